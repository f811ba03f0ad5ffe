"""What is said about 3 x 3 boards of digits: questions, sentences about two boards, captions, and what is true.

Numbers and words alone, no pictures: `boards.py` makes tasks of them, and `tiny-meter` was pretrained on the kinds in
PRETRAINED. The other kinds are new to it; each asks for something that it can see, in another way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
SHAPE = (len(ROWS), len(COLUMNS))
CELLS = len(ROWS) * len(COLUMNS)
DIGITS = tuple("0123456789")
ANSWERS = (*DIGITS, "yes", "no", "even", "odd")
"""The closed list of answers to questions on one board."""
TRUTH = ("false", "true")
QUESTIONS = ("cell", "exists", "check", "larger", "both", "parity")
SENTENCES = ("first", "second", "each", "same", "one", "no")
CAPTIONS = ("one", "two", "three", "four")
PRETRAINED = {
    "question": ("cell", "exists", "check", "larger"),
    "sentence": ("first", "second", "each", "same"),
    "caption": ("one", "two"),
}

Board = np.ndarray  # SHAPE of 0..9


def draw_digits(rng: np.random.Generator) -> Board:
    """A board, each digit as likely in each cell."""
    return rng.integers(10, size=SHAPE)


def place(row: int, column: int) -> str:
    return f"{ROWS[row]} {COLUMNS[column]}"


def _cell(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(SHAPE[0])), int(rng.integers(SHAPE[1]))


def _other_cell(rng: np.random.Generator, cell: tuple[int, int]) -> tuple[int, int]:
    number = (cell[0] * SHAPE[1] + cell[1] + 1 + int(rng.integers(CELLS - 1))) % CELLS
    return divmod(number, SHAPE[1])


def digit_there_or_not(there: Board, rng: np.random.Generator) -> int:
    """As likely one of those there as one that is not."""
    if rng.random() < 0.5:
        return int(rng.choice(np.unique(there)))
    return int(rng.choice(np.setdiff1d(np.arange(10), there)))


def question(kind: str, board: Board, rng: np.random.Generator) -> tuple[str, str, tuple[str, ...]]:
    """A question of the kind (of QUESTIONS), its answer, and the answers that such questions have."""
    cell = _cell(rng)
    if kind == "cell":
        return f"which digit is at {place(*cell)} ?", str(board[cell]), DIGITS
    if kind == "exists":
        digit = digit_there_or_not(board, rng)
        return f"is there a {digit} ?", _yes((board == digit).any()), ("yes", "no")
    if kind == "check":
        digit = digit_there_or_not(board[cell], rng)
        return f"is there a {digit} at {place(*cell)} ?", _yes(board[cell] == digit), ("yes", "no")
    if kind == "parity":
        return f"which digit is at {place(*cell)} , even or odd ?", ("even", "odd")[board[cell] % 2], ("even", "odd")
    if kind == "both":
        cells = (cell, _other_cell(rng, cell))
        digits = [board[one] if rng.random() < 0.7 else rng.integers(10) for one in cells]
        text = " and ".join(f"a {digit} at {place(*one)}" for digit, one in zip(digits, cells, strict=True))
        answer = all(board[one] == digit for digit, one in zip(digits, cells, strict=True))
        return f"is there {text} ?", _yes(answer), ("yes", "no")
    if kind == "larger":
        other = _other_cell(rng, cell)
        text = f"is the digit at {place(*cell)} larger than the one at {place(*other)} ?"
        return text, _yes(board[cell] > board[other]), ("yes", "no")
    raise ValueError(f"kind: wanted one of {QUESTIONS}, got {kind!r}")


def _yes(true: bool) -> str:
    return "yes" if true else "no"


# which of two boards have the digit at the place (first, second), where a sentence of the kind is true
_HOLDS = {
    "first": {(True, False), (True, True)},
    "second": {(False, True), (True, True)},
    "each": {(True, True)},
    "one": {(True, False), (False, True)},
    "no": {(False, False)},
}
_SUBJECTS = {"first": "the first board", "second": "the second board", "each": "each board"}
_SUBJECTS |= {"one": "just one board", "no": "no board"}
_EITHER = tuple((first, second) for first in (False, True) for second in (False, True))


@dataclass(frozen=True)
class Sentence:
    """A sentence of a kind about what two boards have in a cell: a digit, or, of kind "same", the same one."""

    kind: str
    cell: tuple[int, int]
    digit: int

    @property
    def text(self) -> str:
        if self.kind == "same":
            return f"the boards have the same digit at {place(*self.cell)}"
        return f"{_SUBJECTS[self.kind]} has a {self.digit} at {place(*self.cell)}"


def sentence(kind: str, rng: np.random.Generator) -> Sentence:
    """One of the kind (of SENTENCES)."""
    if kind not in SENTENCES:
        raise ValueError(f"kind: wanted one of {SENTENCES}, got {kind!r}")
    return Sentence(kind, _cell(rng), int(rng.integers(10)))


def boards_for(said: Sentence, wanted: bool, rng: np.random.Generator) -> tuple[Board, Board]:
    """Two boards of which the sentence is true, or false; each way of being so is as likely."""
    both = draw_digits(rng), draw_digits(rng)
    if said.kind == "same":
        both[1][said.cell] = both[0][said.cell] if wanted else _another(both[0][said.cell], rng)
        return both
    ways = [way for way in _EITHER if (way in _HOLDS[said.kind]) == wanted]
    for board, has_it in zip(both, ways[int(rng.integers(len(ways)))], strict=True):
        board[said.cell] = said.digit if has_it else _another(said.digit, rng)
    return both


def _another(digit: int, rng: np.random.Generator) -> int:
    return (int(digit) + 1 + int(rng.integers(9))) % 10


def caption(kind: str, board: Board, rng: np.random.Generator) -> str:
    """What stands at one to four places of the board, in any order."""
    if kind not in CAPTIONS:
        raise ValueError(f"kind: wanted one of {CAPTIONS}, got {kind!r}")
    cells = [divmod(int(n), SHAPE[1]) for n in rng.permutation(CELLS)[: 1 + CAPTIONS.index(kind)]]
    return " and ".join(f"{board[cell]} at {place(*cell)}" for cell in cells)


def vocabulary() -> tuple[str, ...]:
    """Every word that the texts are made of, sorted."""
    rng = np.random.default_rng(0)
    words: set[str] = {*DIGITS, *ROWS, *COLUMNS, *ANSWERS, *TRUTH}
    board = draw_digits(rng)
    for kind in QUESTIONS:
        words.update(question(kind, board, rng)[0].split())
    for kind in SENTENCES:
        words.update(sentence(kind, rng).text.split())
    words.update(caption("two", board, rng).split())
    return tuple(sorted(words))


def _parts(text: str) -> list[tuple[int, tuple[int, int]]]:
    """(digit, cell) of each part of a caption."""
    parts = (part.split() for part in text.split(" and "))
    return [(int(digit), (ROWS.index(row), COLUMNS.index(column))) for digit, _, row, column in parts]


def right_parts(text: str, board: Board) -> list[bool]:
    """Of each digit of a caption, whether the board has it there."""
    return [bool(board[cell] == digit) for digit, cell in _parts(text)]


def describes(text: str, board: Board) -> bool:
    """Whether a caption is true of a board."""
    return all(right_parts(text, board))


def places_in(text: str) -> list[int]:
    """The places that a caption names, numbered row by row."""
    return [SHAPE[1] * row + column for _, (row, column) in _parts(text)]
