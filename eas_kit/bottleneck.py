"""The bottleneck adapter (Houlsby et al., 2019): n + up(act(down n)), by itself, behind a module or beside one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """x + scale * up(act(down(x))), d -> rank -> d; `up` starts at zero, so a new one returns its input.

    In a slot it goes by the same names as a PIA (`delta`, `route`), and reads nothing of a prompt.
    """

    reads_prompt = False

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] = F.silu,
    ) -> None:
        super().__init__()
        self.hidden_size, self.rank, self.scale, self.activation = hidden_size, rank, scale, activation
        self.down, self.up = nn.Linear(hidden_size, rank), nn.Linear(rank, hidden_size)
        self.drop = nn.Dropout(dropout)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def route(self, x: Tensor) -> None:
        """Nothing depends on more than the token at hand."""

    def delta(self, x: Tensor, route: None = None) -> Tensor:
        """What is added to x (..., d), in the adapter's dtype."""
        return self.scale * self.up(self.drop(self.activation(self.down(x.to(self.down.weight.dtype)))))

    def forward(self, x: Tensor, prompt_mask: Tensor | None = None, *, route: None = None) -> Tensor:
        return x + self.delta(x).to(x.dtype)


class Behind(nn.Sequential):
    """A module, and an adapter that reads what it returns."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module, adapter = self
        out = module(x, *args, **kwargs)
        return (adapter(out[0]), *out[1:]) if isinstance(out, tuple) else adapter(out)


class Parallel(nn.Module):
    """module(x) + adapter.delta(x): an adapter beside a module."""

    def __init__(self, module: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        self.module, self.adapter = module, adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.module(x, *args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        added = first + self.adapter.delta(x).to(first.dtype)
        return (added, *out[1:]) if isinstance(out, tuple) else added


def like(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new` on the device and in the mode of `old`; in float32 or wider, as small steps of an optimiser need it."""
    weight = next(old.parameters())
    return new.to(weight.device, torch.promote_types(weight.dtype, torch.float32)).train(old.training)
