"""Tasks ``boards-vqa``, ``boards-nlvr2``, ``boards-retrieval``: METER's three, on boards of handwritten digits.

For ``tiny-meter`` or any model of the kind (a closed list of answers, pairs of pictures, a score of text and picture).
Each role has digit scans of its own. Columns are the kinds, and whether ``tiny-meter`` knows the kind from its
pretraining or meets it here (``known`` / ``new``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from eas_kit.tasks import board_texts as said
from eas_kit.tasks.base import ROLES, Example
from eas_kit.tasks.closed import ClosedTask
from eas_kit.tasks.digit_images import draw_board
from eas_kit.tasks.matching import MatchingTask
from eas_kit.tasks.metrics import consistency

SIZES = {"train": 20_000, "search": 500, "val": 500, "test": 1_000}
PICTURES = {"train": 5_000, "search": 500, "val": 200, "test": 200}


def _known(what: str, kind: str) -> str:
    return "known" if kind in said.PRETRAINED[what] else "new"


class BoardsVQA(ClosedTask):
    """See the module: questions on one board, 14 answers."""

    name = "boards-vqa"
    template = "a question on a board -> one of 14 answers"
    answers = said.ANSWERS

    def __init__(self, processor, sizes: dict[str, int] | None = None, seed: int = 0):
        super().__init__(processor)
        self.seed = seed
        self.set_splits(self._make, SIZES, sizes)

    def _make(self, role: str, i: int) -> Example:
        rng = np.random.default_rng((self.seed, 3, ROLES.index(role), i))
        kind = said.QUESTIONS[i % len(said.QUESTIONS)]
        board = said.draw_digits(rng)
        question, answer, choices = said.question(kind, board, rng)
        picture = draw_board(board, role, rng)
        columns = (kind, _known("question", kind))
        return Example(f"{role}-{i}", question, answer, choices, images=(picture,), categories=columns)


class BoardsNLVR2(ClosedTask):
    """See the module: is a sentence true of two boards? Each sentence is judged of two pairs, true of one of them.

    The result also has ``consistency``, the share of sentences that are judged rightly of both.
    """

    name = "boards-nlvr2"
    template = "a sentence on two boards -> false or true"
    answers = said.TRUTH

    def __init__(self, processor, sizes: dict[str, int] | None = None, seed: int = 0):
        super().__init__(processor)
        self.seed = seed
        self.set_splits(self._make, SIZES, sizes)

    def _make(self, role: str, i: int) -> Example:
        number, second = divmod(i, 2)
        rng = np.random.default_rng((self.seed, 4, ROLES.index(role), number))
        kind = said.SENTENCES[number % len(said.SENTENCES)]
        sentence, first_is_true = said.sentence(kind, rng), bool(rng.random() < 0.5)
        wanted = first_is_true != bool(second)
        rng = np.random.default_rng((self.seed, 5, ROLES.index(role), i))
        pair = said.boards_for(sentence, wanted, rng)
        return Example(
            id=f"{role}-{number}-{second}",
            question=sentence.text,
            answer=said.TRUTH[int(wanted)],
            choices=said.TRUTH,
            images=tuple(draw_board(board, role, rng) for board in pair),
            categories=(kind, _known("sentence", kind)),
            group=f"{role}-{number}",
        )

    def summarise(self, grades: Sequence[float], examples: Sequence[Example]) -> dict[str, Any]:
        return {"consistency": consistency([grade == 1 for grade in grades], [e.group for e in examples])}


class BoardsRetrieval(MatchingTask):
    """See the module: boards by captions of two and three digits, and back."""

    name = "boards-retrieval"
    template = "a board and a caption -> a score of the pair"

    def __init__(self, processor, sizes: dict[str, int] | None = None, seed: int = 0, false_texts: int = 15):
        super().__init__(processor, false_texts)
        self.seed = seed
        self._made = lru_cache(maxsize=None)(self._board)
        self.set_splits(self._make, PICTURES, sizes)
        self.check_numbers()

    def _board(self, role: str, i: int) -> tuple[np.ndarray, tuple[str, ...]]:
        rng = np.random.default_rng((self.seed, 6, ROLES.index(role), i))
        board = said.draw_digits(rng)
        return board, tuple(said.caption(kind, board, rng) for kind in ("two", "three"))

    def _make(self, role: str, i: int) -> Example:
        board, captions = self._made(role, i)
        picture = draw_board(board, role, np.random.default_rng((self.seed, 7, ROLES.index(role), i)))
        return Example(f"{role}-{i}", "", "match", images=(picture,), references=captions, group=f"{role}-{i}")

    def role_of(self, example: Example) -> str:
        return example.id.rpartition("-")[0]

    def captions(self, role: str, number: int) -> Sequence[str]:
        return self._made(role, number)[1]

    def describes(self, text: str, example: Example) -> bool:
        role, _, number = example.id.rpartition("-")
        return said.describes(text, self._made(role, int(number))[0])
