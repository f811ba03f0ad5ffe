"""How much memory a computation holds at once, read off its tensors; works on the meta device, where none is used."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

FUSED = "eas_kit_fused"  # the name of `fused_attention` among transformers' attention functions


class LiveBytes(TorchDispatchMode):
    """Within the block, counts the bytes of tensors that were made there and are still held by someone.

    `peak` is the most at any moment, `live` what is held now. Tensors that share memory count once; `known` are those
    from before, views of which are not new. What a kernel takes for itself and gives back at once is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size


class _Fused(torch.autograd.Function):
    """Shapes of an attention kernel that never holds its scores: keeps q, k, v, its output and one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        row = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, row)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Stands in for the fused kernels (sdpa, flash) on the meta device, where torch has only the unfused form.

    q (B, H, S, d_h), k and v (B, H_kv, T, d_h); empty output (B, S, H, d_h). Keys and values of grouped heads are
    repeated first, as transformers does where there is a mask.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return _Fused.apply(query, key, value).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make `fused_attention` known to transformers; its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(FUSED, fused_attention)
    return FUSED
