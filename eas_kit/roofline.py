"""The roofline of decoding: a step cannot take less time than reading, once, what it must read.

At small batches decoding is bound by memory: every weight is read for one multiplication with it. So the bytes that a
step reads over the speed at which this machine reads give a time that no implementation passes, and the share of it
that is reached says whether a slow arm reads too much or wastes what it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .modes import eval_mode
from .prompt import find_cache
from .sites import unwrap
from .timing import now

# ops that read only the rows asked for
LOOKUPS = ("embedding", "index_select", "index", "gather")


def bandwidth(device: Any = "cpu", dtype: torch.dtype = torch.float32, mebibytes: int | None = None) -> float:
    """Bytes per second at which `device` reads memory: the best of several reads of one large tensor.

    Read as a sum, a maximum and a product with a vector, since no single kernel is the fastest everywhere.
    `mebibytes`: size of the tensor, by default 512 on a CPU and 4096 elsewhere, far beyond any cache.
    """
    device = torch.device(device)
    mebibytes = mebibytes or (512 if device.type == "cpu" else 4096)
    columns = 4096
    tensor = torch.ones(mebibytes * 2**20 // dtype.itemsize // columns, columns, dtype=dtype, device=device)
    vector = torch.ones(columns, dtype=dtype, device=device)
    seconds = []
    for read in (tensor.sum, tensor.amax, lambda: tensor @ vector):
        for _ in range(5):
            start = now(device)
            read()
            seconds.append(now(device) - start)
    return tensor.nbytes / min(seconds)


@torch.no_grad()
def decode_bytes(model: nn.Module, inputs: Mapping[str, torch.Tensor], **generate: Any) -> dict[str, int]:
    """What one step of `model.generate(**inputs, **generate)` after the prompt reads, in bytes.

    weights: every floating-point tensor that was there before the step and is no key or value: parameters (of an
    embedding the rows looked up), adapters, folded weights, each counted once. cache_per_position: keys and values of
    one position, all rows and layers together; multiply by the positions that are attended to. Seen by watching the
    operations of a step, not computed from a configuration; eager, so give no compile options.
    """
    from transformers import StoppingCriteriaList

    reads, caches = _Reads(), []
    decoder = unwrap(model).get_decoder()
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(find_cache(kwargs)), with_kwargs=True
    )

    def between(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        # after the first token the step to watch begins, after the second it is over
        reads.watching = not reads.watching
        reads.apart = {_storage(t) for entry in caches[-1].layers for t in _keys_and_values(entry)}
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False} | generate
    try:
        with eval_mode(model), reads:
            model.generate(**inputs, **settings, stopping_criteria=StoppingCriteriaList([between]))
    finally:
        handle.remove()
    entries = [_keys_and_values(entry) for entry in caches[-1].layers]
    return {
        "weights": reads.total(),
        "cache_per_position": sum(t.nbytes // t.shape[-2] for pair in entries for t in pair),
    }


def _keys_and_values(entry: Any) -> list[torch.Tensor]:
    """Of one layer's entry in the KV cache; none of a layer without attention."""
    found = [getattr(entry, name, None) for name in ("keys", "values")]
    return [t for t in found if torch.is_tensor(t) and t.dim() == 4]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Reads(TorchDispatchMode):
    """While `watching`: which parts of which tensors are read that the watched operations did not make themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.watching, self.apart, self.made = False, set(), set()
        self.parts: dict[int, dict[Any, int]] = {}  # storage -> part of it -> bytes
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.watching and not func.is_view:
            results = [t for t in tree_leaves(out) if torch.is_tensor(t)]
            for tensor in tree_leaves((args, kwargs)):
                if torch.is_tensor(tensor) and tensor.is_floating_point():
                    self._note(tensor, func, results)
            self.made.update(_storage(t) for t in results)
        return out

    def _note(self, tensor: torch.Tensor, func: Any, results: list[torch.Tensor]) -> None:
        where = _storage(tensor)
        if where in self.made or where in self.apart:
            return
        rows = func.overloadpacket.__name__ in LOOKUPS
        size = sum(t.nbytes for t in results) if rows else tensor.nbytes
        self.sizes[where] = tensor.untyped_storage().nbytes()
        self.parts.setdefault(where, {})[tensor.storage_offset(), tensor.numel(), rows] = size

    def total(self) -> int:
        # a tensor read in parts and again as a whole is still read once
        return sum(min(sum(parts.values()), self.sizes[where]) for where, parts in self.parts.items())
