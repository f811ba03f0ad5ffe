"""How answers are graded, and grades put together: the metrics of the benchmarks, on plain strings and numbers.

An answer that could not be parsed is None and scores nothing. Shares are from 0 to 1, not in percent.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from eas_kit.errors import TaskError
from eas_kit.tasks.answers import normalise, normalise_reference, plain_words


def vqa_accuracy(answer: str | None, references: Sequence[str]) -> float:
    """Soft accuracy of VQA, as the official VQAv2 evaluation computes it (github.com/GT-Vision-Lab/VQA).

    The mean, over the references left out one by one, of min(1, matches among the others / 3). The answer goes through
    ``normalise``. The references are compared as they stand if all are the same string, else after
    ``normalise_reference``: neither makes them lower case, as the published annotations are. The formula is for ten
    references; the same one is used for fewer, and with fewer than four no answer can reach 1 (with one: 0).

    Raises:
        TaskError: without references, or where ``references`` is one string.
    """
    if isinstance(references, str) or len(references) == 0:
        raise TaskError(
            f"vqa_accuracy wants a list of reference answers, ten in VQAv2, got {references!r}; for one reference take"
            " exact_match"
        )
    if answer is None:
        return 0.0
    if len(set(references)) > 1:
        references = [normalise_reference(reference) for reference in references]
    matches, count = list(references).count(normalise(answer)), len(references)
    # whoever is left out is one of the matches, or is not; thirds are counted, so that the result is rounded once
    thirds = matches * min(3, matches - 1) + (count - matches) * min(3, matches)
    return thirds / (3 * count)


def token_recall(answer: str | None, reference: str) -> float:
    """Share of the reference's words that the answer has, from 0 to 1: the usual grade of open questions in Slake.

    Words are those of ``plain_words``; one that the reference has twice is wanted twice. Words that are too many cost
    nothing, and one repeated counts no more often than the reference has it (in LLaVA-Med's script repeating it helps).

    Raises:
        TaskError: for a reference without words.
    """
    wanted = Counter(plain_words(reference))
    if not wanted:
        raise TaskError(f"token_recall wants a reference with at least one word, got {reference!r}; leave it out")
    return (wanted & Counter(plain_words(answer or ""))).total() / wanted.total()


def exact_match(answer: str | None, reference: str) -> bool:
    """Whether both are the same after ``normalise``; where that leaves nothing of the reference ("a"), before it.

    Raises:
        TaskError: for a blank reference.
    """
    if not reference.strip():
        raise TaskError(f"exact_match wants a reference answer, got {reference!r}; leave the question out")
    if answer is None:
        return False
    wanted = normalise(reference)
    if not wanted:
        return answer.strip().lower() == reference.strip().lower()
    return normalise(answer) == wanted


def consistency(right: Sequence[bool], groups: Sequence[str]) -> float:
    """Share of groups all of whose examples are right: NLVR2's consistency, groups being sentences.

    Raises:
        TaskError: for no examples, or lengths that differ.
    """
    _check_lengths("consistency", right, "examples", groups, "groups")
    all_right: dict[str, bool] = {}
    for good, group in zip(right, groups):
        all_right[group] = all_right.get(group, True) and bool(good)
    return sum(all_right.values()) / len(all_right)


def recall_at(scores: Any, relevant: Any, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """R@k: share of the queries with a relevant item among the k items that score highest.

    Args:
        scores: (Q, N) numbers, Q queries by N items, higher is better.
        relevant: (Q, N) bool, at least one True for every query.
        ks: cut-offs from 1 up; one of N and more is reached by every query.

    Ties do not help: the items that are not relevant come first among equal scores, so a scorer that says the same of
    all items finds nothing at k = 1.

    Raises:
        TaskError: for shapes that differ or are empty, scores that are NaN or no numbers, ``relevant`` that is not
            bool, a query without a relevant item, or a k that is no whole number from 1 up.
    """
    scores, relevant = np.asarray(scores), np.asarray(relevant)
    if scores.ndim != 2 or scores.shape != relevant.shape or scores.size == 0:
        raise TaskError(
            "recall_at wants scores and relevant of one shape, queries by items, at least 1 by 1; got"
            f" {scores.shape} and {relevant.shape}"
        )
    if scores.dtype.kind not in "iuf" or relevant.dtype.kind != "b":
        raise TaskError(
            f"recall_at wants scores in numbers and relevant in bool, got {scores.dtype} and"
            f" {relevant.dtype}; convert them"
        )
    bad = [k for k in ks if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1]
    if bad or len(ks) == 0:
        raise TaskError(f"recall_at wants whole numbers from 1 up for ks, got {bad or 'none'}")
    nan, without = np.isnan(scores).any(1), ~relevant.any(1)
    for rows, what in (
        (nan, "has scores that are NaN; see what made them"),
        (without, "has no relevant item; drop it"),
    ):
        if rows.any():
            raise TaskError(f"recall_at: query {rows.argmax()} {what} ({rows.sum()} of {len(rows)} queries)")
    lowest = -np.inf if scores.dtype.kind == "f" else np.iinfo(scores.dtype).min
    best = np.where(relevant, scores, lowest).max(1, keepdims=True)  # of the relevant items
    before = (~relevant & (scores >= best)).sum(1)  # none of the relevant ones is before the best of them
    return {int(k): float((before < k).mean()) for k in ks}


def by_category(
    grades: Sequence[float], categories: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, int]]:
    """Mean grade and number of examples by category, names sorted. An example counts once in each of its categories.

    Raises:
        TaskError: for no grades, lengths that differ, a grade that is NaN, or categories of an example as one string.
    """
    _check_lengths("by_category", grades, "grades", categories, "lists of categories")
    columns: dict[str, list[float]] = defaultdict(list)
    for i, (grade, names) in enumerate(zip(grades, categories)):
        if isinstance(names, str):
            raise TaskError(f"by_category wants a list of categories for every example, got {names!r} for example {i}")
        if math.isnan(grade):
            raise TaskError(f"by_category: the grade of example {i} is NaN; what cannot be graded scores 0")
        for name in set(names):
            columns[name].append(float(grade))
    names = sorted(columns)
    return {n: math.fsum(columns[n]) / len(columns[n]) for n in names}, {n: len(columns[n]) for n in names}


def _check_lengths(caller: str, a: Sequence, a_name: str, b: Sequence, b_name: str) -> None:
    if len(a) != len(b) or len(a) == 0:
        raise TaskError(f"{caller} wants as many {a_name} as {b_name}, at least one; got {len(a)} and {len(b)}")
