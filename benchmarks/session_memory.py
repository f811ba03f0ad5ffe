"""How much memory a reader's session takes: JupyterLab's server, and a kernel for each notebook that was run in it.

    python benchmarks/session_memory.py                    two minutes; needs playwright and chromium
    python benchmarks/session_memory.py --notebooks 00_start_here 01_probe_redundancy
    python benchmarks/session_memory.py --open 3           three notebooks at a time (default: 2)
    python benchmarks/session_memory.py --parameters own   the notebooks' own parameters, not the small ones
    python benchmarks/session_memory.py --out FILE.json    (default: results/session_memory.json)

Each notebook is opened and run in a real browser, in a JupyterLab without access to other machines, one after the
other. So many stay open, with their kernels; before a further one the oldest is closed and shut down, as the first page
advises where memory is short. Measured is what Binder's limit counts: the server
and everything it started, the browser not. `resident MB` counts pages that processes share (torch's code) for each of
them, `proportional MB` once; peaks, sampled four times a second.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from lab import BADGE, Browser, Lab, why_not  # noqa: E402

NOTEBOOKS = [
    "00_start_here",
    "02_search_with_bandit",
    "06_skip_mask_playground",
]  # the last two have something to press
LIMIT_MB = 1500  # what a session may take: Binder gives one to two GB


class Meter:
    """Peaks of a process and its children, in MB; use it with `with`."""

    def __init__(self, pid: int, interval: float = 0.25) -> None:
        self.process, self.interval = psutil.Process(pid), interval
        self.now: dict[str, float] = {}
        self.peak = {"resident MB": 0.0, "proportional MB": 0.0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> dict[str, float]:
        total = {"resident MB": 0.0, "proportional MB": 0.0}
        for member in (self.process, *self.process.children(recursive=True)):
            try:
                held = member.memory_full_info()
            except psutil.Error:  # it ended between the listing and the look
                continue
            total["resident MB"] += held.rss / 1e6
            total["proportional MB"] += held.pss / 1e6
        return total

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            for name, value in self.look().items():
                self.peak[name] = max(self.peak[name], value)


def rounded(values: dict[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in values.items()}


def measure(notebooks: list[str], small: bool, at_once: int) -> dict:
    """Runs the notebooks in one session; what it held after each, and at its peak."""
    steps, pages = [], []
    with tempfile.TemporaryDirectory() as folder, Lab(Path(folder)) as lab, Meter(lab.process.pid) as meter:
        steps.append({"after": "the server's start"} | rounded(meter.look()))
        with Browser() as browser:
            for name in notebooks:
                if len(pages) == at_once:
                    pages.pop(0).close_and_shut_down()
                began = time.perf_counter()
                page = browser.open(lab, lab.add(name, None if small else {}))
                opened = time.perf_counter() - began
                pages.append(page)
                page.run_all()
                held = rounded(meter.look())
                kernels = len(lab.ask("api/kernels"))
                seconds = {
                    "kernels": kernels,
                    "opened after s": round(opened, 1),
                    "run after s": round(time.perf_counter() - began, 1),
                }
                steps.append({"after": name} | held | seconds)
                downloads = sorted(page.outside - {BADGE})
                if page.problems or downloads:
                    raise SystemExit(f"{name}: {[*page.problems, *downloads]}")
        peak = rounded(meter.peak)
    return {"steps": steps, "peak": peak}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", nargs="+", default=NOTEBOOKS)
    parser.add_argument("--open", type=int, default=2, metavar="N", help="notebooks that stay open (default: 2)")
    parser.add_argument("--parameters", choices=("small", "own"), default="small")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "session_memory.json")
    chosen = parser.parse_args(arguments)
    if why_not():
        parser.error(why_not())
    found = measure(chosen.notebooks, small=chosen.parameters == "small", at_once=chosen.open)
    for step in found["steps"]:
        words = ", ".join(f"{name} {value}" for name, value in step.items() if name != "after")
        print(f"after {step['after']}: {words}")
    print(f"peak: {found['peak']}, limit {LIMIT_MB} MB")
    packages = ("torch", "transformers", "jupyterlab", "ipykernel", "ipywidgets", "plotly")
    record = {
        "command": " ".join(["python benchmarks/session_memory.py", *(arguments or sys.argv[1:])]),
        "parameters": chosen.parameters,
        "open at once": chosen.open,
        "limit_mb": LIMIT_MB,
        **found,
        "machine": {"cores": psutil.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9, 1)},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(found["peak"]["proportional MB"] > LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())
