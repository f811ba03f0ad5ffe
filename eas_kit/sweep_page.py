"""The page of a sweep: every run with how it went, the table of results, and the tracebacks of what failed."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import report
from .pages import badge, render_rows, whole_page

if TYPE_CHECKING:
    from .sweep import SweepReport, Went

MAX_COLUMNS = 40  # results.csv has them all


def write_sweep_page(result: SweepReport, run: str) -> Path:
    """Write ``index.html`` into the sweep's folder; returns its path."""
    good = sum(went.status in ("done", "kept") for went in result.went)
    facts = [
        run,
        f"{good} of {len(result.went)} runs done",
        f"{result.seconds / 60:.1f} minutes",
        report.now()[:16].replace("T", " "),
    ]
    rows = "".join(
        f"<tr><td>{html.escape(went.job.name)}</td><td>{badge(went.status)}</td><td class=n>{went.seconds:.0f}</td>"
        f"<td>{_settings(went)}</td><td>{_links(went, result.out)}</td></tr>"
        for went in result.went
    )
    head = "<tr><th>run<th>status<th class=n>seconds<th>settings that vary<th>open</tr>"
    body = [
        f"<div class=scroll><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>",
        *(_failure(went) for went in result.went if went.error),
        _results(result),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions().items())
    path = result.out / "index.html"
    path.write_text(whole_page(f"sweep {result.out.name}", facts, "".join(body), versions), encoding="utf-8")
    return path


def _settings(went: Went) -> str:
    return html.escape(", ".join(f"{name} {value}" for name, value in went.job.varied.items()))


def _links(went: Went, out: Path) -> str:
    folder = f"runs/{went.job.name}"
    found = [("log", f"{folder}/log.txt"), ("notebook", f"{folder}/run/{went.job.kind}.ipynb")]
    return " · ".join(f"<a href='{html.escape(path)}'>{name}</a>" for name, path in found if (out / path).exists())


def _failure(went: Went) -> str:
    return (
        f"<section><h2>{html.escape(went.job.name)} {badge(went.status)}</h2>"
        f"<p class=error>{html.escape(went.error)}</p><pre>{html.escape(went.traceback)}</pre></section>"
    )


def _results(result: SweepReport) -> str:
    """What differs between the runs: a column that is empty or the same in all of them says nothing here."""
    lines: list[dict[str, Any]] = report.plain(result.frame.to_dict("records"))
    if len(lines) > 1:
        same = {name for name in lines[0] if len({repr(line.get(name)) for line in lines}) == 1}
        lines = [{name: value for name, value in line.items() if name not in same} for line in lines]
    names = [name for name in lines[0] if name not in ("details", "error")][:MAX_COLUMNS]
    lines = [{name: _short(line.get(name)) for name in names} for line in lines]
    whole = "<p class=links><a href='results.csv'>results.csv</a></p>"
    return f"<section><h2>Results</h2>{render_rows(lines)}{whole}</section>"


def _short(value: Any) -> Any:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
