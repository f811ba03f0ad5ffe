"""Runs notebooks in reading order, strictly: everything is checked before anything runs, and a failure is a failure.

    report = run(["00_start_here"], {"seed": 1}, out="runs/mine")
    report.ok, report.outcomes[0].seconds

The run folder holds the executed copies, each notebook's ``results.json`` (see ``report``), ``run.json`` with what was
run and how it went, and ``index.html``, which shows all of it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from . import report
from .errors import RunError
from .notebooks import (
    RUN_DIR,
    Notebook,
    Parameters,
    choose,
    find_folder,
    read_notebooks,
    read_parameters,
    resolve,
)
from .terminal import ProgressLine, clock, closing_table, failure_text, shown

DONE, KEPT, FAILED, STOPPED, NOT_RUN = "done", "kept", "FAILED", "stopped", "not run"


@dataclass
class Outcome:
    """How one notebook went; kept in run.json. ``parameters`` are those that differ from the notebook's cell."""

    notebook: str
    status: str = NOT_RUN
    title: str = ""
    cells: int = 0
    seconds: float = 0.0
    peak_mb: float = 0.0
    path: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    finished: str = ""
    error: str = ""
    cell: int = 0
    source: str = ""
    traceback: str = ""


@dataclass
class RunReport:
    """All of a run. ``ok`` when no notebook failed and none was left out."""

    out: Path
    outcomes: list[Outcome]
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        return all(outcome.status in (DONE, KEPT) for outcome in self.outcomes)


def run(
    wanted: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    params_file: str | Path | None = None,
    out: str | Path | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    keep_going: bool = False,
    cell_timeout: float | None = None,
    stream: TextIO | None = None,
    pages: bool = True,
) -> RunReport:
    """Run the wanted notebooks (all, if none is named) and leave everything in ``out``.

    Args:
        parameters: values for every chosen notebook that has them; one that none has is an error.
        params_file: YAML, see ``notebooks.read_parameters``; ``parameters`` win over it.
        out: the run folder; runs/<date>-<time> if not given. It must be new, empty, or a run folder.
        resume: keep notebooks already done with the same parameters and the same source.
        keep_going: go on with the next notebook after one has failed.
        cell_timeout: seconds one cell may take.
        stream: where progress is printed (standard output).
        pages: make index.html and the executed copies' HTML.

    Raises:
        RunError: what was asked for does not make sense. Nothing has run then. A failing notebook does not raise.
    """
    stream = stream or sys.stdout
    notebooks = read_notebooks(find_folder(folder))
    chosen = choose(notebooks, wanted)
    from_file = read_parameters(params_file, notebooks) if params_file is not None else Parameters()
    values = resolve(chosen, parameters or {}, from_file)
    out = _prepare_folder(out, resume)

    earlier = _read_record(out)
    outcomes = [
        Outcome(n.name, title=n.title, path=f"{n.name}.ipynb", parameters=values[n.name], digest=n.digest)
        for n in chosen
    ]
    result = RunReport(out, outcomes)
    start = time.monotonic()
    fresh: list[str] = []
    print(f"{len(chosen)} notebook{'s' * (len(chosen) > 1)} -> {shown(out)}", file=stream, flush=True)
    for number, (notebook, outcome) in enumerate(zip(chosen, outcomes), 1):
        done = earlier.get(notebook.name)
        if resume and done and _is_done(done, outcome, out):
            _keep(outcome, done)
            note = f"; {fresh[-1]} before it was run anew, leave out --resume to follow it" if fresh else ""
            print(f"[{number}/{len(chosen)}] {notebook.name}  already done, kept{note}", file=stream, flush=True)
        else:
            fresh.append(notebook.name)
            _run_one(notebook, outcome, out, f"[{number}/{len(chosen)}]", cell_timeout, stream, resume)
            earlier[notebook.name] = asdict(outcome)
            _write_record(out, earlier)
        if outcome.status == STOPPED:
            result.interrupted = True
            break
        if outcome.status == FAILED and not keep_going:
            break
    result.seconds = time.monotonic() - start

    if pages:
        from .pages import write_pages

        write_pages(out)
    print(f"\n{closing_table(outcomes, out)}\n", file=stream)
    peak = max((o.peak_mb for o in outcomes), default=0.0)
    print(f"{clock(result.seconds)} in all, at most {peak:.0f} MB in a notebook's kernel.", file=stream)
    if pages:
        print(f"Open {shown(out / 'index.html')} to see it.", file=stream, flush=True)
    return result


def _run_one(
    notebook: Notebook,
    outcome: Outcome,
    out: Path,
    label: str,
    timeout: float | None,
    stream: TextIO,
    resume: bool,
) -> None:
    from .kernel import execute  # papermill and its friends take a moment to import

    given = ", ".join(f"{name}={value!r}" for name, value in outcome.parameters.items())
    print(f"{label} {notebook.name}  {given}".rstrip(), file=stream, flush=True)
    target = out / outcome.path
    _remove_leftovers(out, notebook.name, resume)
    parameters = dict(outcome.parameters)
    if RUN_DIR in notebook.defaults:
        parameters[RUN_DIR] = _run_dir_for(notebook, out)
        report.notebook_folder(out, notebook.name)

    line = ProgressLine(stream)
    went = execute(notebook.path, target, parameters, line, timeout)
    line.end()

    outcome.cells, outcome.seconds, outcome.peak_mb = went.cells, round(went.seconds, 2), round(went.peak_mb, 1)
    outcome.error, outcome.cell, outcome.source, outcome.traceback = went.error, went.cell, went.source, went.traceback
    outcome.finished = report.now()
    outcome.status = STOPPED if went.interrupted else FAILED if went.error else DONE
    if outcome.status == DONE:
        print(f"      done in {clock(went.seconds)}, peak {went.peak_mb:.0f} MB", file=stream, flush=True)
    else:
        print(failure_text(outcome, out), file=stream, flush=True)


def _run_dir_for(notebook: Notebook, out: Path) -> str:
    """Relative to the notebook (where its kernel works) inside one checkout, so that no executed copy names a
    person's folders; absolute otherwise."""
    inside = out.is_relative_to(notebook.path.parent.parent)
    return os.path.relpath(out, notebook.path.parent) if inside else str(out)


def _prepare_folder(out: str | Path | None, resume: bool) -> Path:
    if out is None:
        if resume:
            raise RunError("--resume needs --out DIR, the folder of the run to go on with")
        out = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    out = Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; --out wants a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "run.json").exists():
        raise RunError(f"{out} holds other things than a run: give an empty or a new folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "run.json").exists():
        _write_record(out, {})
    return out


def _read_record(out: Path) -> dict[str, dict[str, Any]]:
    return {entry["notebook"]: entry for entry in report.read_json(out / "run.json")["notebooks"]}


def _write_record(out: Path, entries: Mapping[str, dict[str, Any]]) -> None:
    ordered = sorted(entries.values(), key=lambda entry: entry["notebook"])
    record = {"format": report.FORMAT, "name": out.name, "written": report.now(), "versions": report.versions()}
    report.write_json(out / "run.json", {**record, "notebooks": report.plain(ordered)})


def _is_done(done: Mapping[str, Any], wanted: Outcome, out: Path) -> bool:
    same = done["parameters"] == report.plain(wanted.parameters) and done["digest"] == wanted.digest
    return done["status"] == DONE and same and (out / done["path"]).exists()


def _keep(outcome: Outcome, done: Mapping[str, Any]) -> None:
    for name in ("cells", "seconds", "peak_mb", "finished"):
        setattr(outcome, name, done[name])
    outcome.status = KEPT


def _remove_leftovers(out: Path, name: str, resume: bool) -> None:
    """A notebook that runs anew must not find, or leave for the next ones, what an earlier run of it wrote.

    With ``resume`` its folder stays, but for the results: finished parts (the arms of a comparison, checkpoints) are
    files there that say themselves which settings they belong to.
    """
    import shutil

    for path in (f"{name}.ipynb", f"{name}.html", f"{name}/results.json"):
        (out / path).unlink(missing_ok=True)
    if not resume:
        shutil.rmtree(out / name, ignore_errors=True)
