"""The 118 chemical elements as facts: the table behind the task ``elements`` and part of the bundled model's reading.

``elements.csv`` is written by ``data/make_elements.py`` from the package mendeleev (MIT licence).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Element:
    """One element; a fact that is not known is an empty text."""

    number: str
    name: str
    symbol: str
    period: str
    group: str
    block: str
    category: str
    state: str  # at 25 degrees Celsius
    discovered: str  # century


ATTRIBUTES = tuple(f.name for f in fields(Element) if f.name != "number")


@cache
def elements() -> tuple[Element, ...]:
    """All 118 elements by atomic number."""
    with (Path(__file__).parent / "elements.csv").open(newline="") as file:
        return tuple(Element(**row) for row in csv.DictReader(file))


@cache
def values(attribute: str) -> tuple[str, ...]:
    """The distinct known values of one attribute, sorted: the pool that wrong options are drawn from."""
    found = {getattr(e, attribute) for e in elements()} - {""}
    return tuple(sorted(found, key=lambda v: (len(v), v) if v.isdigit() else (0, v)))
