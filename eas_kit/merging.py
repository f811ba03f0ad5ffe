"""Fold the adapters away for given prompts, exactly (eq. 8-13). `proof.py` shows that it is exact.

After prefill an adapter is an affine map y = n + U D n + b of the input n of some linears W. With the gain g and the
bias h of the norm in between, W (g * y + h) + c = W' n + c' with

    W' = W diag(g) + (W diag(g) U) D          a rank-r update, never a d x d product
    c' = W diag(g) b + W h + c                with the ORIGINAL W, not W'

The W are gate and up of a skipped layer's feed-forward, and q, k, v of a kept attention. Two exact forms:

- *per prompt*: W' and c' take the place of W and c. For one prompt. A skipped layer then reads no attention weight and
  no adapter, keeps no keys and values, and costs its feed-forward alone.
- *low rank*: the linears stay, and y is computed as n + [U_0, U_1] (w_b x (D n)) + b_b, with all that depends on the
  prompt in w_b and b_b. For a batch of different prompts, each row exact, and for linears that cannot be rewritten.
  Carrying the factors on through W, as W n + (W U_b) D n, is the same function; it costs 2 r d_ff a linear where this
  costs 2 r d for all of them. It was slower than this form in every case measured, and than the unmerged adapter in
  most (benchmarks/fold.py).

The third, approximate form, for all prompts at once, is `static.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import MergeError, UnsupportedModelError
from .families import ATTENTION_READERS, FFN_READERS, matrix, readers
from .pia import PIA, Factors, Route, no_autocast
from .prompt import has_route
from .sites import LEAVE_NO_LINEAR
from .slots import LowRank, StandIn, place, restore

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .model import EASModel
    from .seats import Seat

FORMS = ("per_prompt", "low_rank")


class MergedLinear(StandIn):
    """A linear that computes with folded weights while its own stay where they are, registered and untouched.

    The folded tensors are allocated once and written anew for each prompt: a compiled decoding step and a CUDA graph
    go on reading the same addresses.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        weight = matrix(original)
        with torch.inference_mode(False):  # or they could not be written to outside of it
            # in a tuple: no parameter of the model
            self.folded = (torch.empty_like(weight, requires_grad=False).contiguous(), weight.new_empty(len(weight)))
        if weight.is_cuda:
            for tensor in self.folded:  # else a CUDA graph copies them at every step
                torch._dynamo.mark_static_address(tensor)

    def write(self, weight: Tensor, bias: Tensor) -> None:
        for own, new in zip(self.folded, (weight, bias), strict=True):
            own.copy_(new)

    def fits(self, linear: nn.Module) -> bool:
        """True if this is a stand-in for `linear` as it is now: not moved, not cast, not replaced."""
        weight, own = matrix(linear), self.folded[0]
        return self.original is linear and (own.shape, own.dtype, own.device) == (
            weight.shape,
            weight.dtype,
            weight.device,
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.folded)


@torch.no_grad()
def fold_linear(
    linear: nn.Module, factors: Factors, gain: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(W', c') of a linear that reads gain * y + shift, for the first example of `factors`; in the linear's dtype.

    Calculated in at least float32 at a cost of O(d_out d r).
    """
    wide = torch.promote_types(linear.weight.dtype, torch.float32)
    up, down, bias = factors.up[0].to(wide), factors.down.to(wide), factors.bias[0].to(wide)
    if gain is not None:
        gain = gain.to(wide)
        up, bias = gain[:, None] * up, gain * bias
    if shift is not None:
        bias = bias + shift.to(wide)
    weight = matrix(linear).to(wide, copy=True)
    with no_autocast(weight.device):
        # one pass over the weight, the original one, for both of them: W diag(g) U and W (g b + h)
        projected = weight @ torch.cat([up, bias[:, None]], dim=1)
        if gain is not None:
            weight *= gain
        torch.addmm(weight, projected[:, :-1], down, out=weight)  # in place; torch's flop counter does not see addmm_
    folded_bias = projected[:, -1] if linear.bias is None else projected[:, -1] + linear.bias.to(wide)
    return weight.to(linear.weight.dtype), folded_bias.to(linear.weight.dtype)


def condense(
    pia: PIA, route: Route, gain: Tensor | None = None, shift: Tensor | None = None, dtype: torch.dtype | None = None
) -> LowRank:
    """gain * PIA(n) + shift as n -> gain * (n + U_b D n + b_b) + shift for the prompts of `route`, one a row."""
    up, down, weights, bias = pia.shared_factors(route)
    if gain is not None:
        gain = gain.to(up.dtype)
        up, bias = gain[:, None] * up, gain * bias
    if shift is not None:
        bias = bias + shift.to(bias.dtype)
    weights, bias = weights[:, None, :, None], bias[:, None]
    tensors = (None if t is None else t.to(dtype or up.dtype) for t in (down, up, weights, bias, gain))
    return LowRank(*tensors)


@dataclass(frozen=True)
class Target:
    """What takes in one layer's adapter: linears, and what stands between it and them."""

    parent: nn.Module
    table: Any
    gain: Tensor | None
    shift: Tensor | None
    where: str

    def linears(self) -> tuple[str, ...]:
        """Names of the linears, if they can be rewritten; else MergeError naming the one that cannot."""
        try:
            return readers(self.parent, self.table)
        except UnsupportedModelError as error:
            raise MergeError(f"cannot merge {self.where}: {error}") from error


def merge_target(net: EASModel, seat: Seat) -> Target:
    """What takes in this layer's adapter."""
    site = seat.site
    names, gain, shift = site.names, None, None
    if seat.role == "skip":
        parent, table = getattr(seat.layer, names.ffn), FFN_READERS
        if names.norm_ffn and net.config.source == "attention_norm":
            norm = getattr(seat.layer, names.norm_ffn)
            gain, shift = norm.gain(), norm.shift()
    else:
        parent, table = getattr(seat.layer, names.attention), ATTENTION_READERS
    return Target(parent, table, gain, shift, f"site {site.index} ({site.layer_path})")


def check_foldable(net: EASModel) -> None:
    """MergeError naming the first site whose adapter cannot be folded into linears."""
    check_attentions_only(net)
    for seat in net._seats:
        if seat.role:
            merge_target(net, seat).linears()


def check_attentions_only(net: EASModel) -> None:
    """MergeError if the mask holds anything but attentions, or if the adapters are no affine maps."""
    config = net.config
    if config.adapter != "pia" or config.parts != "frozen":
        name, value = ("parts", config.parts) if config.adapter == "pia" else ("adapter", config.adapter)
        raise MergeError(
            f"cannot merge: with EASConfig({name}={value!r}) an adapter is no affine map of its input, not even"
            ' after the prompt; run unmerged, or attach with adapter="pia" and parts="frozen"'
        )
    for site in net.sites:
        if site.kind in LEAVE_NO_LINEAR and site.index in net.mask:
            raise MergeError(
                f"cannot merge: site {site.index} ({site.path}) is a skipped {LEAVE_NO_LINEAR[site.kind]}, which leaves"
                " no linear to fold its adapter into; mask attentions only, or run unmerged"
            )


def routes_of(net: EASModel, cache: Cache) -> dict[int, Route]:
    """What the adapters at work keep of the cache's prompts, by layer_idx. MergeError where one has read none."""
    routes = {}
    for seat in net._seats:
        if seat.role is None:
            continue
        if not has_route(cache, seat.layer_idx) or seat.role not in cache.layers[seat.layer_idx].routes:
            raise MergeError(
                f"cannot merge: the cache knows no prompt for site {seat.site.index}; prefill with this net and"
                " mask first (net.prefill(**inputs).past_key_values)"
            )
        routes[seat.layer_idx] = cache.layers[seat.layer_idx].routes[seat.role]
    return routes


def default_form(prompts: int) -> str:
    """How to merge when nobody says: one prompt goes into the weights, several are condensed."""
    return "per_prompt" if prompts == 1 else "low_rank"


def one_prompt(routes: Mapping[int, Route]) -> bool:
    """True if all rows (beams, samples) share one prompt."""
    return all(
        torch.allclose(tensor, tensor[:1].expand_as(tensor), atol=1e-4, rtol=1e-4)
        for route in routes.values()
        for tensor in (route.mean, route.weights)
    )


class Merge:
    """The adapters of `routes` folded or condensed, in place. `undo` puts the very same modules back.

    `cache`: the KV cache that the routes belong to, the only one that may be used meanwhile; None if they hold for all.
    """

    @torch.no_grad()
    def __init__(self, net: EASModel, routes: Mapping[int, Route], form: str, cache: Cache | None = None) -> None:
        check_attentions_only(net)
        self.cache, self.form = cache, form
        self.seats = [seat for seat in net._seats if seat.role]
        self.placed: list[tuple[nn.Module, str]] = []
        self.first = self.seats[0].layer_idx if self.seats else None
        linears: list[tuple[nn.Module, str, MergedLinear]] = []
        condensed: list[LowRank | None] = []
        for seat in self.seats:  # everything is calculated, and may fail, before anything is swapped
            target, route = merge_target(net, seat), routes[seat.layer_idx]
            if form == "low_rank":
                norm = getattr(getattr(seat.layer, seat.names.norm_in), "weight", None)
                dtype = (
                    None if norm is None else norm.dtype
                )  # what n comes in, or LowRank turns to it at its first call
                condensed.append(condense(seat.pia, route, target.gain, target.shift, dtype))
            else:
                linears += self._fold(net, seat, target, route)
                condensed.append(None)
        try:
            for parent, name, linear in linears:
                self.placed.append((parent, name))
                place(parent, name, linear)
            for seat, low_rank in zip(self.seats, condensed, strict=True):
                seat.merge(low_rank)
        except BaseException:  # an interrupt: nobody else knows yet what to undo
            self.undo()
            raise

    def _fold(self, net: EASModel, seat: Seat, target: Target, route: Route) -> list[tuple]:
        factors = seat.pia.factors(route.map(lambda t: t[:1]))
        planned = []
        for name in target.linears():
            original = getattr(target.parent, name)
            linear = net._folded.get((seat.layer_idx, name))
            if linear is None or not linear.fits(original):
                linear = net._folded[seat.layer_idx, name] = MergedLinear(original)
            linear.write(*fold_linear(original, factors, target.gain, target.shift))
            planned.append((target.parent, name, linear))
        return planned

    def check(self, cache: Cache | None) -> None:
        """MergeError unless a forward uses the cache whose prompt is folded in; if that is none, one of no prompt."""
        if self.cache is None:
            if cache is not None and any(has_route(cache, seat.layer_idx) for seat in self.seats):
                raise MergeError(
                    "the weights are merged for all prompts, and this KV cache was filled by the unmerged net, whose"
                    " adapters read its own prompt; prefill again inside of this block, with a new cache"
                )
            return
        if cache is not self.cache or (self.first is not None and not has_route(cache, self.first)):
            raise MergeError(
                "the weights are merged for one prompt and its KV cache, and this forward is for another (or for none);"
                " leave the merged block first, then prefill the new prompt"
            )

    def undo(self) -> None:
        for seat in self.seats:
            seat.unmerge()
        for parent, name in reversed(self.placed):
            if isinstance(getattr(parent, name), MergedLinear):  # not if interrupted just before it was placed
                restore(parent, name)
        self.placed.clear()


@contextmanager
def merged(net: EASModel, cache: Cache, form: str | None = None) -> Iterator[EASModel]:
    """Within the block, decoding on `cache` runs without adapters, folded or condensed for its prompts.

    `cache` comes from a prefill: `net.prefill(**inputs).past_key_values`. `form`: "per_prompt", "low_rank", or None for
    the first if the cache holds one prompt, the second if it holds several. Only steps that continue this very cache
    are allowed; anything else raises MergeError, as do linears that cannot be rewritten. Afterwards the model is as
    before, bit for bit.
    """
    net._start_merge(cache, form)
    try:
        yield net
    finally:
        net._end_merge()
