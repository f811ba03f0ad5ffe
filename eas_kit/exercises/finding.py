"""Checks of notebooks 00, 01, 02 and 06: which sites matter, alone and together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bandit import rewards
from ..masks import load_mask
from ..sites import find_sites
from ..slots import skipping
from .verdict import anything, close, exercise, how_far, limits, number, pair, sites, whole


def _needed(answer: int, losses: Mapping[int, float], what: str) -> tuple[bool, str]:
    """Whether leaving this one out costs most; losses by number, each without that one alone."""
    others = [loss for site, loss in losses.items() if site != answer]
    above = sum(loss > losses[answer] for loss in others)
    said = f"without {what} {answer} the loss is {losses[answer]:.3f}"
    if above:
        return (
            False,
            f"{said}, and {above} of the other {len(others)} cost more. Does your loop go through all of them?",
        )
    return True, f"{said}, without any other one at most {max(others):.3f}"


@exercise(whole)
def most_needed_attention(answer: int, model: Any, task: Any, split: str = "val", **scoring: Any) -> tuple[bool, str]:
    """00: the layer whose attention, left out alone, costs most. `scoring`: what `task.score` takes, such as limit."""
    count = len(find_sites(model, ("mha",)))
    limits(answer, count, "the attentions")
    losses = {}
    for layer in range(count):
        with skipping(model, mha=[layer]):
            losses[layer] = task.score(model, split, **scoring)["loss"]
    return _needed(answer, losses, "attention")


@exercise(number)
def surplus_of_both(
    answer: float, model: Any, task: Any, layer: int, split: str = "val", **scoring: Any
) -> tuple[bool, str]:
    """00: what attention and feed-forward of a layer cost together, less what the two cost alone, in nats a token."""
    losses = {}
    for name, skipped in {"none": {}, "mha": {"mha": [layer]}, "ffn": {"ffn": [layer]}}.items():
        with skipping(model, **skipped):
            losses[name] = task.score(model, split, **scoring)["loss"]
    with skipping(model, mha=[layer], ffn=[layer]):
        both = task.score(model, split, **scoring)["loss"] - losses["none"]
    alone = losses["mha"] + losses["ffn"] - 2 * losses["none"]
    if close(answer, both - alone):
        more = "more" if both > alone else "less"
        return True, f"together {both:+.3f}, one by one {alone:+.3f}: {more} than the sum of the two"
    if close(answer, both) or close(answer, both + losses["none"]):
        return (
            False,
            "that is what both cost together; take off what each of them costs alone, all against nothing skipped",
        )
    if close(answer, both - alone - losses["none"]):
        return False, "the loss with nothing skipped has to be taken off each of the three losses, not once"
    return False, how_far(answer, both - alone)


@exercise(sites)
def shared_by_the_worst(answer: set[int], report: Any, k: int) -> tuple[bool, str]:
    """01: the layers that the costliest mask of k attentions and the costliest of k feed-forwards have in common."""
    frame = report.frame[report.frame["k"] == k]
    worst = {kind: rows.loc[rows["loss"].idxmax()] for kind, rows in frame.groupby("kind")}
    attentions, feed_forwards = (set(worst[kind]["mask"]) for kind in ("mha", "ffn"))
    truth = attentions & feed_forwards
    if answer == truth:
        shared = sorted(truth) or "none"
        return True, f"attentions {sorted(attentions)} and feed-forwards {sorted(feed_forwards)} share {shared}"
    costs = ", ".join(
        f"{name} end at {worst[kind]['loss']:.3f}" for kind, name in (("mha", "attentions"), ("ffn", "feed-forwards"))
    )
    rightly = f"of your {len(answer)} layers {len(answer & truth)} are shared, and {len(truth)} are wanted"
    return False, f"{rightly}; the worst {costs}"


@exercise(whole)
def underestimated_masks(answer: int, report: Any, sweep: Any, kind: str = "mha") -> tuple[bool, str]:
    """01: how many masks of two or more sites of a kind cost more than these sites do alone, added up.

    `sweep`: a row a site with kind, site and loss_change, as `single_site_sweep` gives it.
    """
    alone = sweep[sweep["kind"] == kind].set_index("site")["loss_change"]
    masks = report.frame[(report.frame["kind"] == kind) & (report.frame["k"] > 1)]
    sums = masks["mask"].map(lambda mask: sum(alone[site] for site in mask))
    measured = masks["loss"] - report.dense["loss"]
    truth = int((measured > sums).sum())
    if answer == truth:
        means = f"a mask costs {measured.mean():.3f}, its sites alone {sums.mean():.3f}"
        return True, f"{truth} of {len(masks)}; on the mean {means}"
    if answer == len(masks) - truth:
        return False, f"that many of the {len(masks)} masks cost less than their sites add up to"
    return False, f"there are {len(masks)} such masks; {how_far(answer, truth, share=0, size=0)}"


@exercise(pair)
def width_of_rewards(answer: tuple[float, float], losses: Sequence[float]) -> tuple[bool, str]:
    """02: best less worst reward of these losses, as "exp" and as "standardized"."""
    wrong, said = [], []
    for value, kind in zip(answer, ("exp", "standardized"), strict=True):
        truth = float(np.ptp(rewards(losses, kind)))
        said.append(f"{kind} {truth:.4f}")
        if not close(value, truth, size=5e-5):
            wrong.append(f"{kind}: {how_far(value, truth, size=5e-5)}")
    return not wrong, "; ".join(wrong or said)


@exercise(whole)
def most_skipped_site(answer: int, result: Any) -> tuple[bool | None, str]:
    """02: the site that was skipped in most of the subnetworks that a search compared."""
    if not result.history:
        return None, "the search was stopped before its first update, so there is nothing to count; run it again"
    counts = result.history[-1]["counts"]
    limits(answer, len(counts), "the sites")
    compared = sum(len(record["masks"]) for record in result.history)
    said = f"site {answer} was skipped in {counts[answer]} of {compared} subnetworks"
    if counts[answer] < max(counts):
        return False, f"{said}; {sum(count > counts[answer] for count in counts)} sites were skipped more often"
    place = 1 + int((np.asarray(result.preferences) < float(result.preferences[answer])).sum())
    return True, f"{said}; its preference is number {place} from below of {len(counts)}"


@exercise(sites)
def better_mask(answer: set[int], play: Any, rivals: Mapping[str, Any], k: int) -> tuple[bool, str]:
    """06: k attentions that cost less than every rival's; `rivals` are masks by name."""
    attentions = {site for site, kind in enumerate(play.site_kinds) if kind == "mha"}
    if len(answer) != k or not answer <= attentions:
        yours = f"you have {len(answer)} sites, {len(answer & attentions)} of them attentions"
        return False, f"wanted {k} attentions, which are the sites 0 to {max(attentions)}; {yours}"
    loss = play.score(answer)["loss"]
    beaten = {name: play.score(mask)["loss"] for name, mask in rivals.items()}
    name = min(beaten, key=beaten.get)
    said = f"loss {loss:.4f}, the best of the others, {name}, {beaten[name]:.4f}"
    return loss < beaten[name], said if loss < beaten[name] else f"{said}. Exchange one site for another"


@exercise(whole)
def most_needed_feed_forward(answer: int, play: Any) -> tuple[bool, str]:
    """06: the site of the feed-forward that costs most alone."""
    numbers = [site for site, kind in enumerate(play.site_kinds) if kind == "ffn"]
    if answer not in numbers:
        return False, f"the feed-forwards are sites {numbers[0]} to {numbers[-1]}, behind the attentions; got {answer}"
    return _needed(answer, {site: play.score([site])["loss"] for site in numbers}, "site")


@exercise(anything)
def saved_mask(answer: Any, play: Any, k: int) -> tuple[bool, str]:
    """06: the path of a mask file for this model with k sites, as the panel saves it."""
    if not isinstance(answer, str) and not hasattr(answer, "__fspath__"):
        return False, f"wanted the path of a file, such as 'mask.json'; got {answer!r:.60}"
    mask = load_mask(answer, site_kinds=play.site_kinds)
    if len(mask) != k:
        return False, f"this file skips {len(mask)} sites, {list(mask)}; wanted {k}"
    return True, f"{Path(answer).resolve()} skips {list(mask)}; loss {play.score(mask)['loss']:.4f}"
