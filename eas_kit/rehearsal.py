"""Does a layer do what its parts' names promise? Its own forward is run once on stubs, and watched.

Names alone can mislead: layers with norms behind their parts, or that take the residual stream behind the norm, use the
same names as those that eas_kit can skip. So before a layer becomes a site, its forward runs with an attention and a
feed-forward that add nothing. What comes out must be what went in, and each part must read its norm. No weight is
touched: the model may be on the meta device, offloaded, sharded or quantised.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .families import Names


class _Stub(nn.Module):
    def __init__(self, play: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.play = play

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.play(args[0] if args else kwargs["hidden_states"])


@torch.no_grad()
def rehearse(layer: nn.Module, names: Names, width: int) -> bool:
    """True if the layer takes a tuple from its feed-forward, False if it takes a tensor.

    Raises UnsupportedModelError if layer(x) without its attention is not x + FFN(norm(x)), up to the family's own tail.
    """
    return _rehearsed(layer, names, width)[0]


@torch.no_grad()
def leaves_tuple(layer: nn.Module, names: Names, width: int) -> bool:
    """True if the layer itself returns a tuple, False if a tensor. Raises as `rehearse`."""
    return _rehearsed(layer, names, width)[1]


def _rehearsed(layer: nn.Module, names: Names, width: int) -> tuple[bool, bool]:
    """Whether the layer takes a tuple from its feed-forward, and whether it returns one."""
    reasons = []
    for as_tuple in (False, True):
        try:
            return as_tuple, _rehearse(layer, names, width, as_tuple)
        except UnsupportedModelError as error:
            reasons.append(error)
        except Exception as error:  # whatever a forward may do with parts that it did not expect
            reasons.append(f"{type(error).__name__}: {error}")
    known = next((reason for reason in reasons if isinstance(reason, UnsupportedModelError)), reasons[0])
    raise UnsupportedModelError(
        f"{type(layer).__name__} has parts with names that eas_kit knows, but does not put them together as x +"
        f" Attention(norm(x)), then x + FFN(norm(x)): with an attention that adds nothing, {known}. Such a layer cannot"
        " be skipped exactly"
    )


def _rehearse(layer: nn.Module, names: Names, width: int, as_tuple: bool) -> bool:
    x, n, m = (torch.sin(torch.arange(3.0 * width, device="cpu") * k).view(1, 3, width) for k in (1.0, 2.0, 3.0))
    entrance = m if names.norm_ffn else n  # what the feed-forward must read
    seen: dict[str, Tensor] = {}

    def attention(read: Tensor) -> Any:
        seen["attention"] = read
        return torch.zeros_like(read), None

    def feed_forward(read: Tensor) -> Any:
        seen["feed-forward"] = read
        return (torch.zeros_like(read), None) if as_tuple else torch.zeros_like(read)

    parts = {names.norm_in: lambda _: n, names.attention: attention, names.ffn: feed_forward}
    if names.norm_ffn:
        parts[names.norm_ffn] = lambda _: m
    parts |= {name: lambda read: read for name in names.tail}
    # a double with tables of its own; not copy.copy, which FSDP2's classes do not stand
    actor = object.__new__(type(layer))
    actor.__dict__.update(layer.__dict__)
    actor.__dict__["_modules"] = dict(layer._modules) | {name: _Stub(play) for name, play in parts.items()}
    actor.__dict__["_buffers"] = {name: torch.ones(b.shape) for name, b in layer._buffers.items() if b is not None}
    actor.__dict__["training"] = False
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    missing = {
        p.name: None for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    out = type(layer).forward(actor, x, **missing)
    in_tuple = isinstance(out, tuple | list)
    out = out[0] if in_tuple else out
    for part, wanted in (("attention", n), ("feed-forward", entrance)):
        if part not in seen:
            raise UnsupportedModelError(f"the {part} was not called")
        if seen[part].numel() != wanted.numel() or not torch.equal(seen[part].reshape_as(wanted), wanted):
            raise UnsupportedModelError(f"the {part} did not read the norm before it")
    factor = (out * x).sum() / (x * x).sum()  # some families scale what leaves a layer
    if out.shape != x.shape or factor <= 0 or not torch.allclose(out, factor * x, atol=1e-5):
        raise UnsupportedModelError("what left the layer was not what had entered it")
    return in_tuple
