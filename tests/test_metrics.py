"""The metrics: values counted by hand, and the definitions written out as plain loops beside them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from eas_kit.errors import TaskError
from eas_kit.tasks.answers import normalise, normalise_reference
from eas_kit.tasks.metrics import by_category, consistency, exact_match, recall_at, token_recall, vqa_accuracy


def ten(**counts: int) -> list[str]:
    listed = [answer for answer, count in counts.items() for _ in range(count)]
    return listed + [f"other {i}" for i in range(10 - len(listed))]


@pytest.mark.parametrize("matches, wanted", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten(matches, wanted):
    assert vqa_accuracy("Red.", ten(red=matches)) == wanted


@pytest.mark.parametrize(
    "answer, references, wanted",
    [
        ("two", ten(**{"2": 4}), 1.0),  # number words of the prediction become digits,
        ("2", ten(two=4), 0.0),  # those of the references do not
        ("yes", ten(Yes=4), 0.0),  # nor is their case changed
        ("t-shirt", ["t-shirt"] * 4 + ["shirt"] * 6, 1.0),
        # ten equal references are compared as they stand: the mark stays, and no prediction holds one
        ("t-shirt", ["t-shirt"] * 10, 0.0),
        ("t shirt", ["t-shirt"] * 10, 0.0),
        ("yes", ["yes"] * 10, 1.0),
        # equal only after the punctuation step: not all equal as they came, so the step is taken
        ("t shirt", ["t-shirt"] * 5 + ["t shirt"] * 5, 1.0),
        (None, ten(red=10), 0.0),
        ("", ten(red=4), 0.0),
        # fewer than ten, the same formula
        ("red", ["red"], 0.0),
        ("red", ["red", "red"], 1 / 3),
        ("red", ["red", "red", "red"], 2 / 3),
        ("red", ["red"] * 4, 1.0),
        ("red", ["red", "blue", "blue"], 2 / 9),
    ],
)
def test_vqa_accuracy(answer, references, wanted):
    assert vqa_accuracy(answer, references) == wanted
    assert vqa_accuracy(answer, tuple(references)) == wanted


def left_one_out(answer: str, references: list[str]) -> float:
    if any(reference != references[0] for reference in references):
        references = [normalise_reference(reference) for reference in references]
    total = 0.0
    for out in range(len(references)):
        matches = 0
        for i, reference in enumerate(references):
            if i != out and reference == normalise(answer):
                matches += 1
        total += min(1.0, matches / 3)
    return total / len(references)


def test_vqa_accuracy_is_the_mean_over_those_left_out():
    rng = random.Random(1)
    words = ("yes", "no", "t-shirt", "t shirt", "a dog", "dog")
    seen = set()
    for _ in range(2000):
        references = [rng.choice(words[: rng.randint(1, 6)]) for _ in range(rng.randint(1, 12))]
        answer = rng.choice(words)
        value = vqa_accuracy(answer, references)
        assert value == pytest.approx(left_one_out(answer, references), abs=1e-12)
        seen.add(round(value, 3))
    assert len(seen) > 20


@pytest.mark.parametrize("references", [[], (), "yes"])
def test_vqa_accuracy_wants_references(references):
    with pytest.raises(TaskError, match="wants a list of reference answers, ten in VQAv2, got.*take exact_match"):
        vqa_accuracy("yes", references)


@pytest.mark.parametrize(
    "answer, reference, wanted",
    [
        ("left lung", "Left Lung.", 1.0),
        ("the lung", "left lung", 0.5),
        ("It is the lung, on the left side", "left lung", 1.0),
        ("lung lung", "left lung", 0.5),  # repeating a word does not help
        ("yes", "yes yes yes", 1 / 3),
        ("yes no yes", "yes yes yes", 2 / 3),
        ("lungs", "lung", 0.0),
        ("", "lung", 0.0),
        (None, "lung", 0.0),
        ("2", "2.5 cm", 0.0),
    ],
)
def test_token_recall(answer, reference, wanted):
    assert token_recall(answer, reference) == wanted


def test_token_recall_wants_words():
    with pytest.raises(TaskError, match=r"a reference with at least one word, got '\?'; leave it out"):
        token_recall("yes", "?")


@pytest.mark.parametrize(
    "answer, reference, wanted",
    [
        ("Two dogs.", "2 dogs", True),
        ("2 dogs", "the two dogs", True),
        ("t shirt", "t-shirt", True),
        ("dogs", "dog", False),
        ("", "dog", False),
        (None, "dog", False),
        (None, "a", False),
        (" A ", "a", True),  # nothing is left of the reference: compared before
        ("the", "a", False),
        ("", "a", False),
        ("x", "a", False),
    ],
)
def test_exact_match(answer, reference, wanted):
    assert exact_match(answer, reference) is wanted


def test_exact_match_wants_a_reference():
    with pytest.raises(TaskError, match="exact_match wants a reference answer, got ' '; leave the question out"):
        exact_match("", " ")


@pytest.mark.parametrize(
    "right, groups, wanted",
    [
        ([True], ["s"], 1.0),
        ([True, False], ["s", "s"], 0.0),
        ([False, True], ["s", "s"], 0.0),
        ([True, False, True], ["s", "t", "s"], 0.5),
        ([True, True, True, True, False], ["s", "t", "u", "s", "u"], 2 / 3),
        (np.array([True, True]), ["s", "t"], 1.0),
    ],
)
def test_consistency(right, groups, wanted):
    assert consistency(right, groups) == wanted


def test_consistency_wants_equal_lengths():
    with pytest.raises(TaskError, match="consistency wants as many examples as groups, at least one; got 2 and 1"):
        consistency([True, True], ["s"])
    with pytest.raises(TaskError, match="got 0 and 0"):
        consistency([], [])


def test_recall_at_by_hand():
    scores = [[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.1, 0.5, 0.9]]
    relevant = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]], bool)  # best ranks 1, 2, 3, 1
    assert recall_at(scores, relevant, (1, 2, 3, 7)) == {1: 0.5, 2: 0.75, 3: 1.0, 7: 1.0}
    assert recall_at(scores, relevant) == {1: 0.5, 5: 1.0, 10: 1.0}


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int8, np.uint8])
def test_ties_do_not_help(kind):
    eye = np.eye(5, dtype=bool)
    assert recall_at(np.zeros((5, 5), kind), eye, (1, 4, 5)) == {1: 0.0, 4: 0.0, 5: 1.0}
    assert recall_at(eye.astype(kind), eye, (1,)) == {1: 1.0}
    two = np.array([[1, 1, 0]], bool)  # relevant items do not stand in each other's way
    assert recall_at(np.array([[3, 3, 3]], kind), two, (1, 2)) == {1: 0.0, 2: 1.0}
    assert recall_at(np.array([[3, 3, 2]], kind), two, (1,)) == {1: 1.0}


def test_negative_scores_that_are_whole_numbers():
    assert recall_at([[-3, -3, -4]], np.array([[1, 0, 0]], bool), (1, 2)) == {1: 0.0, 2: 1.0}


def test_infinite_scores():
    relevant = np.array([[0, 1]], bool)
    assert recall_at([[-np.inf, -np.inf]], relevant, (1, 2)) == {1: 0.0, 2: 1.0}
    assert recall_at([[0.0, np.inf]], relevant, (1,)) == {1: 1.0}
    assert recall_at([[np.inf, np.inf]], relevant, (1,)) == {1: 0.0}


def test_recall_at_is_a_search_in_the_sorted_list():
    rng = np.random.default_rng(2)
    for _ in range(100):
        queries, items = int(rng.integers(1, 8)), int(rng.integers(1, 12))
        scores = rng.integers(-2, 4, (queries, items)) / 2  # many ties
        relevant = rng.random((queries, items)) < 0.3
        relevant[np.arange(queries), rng.integers(items, size=queries)] = True
        found = recall_at(scores, relevant, (1, 2, 5, 20))
        for k, share in found.items():
            hits = 0
            for q in range(queries):
                order = sorted(range(items), key=lambda i: (-scores[q, i], relevant[q, i]))  # not relevant first
                hits += any(relevant[q, i] for i in order[:k])
            assert share == hits / queries


def test_recall_at_refuses():
    scores, relevant = np.zeros((2, 3)), np.ones((2, 3), bool)
    with pytest.raises(TaskError, match=r"one shape, queries by items, at least 1 by 1; got \(2, 3\) and \(3, 2\)"):
        recall_at(scores, relevant.T)
    with pytest.raises(TaskError, match=r"got \(3,\) and \(3,\)"):
        recall_at(scores[0], relevant[0])
    with pytest.raises(TaskError, match=r"got \(0, 3\) and \(0, 3\)"):
        recall_at(scores[:0], relevant[:0])
    with pytest.raises(TaskError, match="relevant in bool, got float64 and int64; convert them"):
        recall_at(scores, relevant.astype("int64"))
    with pytest.raises(TaskError, match="scores in numbers and relevant in bool, got bool and bool"):
        recall_at(relevant, relevant)
    for ks, came in (((0, 1), r"\[0\]"), ((), "none"), ((1.5,), r"\[1.5\]"), ((True,), r"\[True\]")):
        with pytest.raises(TaskError, match=f"whole numbers from 1 up for ks, got {came}"):
            recall_at(scores, relevant, ks)
    relevant[1] = False
    with pytest.raises(TaskError, match=r"query 1 has no relevant item; drop it \(1 of 2 queries\)"):
        recall_at(scores, relevant)
    scores[0, 2] = np.nan
    with pytest.raises(TaskError, match=r"query 0 has scores that are NaN; see what made them \(1 of 2 queries\)"):
        recall_at(scores, relevant)


def test_by_category():
    grades = [1, 0, 0.5, 1.0]
    categories = [("social", "text"), ("natural",), ("text", "text"), ()]
    mean, count = by_category(grades, categories)
    assert mean == {"natural": 0.0, "social": 1.0, "text": 0.75}
    assert count == {"natural": 1, "social": 1, "text": 2}
    assert list(mean) == list(count) == ["natural", "social", "text"]
    assert by_category([True, False], [["x"], ["x"]]) == ({"x": 0.5}, {"x": 2})
    assert by_category([0.1] * 10, [["x"]] * 10) == ({"x": 0.1}, {"x": 10})


def test_by_category_refuses():
    with pytest.raises(TaskError, match="as many grades as lists of categories, at least one; got 1 and 2"):
        by_category([1.0], [("x",), ("y",)])
    with pytest.raises(TaskError, match="got 0 and 0"):
        by_category([], [])
    with pytest.raises(TaskError, match="a list of categories for every example, got 'text' for example 1"):
        by_category([1.0, 1.0], [("x",), "text"])
    with pytest.raises(TaskError, match="the grade of example 1 is NaN; what cannot be graded scores 0"):
        by_category([1.0, float("nan")], [("x",), ("x",)])
