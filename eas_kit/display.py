"""One figure as one notebook output, for people who watch and for those who read the saved copy.

Where a person watches (JupyterLab, VS Code, Voila) a figure is interactive. Where nobody does (papermill, nbclient)
the same output also holds a PNG, so that the saved notebook shows a picture on GitHub and in exported pages. The
environment variable EAS_KIT_DISPLAY, "live" or "static", overrules the guess.
"""

from __future__ import annotations

import base64
import json
import os
from typing import Any

from .errors import ConfigError
from .figures import figure_png
from .figures.canvas import plain

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
    # Not "responsive": plotly's own answer to a change of the window's size forgets the height, and a figure that is
    # out of sight then has none. JupyterLab makes figures as wide as their cell by itself.
    config = {"displaylogo": False, "responsive": False}
    data: dict[str, Any] = {
        PLOTLY: {"data": values["data"], "layout": values["layout"], "config": config},
        "text/plain": f"<figure: {words}>",
    }
    if live_session() if live is None else live:
        if values.get("frames"):  # nobody can play them in a static copy, which is to stay small
            data[PLOTLY]["frames"] = values["frames"]
        return data, {}
    data["image/png"] = base64.b64encode(figure_png(fig)).decode()
    return data, {"image/png": {"width": int(fig.layout.width or 820), "alt": words}}


def emit(data: dict, metadata: dict, display_id: str | None = None, update: bool = False) -> None:
    """Sends an output to the notebook, or puts it in place of the one that has this id; nothing outside a kernel."""
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
        emit(data, metadata)
    else:
        print(data["text/plain"])
