"""The paper's tables as data: the file data/paper_tables.json, what is wrong with it, and the arms that its rows are.

A figure that is not known to us is null in the file. To fill one in, write ``{"value": 12.3, "source": "paper"}``
in its place, and ask ``python -m eas_kit.tables check``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .arms import Arm
from .errors import ConfigError

NUMBERS = tuple("12345678")
_TABLE = (
    "table",
    "title",
    "model",
    "sites",
    "stand_ins",
    "known",
    "reference",
    "columns",
    "rows",
    "stated",
)
_COLUMN = ("column", "unit", "measured", "scale")
_ROW = ("row", "arm", "cells")  # and "unmerged": true, where the row is of the adapters before they are folded


def default_path() -> Path:
    """data/paper_tables.json of the checkout that eas_kit runs from, else of the working folder."""
    places = [Path(__file__).resolve().parents[1], Path.cwd()]
    return next((p for p in (place / "data" / "paper_tables.json" for place in places) if p.is_file()), places[0])


def read_tables(path: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """The paper's tables by number ("1" to "8"), each with `paper` and `sources` of the whole file.

    Raises:
        ConfigError: no such file, or it has faults; the message lists them.
    """
    content = _read(path)
    faults = find_faults(content)
    if faults:
        raise ConfigError(f"{path or default_path()} has {len(faults)} faults:\n" + "\n".join(faults))
    shared = {"paper": content["paper"], "sources": content["sources"]}
    return {table["table"]: {**table, **shared} for table in content["tables"]}


def _read(path: str | Path | None) -> Any:
    path = Path(path or default_path())
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the paper's tables, {path}, cannot be read ({error}); they are data/paper_tables.json of a checkout"
        ) from error


def find_faults(content: Any) -> list[str]:
    """What is wrong with the file's content, a line a fault; empty if nothing is."""
    if not isinstance(content, dict) or content.get("format") != 1:
        return ["wanted an object with format 1"]
    faults = [f"no {name!r}" for name in ("paper", "sources", "tables") if not content.get(name)]
    if faults:
        return faults
    faults += [f"paper: no {name!r}" for name in ("arxiv", "version", "title", "rank") if name not in content["paper"]]
    numbers = [table.get("table") for table in content["tables"]]
    if numbers != list(NUMBERS):
        faults.append(f"wanted tables {', '.join(NUMBERS)} in this order, got {', '.join(map(str, numbers))}")
    for table in content["tables"]:
        where = f"table {table.get('table')}"
        missing = [name for name in _TABLE if name not in table]
        if missing:
            faults.append(f"{where}: no {', '.join(missing)}")
            continue
        columns = [column.get("column") for column in table["columns"]]
        faults += [
            f"{where}: column {c} has {sorted(c)}, wanted {_COLUMN}"
            for c in table["columns"]
            if set(c) - {"task"} != set(_COLUMN)
        ]
        for what, names in (("column", columns), ("row", [row.get("row") for row in table["rows"]])):
            faults += [f"{where}: two {what}s {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
        if not table["stand_ins"] or not all({"model", "task"} <= set(one) for one in table["stand_ins"]):
            faults.append(f"{where}: stand_ins is a list of {{model, task}}, what runs here in place of the paper's")
        if table["reference"] not in (None, *(row.get("row") for row in table["rows"])):
            faults.append(f"{where}: its reference, {table['reference']!r}, is none of its rows")
        for row in table["rows"]:
            faults += [f"{where}, {fault}" for fault in _faults_of_row(row, columns, content["sources"])]
        for said in table["stated"]:
            faults += [f"{where}, stated {fault}" for fault in _faults_of_cell(said, content["sources"])]
    return faults


def _faults_of_row(row: Mapping[str, Any], columns: Sequence[str], sources: Mapping) -> Iterable[str]:
    if set(row) - {"unmerged"} != set(_ROW):
        yield f"row {row.get('row')!r}: has {sorted(row)}, wanted {_ROW}"
        return
    where = f"row {row['row']!r}"
    if list(row["cells"]) != list(columns):
        yield f"{where}: its cells are {', '.join(row['cells'])}; wanted one for every column: {', '.join(columns)}"
    for name, cell in row["cells"].items():
        if cell is not None:
            yield from (f"{where}, {name}: {fault}" for fault in _faults_of_cell(cell, sources))
    try:
        make_arm(row["arm"])
    except (ConfigError, TypeError) as error:
        yield f"{where}: no arm: {error}"


def _faults_of_cell(cell: Any, sources: Mapping) -> Iterable[str]:
    if (
        not isinstance(cell, dict)
        or isinstance(cell.get("value"), bool)
        or not isinstance(cell.get("value"), int | float)
    ):
        yield f"wanted null or {{value: a number, source: ...}}, got {cell!r}"
    elif cell.get("source") not in sources:
        yield f"source {cell.get('source')!r} is none of {', '.join(sources)}: a figure says where it was seen"


def make_arm(spec: Mapping[str, Any]) -> Arm:
    """An `Arm` of a row's or a grid's words.

    Raises:
        ConfigError: the words make no arm.
    """
    try:
        return Arm(**spec)
    except TypeError as error:
        raise ConfigError(
            f"an arm has method, k, chosen_by, candidates and settings; got {dict(spec)} ({error})"
        ) from None


def row_of(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A row by its name. Raises ConfigError, with the rows there are."""
    for row in table["rows"]:
        if row["row"] == name:
            return row
    known = ", ".join(repr(row["row"]) for row in table["rows"])
    raise ConfigError(f"table {table['table']} has no row {name!r}; its rows are {known}")


def scaled_arm(table: Mapping[str, Any], name: str, sites: int, skip_rank: int, groups: int = 2) -> dict[str, Any]:
    """The words of a row's arm, for another model than the paper's.

    The share of skipped sites stays: k of 32 becomes the nearest k of `sites` (halves to the even number), 1 at least.
    So do the ratios of ranks: the paper's 256 is `skip_rank`, rounded to a multiple of `groups`.
    """
    arm = dict(row_of(table, name)["arm"])
    if arm.get("k"):
        arm["k"] = max(1, round(arm["k"] * sites / table["sites"]))
    ranks = {"skip_rank", "adapt_rank"} & set(arm.get("settings") or {})
    if ranks:
        scale = skip_rank / table["paper"]["rank"]
        smaller = {r: max(groups, groups * round(arm["settings"][r] * scale / groups)) for r in sorted(ranks)}
        arm["settings"] = {**arm["settings"], **smaller}
    return arm


def known_cells(table: Mapping[str, Any]) -> tuple[int, int]:
    """How many of a table's cells hold a figure, and how many there are."""
    cells = [cell for row in table["rows"] for cell in row["cells"].values()]
    return sum(cell is not None for cell in cells), len(cells)
