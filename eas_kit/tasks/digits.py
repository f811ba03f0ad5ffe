"""Task ``digits``: questions on a 3 x 3 board of handwritten digits, half multiple choice, half free form."""

from __future__ import annotations

import numpy as np

from eas_kit.tasks.base import ROLES, Example, Task, said_answer
from eas_kit.tasks.digit_images import draw_board

SIZES = {"train": 20_000, "search": 500, "val": 500, "test": 1_000}
KINDS = ("cell", "count", "maximum", "sum", "parity")
_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "centre", "right")


class Digits(Task):
    """See the module. Splits use disjoint digit scans; columns are the question kind and CHOICE / FREE."""

    name = "digits"
    pictures = True
    template = "Question [/ Options] -> The answer is X. BECAUSE: the row or the board"
    parser = "the text in 'The answer is X.'; among the options where there are some"

    def __init__(self, processor, sizes: dict[str, int] | None = None, seed: int = 0):
        super().__init__(processor)
        self.seed = seed
        self.set_splits(self._make, SIZES, sizes)

    def _make(self, role: str, i: int) -> Example:
        rng = np.random.default_rng((self.seed, 1, ROLES.index(role), i))
        board = rng.integers(10, size=(3, 3))
        row, column = int(rng.integers(3)), int(rng.integers(3))
        kind = KINDS[i % len(KINDS)]
        line = " ".join(map(str, board[row]))
        reason = f"the {_ROWS[row]} row is {line}."
        if kind == "cell":
            question = f"Which digit is at {_ROWS[row]} {_COLUMNS[column]}?"
            value, pool = str(board[row, column]), [str(n) for n in range(10)]
        elif kind == "count":
            digit = int(rng.choice(board.ravel())) if rng.random() < 0.8 else int(rng.integers(10))
            question = f"How many times does {digit} occur?"
            value, pool = str(int((board == digit).sum())), [str(n) for n in range(10)]
            reason = "the rows are " + " / ".join(" ".join(map(str, r)) for r in board) + "."
        elif kind == "maximum":
            question = f"Which is the largest digit in the {_ROWS[row]} row?"
            value, pool = str(board[row].max()), [str(n) for n in range(10)]
        elif kind == "sum":
            question = f"What is the sum of the {_ROWS[row]} row?"
            value, pool = str(board[row].sum()), [str(n) for n in range(28)]
        else:
            question = f"Is the digit at {_ROWS[row]} {_COLUMNS[column]} even or odd?"
            value, pool = ("even", "odd")[board[row, column] % 2], ["even", "odd"]
        choices: tuple[str, ...] = ()
        if rng.random() < 0.5:
            wrong = [p for p in pool if p != value]
            options = [str(o) for o in rng.choice(wrong, size=min(3, len(wrong)), replace=False)]
            options.insert(int(rng.integers(len(options) + 1)), value)
            choices = tuple(options)
        return Example(
            id=f"{role}-{i}",
            question=question,
            choices=choices,
            answer=value,
            explanation=reason,
            images=(draw_board(board, role, rng),),
            categories=(kind, "CHOICE" if choices else "FREE"),
        )

    def question_text(self, example: Example) -> str:
        options = f"\nOptions: {', '.join(example.choices)}" if example.choices else ""
        return f"Question: {example.question}{options}"

    def target_text(self, example: Example) -> tuple[str, str]:
        rest = f" BECAUSE: {example.explanation}" if example.explanation else ""
        return f" The answer is {example.answer}.", rest

    def parse(self, text: str, example: Example) -> str | None:
        said = said_answer(text)
        if not example.choices:
            return said or None
        return next((c for c in example.choices if c.lower() == said), None)
