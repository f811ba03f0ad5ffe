"""Runs a grid in several processes: each run in one of its own, so that one that fails or is killed is one row.

    report = sweep("benchmarks/grids/table_1.yaml", out="runs/table_1", workers=2)
    report.frame                                  # one line a run: settings and what came out

    runs/table_1/results.parquet, results.csv     the same table
    runs/table_1/index.html                       open this
    runs/table_1/results/NAME.json                a run's result; the same command keeps it and runs what is missing
    runs/table_1/runs/NAME/                       its log, its error, a notebook's executed copy
    runs/table_1/arms/                            files that runs of arms share: searches, scorers, learning rates

Stopped in any way, the same command goes on: results that are there stay, with the settings and the notebook they came
from; runs that failed, or were killed, run again. Several sweeps may fill one folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from . import report
from .cache import find_cached
from .errors import RunError
from .grids import Grid, Job, read_grid
from .sweep_worker import BUSY, ERROR_FILE, JOB_FILE, LOG_FILE
from .terminal import clock, shown

if TYPE_CHECKING:
    import pandas

DONE, KEPT, FAILED, STOPPED, NOT_RUN = "done", "kept", "FAILED", "stopped", "not run"
LOOK_EVERY = 0.1  # seconds
WAIT_FOR_OTHERS = 2.0  # seconds until a run that another sweep holds is asked for again


@dataclass
class Went:
    """How one run went. `error` is a line, `traceback` the whole; `result` is what it left, by name."""

    job: Job
    status: str = NOT_RUN
    seconds: float = 0.0
    error: str = ""
    traceback: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class SweepReport:
    """All of a sweep. `ok` when every run is done or was."""

    out: Path
    went: list[Went]
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        return all(went.status in (DONE, KEPT) for went in self.went)

    @property
    def frame(self) -> pandas.DataFrame:
        return to_frame(self.went)


def sweep(
    grid: str | Path | Grid,
    out: str | Path,
    workers: int = 1,
    notebooks: str | Path | None = None,
    stream: TextIO | None = None,
    pages: bool = True,
) -> SweepReport:
    """Run what is missing of a grid and leave one table of all its runs.

    Args:
        grid: the file, or what `read_grid` made of it.
        out: the folder; of this or of another grid. Runs that both have in common are shared.
        workers: processes at once. Each has cores / workers threads, unless OMP_NUM_THREADS says otherwise.
        notebooks: their folder, for a grid that runs one.
        stream: where progress is printed (standard output).
        pages: make index.html.

    Raises:
        RunError: the grid or the folder make no sense. Nothing has run then; a run that fails does not raise.
    """
    stream = stream or sys.stdout
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise RunError(f"workers is a number of processes from 1 up, got {workers!r}")
    grid = grid if isinstance(grid, Grid) else read_grid(grid, notebooks)
    out = _prepare(out)
    floor = _Floor(grid, out, workers, notebooks, stream)
    start = time.monotonic()
    try:
        floor.work()
    except KeyboardInterrupt:
        floor.stop()
    result = SweepReport(out, floor.went, time.monotonic() - start, floor.interrupted)
    _write_table(result)
    if pages:
        from .sweep_page import write_sweep_page

        write_sweep_page(result, grid.run)
    counts = {
        status: sum(went.status == status for went in result.went) for status in (DONE, KEPT, FAILED, STOPPED, NOT_RUN)
    }
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    print(f"{said}; {clock(result.seconds)} in all. Results: {shown(out / 'results.csv')}", file=stream, flush=True)
    if pages:
        print(f"Open {shown(out / 'index.html')} to see them.", file=stream, flush=True)
    return result


def listing(grid: Grid, out: str | Path | None = None) -> str:
    """The runs of a grid, a line each, with what is done already in `out`."""
    lines = [f"{len(grid.jobs)} runs of {grid.run}"]
    for number, job in enumerate(grid.jobs, 1):
        done = out is not None and _find(Path(out), job) is not None
        lines.append(f"{number:>4}  {'done  ' if done else ''}{job.name}  {_words(job)}")
    return "\n".join(lines)


def _words(job: Job) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in job.varied.items())


def to_frame(went: Sequence[Went]) -> pandas.DataFrame:
    """One line a run: run, status, seconds, error; the settings that the grid varies; what came out of it."""
    import pandas as pd

    lines = []
    for one in went:
        own = {"run": one.job.name, "status": one.status, "seconds": round(one.seconds, 2), "error": one.error}
        found = {**one.job.settings, **(one.result.get("words") or {}), **one.result}
        lines.append(own | {f"run_{name}" if name in own else name: value for name, value in found.items()})
    return pd.DataFrame(lines)


def read_sweep(out: str | Path) -> pandas.DataFrame:
    """The table that a sweep left in `out`, with lists and dicts as such.

    Raises:
        RunError: no sweep has left one there.
    """
    import pandas as pd

    path = Path(out) / "results.parquet"
    if not path.is_file():
        raise RunError(f"no results of a sweep in {out}: eas-kit sweep GRID.yaml --out {out} writes them")
    frame = pd.read_parquet(path)
    for name in frame.columns:
        coded = frame[name].map(lambda value: isinstance(value, str) and value[:1] in "[{")
        if coded.any():
            frame[name] = frame[name].map(_decoded)
    return frame


def _decoded(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value[:1] in ("[", "{") else value
    except ValueError:
        return value


def _write_table(result: SweepReport) -> None:
    """Lists and dicts as JSON: neither CSV nor a column of one kind can hold them. Written at once or not at all."""
    frame = result.frame
    for name in frame.columns:
        kinds = {type(value) for value in frame[name] if value is not None and value == value}
        if kinds & {list, dict, tuple} or (len(kinds) > 1 and kinds != {int, float}):
            frame[name] = frame[name].map(lambda v: json.dumps(v) if isinstance(v, list | dict | tuple) else v)
            if len({type(v) for v in frame[name] if v is not None and v == v}) > 1:
                frame[name] = frame[name].map(lambda v: v if v is None or isinstance(v, str) else json.dumps(v))
    for name, write in (("results.parquet", frame.to_parquet), ("results.csv", frame.to_csv)):
        part = result.out / f"{name}.part"
        write(part, index=False)
        part.replace(result.out / name)


def _prepare(out: str | Path) -> Path:
    out = Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; --out wants a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "results").is_dir():
        raise RunError(f"{out} holds other things than a sweep: give an empty or a new folder with --out")
    (out / "results").mkdir(parents=True, exist_ok=True)
    return out


def _find(out: Path, job: Job) -> dict | None:
    return find_cached(out / "results", job.name, report.plain(job.key))


class _Floor:
    """Where the workers are: starts them, looks after them, and says how each run went."""

    def __init__(self, grid: Grid, out: Path, workers: int, notebooks: str | Path | None, stream: TextIO) -> None:
        self.out, self.workers, self.stream, self.interrupted = out, workers, stream, False
        self.notebooks = None if notebooks is None else str(Path(notebooks).resolve())
        self.went = [Went(job) for job in grid.jobs]
        self.running: dict[subprocess.Popen, tuple[Went, float]] = {}

    def work(self) -> None:
        queue: list[tuple[float, Went]] = []
        for went in self.went:
            found = _find(self.out, went.job)
            if found is None:
                queue.append((0.0, went))
            else:
                went.status, went.result, went.seconds = KEPT, found["result"], found["seconds"]
        kept = len(self.went) - len(queue)
        some = f", {kept} of them done already" if kept else ""
        self._say(f"{len(self.went)} runs -> {shown(self.out)}{some}; {self.workers} at once")
        while queue or self.running:
            now = time.monotonic()
            due = [entry for entry in queue if entry[0] <= now][: self.workers - len(self.running)]
            for entry in due:
                queue.remove(entry)
                self._start(entry[1])
            for process in [process for process in self.running if process.poll() is not None]:
                went, started = self.running.pop(process)
                if process.returncode == BUSY:  # another sweep is at it
                    queue.append((time.monotonic() + WAIT_FOR_OTHERS, went))
                    continue
                went.seconds = time.monotonic() - started
                self._judge(went, process.returncode)
                self._tell(went, len(queue))
            time.sleep(LOOK_EVERY)

    def stop(self) -> None:
        self.interrupted = True
        for process in self.running:
            process.terminate()
        for process, (went, started) in self.running.items():
            process.wait()
            went.status, went.seconds = STOPPED, time.monotonic() - started
        self.running.clear()

    def _start(self, went: Went) -> None:
        folder = self.out / "runs" / went.job.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR_FILE).unlink(missing_ok=True)
        task = {"name": went.job.name, "key": report.plain(went.job.key), "notebooks": self.notebooks}
        report.write_json(folder / JOB_FILE, task | {"out": os.path.relpath(self.out, folder)})
        env = dict(os.environ)
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
        home = str(Path(__file__).resolve().parents[1])
        env["PYTHONPATH"] = os.pathsep.join(p for p in (home, env.get("PYTHONPATH")) if p)
        with open(folder / LOG_FILE, "wb") as log:
            command = [sys.executable, "-m", "eas_kit.sweep_worker", str(folder)]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
        self.running[process] = (went, time.monotonic())

    def _judge(self, went: Went, code: int) -> None:
        found = _find(self.out, went.job) if code == 0 else None
        if found is not None:
            went.status, went.result = DONE, found["result"]
            return
        folder = self.out / "runs" / went.job.name
        went.status = FAILED
        if (folder / ERROR_FILE).is_file():
            said = report.read_json(folder / ERROR_FILE)
            went.error, went.traceback = said["error"], said["traceback"]
        else:
            went.error = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code} and no result"
            went.traceback = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")[-4000:]

    def _tell(self, went: Went, waiting: int) -> None:
        over = sum(one.status != NOT_RUN for one in self.went)
        rest = f"  ({len(self.running)} running, {waiting} waiting)" if self.running or waiting else ""
        word = f"{went.status} in {clock(went.seconds)}"
        self._say(f"[{over}/{len(self.went)}] {went.job.name}  {word}{': ' + went.error if went.error else ''}{rest}")

    def _say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)
