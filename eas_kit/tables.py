"""What we measured beside the paper's tables: value, spread over seeds, published value, difference.

    python -m eas_kit.tables check                 # is data/paper_tables.json whole, and how much of it is known?

    found = beside(read_tables()["1"], frame)      # a frame of compare.run_arms with a column `row`
    print(to_markdown(found))

The published figures are of other models and data than the bundled ones: a difference is a number, not a judgement.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .paper import known_cells, read_tables, row_of

if TYPE_CHECKING:
    import pandas

UNKNOWN = "not known to us"


def beside(
    table: Mapping[str, Any], frame: pandas.DataFrame, costs: pandas.DataFrame | None = None
) -> pandas.DataFrame:
    """Measured beside published, a line for every row and column of the paper's table.

    Args:
        table: one of `paper.read_tables`.
        frame: one line a run, as `compare.run_arms` returns them, with the paper's row in `row` (and, where it holds
            several tables, its number in `table`).
        costs: what was measured apart from these runs, in the same form: times want a machine that does nothing else.
            It fills what the frame leaves open.

    A column of the paper names in `measured` what it reads of a run: a column of the frame, "test_columns.NAT" for a
    key of a dict in one, or one of these. `final_macs`: multiply-accumulates as the row is used, merged where that is
    exact and the row is not of the unmerged adapters. `macs_more`: that, less the reference row's. `speed`: the
    reference row's time for a decoded token over the row's. A column with a `task` is read of runs with that `task`;
    it may be a list of tasks.

    Returns:
        Columns table, row, column, unit, measured (mean over runs; NaN where nothing was measured), sd (NaN for one
        run), runs, published (NaN where null), difference (measured - published), source,
        and skipped: how many sites the runs of the row skipped, where its name has the paper's number. In the paper's
        units.

    Raises:
        ConfigError: the frame names a row that the table does not have.
    """
    import pandas as pd

    sources = [_runs_by_row(table, part) for part in (frame, costs) if part is not None]
    lines = []
    for row in table["rows"]:
        skipped = next((run["k"] for runs in sources for run in runs.get(row["row"], ()) if "k" in run), None)
        for column in table["columns"]:
            found = (_measured(table, row, column, runs) for runs in sources)
            values = next((values for values in found if values), [])
            values = [value * column["scale"] for value in values]
            lines.append(_line(table, row, column, values) | {"skipped": skipped})
    return pd.DataFrame(lines)


def _runs_by_row(table: Mapping[str, Any], frame: pandas.DataFrame) -> dict[str, list[dict[str, Any]]]:
    if not len(frame):
        return {}
    if "row" not in frame:
        raise ConfigError(f"beside: wanted a frame with a column 'row'; this one has {', '.join(frame.columns)}")
    if "table" in frame:
        frame = frame[frame["table"].astype(str) == table["table"]]
    by_row: dict[str, list[dict[str, Any]]] = {}
    for run in frame.to_dict("records"):
        by_row.setdefault(row_of(table, run["row"])["row"], []).append(run)
    return by_row


def _measured(table: Mapping, row: Mapping, column: Mapping, by_row: Mapping[str, list[dict]]) -> list[float]:
    """What a column reads of each run of a row; runs that do not hold it are left out."""

    tasks = column.get("task")
    tasks = [tasks] if isinstance(tasks, str) else tasks

    def runs(of: Mapping[str, Any]) -> list[dict]:
        return [run for run in by_row.get(of["row"], ()) if tasks is None or run.get("task") in tasks]

    def final(of: Mapping[str, Any], name: str) -> list[float]:
        return [_final(run, name, not of.get("unmerged")) for run in runs(of)]

    name = column["measured"]
    if name == "final_macs":
        found = final(row, "macs")
    elif name in ("macs_more", "speed"):
        part = "macs" if name == "macs_more" else "decode_seconds"
        reference = _mean(_finite(final(row_of(table, table["reference"]), part)))
        found = [own - reference if name == "macs_more" else reference / own for own in final(row, part)]
    else:
        found = [_value(run, name) for run in runs(row)]
    return _finite(found)


def _final(run: Mapping[str, Any], name: str, merged: bool) -> float:
    found = _value(run, f"merged_{name}") if merged else math.nan
    return _value(run, name) if math.isnan(found) else found


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _line(table: Mapping, row: Mapping, column: Mapping, values: list[float]) -> dict[str, Any]:
    count, cell, mean = len(values), row["cells"].get(column["column"]), _mean(values)
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1)) if count > 1 else math.nan
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
    """A table to read: a line a row; how many sites were skipped, where any was; for each column what was measured
    (mean ± sd), and, where the paper's figure of any row is known, `paper` and `difference`.

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
            line = lines.setdefault(cell["row"], {"row": cell["row"], "runs": 0, "skipped here": cell.get("skipped")})
            line["runs"] = max(line["runs"], cell["runs"])
            line[title] = _number(cell["measured"]) or "not measured"
            if cell["runs"] > 1:
                line[title] += f" ± {_number(cell['sd'])}"
            if known:
                line[f"{name}, paper"] = _number(cell["published"]) or UNKNOWN
                line[f"{name}, difference"] = _number(cell["difference"], "+")
    frame = pd.DataFrame(list(lines.values()))
    if frame.empty or not any(k > 0 for k in frame["skipped here"] if k is not None):
        return frame.drop(columns="skipped here", errors="ignore")
    frame["skipped here"] = ["" if pd.isna(k) else str(int(k)) for k in frame["skipped here"]]
    return frame


def _number(value: float, sign: str = "") -> str:
    """Three digits that say something; empty for NaN."""
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return "" if math.isnan(value) else "0" if value == 0 else f"{value:{sign}.{digits}f}"


def to_markdown(found: pandas.DataFrame, columns: Sequence[str] | None = None) -> str:
    """`to_frame` as a Markdown table."""
    frame = to_frame(found, columns)
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
