"""Pictures composed of real handwritten digits (the 1,797 8x8 scans in scikit-learn), disjoint by data role.

A picture is a 24 x 24 canvas of 3 x 3 cells, one unscaled 8 x 8 digit a cell, so that a vision tower with
8-pixel patches sees one digit a patch. Digit scans never cross the roles train / search / val / test.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from eas_kit.errors import TaskError

ROLES = ("train", "search", "val", "test")
CELL = 8  # pixels
GRID = 3  # cells a side
_SHARES = (0.6, 0.1, 0.1, 0.2)  # of each digit's scans, by role
_SPLIT_SEED = 20240322


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans, (1797, 8, 8) uint8 in 0..255, and their labels (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * (255 / 16)).round().astype(np.uint8), data.target


@cache
def scan_indices(role: str) -> tuple[np.ndarray, ...]:
    """For each digit 0..9 the numbers of its scans that belong to ``role``; raises TaskError for another role."""
    if role not in ROLES:
        raise TaskError(f"digit scans are split into {', '.join(ROLES)}; there is no {role!r}")
    _, labels = _scans()
    rng = np.random.default_rng(_SPLIT_SEED)
    out = []
    for digit in range(10):
        numbers = rng.permutation(np.flatnonzero(labels == digit))
        edges = (np.cumsum((0, *_SHARES)) * len(numbers)).round().astype(int)
        place = ROLES.index(role)
        out.append(numbers[edges[place] : edges[place + 1]])
    return tuple(out)


def _scan(digit: int, role: str, rng: np.random.Generator) -> np.ndarray:
    return _scans()[0][rng.choice(scan_indices(role)[digit])]


def draw_cells(cells: dict[tuple[int, int], int], role: str, rng: np.random.Generator) -> Image.Image:
    """A 24 x 24 RGB picture with a random scan of ``cells[row, column]`` in each named cell, black elsewhere."""
    canvas = np.zeros((GRID * CELL, GRID * CELL), dtype=np.uint8)
    for (row, column), digit in cells.items():
        canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = _scan(digit, role, rng)
    return Image.fromarray(canvas).convert("RGB")


def draw_board(board: np.ndarray, role: str, rng: np.random.Generator) -> Image.Image:
    """A full board; ``board`` is (3, 3) with digits 0..9."""
    return draw_cells({(r, c): int(board[r, c]) for r in range(GRID) for c in range(GRID)}, role, rng)


def draw_number(number: int, role: str, rng: np.random.Generator) -> Image.Image:
    """A number of one to three digits, written without gaps in a random row and at a random column that fits."""
    digits = [int(d) for d in str(number)]
    if number < 0 or len(digits) > GRID:
        raise TaskError(f"a picture holds numbers from 0 to 999, not {number}")
    row = int(rng.integers(GRID))
    left = int(rng.integers(GRID - len(digits) + 1))
    return draw_cells({(row, left + i): d for i, d in enumerate(digits)}, role, rng)
