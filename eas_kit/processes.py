"""What the training loop needs from its surroundings: the order of the examples, accelerate, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .errors import ConfigError
from .sharding import unknown_to_accelerate


class Order:
    """An endless order of examples: each epoch another shuffle, which depends on (seed, purpose, epoch) only."""

    def __init__(self, count: int, seed: int, purpose: int = 0):
        self.count, self.seed, self.purpose = count, seed, purpose
        self._epochs: dict[int, np.ndarray] = {}

    def take(self, start: int, size: int) -> list[int]:
        """Indices of the examples at positions start, ..., start + size - 1."""
        return [int(self._epoch(at // self.count)[at % self.count]) for at in range(start, start + size)]

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            if len(self._epochs) > 2:
                self._epochs.clear()
            self._epochs[epoch] = np.random.default_rng([self.seed, self.purpose, epoch]).permutation(self.count)
        return self._epochs[epoch]


def world_size() -> int:
    """Processes that work together: 1 before a group exists and where no launcher announced one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_accelerator(mixed_precision: str, net: nn.Module):
    """An Accelerator that leaves a single process's model where it is, and the sharding of FSDP to sharding.py."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, PartialState

    alone = world_size() == 1
    if alone:
        on_cpu = next(net.parameters()).device.type == "cpu"
    else:  # without a device that has a way to talk, accelerate would take each process for a run of its own
        found = torch.accelerator.current_accelerator(check_available=True)
        on_cpu = found is None or found.type == "mps"
    # accelerate keeps its settings for the life of the process; a second run with others would be refused.
    shared = AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") != mixed_precision:
        AcceleratorState._reset_state()
    if alone and PartialState._shared_state and (PartialState().device.type == "cpu") != on_cpu:
        AcceleratorState._reset_state(reset_partial_state=True)
    with unknown_to_accelerate():
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=on_cpu,
            device_placement=not alone,
            # Another mask is another graph: the adapters that a step does not use get no gradient in it.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
        )
    kind = accelerator.distributed_type.value
    if kind == "FSDP":
        raise ConfigError(
            "an Accelerator with FSDP exists in this process already, and fit and search shard in a way of their own"
            " (frozen weights alone): call them before, or without, an Accelerator of yours"
        )
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise ConfigError(
            f"accelerate is set up for {kind}, which would put the adapters into shards too; launch with --multi_gpu,"
            " which wants a whole copy of the model in every process, or with --use_fsdp --fsdp_version 2, which shards"
            " the frozen weights"
        )
    return accelerator


# transformers 5.23 renames gradient checkpointing to activation checkpointing and warns about the old name.


def recomputing(net: nn.Module) -> bool:
    """Whether the model recomputes activations in the backward pass."""
    value = getattr(net, "is_activation_checkpointing", None)
    return bool(getattr(net, "is_gradient_checkpointing", False) if value is None else value)


def recompute(net: nn.Module, on: bool) -> None:
    """Turns the recomputing of activations on or off."""
    name = "activation" if hasattr(net, "activation_checkpointing_enable") else "gradient"
    if not on:
        getattr(net, f"{name}_checkpointing_disable")()
        return
    # Not reentrant: with a frozen base, the first layer's input requires no gradient.
    getattr(net, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})


class StopOnInterrupt:
    """While entered, the first Ctrl-C calls `stop` (end after the present step), the second interrupts at once."""

    def __init__(self, stop: Callable[[], None]):
        self.stop, self.asked = stop, False

    def __enter__(self) -> None:
        self.installed = threading.current_thread() is threading.main_thread()  # signals belong to the main thread
        if self.installed:
            self.before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.stop()

    def __exit__(self, *exc) -> None:
        if self.installed:
            # None: a handler that was not set from Python. SIG_DFL is 0, and must come back as it is.
            signal.signal(signal.SIGINT, signal.default_int_handler if self.before is None else self.before)
