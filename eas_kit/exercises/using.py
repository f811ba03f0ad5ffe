"""Checks of notebooks 03, 04 and 05: tuning, merging, data of one's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .. import merging
from ..config import EASConfig
from ..counting import parameters
from ..meta import meta_model
from ..model import attach
from ..proof import check_merge
from .verdict import anything, close, exercise, how_far, number, text, whole


@exercise(text)
def column_of_largest_change(answer: str, columns: Any, untuned: str = "zero_shot") -> tuple[bool | None, str]:
    """03: the column in which the tuned arms, on the mean, differ most from the untuned one; a row an arm and seed."""
    first = columns.index.str.startswith(untuned)
    if first.all() or not first.any():
        return None, f"this needs rows of {untuned} and of tuned arms; run the notebook with both among its methods"
    change = (columns[~first].mean() - columns[first].mean()).dropna()
    if answer not in change:
        return False, f"there is no column {answer!r}; they are {', '.join(change.index)}"
    said = f"in {answer} tuned arms are {100 * change[answer]:+.1f} points from the untuned model"
    above = int((change.abs() > abs(change[answer]) + 1e-12).sum())
    return not above, f"{said}; {above} columns change more" if above else f"{said}, in the others by less"


@exercise(number)
def share_at_ranks(answer: float, config: Any, mask: Any, skip_rank: int, adapt_rank: int) -> tuple[bool, str]:
    """03: `active_share` of `eas.measure.parameters` with adapters of these ranks; `config` of the base model.

    Counted on a model without weights, so that the reader's is left alone.
    """
    counts = {}
    for ranks in ((skip_rank, adapt_rank), (2 * skip_rank, 2 * adapt_rank)):
        net = attach(meta_model(config), EASConfig(skip_rank=ranks[0], adapt_rank=ranks[1]))
        net.mask = mask
        counts[ranks] = parameters(net)
    mine, double = counts.values()
    truth = mine["active_share"]
    if close(answer, truth, size=0):
        times = double["active_share"] / truth
        return True, f"{truth:.3%} of the language model; ranks twice as large train {times:.2f} times as much"
    if close(answer, mine["share"], size=0):
        return (
            False,
            "that is the share of all adapters, of both kinds at every site; under a mask one of the two is active",
        )
    return False, how_far(answer, truth, size=0)


@exercise(anything)
def error_of_the_slip(answer: Any, net: Any, inputs: Any, new_tokens: int) -> tuple[bool, str]:
    """04: `max_rel_diff` of the proof if the bias is folded with the weight that is merged already; or that proof."""
    value = number(getattr(answer, "max_rel_diff", answer))
    right = merging.fold_linear

    def slip(linear: Any, factors: Any, gain: Any = None, shift: Any = None) -> Any:
        weight, _ = right(linear, factors, gain, shift)
        bias = weight @ factors.bias[0].to(weight.dtype)
        return weight, bias if linear.bias is None else bias + linear.bias

    honest = check_merge(net, inputs, max_new_tokens=new_tokens)
    merging.fold_linear = slip
    try:
        slipped = check_merge(net, inputs, max_new_tokens=new_tokens)
    finally:
        merging.fold_linear = right
    if close(value, slipped.max_rel_diff, share=0.05, size=0):
        off = slipped.max_rel_diff / slipped.tolerance
        return True, f"{slipped.max_rel_diff:.1e} of the logits' scale, {off:.0f} times what a proof may be off"
    if value <= honest.tolerance:
        return False, "so small a difference is the right fold's: is the slip in place while check_merge runs?"
    return False, how_far(value, slipped.max_rel_diff, share=0.05, size=0)


@exercise(number)
def tokens_to_win_back(answer: float, times: Mapping[str, Any], new_tokens: int) -> tuple[bool, str]:
    """04: after how many written tokens the folding is paid, merged against unmerged; medians of `compare_latency`."""
    merged, unmerged = times["arms"]["merged"], times["arms"]["unmerged"]
    extra = merged["prefill"]["median"] - unmerged["prefill"]["median"]
    saved = (unmerged["decode"]["median"] - merged["decode"]["median"]) / (new_tokens - 1)
    truth = extra / saved
    said = f"{1e3 * extra:.1f} ms more before the first token, {1e3 * saved:.2f} ms less for each"
    if close(answer, truth, share=0.05, size=0.5):
        return True, f"{said}: {truth:.0f} tokens" if saved > 0 else f"{said}: here it is never won back"
    if close(answer, truth / (new_tokens - 1), share=0.05):
        return False, f"that counts answers of {new_tokens} tokens: divide the time of decoding by the tokens in it"
    return False, f"{how_far(answer, truth)}: wanted is the extra time of the prefill over what a token saves"


@exercise(anything)
def record_left_out(answer: Any, task: Any) -> tuple[bool, str]:
    """05: the task once more, read with on_error="skip" from a folder in which one record more is faulty."""
    if not hasattr(answer, "skipped") or not hasattr(answer, "split"):
        return False, f"wanted the task that load_task returned; got a {type(answer).__name__}"
    before = {str(problem) for problem in task.skipped}
    new = [problem for problem in map(str, answer.skipped) if problem not in before]
    if len(new) == 1:
        return True, f"left out and counted: {new[0]}"
    if not new:
        return False, "nothing more than before was left out: is the spoilt folder the one that was read?"
    return False, f"{len(new)} records were left out, wanted one; the first: {new[0]}"


@exercise(whole)
def target_tokens(answer: int, task: Any, example: Any, **settings: Any) -> tuple[bool | None, str]:
    """05: how many tokens the target of an example has under other settings of its task, such as prompt_format."""
    missing = [name for name in settings if not hasattr(task, name)]
    if missing:
        return None, f"this one is about ScienceQA; {task.name} has no {missing[0]}"
    other = copy.copy(task)
    for name, value in settings.items():
        setattr(other, name, value)
    counts = [(len(ids), scored) for ids, scored in (task.target_ids(example), other.target_ids(example))]
    (before, _), (truth, scored) = counts
    if answer == truth:
        return True, f"{truth} tokens, {scored} of them scored; with the notebook's own settings there are {before}"
    if answer == before:
        return False, "that is with the notebook's own settings: load the task again with the others"
    return False, f"{how_far(answer, truth, share=0, size=0)}: count len(task.target_ids(example)[0])"
