"""Swap sub-modules in and out of a decoder layer, and leave the layer's own forward alone.

A stock layer computes x + Attention(LN1(x)), then x + FFN(LN2(x)). With zeros in the attention's slot and, in the slot
of LN2, a module that returns g2 * PIA(LN1(x)), the same code computes x + FFN(g2 * PIA(LN1(x))): the skipped layer of
the paper, whatever else the model's family does around it. A norm with a bias b2 adds it after the gain; a parallel
layer, x + Attention(n) + FFN(n), has no norm in between, and its feed-forward takes PIA(n) as it is. To skip a layer
whole, what the adapter adds stands in the feed-forward's slot: x + PIA(LN1(x)) - LN1(x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from .bottleneck import Bottleneck
from .errors import ConfigError, MergeError, PromptError
from .pia import PIA, Route, Running
from .prompt import PromptState, find_cache, kept_state, skipped_state
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


# What transformers records on request, with hooks that it puts on modules of the right class, at the first request.
RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")


def install_recorders(model: nn.Module, placed: Iterable[tuple[nn.Module, str]]) -> None:
    """Let transformers find the originals: it would not know the stand-ins by their class, and it looks only once."""
    from transformers.utils import output_capturing

    stand_ins = [(layer, slot, layer._modules[slot]) for layer, slot in placed]
    for layer, slot, stand_in in stand_ins:
        layer._modules[slot] = stand_in.original
    try:
        inside: set[nn.Module] = set()  # what an outer module has reached already
        for module in model.modules():
            if module not in inside and _records(type(module), output_capturing.__name__):
                inside.update(module.modules())
                output_capturing.maybe_install_capturing_hooks(module)
    finally:
        for layer, slot, stand_in in stand_ins:
            layer._modules[slot] = stand_in


def _records(cls: type, decorated_in: str) -> bool:
    """True if the forward of this class collects what the recorders see."""
    function = getattr(cls, "forward", None)
    while function is not None:
        if getattr(function, "__globals__", {}).get("__name__") == decorated_in:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


class NoAttention(StandIn):
    """An attention that adds nothing and keeps nothing in the cache."""

    def __init__(self, original: nn.Module, layer_idx: int) -> None:
        super().__init__(original)
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        skipped_state(find_cache(kwargs), self.layer_idx)  # else the cache would ask this layer for its length
        return torch.zeros_like(hidden_states), None


class NoFeedForward(StandIn):
    """A feed-forward that adds nothing."""

    def __init__(self, original: nn.Module, returns_tuple: bool) -> None:
        super().__init__(original)
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.returns_tuple else nothing


@contextmanager
def skipping(model: nn.Module, mha: Iterable[int] = (), ffn: Iterable[int] = ()) -> Iterator[nn.Module]:
    """Within the block, the attentions `mha` and the feed-forwards `ffn` add nothing; each kind is numbered by itself.

    No adapters take their place. The model is as before when the block ends, also by an exception: the very same
    module objects are back. Raises ConfigError for a site that is not there or is skipped already.
    """
    plain = unwrap(model)
    placed: list[tuple[nn.Module, str]] = []
    try:
        for kind, wanted in (("mha", mha), ("ffn", ffn)):
            sites = find_sites(plain, (kind,))
            for number in dict.fromkeys(int(site) for site in wanted):
                if not 0 <= number < len(sites):
                    raise ConfigError(f"skipping {kind} {number}: the model's are 0 to {len(sites) - 1}")
                site = sites[number]
                layer = plain.get_submodule(site.layer_path)
                original = getattr(layer, site.slot)
                if isinstance(original, StandIn):
                    raise ConfigError(f"{site.path} is skipped already; set net.mask = () or leave the other block")
                if kind == "mha":
                    stand_in = NoAttention(original, site.layer_idx)
                else:
                    stand_in = NoFeedForward(original, site.returns_tuple)
                place(layer, site.slot, stand_in)
                placed.append((layer, site.slot))
        yield model
    finally:
        for layer, slot in reversed(placed):
            restore(layer, slot)


ABSENT = object()  # no forward of the model is running


class Desk:
    """What the slots of one decoder layer pass to each other within one forward."""

    def __init__(self) -> None:
        self.value: Tensor | None = None  # (B, S, d), from the attention's slot to the feed-forward's entrance
        self.prompt: Any = ABSENT  # (B, S) bool at prefill, None at a decoding step
        self.state: PromptState | None = None  # the layer's entry in the KV cache

    def receive(self, kwargs: dict[str, Any]) -> None:
        """Take the prompt off an attention's keywords.

        It comes as a keyword because gradient checkpointing keeps those for the recomputation. A layer that does not
        pass keywords on to its attention has the prompt that its own hook laid down here, in the same forward.
        """
        self.prompt = kwargs.pop("eas_prompt", self.prompt)
        if self.prompt is ABSENT:
            raise PromptError(
                "an attention was called outside of a forward of the whole model, in a layer that passes no keywords"
                " on to it. Gradient checkpointing recomputes so, and this family does not allow it: switch it off"
            )

    def take(self) -> Tensor:
        value, self.value = self.value, None
        return value

    def clear(self) -> None:
        self.value, self.prompt, self.state = None, ABSENT, None

    def route(self, key: str, pia: PIA | Bottleneck, n: Tensor) -> Route | None:
        """The adapter's route: read from the prompt at prefill, looked up in the cache after."""
        if not pia.reads_prompt:
            return pia.route(n)
        if pia.parts == "exchange" and (self.prompt is not None or self._known(key)):
            route, self.state.routes[key] = pia.running(n, self.prompt, self._known(key))
            if self.prompt is not None:
                self.state.length = self.prompt.sum(dim=1)
            return route
        if self.prompt is not None:
            route = pia.route(pia.mean(n, self.prompt))
            self.state.routes[key], self.state.length = route, self.prompt.sum(dim=1)
            return route
        route = self._known(key)
        if route is None:
            raise PromptError(
                "a decoding step with a KV cache that knows no prompt for this adapter: the cache was filled without"
                " the adapters or under another mask; prefill again with a new cache"
            )
        return route

    def _known(self, key: str) -> Route | Running | None:
        return self.state.routes.get(key) if self.state is not None else None


class LowRank:
    """An adapter condensed for the prompts of a batch: n -> gain * (n + U_b D n + b_b) + shift, exact for every row.

    All rows share D (r, d) and up = gain * [U_0, U_1] (d, 2 r); `weights` (B, 1, 2, 1) are their routers' weights, and
    `bias` (B, 1, d) is all that does not depend on n. `merging.condense` makes one.
    """

    def __init__(self, down: Tensor, up: Tensor, weights: Tensor, bias: Tensor, gain: Tensor | None) -> None:
        self.down, self.up, self.weights, self.bias, self.gain = down, up, weights, bias, gain

    def __call__(self, n: Tensor) -> Tensor:
        if len(n) != len(self.weights):
            raise MergeError(
                f"the adapters are condensed for a batch of {len(self.weights)} rows and this forward has {len(n)};"
                " generate with merge=False where rows come and go"
            )
        if n.dtype != self.down.dtype:
            for name, tensor in list(vars(self).items()):
                setattr(self, name, None if tensor is None else tensor.to(n.dtype))
        z = F.linear(n, self.down)  # (B, S, r)
        z = (z.unsqueeze(-2) * self.weights).flatten(-2)  # (B, S, 2 r)
        y = n if self.gain is None else n * self.gain
        return y + F.linear(z, self.up) + self.bias


class SkippedAttention(StandIn):
    """Adds nothing to the residual stream; hands PIA(n) (merged: n itself) to the feed-forward's entrance.

    With source "layer" it is PIA(n) - n, for the exit of a feed-forward that is skipped along.
    """

    def __init__(self, original: nn.Module, layer_idx: int, pia: PIA | Bottleneck, desk: Desk, source: str) -> None:
        super().__init__(original)
        self.layer_idx, self.desk, self.source = layer_idx, desk, source
        self.adapter = (pia,)  # in a tuple: owned by the adapters' container, not by the base model
        self.merged = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        n, desk = hidden_states, self.desk
        state = skipped_state(find_cache(kwargs), self.layer_idx)
        if self.merged:
            desk.value = n
            return torch.zeros_like(n), None
        desk.receive(kwargs)
        desk.state = state
        if self.source != "ffn_norm":
            (pia,) = self.adapter
            route = desk.route("skip", pia, n)
            desk.value = pia.delta(n, route).to(n.dtype) if self.source == "layer" else pia(n, route=route)
        return torch.zeros_like(n), None


class SkippedNorm(StandIn):
    """The norm before the feed-forward of a skipped layer; with source "attention_norm" its input goes unread."""

    def __init__(self, original: nn.Module, offset: float, pia: PIA, desk: Desk, source: str) -> None:
        super().__init__(original)
        self.offset, self.desk, self.source = offset, desk, source
        self.adapter = (pia,)
        self.merged: Callable[[Tensor], Tensor] | None = None  # in place of adapter, gain and bias

    def _own(self, name: str) -> Tensor | None:
        value = self._parameters.get(name)
        if isinstance(value, DTensor):  # sharded, and asked for outside of a forward, which would gather it
            return value.full_tensor()
        if value is None or not value.is_meta:
            return value
        from accelerate.utils import align_module_device

        with align_module_device(self.original):  # what accelerate offloads is in memory inside this block
            return self._parameters[name]

    def gain(self) -> Tensor | None:
        """g2, (d,); None for a norm without weight."""
        weight = self._own("weight")
        return weight if weight is None or self.offset == 0.0 else self.offset + weight.float()

    def shift(self) -> Tensor | None:
        """b2, (d,), which a LayerNorm adds after its gain; None for a norm without bias."""
        return self._own("bias")

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.source == "attention_norm":
            y = self.desk.take()
            if self.merged is not None:
                return self.merged(y)
            gain, shift = self.gain(), self.shift()
            out = y if gain is None else y * gain
            return (out if shift is None else out + shift).to(y.dtype)
        n = self.original(hidden_states)
        if self.merged is not None:
            return self.merged(n)
        (pia,) = self.adapter
        return pia(n, route=self.desk.route("skip", pia, n))


class UnreadNorm(StandIn):
    """The norm before the feed-forward of a layer that is skipped whole: nobody reads it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class LastOfLayer(StandIn):
    """In place of the feed-forward of a layer that is skipped whole: what its adapter adds to the residual stream."""

    def __init__(self, original: nn.Module, desk: Desk, returns_tuple: bool) -> None:
        super().__init__(original)
        self.desk, self.returns_tuple = desk, returns_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        delta = self.desk.take()
        return (delta, None) if self.returns_tuple else delta


class SkippedFeedForward(StandIn):
    """What the adapter adds to its input, in place of a skipped feed-forward."""

    def __init__(self, original: nn.Module, pia: PIA, desk: Desk, returns_tuple: bool) -> None:
        super().__init__(original)
        self.desk, self.adapter, self.returns_tuple = desk, (pia,), returns_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        (pia,) = self.adapter
        delta = pia.delta(hidden_states, self.desk.route("ffn", pia, hidden_states)).to(hidden_states.dtype)
        return (delta, None) if self.returns_tuple else delta


def _with_input(
    args: tuple, kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a forward with the hidden states changed, however they were passed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


class BeforeAttention:
    """Forward pre-hook of a kept attention: takes the prompt off the keywords and adapts the attention's input."""

    def __init__(self, layer_idx: int, pia: PIA | None, desk: Desk) -> None:
        self.layer_idx, self.pia, self.desk = layer_idx, pia, desk

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs, desk, pia = dict(kwargs), self.desk, self.pia
        desk.receive(kwargs)
        desk.state = kept_state(find_cache(kwargs), self.layer_idx)
        if pia is None:  # only here for a skipped feed-forward in the same layer
            return args, kwargs
        return _with_input(args, kwargs, lambda n: pia(n, route=desk.route("keep", pia, n)))


class BeforeFeedForward:
    """Forward pre-hook in a skipped, parallel layer: the feed-forward reads what the attention's slot handed over."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def __call__(self, ffn: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return _with_input(args, kwargs, lambda _: self.desk.take())


class BeforeMerged:
    """Forward pre-hook of whatever reads a condensed adapter and has no slot before it."""

    def __init__(self, low_rank: LowRank) -> None:
        self.low_rank = low_rank

    def __call__(self, reader: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return _with_input(args, kwargs, self.low_rank)
