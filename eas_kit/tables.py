"""The paper's tables as data, and what we measured beside them: value, spread over seeds, published value, difference.

    python -m eas_kit.tables check                 # is data/paper_tables.json whole, and how much of it is known?

    paper = read_tables()
    found = beside(paper["1"], frame)              # a frame of compare.run_arms with a column `row`
    print(to_markdown(found))

The published figures are of other models and data than the bundled ones: a difference is a number, not a judgement. A
figure that is not available to us is null in the file, and "not published here" in a table.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arms import Arm
from .errors import ConfigError

if TYPE_CHECKING:
    import pandas

NUMBERS = tuple("12345678")
UNKNOWN = "not published here"
_TABLE = ("table", "title", "model", "sites", "stand_in", "stand_in_task", "known", "columns", "rows", "stated")
_COLUMN = ("column", "unit", "measured", "scale")
_ROW = ("row", "arm", "cells")


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
            f"{where}: column {c} has {sorted(c)}, wanted {_COLUMN}" for c in table["columns"] if set(c) != set(_COLUMN)
        ]
        for what, names in (("column", columns), ("row", [row.get("row") for row in table["rows"]])):
            faults += [f"{where}: two {what}s {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
        for row in table["rows"]:
            faults += [f"{where}, {fault}" for fault in _faults_of_row(row, columns, content["sources"])]
        for said in table["stated"]:
            faults += [f"{where}, stated {fault}" for fault in _faults_of_cell(said, content["sources"])]
    return faults


def _faults_of_row(row: Mapping[str, Any], columns: Sequence[str], sources: Mapping) -> Iterable[str]:
    if set(row) != set(_ROW):
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


def beside(
    table: Mapping[str, Any], frame: pandas.DataFrame, costs: pandas.DataFrame | None = None
) -> pandas.DataFrame:
    """Measured beside published, a line for every row and column of the paper's table.

    Args:
        table: one of `read_tables`.
        frame: one line a run, as `compare.run_arms` returns them, with the paper's row in `row` (and, where it holds
            several tables, its number in `table`). Columns of the paper name what they read: "test_accuracy",
            "test_columns.NAT" (a key of a dict).
        costs: what was measured apart from the runs (`eas_kit.measure`), a line a row: a column `row`, and more such
            columns. They win over the frame's.

    Returns:
        Columns table, row, column, unit, measured (mean over runs; NaN where nothing was measured), sd (NaN for one
        run), runs, published (NaN where null), difference (measured - published), source. In the paper's units.

    Raises:
        ConfigError: the frame names a row that the table does not have.
    """
    import pandas as pd

    if len(frame) and "row" not in frame:
        raise ConfigError(
            f"beside: the frame has no column 'row' (the paper's rows); it has {', '.join(frame.columns)}"
        )
    if "table" in frame:
        frame = frame[frame["table"].astype(str) == table["table"]]
    for name in dict.fromkeys(frame["row"] if len(frame) else ()):
        row_of(table, name)
    lines = []
    for row in table["rows"]:
        runs = frame[frame["row"] == row["row"]].to_dict("records") if len(frame) else []
        apart = [] if costs is None else costs[costs["row"] == row["row"]].to_dict("records")
        for column in table["columns"]:
            values = [_value(run, column["measured"]) for run in apart] or [
                _value(run, column["measured"]) for run in runs
            ]
            if all(math.isnan(value) for value in values):  # not measured apart
                values = [_value(run, column["measured"]) for run in runs]
            lines.append(_line(table, row, column, [v * column["scale"] for v in values if not math.isnan(v)]))
    return pd.DataFrame(lines)


def _line(table: Mapping, row: Mapping, column: Mapping, values: list[float]) -> dict[str, Any]:
    count, cell = len(values), row["cells"][column["column"]]
    mean = sum(values) / count if count else math.nan
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1)) if count > 1 else math.nan
    published = math.nan if cell is None else float(cell["value"])
    found = {"table": table["table"], "row": row["row"], "column": column["column"], "unit": column["unit"]}
    found |= {"measured": mean, "sd": sd, "runs": count, "published": published, "difference": mean - published}
    return found | {"source": None if cell is None else cell["source"]}


def _value(run: Mapping[str, Any], path: str) -> float:
    """The number at a dotted path of a run's line; NaN where there is none. Names may hold dots themselves."""
    found: Any = run.get(path)
    if found is None:
        head, _, rest = path.partition(".")
        inner = run.get(head)
        found = inner.get(rest) if rest and isinstance(inner, Mapping) else None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan


def to_frame(found: pandas.DataFrame, columns: Sequence[str] | None = None, empty: bool = False) -> pandas.DataFrame:
    """A table to read: a line a row; for each column what was measured (mean ± sd), and, where the paper's figure of
    any row is known, `paper` and `difference`.

    Args:
        found: of `beside`, one table.
        columns: which of the paper's columns; all of them, if not given.
        empty: keep columns in which nothing was measured and nothing is published.
    """
    import pandas as pd

    order, lines = list(dict.fromkeys(found["column"])), {}
    for name in columns or order:
        if name not in order:
            raise ConfigError(f"table {found['table'].iloc[0]} has no column {name!r}; it has {', '.join(order)}")
        cells = found[found["column"] == name]
        known = cells["published"].notna().any()
        if not (empty or known or cells["measured"].notna().any()):
            continue
        title = f"{name} ({cells['unit'].iloc[0]})"
        for cell in cells.to_dict("records"):
            line = lines.setdefault(cell["row"], {"row": cell["row"], "runs": 0})
            line["runs"] = max(line["runs"], cell["runs"])
            line[title] = _number(cell["measured"], cell["unit"]) or "not measured"
            if cell["runs"] > 1:
                line[title] += f" ± {_number(cell['sd'], cell['unit'])}"
            if known:
                line[f"{name}, paper"] = _number(cell["published"], cell["unit"]) or UNKNOWN
                line[f"{name}, difference"] = _number(cell["difference"], cell["unit"], "+")
    return pd.DataFrame(list(lines.values()))


def _number(value: float, unit: str, sign: str = "") -> str:
    """Two digits after the point where the paper's units need them; empty for NaN."""
    digits = 2 if unit in ("%", "x") and abs(value) < 10 else 1
    return "" if math.isnan(value) else f"{value:{sign}.{digits}f}"


def to_markdown(found: pandas.DataFrame, columns: Sequence[str] | None = None) -> str:
    """`to_frame` as a Markdown table."""
    frame = to_frame(found, columns)
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def known_cells(table: Mapping[str, Any]) -> tuple[int, int]:
    """How many of a table's cells hold a figure, and how many there are."""
    cells = [cell for row in table["rows"] for cell in row["cells"].values()]
    return sum(cell is not None for cell in cells), len(cells)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m eas_kit.tables check [FILE]`: exit code 0 if the file is whole, 1 if it has faults, 2 if misused."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] != "check" or len(argv) > 2:
        print("usage: python -m eas_kit.tables check [FILE]", file=sys.stderr)
        return 2
    try:
        tables = read_tables(*argv[1:])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    for table in tables.values():
        known, cells = known_cells(table)
        print(f"Table {table['table']}  {table['title']}: {len(table['rows'])} rows, {known} of {cells} figures known")
    return 0


if __name__ == "__main__":
    sys.exit(main())
