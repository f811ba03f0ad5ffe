"""What is said about 3 x 3 boards of digits: questions, sentences about two boards, captions, and what is true.

Numbers and words alone, no pictures: `boards.py` makes tasks of them, and `tiny-meter` was pretrained on the kinds in
PRETRAINED. The other kinds are new to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
DIGITS = tuple("0123456789")
ANSWERS = (*DIGITS, "yes", "no", "even", "odd")
"""The closed list of answers to questions on one board."""
TRUTH = ("false", "true")
QUESTIONS = ("cell", "exists", "count", "parity", "maximum", "compare")
SENTENCES = ("each", "both", "one", "same", "larger")
CAPTIONS = ("one", "two", "three", "four")
PRETRAINED = {"question": ("cell", "exists", "count"), "sentence": ("each", "both"), "caption": ("one", "two")}

Board = np.ndarray  # (3, 3) of 0..9


def place(row: int, column: int) -> str:
    return f"{ROWS[row]} {COLUMNS[column]}"


def _cell(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(3)), int(rng.integers(3))


def _other_cell(rng: np.random.Generator, cell: tuple[int, int]) -> tuple[int, int]:
    number = (3 * cell[0] + cell[1] + 1 + int(rng.integers(8))) % 9
    return divmod(number, 3)


def _digit_there_or_not(board: Board, rng: np.random.Generator) -> int:
    """As likely one that the board has as one that it has not (but for boards of all ten digits: there are none)."""
    there = np.unique(board)
    pool = there if rng.random() < 0.5 else np.setdiff1d(np.arange(10), there)
    return int(rng.choice(pool))


def question(kind: str, board: Board, rng: np.random.Generator) -> tuple[str, str, tuple[str, ...]]:
    """A question of the kind (of QUESTIONS), its answer, and the answers that such questions have."""
    cell = _cell(rng)
    if kind == "cell":
        return f"which digit is at {place(*cell)} ?", str(board[cell]), DIGITS
    if kind == "exists":
        digit = _digit_there_or_not(board, rng)
        return f"is there a {digit} ?", ("no", "yes")[int((board == digit).any())], ("yes", "no")
    if kind == "count":
        digit = _digit_there_or_not(board, rng)
        return f"how many times does {digit} occur ?", str(int((board == digit).sum())), DIGITS
    if kind == "parity":
        return f"is the digit at {place(*cell)} even or odd ?", ("even", "odd")[board[cell] % 2], ("even", "odd")
    if kind == "maximum":
        return f"which is the largest digit in the {ROWS[cell[0]]} row ?", str(board[cell[0]].max()), DIGITS
    if kind == "compare":
        other = _other_cell(rng, cell)
        text = f"is the digit at {place(*cell)} larger than the one at {place(*other)} ?"
        return text, ("no", "yes")[int(board[cell] > board[other])], ("yes", "no")
    raise ValueError(f"kind: wanted one of {QUESTIONS}, got {kind!r}")


@dataclass(frozen=True)
class Sentence:
    """A sentence about two boards."""

    text: str
    holds: Callable[[Board, Board], bool]
    plant: Callable[[Board, Board], None]
    """Changes two boards so that it holds."""


def sentence(kind: str, rng: np.random.Generator) -> Sentence:
    """One of the kind (of SENTENCES)."""
    cell, digit = _cell(rng), int(rng.integers(10))

    def put(*boards: Board) -> None:
        for board in boards:
            board[cell] = digit

    if kind == "each":
        return Sentence(f"each board has a {digit} at {place(*cell)}", lambda a, b: a[cell] == b[cell] == digit, put)
    if kind == "both":
        return Sentence(
            f"both boards have a {digit}", lambda a, b: bool((a == digit).any() and (b == digit).any()), put
        )
    if kind == "one":
        return Sentence(
            f"just one board has a {digit}",
            lambda a, b: bool((a == digit).any() != (b == digit).any()),
            lambda a, b: (put(a), b.__setitem__(b == digit, (digit + 1) % 10))[0],
        )
    if kind == "same":
        return Sentence(
            f"the boards have the same digit at {place(*cell)}",
            lambda a, b: bool(a[cell] == b[cell]),
            lambda a, b: b.__setitem__(cell, a[cell]),
        )
    if kind == "larger":

        def swap(a: Board, b: Board) -> None:
            a[cell], b[cell] = max(a[cell], b[cell], 1), min(a[cell], b[cell], 8)
            if a[cell] == b[cell]:
                b[cell] -= 1

        return Sentence(
            f"the digit at {place(*cell)} is larger on the left board", lambda a, b: bool(a[cell] > b[cell]), swap
        )
    raise ValueError(f"kind: wanted one of {SENTENCES}, got {kind!r}")


def boards_for(said: Sentence, wanted: bool, rng: np.random.Generator) -> tuple[Board, Board]:
    """Two boards of which the sentence is true, or false: then half of the time nearly true, one board changed."""
    while True:
        both = [rng.integers(10, size=(3, 3)) for _ in range(2)]
        if wanted or rng.random() < 0.5:
            said.plant(*both)
        if not wanted and rng.random() < 0.5:
            both[int(rng.integers(2))] = rng.integers(10, size=(3, 3))
        if said.holds(*both) == wanted:
            return both[0], both[1]


def caption(kind: str, board: Board, rng: np.random.Generator) -> str:
    """What stands at one to four places of the board, in any order."""
    if kind not in CAPTIONS:
        raise ValueError(f"kind: wanted one of {CAPTIONS}, got {kind!r}")
    cells = [divmod(int(n), 3) for n in rng.permutation(9)[: 1 + CAPTIONS.index(kind)]]
    return "a board with " + " and ".join(f"{board[cell]} at {place(*cell)}" for cell in cells)


def vocabulary() -> tuple[str, ...]:
    """Every word that the texts are made of, sorted."""
    rng = np.random.default_rng(0)
    words: set[str] = {*DIGITS, *ROWS, *COLUMNS, *ANSWERS, *TRUTH}
    board = rng.integers(10, size=(3, 3))
    for kind in QUESTIONS:
        words.update(question(kind, board, rng)[0].split())
    for kind in SENTENCES:
        words.update(sentence(kind, rng).text.split())
    words.update(caption("two", board, rng).split())
    return tuple(sorted(words))


def _parts(text: str) -> list[tuple[int, tuple[int, int]]]:
    """(digit, cell) of each part of a caption."""
    parts = (part.split() for part in text.removeprefix("a board with ").split(" and "))
    return [(int(digit), (ROWS.index(row), COLUMNS.index(column))) for digit, _, row, column in parts]


def right_parts(text: str, board: Board) -> list[bool]:
    """Of each digit of a caption, whether the board has it there."""
    return [bool(board[cell] == digit) for digit, cell in _parts(text)]


def describes(text: str, board: Board) -> bool:
    """Whether a caption is true of a board."""
    return all(right_parts(text, board))


def places_in(text: str) -> list[int]:
    """The places that a caption names, 0 to 8, row by row."""
    return [3 * row + column for _, (row, column) in _parts(text)]
