"""Pause and stop for a run that goes on in a notebook's cell, and a slider to play it back afterwards.

The run keeps the kernel's main thread busy, so a button's message needs another one. JupyterLab 4.4 or newer with
ipykernel 7 or newer has it: messages of widgets go to a subshell, a thread beside the main one. There the buttons work
at once. Where either is older, in VS Code and in Voila, such messages wait until the cell has ended: no buttons are
shown, and the notebook's own Interrupt button, which is a signal and works everywhere, stops the run as cleanly.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

ADVICE = "The Interrupt button (■) of the notebook stops it after the step it is in, with its result."
PLAY_SECONDS = 8  # a whole play-back takes about this long


class RunControl:
    """Asks a run to hold or to end, from any thread; the run obeys between two steps."""

    def __init__(self, look_every: float = 0.1) -> None:
        """look_every: seconds between looks at the buttons while it holds."""
        self.look_every = look_every
        self._go, self._stop = threading.Event(), threading.Event()
        self.reset()

    @property
    def paused(self) -> bool:
        return not self._go.is_set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def pause(self) -> None:
        if not self.stopping:
            self._go.clear()

    def resume(self) -> None:
        self._go.set()

    def stop(self) -> None:
        self._stop.set()
        self._go.set()

    def reset(self) -> None:
        """For a new run."""
        self._stop.clear()
        self._go.set()

    def obey(self) -> None:
        """Waits as long as it is paused. Called by the run, in its own thread.

        Raises:
            KeyboardInterrupt: it is to stop, or was interrupted while it waited; `fit` and `search` then end cleanly.
        """
        try:
            with _signals_interrupt() if self.paused else nullcontext():
                while self.paused:
                    self._go.wait(self.look_every)
        except KeyboardInterrupt:
            self.stop()  # the step may have another event to come, which is not to wait again
            raise
        if self.stopping:
            raise KeyboardInterrupt


@contextmanager
def _signals_interrupt():
    """An interrupt ends the waiting at once: the training loop's own handler would only note it for the next step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)


def buttons_work() -> bool:
    """Whether a click reaches the kernel while a cell runs: see the module's text."""
    if os.environ.get("VSCODE_PID") or os.environ.get("SERVER_SOFTWARE", "").startswith("voila"):
        return False
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    return "kernel subshells" in getattr(kernel, "kernel_info", {}).get("supported_features", ())


def reach_at_once(*widgets: Any) -> None:
    """Lets messages of these widgets go where the front end sends them: to its subshell.

    From 7.4 on ipykernel sends the answers to a widget back to the shell that last wrote to it, for the sake of code
    that waits for one. The run's own thread is that shell here, and too busy to look. Kernels that do not know the
    name set here are not changed by it.
    """
    for widget in widgets:
        if widget.comm is not None:
            widget.comm._reply_subshell_for = lambda data, default: default


class RunBar:
    """The row above a live picture: pause, stop and a line of words while it runs, then play and a slider.

    Args:
        control: what the buttons act on.
        buttons: False: words only.
    """

    def __init__(self, control: RunControl, buttons: bool = True) -> None:
        import ipywidgets

        self.control, self.step = control, 0
        self._make = ipywidgets
        wide = ipywidgets.Layout(width="110px")
        self.pause = ipywidgets.Button(
            description="Pause", icon="pause", tooltip="Hold the run after this step", layout=wide
        )
        self.stop = ipywidgets.Button(
            description="Stop", icon="stop", tooltip="End the run after this step and keep its result", layout=wide
        )
        self.words = ipywidgets.Label("" if buttons else ADVICE)
        self.pause.on_click(self._pause)
        self.stop.on_click(self._stop)
        row = [self.pause, self.stop, self.words] if buttons else [self.words]
        self.box = ipywidgets.HBox(row, layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.box.add_class("eas-run-bar")
        reach_at_once(self.pause, self.stop)
        self.play = self.slider = None
        self._buttons = buttons

    def bundle(self) -> dict:
        return self.box._repr_mimebundle_()

    def say(self, words: str = "") -> None:
        """Brings the row up to date with what was asked of the run; `words` if that is nothing."""
        control = self.control
        self.pause.description, self.pause.icon = ("Resume", "play") if control.paused else ("Pause", "pause")
        self.pause.disabled = self.stop.disabled = control.stopping
        if control.stopping:
            words = "Stopping after this step ..."
        elif control.paused:
            words = words or "Pausing after this step ..."
        if self._buttons:
            self.words.value = words

    def _pause(self, _: Any) -> None:
        (self.control.resume if self.control.paused else self.control.pause)()
        self.say()

    def _stop(self, _: Any) -> None:
        self.control.stop()
        self.say()

    def play_back(self, count: int, show: Callable[[int], Any]) -> None:
        """The row becomes a slider over 1, ..., count, at the end now; `show` gets the number it is moved to."""
        make = self._make
        every = -(-count // 50)
        self.play = make.Play(
            min=1, max=count, value=count, step=every, interval=round(1000 * PLAY_SECONDS / -(-count // every))
        )
        self.play.show_repeat = False
        self.slider = make.IntSlider(
            min=1, max=count, value=count, description="update", layout=make.Layout(width="420px")
        )
        reach_at_once(self.play, self.slider)
        make.jslink((self.play, "value"), (self.slider, "value"))
        self.slider.observe(lambda change: show(change["new"]), "value")
        self.words.value = "Play the search back: the slider also moves with the arrow keys."
        self.box.children = (self.play, self.slider, self.words)

    def close(self) -> None:
        """Takes the row off the page."""
        for widget in (*self.box.children, self.pause, self.stop, self.box):
            widget.close()
