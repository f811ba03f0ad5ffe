"""What a run prints: the line that moves, the failed cell, the closing table."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from .kernel import Progress
    from .runner import Outcome


class ProgressLine:
    """One line that is rewritten on a terminal; in a log, a line for each cell and one a minute for a long cell."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._said = time.monotonic()

    def __call__(self, progress: Progress, new_cell: bool) -> None:
        if not (new_cell or self._live or time.monotonic() - self._said > 60):
            return
        self._said = time.monotonic()
        where = f"cell {progress.cell:>2}/{progress.cells}  {progress.peak_mb:>5.0f} MB  {progress.heading[:60]}"
        text = f"      {clock(progress.seconds)}  {where if progress.cell else 'starting'}"
        print(f"\r\x1b[K{text}" if self._live else text, end="" if self._live else "\n", file=self._stream, flush=True)

    def end(self) -> None:
        """Take the moving line away."""
        if self._live:
            print("\r\x1b[K", end="", file=self._stream, flush=True)


def failure_text(outcome: Outcome, out: Path) -> str:
    """The failed cell and its traceback, for a person to read."""
    lines = [f"\n{outcome.notebook} {outcome.status}, code cell {outcome.cell} of {outcome.cells}: {outcome.error}"]
    if outcome.source:
        lines += ["", "  the cell:", *(f"  | {line}" for line in outcome.source.splitlines())]
    if outcome.traceback:
        lines += ["", *(f"  {line}" for line in outcome.traceback.splitlines())]
    return "\n".join([*lines, "", f"  executed so far: {shown(out / outcome.path)}"])


def closing_table(outcomes: Iterable[Outcome], out: Path) -> str:
    """One line a notebook: status, seconds, peak memory, where the executed copy is."""
    outcomes = list(outcomes)
    width = max(len("notebook"), *(len(outcome.notebook) for outcome in outcomes)) + 2
    lines = [f"{'notebook':<{width}}{'status':<9}{'seconds':>8}{'peak MB':>9}  executed copy"]
    lines.append("-" * (len(lines[0]) + 12))
    for outcome in outcomes:
        line = f"{outcome.notebook:<{width}}{outcome.status:<9}"
        if outcome.cells:  # it was run, now or earlier
            line += f"{outcome.seconds:>8.0f}{outcome.peak_mb:>9.0f}  {shown(out / outcome.path)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def shown(path: Path) -> str:
    """A path as short as it can be written from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
