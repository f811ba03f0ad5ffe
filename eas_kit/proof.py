"""Proof that a merged model answers as the unmerged one: prompts decoded both ways, tokens and logits compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import MergeError
from .merging import default_form, merge_target
from .modes import eval_mode

if TYPE_CHECKING:
    from .model import EASModel

# how far merged logits may be off, as a share of the logits' scale: rounding of W' in that dtype; in float64, of the
# float32 in which generate hands logits over
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class MergeProof:
    """What `check_merge` saw. True in a condition if the merged model answers as the unmerged one.

    That is: logits along the same text within `tolerance`, and, in float32 and float64, the same tokens. In half
    precision the rounding of the folded weights may turn a choice between two tokens that are nearly level.
    """

    max_abs_diff: float
    """Largest difference of a logit, over all decoded steps."""
    max_rel_diff: float
    """The same as a share of the largest unmerged logit."""
    same_tokens: bool
    """Greedy decoding gives the same tokens merged and unmerged."""
    dtype: torch.dtype
    tolerance: float
    """Bound on max_rel_diff in this dtype. generate hands logits over in float32: nothing finer is seen in float64."""
    steps: int
    """Tokens decoded for each prompt, end-of-text ignored."""
    mask: tuple[int, ...]
    folded: int
    """Linears that were rewritten; none in the low-rank form."""
    form: str = "per_prompt"
    prompts: int = 1

    def __bool__(self) -> bool:
        return (self.same_tokens or self._half) and self.max_rel_diff <= self.tolerance

    @property
    def _half(self) -> bool:
        return self.dtype not in (torch.float32, torch.float64)

    @property
    def _tokens(self) -> str:
        if self.same_tokens:
            return "identical"
        return "not all identical (nearly level ones, turned by rounding)" if self else "DIFFERENT"

    @property
    def _how(self) -> str:
        return f"{self.folded} linears folded" if self.form == "per_prompt" else "adapters condensed"

    def __str__(self) -> str:
        count = f"{self.prompts} prompts, " if self.prompts > 1 else ""
        return (
            f"{'merged = unmerged' if self else 'MERGED DIFFERS'}: {count}mask {list(self.mask)}, {self._how},"
            f" {self.steps} tokens {self._tokens}, largest logit difference"
            f" {self.max_abs_diff:.2e} ({self.max_rel_diff:.2e} of the scale; bound {self.tolerance:.0e} in"
            f" {str(self.dtype).removeprefix('torch.')})"
        )

    def _repr_html_(self) -> str:
        rows = {
            "verdict": "merged = unmerged" if self else "merged differs",
            "prompts": self.prompts,
            "skipped sites": list(self.mask) or "none",
            "how": self._how,
            "greedy tokens": f"{self.steps}, {self._tokens}",
            "largest logit difference": f"{self.max_abs_diff:.2e}",
            "as a share of the logits' scale": f"{self.max_rel_diff:.2e} (bound {self.tolerance:.0e})",
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        cells = "".join(f"<tr><th style='text-align:left'>{k}</th><td>{v}</td></tr>" for k, v in rows.items())
        return f"<table>{cells}</table>"


class _Force:
    """Logits processor that allows one given continuation of each row only."""

    def __init__(self, tokens: Tensor, start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        next_tokens = self.tokens[:, input_ids.shape[1] - self.start, None]
        return torch.full_like(scores, -torch.inf).scatter(1, next_tokens, 0.0)


def check_merge(net: EASModel, inputs: dict[str, Any], max_new_tokens: int = 16, form: bool | str = True) -> MergeProof:
    """Decode prompts unmerged and merged, and compare tokens and logits.

    `inputs` as the processor makes them; `form` as `merge` of `net.generate`: one example is folded per prompt, several
    are condensed. Logits are compared over the same tokens: if greedy decoding parts ways, the merged model is made to
    follow the unmerged text. Raises MergeError as `net.generate(merge=form)`.
    """
    if not isinstance(inputs, Mapping):
        raise MergeError(
            f"check_merge: wanted the processor's inputs (a mapping with input_ids), got a {type(inputs).__name__}"
        )
    if max_new_tokens < 2:
        raise MergeError(
            f"check_merge: wanted max_new_tokens of 2 or more (the first token is prefill), got {max_new_tokens}"
        )
    with eval_mode(net):

        def decode(merge: bool | str, follow: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
            return out.sequences[:, -len(out.logits) :], torch.stack(out.logits).double()

        tokens, logits = decode(merge=False)
        merged_tokens, merged_logits = decode(merge=form)
        same = torch.equal(tokens, merged_tokens)
        if not same:
            _, merged_logits = decode(merge=form, follow=tokens)
    difference = (logits - merged_logits).abs().max().item()
    dtype = next(p.dtype for p in net.base.parameters() if p.is_floating_point())
    prompts = len(tokens)
    used = form if isinstance(form, str) else default_form(prompts)
    linears = sum(len(merge_target(net, s).linears()) for s in net._seats if s.role) if used == "per_prompt" else 0
    return MergeProof(
        max_abs_diff=difference,
        max_rel_diff=difference / logits.abs().max().item(),
        same_tokens=same,
        dtype=dtype,
        tolerance=TOLERANCE.get(dtype, 1e-1),
        steps=tokens.shape[1],
        mask=net.mask,
        folded=linears,
        form=used,
        prompts=prompts,
    )
