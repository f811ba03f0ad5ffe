"""One background thread that does the newest job: a click never waits, and an older one that still waits is dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

Stop = Callable[[], bool]


class LatestWorker:
    """Runs jobs one at a time, away from the thread that submits them; of those that wait only the newest is kept.

    A job is called with `stop`, a function that says whether a newer job waits or the worker was closed: it looks
    between its steps, ends early, and shows nothing then. A job shows its own errors; what it raises nevertheless goes
    to `on_error`. The thread ends when there is nothing to do, so that an idle worker holds nothing.
    """

    def __init__(self, on_error: Callable[[Exception], Any] = lambda error: None) -> None:
        self._on_error = on_error
        self._changed = threading.Condition()
        self._next: Callable[[Stop], Any] | None = None
        self._thread: threading.Thread | None = None
        self.closed = False

    def submit(self, job: Callable[[Stop], Any]) -> None:
        """Does the job as soon as the running one has ended or stopped; a closed worker does nothing."""
        with self._changed:
            if self.closed:
                return
            self._next = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="skip-mask", daemon=True)
                self._thread.start()

    def stop(self) -> bool:
        """True if the running job is no longer wanted."""
        return self.closed or self._next is not None

    def _run(self) -> None:
        while True:
            with self._changed:
                job, self._next = self._next, None
                if job is None or self.closed:
                    self._thread = None
                    self._changed.notify_all()
                    return
            try:
                job(self.stop)
            except Exception as error:
                self._on_error(error)

    def wait(self, timeout: float | None = None) -> bool:
        """Until there is nothing to do, or for `timeout` seconds; True if there is nothing to do."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, timeout)

    def close(self) -> None:
        """No more jobs: what waits is dropped, what runs is told to stop. Does not wait for it."""
        with self._changed:
            self.closed, self._next = True, None
