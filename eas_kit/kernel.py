"""One notebook, executed headless: papermill does the work, this module keeps it honest.

papermill alone would start whatever the `python3` kernel spec names (another environment, perhaps), hand the kernel
the marks of a live Jupyter session, keep megabytes of widget state, and believe that a notebook is complete when a
cell called ``sys.exit()`` or ran into a time-out. Here the kernel is the interpreter that runs this code, its
environment is cleaned, and a notebook counts as done only if every code cell ran and none left an error.
"""

from __future__ import annotations

import os
import re
import site
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import nbformat
import papermill
import psutil
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

# What a live front end puts into its kernels' environment. A run started from a notebook's or an editor's terminal
# inherits it, and figures would then believe that someone is watching.
LIVE_SESSION_MARKS = ("JPY_SESSION_NAME", "JPY_PARENT_PID", "VSCODE_PID", "SERVER_SOFTWARE")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass
class Progress:
    """Where a running notebook is. Code cells are counted from 1; ``heading`` is the last one above the cell."""

    cell: int = 0
    cells: int = 0
    heading: str = ""
    seconds: float = 0.0
    peak_mb: float = 0.0


@dataclass
class Execution:
    """How a notebook went. ``error`` is empty when every code cell ran and left no error."""

    cells: int = 0
    seconds: float = 0.0
    peak_mb: float = 0.0
    error: str = ""
    cell: int = 0  # the cell at fault, from 1
    source: str = ""
    traceback: str = ""
    interrupted: bool = False


class MemoryMeter:
    """Peak resident memory of a process and its children, sampled; pages they share are counted for each.

    ``tick`` is called after every sample, from the sampling thread.
    """

    def __init__(self, interval: float = 0.25, tick: Callable[[], None] | None = None) -> None:
        self.peak_mb = 0.0
        self._interval, self._tick = interval, tick
        self._process: psutil.Process | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def watch(self, pid: int | None) -> None:
        self._process = psutil.Process(pid) if pid else None

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            if self._process is not None:
                self.peak_mb = max(self.peak_mb, _resident_mb(self._process))
            if self._tick is not None:
                self._tick()


def _resident_mb(process: psutil.Process) -> float:
    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            try:
                total += member.memory_info().rss
            except psutil.Error:  # a child that ended between the listing and the look
                continue
    except psutil.Error:
        pass
    return total / 2**20


def kernel_environment() -> dict[str, str]:
    """The environment of a headless kernel: no marks of a live session, and this very eas_kit importable."""
    env = {name: value for name, value in os.environ.items() if name not in LIVE_SESSION_MARKS}
    home = str(Path(__file__).resolve().parents[1])
    if home not in site.getsitepackages():
        env["PYTHONPATH"] = os.pathsep.join(p for p in (home, os.environ.get("PYTHONPATH")) if p)
    return env


class OwnKernelManager(AsyncKernelManager):
    """Starts ``sys.executable`` whatever kernel specs are installed. Subclassed for each run: see ``execute``."""

    meter: MemoryMeter
    folder: str
    kernel_log: IO[bytes]

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        if self.has_trait("transport_encryption"):
            self.transport_encryption = "auto"  # else ipykernel warns, for every kernel, of an unencrypted port

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

    async def start_kernel(self, **kwargs: object) -> None:
        # cwd goes to the kernel alone: papermill's own `cwd` would move this whole process
        kwargs |= {"env": kernel_environment(), "cwd": self.folder, "stderr": self.kernel_log}
        await super().start_kernel(**kwargs)
        self.meter.watch(getattr(self.provisioner, "pid", None))


def execute(
    source: Path,
    target: Path,
    parameters: dict[str, object],
    on_progress: Callable[[Progress, bool], None] = lambda progress, new_cell: None,
    cell_timeout: float | None = None,
) -> Execution:
    """Run the notebook ``source`` with ``parameters`` in its own folder and write the executed copy to ``target``.

    Args:
        on_progress: called with ``(progress, True)`` when a cell starts, from time to time with ``(progress, False)``.
        cell_timeout: seconds that one cell may take; None is no limit.

    Never raises for what the notebook does, an interrupt included: the result says how it ended.
    """
    start = time.monotonic()
    progress = Progress()

    def tick(new_cell: bool = False) -> None:
        progress.seconds, progress.peak_mb = time.monotonic() - start, meter.peak_mb
        on_progress(progress, new_cell)

    def on_notebook_start(notebook: nbformat.NotebookNode) -> None:
        progress.cells = len(_code_cells(notebook))

    def on_cell_start(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell.cell_type == "markdown":
            headings = [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")]
            progress.heading = headings[-1] if headings else progress.heading

    def on_cell_execute(cell: nbformat.NotebookNode, cell_index: int) -> None:
        progress.cell += 1
        tick(new_cell=True)

    raised: BaseException | None = None
    # What the kernel process itself says (not the notebook's cells) matters only if it dies.
    with tempfile.TemporaryFile() as log, MemoryMeter(tick=tick) as meter:
        own = {"meter": meter, "folder": str(source.parent), "kernel_log": log}
        manager = type("KernelManager", (OwnKernelManager,), own)
        try:
            papermill.execute_notebook(
                *(str(path).replace("{", "{{").replace("}", "}}") for path in (source, target)),  # papermill formats
                parameters=parameters,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                execution_timeout=cell_timeout,
                kernel_manager_class=manager,
                store_widget_state=False,
                on_notebook_start=on_notebook_start,
                on_cell_start=on_cell_start,
                on_cell_execute=on_cell_execute,
            )
        except (Exception, KeyboardInterrupt) as error:
            raised = error
        log.seek(0)
        last_words = log.read().decode(errors="replace")[-4000:]

    result = _judge(target, raised, progress.cell)
    if result.error and not result.traceback and not result.interrupted:
        result.traceback = last_words
    if result.error.startswith("KeyboardInterrupt") and cell_timeout and not result.interrupted:
        result.error = f"the cell took longer than {cell_timeout:g} s (cell_timeout)"
    result.seconds, result.peak_mb = time.monotonic() - start, meter.peak_mb
    return result


def _code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def _judge(target: Path, raised: BaseException | None, last_cell: int) -> Execution:
    """What the executed copy itself shows; papermill's ``status`` says completed after a time-out or an exit."""
    result = Execution(interrupted=isinstance(raised, KeyboardInterrupt))
    cells = []
    if target.exists():
        notebook = nbformat.read(target, as_version=4)
        _forget_local_paths(notebook, target)
        cells = _code_cells(notebook)
        result.cells = len(cells)
        for number, cell in enumerate(cells, 1):
            errors = [output for output in cell.outputs if output.output_type == "error"]
            if errors:
                result.error = f"{errors[0].ename}: {errors[0].evalue}"
                result.traceback = _ANSI.sub("", "\n".join(errors[0].traceback))
            elif cell.execution_count is None:
                result.error = "the cell did not run"
            if result.error:
                result.cell, result.source = number, cell.source
                break
    if result.interrupted:
        result.error = "interrupted"
    elif raised is not None and not result.traceback:  # the kernel died, or never came up
        result.error = f"{type(raised).__name__}: {raised}"
        result.cell = last_cell
        result.source = cells[last_cell - 1].source if 0 < last_cell <= len(cells) else ""
    return result


def _forget_local_paths(notebook: nbformat.NotebookNode, target: Path) -> None:
    """papermill notes absolute paths; an executed copy that is shown to others should not name someone's folders."""
    for key in ("input_path", "output_path"):
        if key in notebook.metadata.get("papermill", {}):
            notebook.metadata.papermill[key] = Path(notebook.metadata.papermill[key]).name
    nbformat.write(notebook, target)
