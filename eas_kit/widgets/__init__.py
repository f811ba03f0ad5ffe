"""A panel to try skip masks by hand: a toggle a site, coloured by preference, and what each mask tried costs.

`SkipMaskState` is the logic, in plain Python: the mask, the presets, undo, the numbers, the file. `SkipMaskWidget` is a
view of it that evaluates in the background. `show_skip_mask` shows the widget where a person watches and a static
picture of the same state where not. What is evaluated and answered comes from outside, mostly `eas_kit.playground`.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from ..figures import preference_heatmap
from ..live import live_session, show
from .panel import SkipMaskWidget
from .state import Evaluate, SkipMaskState
from .worker import LatestWorker

__all__ = ["LatestWorker", "SkipMaskState", "SkipMaskWidget", "show_skip_mask"]


def show_skip_mask(
    preferences: Any, evaluate: Evaluate | None = None, *, answers: Any = None, example: int = 0, **arguments: Any
) -> SkipMaskWidget | SkipMaskState:
    """The panel where a person watches; else a static picture, with no widget in the file. Arguments: SkipMaskWidget's.

    Returns the widget or the state; both have `mask`, `set_mask`, `save` and `load`.
    """
    if live_session():
        from IPython.display import display

        widget = SkipMaskWidget(preferences, evaluate, answers=answers, example=example, **arguments)
        display(widget)
        return widget
    state = SkipMaskState(preferences, evaluate, **arguments)
    state.refresh()
    title = escape(state.status(), quote=False)
    size = np.abs(state.preferences[np.isfinite(state.preferences)])
    most = float(np.quantile(size, 0.9)) if len(size) else 0.0
    limit = most if 0 < 3 * most < size.max() else None  # one site that stands far out would leave the others white
    drawn = {"skipped": state.mask, "site_kinds": state.kinds, "limit": limit}
    fig = preference_heatmap(state.preferences, title=title, **drawn)
    fig.layout.title.subtitle.text += "<br>(a static copy: open the notebook in JupyterLab to switch sites)"
    fig.update_layout(height=fig.layout.height + 18, margin={"t": fig.layout.margin.t + 18})
    show(fig)
    return state
