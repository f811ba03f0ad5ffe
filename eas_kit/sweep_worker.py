"""One run of a sweep, in a process of its own: `python -m eas_kit.sweep_worker FOLDER`, where the sweep left job.json.

Exit codes: 0 the result is in the sweep's folder; 1 it failed, error.json says how; 3 another process is at this run.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from .cache import Busy, cached
from .errors import RunError

JOB_FILE, ERROR_FILE, LOG_FILE = "job.json", "error.json", "log.txt"
BUSY = 3
LOOK_FOR_PARENT = 0.5  # seconds


def main(folder: str) -> int:
    here = Path(folder)
    job = json.loads((here / JOB_FILE).read_text(encoding="utf-8"))
    _end_with(os.getppid())
    out = (here / job["out"]).resolve()
    try:
        cached(out / "results", job["name"], job["key"], lambda: _timed(job, here, out))
    except Busy:
        return BUSY
    except BaseException as error:  # SystemExit of a run is a failure of it too
        said = {
            "error": _one_line(error),
            "traceback": getattr(error, "notebook_traceback", "") or traceback.format_exc(),
        }
        (here / ERROR_FILE).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        traceback.print_exc()
        return 1
    return 0


def _timed(job: dict[str, Any], here: Path, out: Path) -> dict[str, Any]:
    start = time.monotonic()
    key = job["key"]
    if key["kind"] == "arms":
        from .arm_runs import run_arm

        found = run_arm(key["settings"], out / "arms")
    else:
        found = _run_notebook(key["kind"], key["settings"], here, job["notebooks"])
    return {"seconds": time.monotonic() - start, "result": _plain(found)}


def _run_notebook(name: str, parameters: dict[str, Any], here: Path, notebooks: str | None) -> dict[str, Any]:
    """The notebook's single numbers by dotted names, from its results.json, and how long and large it was."""
    from . import runner
    from .report import read_results

    went = runner.run([name], parameters, out=here / "run", folder=notebooks, resume=True, pages=False)
    (outcome,) = went.outcomes
    if not went.ok:
        error = RunError(f"code cell {outcome.cell}: {outcome.error}" if outcome.cell else outcome.error)
        error.notebook_traceback = outcome.traceback
        raise error
    try:
        metrics = read_results(here / "run", name)["metrics"]
    except RunError:  # a notebook of one's own need not leave any
        metrics = {}
    return {"notebook_seconds": outcome.seconds, "peak_mb": outcome.peak_mb, **dict(_single(metrics))}


def _single(metrics: dict[str, Any], prefix: str = ""):
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from _single(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            yield f"{prefix}{name}", value


def _plain(value: Any) -> Any:
    from .report import plain

    return plain(value)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _end_with(parent: int) -> None:
    """Ends this process when the sweep that started it is gone, so that the next one finds the run free."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_FOR_PARENT)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
