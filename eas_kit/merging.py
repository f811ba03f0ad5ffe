"""Per-prompt merge: fold the adapters into the weights for one prompt (eq. 8-13), exactly, and prove it.

After prefill an adapter is an affine map y = n + U D n + b of the input n of some linears W. With the gain g of the
norm in between, W (g * y) + c = W' n + c' with

    W' = W diag(g) + (W diag(g) U) D          a rank-r update, never a d x d product
    c' = W diag(g) b + c                      with the ORIGINAL W, not W'

The W are gate and up of a skipped layer's feed-forward, and q, k, v of a kept attention. A merged, skipped layer reads
no attention weight and no adapter, keeps no keys and values, and costs its feed-forward alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import MergeError, UnsupportedModelError
from .modes import eval_mode
from .pia import Factors, Route
from .prompt import has_route
from .sites import ATTENTION_READERS, FFN_READERS, readers
from .slots import StandIn, place, restore

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .model import EASModel
    from .seats import Seat

# how far merged logits may be off, as a share of the logits' scale: rounding of W' in that dtype
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class MergedLinear(StandIn):
    """A linear that computes with folded weights while its own stay where they are, registered and untouched."""

    def __init__(self, original: nn.Linear, weight: Tensor, bias: Tensor) -> None:
        super().__init__(original)
        self.folded = (weight, bias)  # in a tuple: no parameter of the model

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.folded)


def fold_linear(linear: nn.Linear, factors: Factors, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(W', c') of a linear that reads gain * y, for the first example of `factors`; in the linear's dtype.

    Calculated in at least float32 at a cost of O(d_out d r).
    """
    wide = torch.promote_types(linear.weight.dtype, torch.float32)
    up, down, bias = factors.up[0].to(wide), factors.down.to(wide), factors.bias[0].to(wide)
    weight = linear.weight.to(wide)
    if gain is not None:
        weight = weight * gain.to(wide)
    folded_bias = weight @ bias  # with the weight before its update, see above
    if linear.bias is not None:
        folded_bias = folded_bias + linear.bias.to(wide)
    folded = weight + (weight @ up) @ down
    return folded.to(linear.weight.dtype), folded_bias.to(linear.weight.dtype)


def _one_prompt(route: Route) -> Route:
    """The route of the one prompt that all rows (beams, samples) share."""
    for tensor in (route.mean, route.weights):
        if not torch.allclose(tensor, tensor[:1].expand_as(tensor), atol=1e-4, rtol=1e-4):
            raise MergeError(
                f"the cache holds {len(tensor)} different prompts; a merge is for one:"
                " run them one by one, or unmerged in one batch"
            )
    return route.map(lambda t: t[:1])


def merge_targets(net: EASModel, seat: Seat) -> tuple[nn.Module, tuple[str, ...], Tensor | None]:
    """The module whose linears take in this layer's adapter, the linears' names, and the gain in between if any."""
    site = seat.sites["mha"]
    names, gain = site.names, None
    if seat.role == "skip":
        parent, table = getattr(seat.layer, names.ffn), FFN_READERS
        if net.config.source == "attention_norm":
            gain = getattr(seat.layer, names.norm_ffn).gain()
    else:
        parent, table = getattr(seat.layer, names.attention), ATTENTION_READERS
    try:
        return parent, readers(parent, table), gain
    except UnsupportedModelError as error:
        raise MergeError(f"cannot merge site {site.index} ({site.layer_path}): {error}") from error


class Merge:
    """Folded weights in place, for the prompt that `cache` has read. `undo` puts the very same modules back."""

    @torch.no_grad()
    def __init__(self, net: EASModel, cache: Cache) -> None:
        self.cache, self.placed, self.first = cache, [], None
        planned: list[tuple[nn.Module, str, MergedLinear]] = []
        for seat in net._seats:  # everything is calculated, and may fail, before anything is swapped
            planned += self._plan(net, seat)
        self.skipped = [
            getattr(seat.layer, slot) for seat in net._seats if seat.role for slot in seat.placed
        ]  # SkippedAttention and SkippedNorm
        for parent, name, linear in planned:
            place(parent, name, linear)
            self.placed.append((parent, name))
        for stand_in in self.skipped:
            stand_in.merged = True

    def _plan(self, net: EASModel, seat: Seat) -> list[tuple[nn.Module, str, MergedLinear]]:
        ffn = seat.sites.get("ffn")
        if ffn is not None and ffn.index in net.mask:
            raise MergeError(
                f"cannot merge: site {ffn.index} ({ffn.path}) is a skipped feed-forward, which leaves no linear to fold"
                " its adapter into; mask attentions only, or run unmerged"
            )
        if seat.role is None:
            return []
        role, pia = seat.role, seat.pia
        site = seat.sites["mha"]
        if not has_route(self.cache, seat.layer_idx) or role not in self.cache.layers[seat.layer_idx].routes:
            raise MergeError(
                f"cannot merge: the cache knows no prompt for site {site.index}; prefill with this net and mask first"
                " (net.prefill(**inputs).past_key_values)"
            )
        self.first = seat.layer_idx if self.first is None else self.first
        factors = pia.factors(_one_prompt(self.cache.layers[seat.layer_idx].routes[role]))
        parent, linears, gain = merge_targets(net, seat)
        return [
            (parent, name, MergedLinear(getattr(parent, name), *fold_linear(getattr(parent, name), factors, gain)))
            for name in linears
        ]

    def check(self, cache: Cache | None) -> None:
        """MergeError unless a forward uses the cache whose prompt is folded in."""
        if cache is not self.cache or (self.first is not None and not has_route(cache, self.first)):
            raise MergeError(
                "the weights are merged for one prompt and its KV cache, and this forward is for another (or for none);"
                " leave the merged block first, then prefill the new prompt"
            )

    def undo(self) -> None:
        for stand_in in self.skipped:
            stand_in.merged = False
        for parent, name in reversed(self.placed):
            restore(parent, name)
        self.placed.clear()


@contextmanager
def merged(net: EASModel, cache: Cache) -> Iterator[EASModel]:
    """Within the block, decoding on `cache` runs with the adapters folded into the weights for its prompt.

    `cache` comes from a prefill of one prompt: `net.prefill(**inputs).past_key_values`. Only steps that continue this
    very cache are allowed; anything else raises MergeError, as do linears that cannot be rewritten. Afterwards the
    model is as before, bit for bit.
    """
    net._start_merge(cache)
    try:
        yield net
    finally:
        net._end_merge()


@dataclass(frozen=True)
class MergeProof:
    """What `check_merge` saw. True in a condition if the merged model answers as the unmerged one."""

    max_abs_diff: float
    """Largest difference of a logit, over all decoded steps."""
    max_rel_diff: float
    """The same as a share of the largest unmerged logit."""
    same_tokens: bool
    """Greedy decoding gives the same tokens merged and unmerged."""
    dtype: torch.dtype
    tolerance: float
    """Bound on max_rel_diff in this dtype."""
    steps: int
    """Tokens decoded, end-of-text ignored."""
    mask: tuple[int, ...]
    folded: int
    """Linears that were rewritten."""

    def __bool__(self) -> bool:
        return self.same_tokens and self.max_rel_diff <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{'merged = unmerged' if self else 'MERGED DIFFERS'}: mask {list(self.mask)}, {self.folded} linears"
            f" folded, {self.steps} tokens {'identical' if self.same_tokens else 'DIFFERENT'}, largest logit difference"
            f" {self.max_abs_diff:.2e} ({self.max_rel_diff:.2e} of the scale; bound {self.tolerance:.0e} in"
            f" {str(self.dtype).removeprefix('torch.')})"
        )

    def _repr_html_(self) -> str:
        rows = {
            "verdict": "merged = unmerged" if self else "merged differs",
            "skipped sites": list(self.mask) or "none",
            "linears folded": self.folded,
            "greedy tokens": f"{self.steps}, {'identical' if self.same_tokens else 'different'}",
            "largest logit difference": f"{self.max_abs_diff:.2e}",
            "as a share of the logits' scale": f"{self.max_rel_diff:.2e} (bound {self.tolerance:.0e})",
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        cells = "".join(f"<tr><th style='text-align:left'>{k}</th><td>{v}</td></tr>" for k, v in rows.items())
        return f"<table>{cells}</table>"


class _Force:
    """Logits processor that allows one given continuation only."""

    def __init__(self, tokens: Tensor, start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.start]] = 0
        return forced


def check_merge(net: EASModel, inputs: dict[str, Any], max_new_tokens: int = 16) -> MergeProof:
    """Decode one prompt unmerged and merged, and compare tokens and logits.

    `inputs` as the processor makes them, one example. Logits are compared over the same tokens: if greedy decoding
    parts ways, the merged model is made to follow the unmerged text. Raises MergeError as `net.generate(merge=True)`.
    """
    if max_new_tokens < 2:
        raise MergeError(
            f"check_merge: wanted max_new_tokens of 2 or more (the first token is prefill), got {max_new_tokens}"
        )
    with eval_mode(net):

        def decode(merge: bool, follow: Tensor | None = None) -> tuple[Tensor, Tensor]:
            options: dict[str, Any] = {"min_new_tokens": max_new_tokens}
            if follow is not None:
                options = {"logits_processor": [_Force(follow, inputs["input_ids"].shape[1])]}
            out = net.generate(
                **inputs,
                merge=merge,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )
            return out.sequences[0, -len(out.logits) :], torch.cat(out.logits).double()

        tokens, logits = decode(merge=False)
        merged_tokens, merged_logits = decode(merge=True)
        same = torch.equal(tokens, merged_tokens)
        if not same:
            _, merged_logits = decode(merge=True, follow=tokens)
    difference = (logits - merged_logits).abs().max().item()
    dtype = next(p.dtype for p in net.base.parameters() if p.is_floating_point())
    return MergeProof(
        max_abs_diff=difference,
        max_rel_diff=difference / logits.abs().max().item(),
        same_tokens=same,
        dtype=dtype,
        tolerance=TOLERANCE.get(dtype, 1e-1),
        steps=len(tokens),
        mask=net.mask,
        folded=sum(len(names) for _, names, _ in (merge_targets(net, seat) for seat in net._seats if seat.role)),
    )
