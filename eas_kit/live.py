"""Figures in notebooks: `show` for finished ones, and displays that follow a search or a training run.

Where a person watches (JupyterLab, VS Code, Voila) a figure is interactive. Where nobody does (papermill, nbclient)
the same output also holds a PNG, so that the saved notebook shows a picture on GitHub and in exported pages. The
environment variable EAS_KIT_DISPLAY, "live" or "static", overrules the guess.
"""

from __future__ import annotations

import base64
import json
import os
import time
import uuid
from typing import Any

from .errors import ConfigError
from .figures import figure_png, search_figure, training_curves
from .figures.canvas import plain
from .figures.frames import curve_frame, preference_frame
from .figures.preferences import SearchTrace
from .figures.style import field
from .figures.tuning import smoothed

PLOTLY = "application/vnd.plotly.v1+json"
OVERRIDE = "EAS_KIT_DISPLAY"


def in_kernel() -> bool:
    """True in a notebook's kernel, also under papermill; False in a script or a terminal."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")


def live_session() -> bool:
    """True where a person watches. jupyter_server names its sessions; papermill and nbclient start kernels without.

    Raises:
        ConfigError: EAS_KIT_DISPLAY is neither "live" nor "static".
    """
    wanted = os.environ.get(OVERRIDE, "").strip().lower()
    if wanted not in ("", "auto", "live", "static"):
        raise ConfigError(f"{OVERRIDE} must be 'live', 'static' or 'auto' (or unset); it is {wanted!r}.")
    if wanted in ("live", "static"):
        return wanted == "live"
    named = os.environ.get("JPY_SESSION_NAME") or os.environ.get("VSCODE_PID")
    return in_kernel() and bool(named or os.environ.get("SERVER_SOFTWARE", "").startswith("voila"))


def figure_bundle(fig: Any, live: bool | None = None) -> tuple[dict, dict]:
    """A plotly figure as one notebook output: (data, metadata) by mime type.

    Without a person watching it also holds the PNG. With one it must not: JupyterLab would show the picture in place
    of the graph, and adds its own when the notebook is saved.
    """
    values = json.loads(fig.to_json(engine="json"))  # not to_plotly_json: a user's figure may hold numpy arrays
    words = plain(fig.layout.title.text or "figure").replace("\n", " ")
    config = {"displaylogo": False, "responsive": True}
    data: dict[str, Any] = {
        PLOTLY: {"data": values["data"], "layout": values["layout"], "config": config},
        "text/plain": f"<figure: {words}>",
    }
    if live_session() if live is None else live:
        return data, {}
    data["image/png"] = base64.b64encode(figure_png(fig)).decode()
    return data, {"image/png": {"width": int(fig.layout.width or 820), "alt": words}}


def _display(data: dict, metadata: dict, display_id: str | None = None, update: bool = False) -> None:
    if not in_kernel():
        return
    from IPython.display import display

    more = {"display_id": display_id, "update": update} if display_id else {}
    display(data, metadata=metadata, raw=True, **more)


def show(fig: Any) -> None:
    """Shows a plotly figure: interactive where a person watches, with a PNG beside it where not. One output.

    Outside a notebook it prints the figure's title; `fig.write_html` and `eas_kit.figures.figure_png` make files.
    """
    data, metadata = figure_bundle(fig)
    if in_kernel():
        _display(data, metadata)
    else:
        print(data["text/plain"])


class LiveFigure:
    """A picture of a run in one output area: SVG frames while it runs, the plotly figure at the end.

    Use it as a callback, best inside `with`, which draws the last state (marked "stopped") after an interrupt too.
    Nobody watching: no frames, only the end. A sub-class says what to keep of an event and how to draw it.
    """

    def __init__(self, title: str | None = None, min_interval: float = 0.3) -> None:
        """Args: title: of frames and figure. min_interval: seconds between frames, so that a fast run is not slowed."""
        self.title, self.min_interval = title, float(min_interval)
        self.events: list[dict] = []
        self.step, self.total = 0, None
        self.frames, self.finished = 0, False
        self._live, self._last, self._id, self._graph = live_session(), float("-inf"), None, False

    # what sub-classes say
    def keep(self, event: Any) -> bool:
        """Remember an event; False if it is of a kind that this display does not draw."""
        raise NotImplementedError

    def frame(self) -> str:
        raise NotImplementedError

    def figure(self) -> Any:
        """The final figure; None if there is nothing to draw yet."""
        raise NotImplementedError

    # what the run does
    def __call__(self, event: Any) -> None:
        """Takes an event of a run, an object or a dict."""
        self.step = int(field(event, "step", default=self.step + 1))
        self.total = field(event, "total_steps", "total", default=self.total)
        ends = self.keep(event)
        if self.finished and not ends:  # another kind of event of the last step
            return
        self.finished = False
        if ends and self.total is not None and self.step >= self.total:
            self.close()
            return
        now = time.monotonic()
        if self._live and now - self._last >= self.min_interval:
            self._last = now
            self._emit_frame()

    def close(self, end: str = "") -> None:
        """Draws the final figure, once; `end` goes into its title, "stopped" by itself if steps are missing."""
        if self.finished:
            return
        self.finished = True
        if not end and self.total is not None and self.step < self.total:
            end = f"stopped at step {self.step} of {self.total}"
        figure = self.figure()
        if figure is None:
            self._emit(
                {"text/plain": f"<{self.title or 'live figure'}: nothing recorded{', ' + end if end else ''}>"}, {}
            )
            return
        if end:
            head, sep, tail = figure.layout.title.text.rpartition("</b>")
            figure.layout.title.text = f"{head} ({end}){sep}{tail}" if sep else f"{tail} ({end})"
        if self._graph:  # JupyterLab does not redraw a plotly output in place: something else must come between
            self._emit_frame()
        self._emit(*figure_bundle(figure, self._live))
        self._graph = True

    def __enter__(self) -> LiveFigure:
        return self

    def __exit__(self, kind: type | None, *rest: Any) -> None:
        self.close("stopped" if kind else "")

    def _emit_frame(self) -> None:
        self.frames += 1
        words = self.title or type(self).__name__
        self._emit({"image/svg+xml": self.frame(), "text/plain": f"<{words}, step {self.step}>"}, {})
        self._graph = False

    def _emit(self, data: dict, metadata: dict) -> None:
        first, self._id = self._id is None, self._id or uuid.uuid4().hex
        _display(data, metadata, self._id, update=not first)


class LivePreferenceHeatmap(LiveFigure):
    """The preferences of a search as it learns them, with the rewards below: `callbacks=[LivePreferenceHeatmap()]`.

    with LivePreferenceHeatmap(num_updates=60) as live:
        result = eas.search(net, task, config, callbacks=[live])

    Args:
        site_kinds: the config's `kinds`, one kind a site, or the sites; None: all attention.
        num_updates: updates to come, if known: the picture then fills from left to right.
        num_skipped: k, for searches whose events do not say what is skipped.
    """

    def __init__(
        self,
        site_kinds: Any = None,
        num_updates: int | None = None,
        num_skipped: int | None = None,
        title: str | None = None,
        min_interval: float = 0.3,
    ) -> None:
        super().__init__(title, min_interval)
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
        of = f" of {self.total}" if self.total else ""
        return (self.title or "Preference of each site") + f": {self.phase or 'search'}, step {self.step}{of}"

    def frame(self) -> str:
        if not self.events:
            return curve_frame([], self._words())
        trace = SearchTrace.read(self.events, self.num_skipped)
        return preference_frame(trace, self._words(), self.site_kinds, self.num_updates)

    def figure(self) -> Any:
        if not self.events:
            return None
        from .figures import preference_heatmap

        draw = (
            search_figure
            if any(event.get("rewards") or event.get("losses") for event in self.events)
            else preference_heatmap
        )
        return draw(self.events, num_skipped=self.num_skipped, site_kinds=self.site_kinds, title=self.title)


class LiveLoss(LiveFigure):
    """The loss of a training run as it falls (a moving mean): `eas.fit(net, task, config, callbacks=[LiveLoss()])`.

    Args:
        metric: which number of an event to follow.
    """

    def __init__(self, metric: str = "loss", title: str | None = None, min_interval: float = 0.3) -> None:
        super().__init__(title, min_interval)
        self.metric = metric

    def keep(self, event: Any) -> bool:
        value = field(event, self.metric)
        if value is None or field(event, "preferences") is not None:
            return False
        self.events.append({"step": self.step, self.metric: float(value)})
        return True

    def frame(self) -> str:
        values = [event[self.metric] for event in self.events]
        of = f" of {self.total}" if self.total else ""
        words = (self.title or f"Training {self.metric}") + f": step {self.step}{of}"
        if not values:
            return curve_frame([], words)
        import numpy as np

        every = -(-len(values) // 400)
        line = smoothed(np.asarray(values), max(1, len(values) // 20))[::every]
        return curve_frame(line.tolist(), words, self.metric, -(-self.total // every) if self.total else None)

    def figure(self) -> Any:
        return training_curves(self.events, metric=self.metric, title=self.title) if self.events else None
