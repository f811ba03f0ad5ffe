"""Swap sub-modules in and out of a decoder layer, and leave the layer's own forward alone.

A stock layer computes x + Attention(LN1(x)), then x + FFN(LN2(x)). With zeros in the attention's slot and, in the slot
of LN2, a module that returns g2 * PIA(LN1(x)), the same code computes x + FFN(g2 * PIA(LN1(x))): the skipped layer of
the paper, whatever else the model's family does around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .errors import ConfigError, PromptError
from .pia import PIA, Route
from .prompt import PromptState, kept_state, skipped_state
from .sites import find_sites, unwrap


class StandIn(nn.Module):
    """Sits in the slot of `original` and shares its tables of parameters, buffers and children.

    To everyone who looks from outside (state dicts, optimisers, `.to()`, accelerate, parameter counts) the original
    is still there under its own names; only the forward is another one. So nothing is lost when the base model is
    saved, moved or cast while a stand-in is in place.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # past nn.Module's registration: it would add a level to the names
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[table] = original.__dict__[table]
        self.training = original.training


def place(layer: nn.Module, slot: str, stand_in: StandIn) -> None:
    """Put a stand-in where its original is."""
    stand_in.training = stand_in.original.training
    layer._modules[slot] = stand_in


def restore(layer: nn.Module, slot: str) -> None:
    """Put the original back, in the mode (train or eval) that its stand-in was in."""
    stand_in = layer._modules[slot]
    stand_in.original.training = stand_in.training
    layer._modules[slot] = stand_in.original


class NoAttention(StandIn):
    """An attention that adds nothing and keeps nothing in the cache."""

    def __init__(self, original: nn.Module, layer_idx: int) -> None:
        super().__init__(original)
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Cache | None = None, **kwargs: Any) -> Any:
        skipped_state(past_key_values, self.layer_idx)  # else the cache would ask this layer for its length
        return torch.zeros_like(hidden_states), None


class NoFeedForward(StandIn):
    """A feed-forward that adds nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


@contextmanager
def skipping(model: nn.Module, mha: Iterable[int] = (), ffn: Iterable[int] = ()) -> Iterator[nn.Module]:
    """Within the block, the attentions of layers `mha` and the feed-forwards of layers `ffn` add nothing.

    No adapters take their place. The model is as before when the block ends, also by an exception: the very same
    module objects are back. Raises ConfigError for a layer that is not there or is skipped already.
    """
    plain = unwrap(model)
    placed: list[tuple[nn.Module, str]] = []
    try:
        for kind, wanted in (("mha", mha), ("ffn", ffn)):
            sites = find_sites(plain, (kind,))
            for number in dict.fromkeys(int(layer) for layer in wanted):
                if not 0 <= number < len(sites):
                    raise ConfigError(
                        f"skipping {kind} of layer {number}: the model's layers are 0 to {len(sites) - 1}"
                    )
                site = sites[number]
                layer = plain.get_submodule(site.layer_path)
                original = getattr(layer, site.slot)
                if isinstance(original, StandIn):
                    raise ConfigError(f"{site.path} is skipped already; set net.mask = () or leave the other block")
                stand_in = NoAttention(original, site.layer_idx) if kind == "mha" else NoFeedForward(original)
                place(layer, site.slot, stand_in)
                placed.append((layer, site.slot))
        yield model
    finally:
        for layer, slot in reversed(placed):
            restore(layer, slot)


class Desk:
    """What the slots of one decoder layer pass to each other within one forward."""

    def __init__(self) -> None:
        self.value: Tensor | None = None  # (B, S, d), from the attention's slot to the norm's
        self.prompt: Tensor | None = None  # (B, S) bool at prefill, None at a decoding step
        self.state: PromptState | None = None  # the layer's entry in the KV cache

    def take(self) -> Tensor:
        value, self.value = self.value, None
        return value

    def clear(self) -> None:
        self.value = self.prompt = self.state = None

    def route(self, key: str, pia: PIA, n: Tensor) -> Route:
        """The adapter's route: read from the prompt at prefill, looked up in the cache after."""
        if self.prompt is not None:
            route = pia.route(pia.mean(n, self.prompt))
            self.state.routes[key] = route
            return route
        route = self.state.routes.get(key) if self.state is not None else None
        if route is None:
            raise PromptError(
                "a decoding step with a KV cache that knows no prompt for this adapter: the cache was filled without"
                " the adapters or under another mask; prefill again with a new cache"
            )
        return route


class SkippedAttention(StandIn):
    """Adds nothing to the residual stream; hands PIA(n) (merged: n itself) to the norm before the feed-forward."""

    def __init__(self, original: nn.Module, layer_idx: int, pia: PIA, desk: Desk, source: str) -> None:
        super().__init__(original)
        self.layer_idx, self.desk, self.source = layer_idx, desk, source
        self.adapter = (pia,)  # in a tuple: owned by the adapters' container, not by the base model
        self.merged = False

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        past_key_values: Cache | None = None,
        eas_prompt: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        n, desk = hidden_states, self.desk
        if self.merged:
            desk.value = n
            return torch.zeros_like(n), None
        desk.prompt, desk.state = eas_prompt, skipped_state(past_key_values, self.layer_idx)
        if self.source == "attention_norm":
            (pia,) = self.adapter
            desk.value = pia(n, route=desk.route("skip", pia, n))
        return torch.zeros_like(n), None


class SkippedNorm(StandIn):
    """The norm before the feed-forward of a skipped layer; with source "attention_norm" its input goes unread."""

    def __init__(self, original: nn.Module, offset: float, pia: PIA, desk: Desk, source: str) -> None:
        super().__init__(original)
        self.offset, self.desk, self.source = offset, desk, source
        self.adapter = (pia,)
        self.merged = False

    def gain(self) -> Tensor:
        """g2, (d,)."""
        return self.weight if self.offset == 0.0 else self.offset + self.weight.float()

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.source == "attention_norm":
            y = self.desk.take()
            return y if self.merged else (y * self.gain()).to(y.dtype)
        n = self.original(hidden_states)
        if self.merged:
            return n
        (pia,) = self.adapter
        return pia(n, route=self.desk.route("skip", pia, n))


class SkippedFeedForward(StandIn):
    """What the adapter adds to its input, in place of a skipped feed-forward."""

    def __init__(self, original: nn.Module, pia: PIA, desk: Desk) -> None:
        super().__init__(original)
        self.desk, self.adapter = desk, (pia,)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (pia,) = self.adapter
        return pia.delta(hidden_states, self.desk.route("ffn", pia, hidden_states)).to(hidden_states.dtype)


class BeforeAttention:
    """Forward pre-hook of a kept attention: takes the prompt off the keywords and adapts the attention's input."""

    def __init__(self, layer_idx: int, pia: PIA | None, desk: Desk) -> None:
        self.layer_idx, self.pia, self.desk = layer_idx, pia, desk

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        desk = self.desk
        desk.prompt = kwargs.pop("eas_prompt", None)
        desk.state = kept_state(kwargs.get("past_key_values"), self.layer_idx)
        if self.pia is None:  # only here for a skipped feed-forward in the same layer
            return args, kwargs
        n = args[0] if args else kwargs["hidden_states"]
        y = self.pia(n, route=desk.route("keep", self.pia, n))
        if args:
            args = (y, *args[1:])
        else:
            kwargs["hidden_states"] = y
        return args, kwargs
