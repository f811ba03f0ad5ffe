"""Checks of notebook 07: rows of the paper's tables, and what several seeds of them say."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from ..config import EASConfig
from ..paper import make_arm
from .verdict import exercise, how_far, names, whole


@exercise(names)
def rows_that_fold(answer: set[str], table: Mapping[str, Any]) -> tuple[bool, str]:
    """07: the rows of a table of `paper.read_tables` whose adapters are an affine map, which can be folded away."""
    parts = {}
    for row in table["rows"]:
        arm = make_arm(row["arm"])
        parts[row["row"]] = dict(arm.settings).get("parts", EASConfig.parts) if arm.method == "pia" else arm.method
    unknown = sorted(answer - set(parts))
    if unknown:
        return False, f"there is no row {unknown[0]!r}; they are {', '.join(map(repr, parts))}"
    truth = {row for row, part in parts.items() if part == "frozen"}
    if answer == truth:
        return True, f"{len(truth)} of {len(parts)} rows: after the prompt, router and pooled feature stay as they are"
    wrong = [row for row in parts if row in answer - truth]
    if wrong:
        part = parts[wrong[0]]
        return False, f"the adapter of {wrong[0]!r} ({part}) changes with every token, no one weight is equal to it"
    return False, f"those can be folded; {len(truth - answer)} more can, which train the same adapter as one of yours"


@exercise(whole)
def pairs_apart(answer: int, runs: Any, table: str, column: str = "test_loss") -> tuple[bool | None, str]:
    """07: how many pairs of rows of a table do not overlap over their seeds: every run of one below every run of the
    other. `runs`: a frame with table, row, seed and this column, such as the kept results."""
    here = runs[runs["table"] == table] if len(runs) else runs
    if not len(here) or here.groupby("row")["seed"].nunique().min() < 2:
        return None, f"this needs runs of table {table} with two seeds or more; there are none"
    values = {row: list(part[column]) for row, part in here.groupby("row", sort=False)}
    pairs = list(itertools.combinations(values.values(), 2))
    truth = sum(max(one) < min(other) or max(other) < min(one) for one, other in pairs)
    if answer == truth:
        return True, f"{truth} of {len(pairs)} pairs; the order of the others may change with a seed"
    if answer == 2 * truth:
        return False, "each pair counts once, whichever of its rows is the better one"
    if answer == len(pairs) - truth:
        return False, f"that many of the {len(pairs)} pairs do overlap"
    return False, f"there are {len(pairs)} pairs; {how_far(answer, truth, share=0, size=0)}"
