"""Displays that follow a search or a training run in a notebook: a heatmap of the preferences, the falling loss.

Each takes one output area, with a row above it to pause and stop the run and, after a search, to play it back. Where
nobody watches only the end is shown, as one static picture. `show`, for finished figures, is in display.py.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from . import controls, display
from .controls import RunBar, RunControl
from .display import OVERRIDE, PLOTLY, figure_bundle, in_kernel, live_session, show
from .figures import preference_heatmap, save_playback, search_figure, training_curves
from .figures.frames import curve_frame, preference_frame
from .figures.preferences import SearchTrace, colour_limit
from .figures.style import field
from .figures.tuning import smoothed

__all__ = [
    "OVERRIDE",
    "PLOTLY",
    "LiveFigure",
    "LiveLoss",
    "LivePreferenceHeatmap",
    "figure_bundle",
    "in_kernel",
    "live_session",
    "show",
]


class LiveFigure:
    """A picture of a run in one output area: SVG frames while it runs, the plotly figure at the end.

    Use it as a callback, best inside `with`, which draws the last state (marked "stopped") after an interrupt too.
    Nobody watching: no frames and no widgets, only the end. A sub-class says what to keep of an event and how to draw
    it.

    `pause()`, `resume()` and `stop()` may be called from any thread, and by the buttons above the picture (controls.py
    says where those work): a stopped run ends after the step it is in, with its result.

    Args:
        title: of frames and figure.
        min_interval: seconds between frames, at the least.
        max_share: of the run's time that drawing may take; frames are left out to keep to it.
        buttons: False: no row above the picture.

    Attributes: `frames`, drawn so far; `drawing`, the seconds that took; `finished`.
    """

    clock = staticmethod(time.monotonic)

    def __init__(
        self, title: str | None = None, min_interval: float = 0.3, max_share: float = 0.05, buttons: bool = True
    ) -> None:
        self.title, self.min_interval, self.max_share = title, float(min_interval), float(max_share)
        self.control, self.buttons, self.bar = RunControl(), buttons, None
        self.events: list[dict] = []
        self.step, self.total = 0, None
        self.frames, self.drawing, self.held, self.finished = 0, 0.0, 0.0, False
        self._live, self._last, self._cost = live_session(), float("-inf"), 0.0
        self._began: float | None = None
        self._id, self._bar_id, self._graph = None, None, False
        self.pause, self.resume, self.stop = self.control.pause, self.control.resume, self.control.stop

    # what sub-classes say
    def keep(self, event: Any) -> bool:
        """Remember an event; False if it is of a kind that this display does not draw."""
        raise NotImplementedError

    def frame(self) -> str:
        raise NotImplementedError

    def figure(self) -> Any:
        """The final figure; None if there is nothing to draw yet."""
        raise NotImplementedError

    def play_back(self) -> None:
        """What becomes of the row of buttons after the run: it goes."""
        self._remove_bar()

    # what the run does
    def __call__(self, event: Any) -> None:
        """Takes an event of a run, an object or a dict; holds the run while it is paused.

        Raises:
            KeyboardInterrupt: the run is to stop; `fit` and `search` then end with what they have.
        """
        self._began = self.clock() if self._began is None else self._began
        self.step = int(field(event, "step", default=self.step + 1))
        self.total = field(event, "total_steps", "total", default=self.total)
        ends = self.keep(event)
        if self.finished and not ends:  # another kind of event of the last step
            return
        self.finished = False
        if ends and self.total is not None and self.step >= self.total:
            self.close()
            return
        if self._live:
            self._show_bar()
            if self._due():
                self._draw()
        self._obey()

    def _due(self) -> bool:
        """Whether a frame is due: not too soon after the last, and within the share of time that drawing may take."""
        now = self.clock()
        allowed = self.max_share * (now - self._began - self.held)
        return now - self._last >= self.min_interval and (not self.frames or self.drawing + self._cost <= allowed)

    def _draw(self) -> None:
        self._last = self.clock()
        self._emit_frame()
        self._cost = self.clock() - self._last
        self.drawing += self._cost

    def _obey(self) -> None:
        if not self.control.paused:
            self.control.obey()
            return
        began = self.clock()
        if self._live:
            self._emit_frame()  # as it stands now, whatever the throttle left out
        self._say(f"Paused after step {self.step}{self._of()}.")
        try:
            self.control.obey()
        finally:
            self.held += self.clock() - began
            self._say()

    def _of(self) -> str:
        return f" of {self.total}" if self.total else ""

    def close(self, end: str = "") -> None:
        """Draws the final figure, once; `end` goes into its title, "stopped" by itself if steps are missing."""
        if self.finished:
            return
        self.finished = True
        self.control.reset()
        if not end and self.total is not None and self.step < self.total:
            end = f"stopped at step {self.step} of {self.total}"
        figure = self.figure()
        if figure is None:
            self._remove_bar()
            self._emit(
                {"text/plain": f"<{self.title or 'live figure'}: nothing recorded{', ' + end if end else ''}>"}, {}
            )
            return
        if end:
            head, sep, tail = figure.layout.title.text.rpartition("</b>")
            figure.layout.title.text = f"{head} ({end}){sep}{tail}" if sep else f"{tail} ({end})"
        self._final = figure_bundle(figure, self._live)
        self._emit_final()
        self.play_back()

    def __enter__(self) -> LiveFigure:
        return self

    def __exit__(self, kind: type | None, *rest: Any) -> None:
        self.close("stopped" if kind else "")

    # what goes to the notebook
    def _show_bar(self) -> None:
        if self.bar is None and self.buttons and display.in_kernel():
            self.bar = RunBar(self.control, controls.buttons_work())
            self._bar_id = uuid.uuid4().hex
            display.emit(self.bar.bundle(), {}, self._bar_id)

    def _remove_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            display.emit({"text/plain": ""}, {}, self._bar_id, update=True)
            self.bar = None

    def _say(self, words: str = "") -> None:
        if self.bar is not None:
            self.bar.say(words)

    def _emit_frame(self, svg: str | None = None) -> None:
        self.frames += 1
        words = self.title or type(self).__name__
        data = {"image/svg+xml": self.frame() if svg is None else svg, "text/plain": f"<{words}, step {self.step}>"}
        self._emit(data, {})
        self._graph = False

    def _emit_final(self) -> None:
        if self._graph:  # JupyterLab does not redraw a plotly output in place: something else must come between
            self._emit_frame()
        self._emit(*self._final)
        self._graph = True

    def _emit(self, data: dict, metadata: dict) -> None:
        first, self._id = self._id is None, self._id or uuid.uuid4().hex
        display.emit(data, metadata, self._id, update=not first)


class LivePreferenceHeatmap(LiveFigure):
    """The preferences of a search as it learns them, with the rewards below: `callbacks=[LivePreferenceHeatmap()]`.

    with LivePreferenceHeatmap(num_updates=60) as live:
        result = eas.search(net, task, config, callbacks=[live])

    Args:
        site_kinds: the config's `kinds`, one kind a site, or the sites; None: all attention.
        num_updates: updates to come, if known: the picture then fills from left to right.
        num_skipped: k, for searches whose events do not say what is skipped.
        title, min_interval, max_share, buttons: as in `LiveFigure`.

    After the run a slider, with a play button, shows the search as it was at each update; `save_html` puts that into
    a file.
    """

    def __init__(
        self,
        site_kinds: Any = None,
        num_updates: int | None = None,
        num_skipped: int | None = None,
        title: str | None = None,
        min_interval: float = 0.3,
        max_share: float = 0.05,
        buttons: bool = True,
    ) -> None:
        super().__init__(title, min_interval, max_share, buttons)
        self.site_kinds, self.num_updates, self.num_skipped = site_kinds, num_updates, num_skipped
        self.phase = ""

    def keep(self, event: Any) -> bool:
        preferences = field(event, "preferences")
        self.phase = field(event, "phase", default=self.phase)
        if preferences is None:  # a training step between updates
            return False
        kept = {name: field(event, name) for name in ("update", "skipped", "rewards", "losses")}
        known = {name: value for name, value in kept.items() if value is not None}
        self.events.append({"update": len(self.events) + 1, **known, "preferences": [float(v) for v in preferences]})
        return True

    def _words(self) -> str:
        return (self.title or "Preference of each site") + f": {self.phase or 'search'}, step {self.step}{self._of()}"

    def frame(self) -> str:
        if not self.events:
            return curve_frame([], self._words(), waiting="no update of the preferences yet")
        trace = SearchTrace.read(self.events, self.num_skipped)
        return preference_frame(trace, self._words(), self.site_kinds, self.num_updates)

    def figure(self) -> Any:
        if not self.events:
            return None
        rewarded = any(event.get("rewards") or event.get("losses") for event in self.events)
        draw = search_figure if rewarded else preference_heatmap
        return draw(self.events, num_skipped=self.num_skipped, site_kinds=self.site_kinds, title=self.title)

    def play_back(self) -> None:
        if self.bar is None or len(self.events) < 2:
            self._remove_bar()
        elif self.bar.slider is None:
            self.bar.play_back(len(self.events), self.show_update)

    def show_update(self, number: int) -> None:
        """Shows the search as it was after the number-th of its updates, 1 the first; the last is the final figure."""
        if number >= len(self.events):
            self._emit_final()
            return
        trace = SearchTrace.read(self.events, self.num_skipped)
        words = (self.title or "Preference of each site") + f": update {trace.updates[number - 1]}"
        limit = colour_limit(trace.preferences)
        self._emit_frame(preference_frame(trace.until(number), words, self.site_kinds, len(self.events), limit))

    def save_html(self, path: str | Path, **options: Any) -> int:
        """The search so far as a page to play back: `figures.save_playback` with this display's settings."""
        settings = {"num_skipped": self.num_skipped, "site_kinds": self.site_kinds, "title": self.title}
        return save_playback(self.events, path, **(settings | options))


class LiveLoss(LiveFigure):
    """The loss of a training run as it falls (a moving mean): `eas.fit(net, task, config, callbacks=[LiveLoss()])`.

    Args:
        metric: which number of an event to follow.
    """

    def __init__(self, metric: str = "loss", title: str | None = None, **settings: Any) -> None:
        """settings: min_interval, max_share and buttons of `LiveFigure`."""
        super().__init__(title, **settings)
        self.metric = metric

    def keep(self, event: Any) -> bool:
        value = field(event, self.metric)
        if value is None or field(event, "preferences") is not None:
            return False
        self.events.append({"step": self.step, self.metric: float(value)})
        return True

    def frame(self) -> str:
        values = [event[self.metric] for event in self.events]
        words = (self.title or f"Training {self.metric}") + f": step {self.step}{self._of()}"
        if not values:
            return curve_frame([], words)
        import numpy as np

        every = -(-len(values) // 400)
        line = smoothed(np.asarray(values), max(1, len(values) // 20))[::every]
        return curve_frame(line.tolist(), words, self.metric, -(-self.total // every) if self.total else None)

    def figure(self) -> Any:
        return training_curves(self.events, metric=self.metric, title=self.title) if self.events else None
