"""FSDP for the training loop: the frozen weights of the layers in shards, what trains whole in every process.

accelerate's own FSDP2 wants model and optimiser in one `prepare`, puts every weight into shards, and on CPU is plain
DDP (accelerate 1.15: its AcceleratorState looks at ACCELERATE_USE_FSDP for accelerators alone). An EASModel trains
under one per cent of its weights and uses other adapters at every step. So accelerate launches, casts and talks between
the processes, and torch's `fully_shard` holds the layers' frozen weights: each process a part, gathered layer by layer.
Adapters stay plain tensors, whole in every process, and their checkpoints and files are those of a single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from .errors import ConfigError, UnsupportedModelError
from .sites import decoder_layers, unwrap

ASKED = "ACCELERATE_USE_FSDP"


def sharding_is_asked_for() -> bool:
    """Whether `accelerate launch --use_fsdp` (or its configuration) started this process. Raises ConfigError for
    settings of FSDP that the loop does not have."""
    from accelerate.utils import parse_flag_from_env

    if not parse_flag_from_env(ASKED):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "accelerate is set up for FSDP 1, which flattens frozen and trained weights into one; fit and search shard"
            " with FSDP 2: accelerate launch --use_fsdp --fsdp_version 2"
        )
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError(
            "fsdp_offload_params keeps the shards in CPU memory, which fit and search were never tried with; leave it"
            " out, or use more processes"
        )
    if parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "fsdp_activation_checkpointing wraps the layers in modules that adapters do not know; set"
            " gradient_checkpointing=True in TrainConfig and SearchConfig instead, which does the same"
        )
    return True


@contextmanager
def unknown_to_accelerate() -> Iterator[None]:
    """In the block accelerate does not see that FSDP was asked for: it sets up several processes, no sharding."""
    value = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[ASKED] = value


def is_sharded(net: nn.Module) -> bool:
    """Whether `shard` was here."""
    return isinstance(unwrap(net), FSDPModule)


def shard(net: nn.Module, device: torch.device) -> None:
    """Divides the frozen weights of the decoder's layers among all processes, in place and for good.

    Each layer is a group of its own, gathered when it runs. What trains stays whole, and so do embeddings, head and
    vision tower, which also run outside of the model's forward, or, where a batch has no picture, not at all. A second
    call does nothing. Raises ConfigError where the layers hold no frozen weight, as there is then nothing to divide.
    """
    if is_sharded(net):
        return
    base, layers = unwrap(net), _layers(net)
    frozen = [p for layer in layers for p in layer.parameters() if not p.requires_grad]
    shared = {p for p in frozen if p.is_floating_point()}  # weights of 4 bits lie packed in bytes
    if not shared:
        raise ConfigError(
            f"accelerate is set up for FSDP, and the layers of this {type(base).__name__} have no frozen weights; fit"
            " shards those and keeps what trains whole in every process, so there is nothing to shard: launch with"
            " --multi_gpu, or tune adapters (eas_kit.attach, eas_kit.baselines.lora)"
        )
    whole = [p for p in net.parameters() if p not in shared]  # in an order, the same in all processes
    with torch.no_grad():
        for parameter in whole:  # fully_shard leaves ignored ones where they are, and as they are
            parameter.data = parameter.data.to(device)
            if parameter.requires_grad:
                torch.distributed.broadcast(parameter.data, 0)
    settings = {
        "mesh": torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false",
        "ignored_params": set(whole),
    }
    for layer in layers:
        fully_shard(layer, **settings)
    fully_shard(base, **settings)
    base._is_fsdp_managed_module = True  # transformers' generate then goes on until every process is done
    if hasattr(base, "get_base_model"):  # peft's wrapper, whose generate goes past its own forward
        register_fsdp_forward_method(base, "generate")


def _layers(net: nn.Module) -> list[nn.Module]:
    """The decoder's layers, those without sites too. Every batch runs through all of them, in every process."""
    base = unwrap(net)
    if hasattr(net, "sites"):
        lists = dict.fromkeys(site.layer_path.rpartition(".")[0] for site in net.sites)
        return [layer for path in lists for layer in base.get_submodule(path)]
    try:
        return list(decoder_layers(base)[1])
    except UnsupportedModelError:
        return []


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], accelerator) -> None:
    """The mean of all processes' gradients in place of each one's, as DDP makes it.

    A parameter that no process used keeps no gradient, so that the optimiser leaves it alone; one that some did not
    use counts as zero there.
    """
    parameters = list(parameters)
    device = parameters[0].device
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
    used = (accelerator.reduce(used, "sum") > 0).tolist()
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter, is_used in zip(parameters, used, strict=True):
        if is_used:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        whole = [p.grad if p.grad is not None else torch.zeros_like(p) for p in group]
        mean = accelerator.reduce(torch.cat([grad.flatten() for grad in whole]), "mean")
        for parameter, part in zip(group, mean.split([p.numel() for p in group]), strict=True):
            parameter.grad = part.view_as(parameter)
