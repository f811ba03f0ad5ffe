"""A search to play back: a slider over its updates, as a plotly figure and as one file that needs no network.

Every frame only moves a veil over the updates to come and redraws the bars of the preferences at that update, so 50 of
them take some tens of kB where 50 heatmaps would take megabytes.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import plain
from .frames import colours
from .preferences import BLACK, SearchTrace, colour_limit, over_time, written
from .style import INK, FigureError, axis, field, numbers, site_kinds_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_FRAMES = 50
SPLIT = 0.74  # share of the width that the heatmap takes; the bars stand right of it
FRAME_MS = 160
SCRIPTS = ("inline", "beside")
SCRIPT_FILE = "plotly.min.js"


def search_playback(
    history: Any,
    *,
    num_skipped: int | None = None,
    site_kinds: Any = None,
    title: str | None = None,
    max_frames: int = MAX_FRAMES,
) -> go.Figure:
    """The search as a figure with frames: heatmap so far, rewards below, and bars of the preferences at one update.

    A slider and a play button move it. A longer search than `max_frames` has every n-th update as a frame, and always
    the first and the last. "skip" marks the k sites of lowest preference at the update shown.

    Args:
        history: a search's result or history, or preferences (T, L).
        num_skipped, site_kinds, title: as in `preference_heatmap`.

    Raises:
        FigureError: no updates, or kinds that do not fit.
    """
    import plotly.graph_objects as go

    trace = SearchTrace.read(history, num_skipped)
    sites = trace.preferences.shape[1]
    kinds = site_kinds_of(site_kinds or field(history, "kinds"), sites)
    curve = any(trace.curve()[1])
    limit = colour_limit(trace.preferences)
    fig = over_time(trace, None, kinds, title, limit, curve=curve)
    fig.layout.annotations = [note for note in fig.layout.annotations if note.text not in ("◂ skip", "mean")]
    first = len(fig.data)
    axes = ("", "2") if curve else ("",)
    for name in axes:
        fig.layout[f"xaxis{name}"].domain = [0, SPLIT]
        fig.add_scatter(
            mode="lines",
            fill="toself",
            fillcolor="rgba(255,255,255,0.85)",
            line={"color": INK, "width": 1},
            hoverinfo="skip",
            name="still to come",
            xaxis=f"x{name}",
            yaxis=f"y{name}",
        )
    fig.add_bar(
        orientation="h",
        y=list(range(sites)),
        textposition="outside",
        textfont={"size": 11, "color": BLACK},
        cliponaxis=False,
        xaxis="x3",
        yaxis="y3",
        name="preference",
        hovertemplate="site %{y}<br>preference %{x}<extra></extra>",
    )
    frames = []
    for at in frame_places(len(trace.updates), max_frames):
        update = trace.updates[at]
        veils = [_veil(fig, name, update) for name in axes]
        bars = go.Bar(**_bars(trace, at, limit))
        traces = list(range(first, first + len(axes) + 1))
        frames.append(go.Frame(name=str(update), data=[*veils, bars], traces=traces))
    fig.frames = frames
    for data, last in zip(fig.data[first:], frames[-1].data, strict=True):
        data.update(last.to_plotly_json())
    _arrange(fig, limit, [frame.name for frame in frames])
    return fig


def frame_places(count: int, most: int) -> list[int]:
    """Positions of the updates that are frames: evenly spread, the first and the last among them.

    Raises:
        FigureError: fewer than two frames were asked for.
    """
    if most < 2:
        raise FigureError(f"a play-back needs at least 2 frames, its first and its last; max_frames is {most}.")
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _veil(fig: go.Figure, name: str, update: int) -> dict:
    """Over the updates after this one, on the heatmap (name "") or the curve ("2")."""
    import plotly.graph_objects as go

    end = fig.layout[f"xaxis{name}"].range[1]
    low, high = fig.layout[f"yaxis{name}"].range
    start = min(end, update + 0.5)
    return go.Scatter(x=[start, end, end, start, start], y=[low, low, high, high, low])


def _bars(trace: SearchTrace, at: int, limit: float) -> dict:
    shades = ["#" + bytes(shade).hex() for shade in colours(np.nan_to_num(trace.preferences[at]), limit).tolist()]
    values, skipped = numbers(trace.preferences[at], 4), set(trace.skipped[at])
    marks = [site in skipped for site in range(len(values))]
    return {
        "x": values,
        "text": ["skip" if mark else "" for mark in marks],
        "marker": {"color": shades, "line": {"color": BLACK, "width": [1.6 if mark else 0.4 for mark in marks]}},
    }


def _arrange(fig: go.Figure, limit: float, names: list[str]) -> None:
    """The bars' axes, the slider, the buttons, and room for them."""
    upper = fig.layout.yaxis
    fig.update_layout(
        xaxis3=axis(
            "preference then",
            range=[-1.8 * limit, 1.8 * limit],
            domain=[SPLIT + 0.04, 1],
            anchor="y3",
            tickvals=[-limit, 0, limit],
            ticktext=[f"{v:.2g}".replace("-", "−") for v in (-limit, 0, limit)],
            zeroline=True,
            zerolinecolor=INK,
            zerolinewidth=1,
        ),
        yaxis3=axis(
            range=list(upper.range),
            domain=list(upper.domain),
            anchor="x3",
            tickvals=list(upper.tickvals),
            showgrid=False,
            showline=False,
            ticks="",
        ),
        bargap=0.25,
        height=fig.layout.height + 84,
        margin={"b": fig.layout.margin.b + 84},
    )
    inner = fig.layout.height - fig.layout.margin.t - fig.layout.margin.b
    below = -(fig.layout.margin.b - 74) / inner
    at_once = {"mode": "immediate", "transition": {"duration": 0}}
    play = {"frame": {"duration": FRAME_MS, "redraw": True}, "fromcurrent": True, **at_once}
    jump = {"frame": {"duration": 0, "redraw": True}, **at_once}
    fig.update_layout(
        updatemenus=[
            {
                "type": "buttons",
                "direction": "left",
                "showactive": False,
                "x": 0,
                "xanchor": "left",
                "y": below,
                "yanchor": "top",
                "pad": {"l": 0, "t": 14},
                "buttons": [
                    {"label": "▶ Play", "method": "animate", "args": [None, play]},
                    {"label": "❚❚ Pause", "method": "animate", "args": [[None], jump]},
                ],
            }
        ],
        sliders=[
            {
                "active": len(names) - 1,
                "x": 0.28,
                "len": 0.72,
                "xanchor": "left",
                "y": below,
                "yanchor": "top",
                "pad": {"t": 14, "b": 8},
                "currentvalue": {"prefix": "update ", "xanchor": "right"},
                "steps": [{"label": name, "method": "animate", "args": [[name], jump]} for name in names],
            }
        ],
    )


def save_playback(
    history: Any,
    path: str | Path,
    *,
    num_skipped: int | None = None,
    site_kinds: Any = None,
    title: str | None = None,
    max_frames: int = MAX_FRAMES,
    script: str = "inline",
) -> int:
    """Writes `search_playback` as an HTML page for any browser, without a kernel or a network; returns its bytes.

    The page may not load anything (a content security policy says so). Keys: left and right arrow, Page Up and Page
    Down (ten frames), Home, End, and the space bar to play; the sites marked are also written out, for screen readers.

    Args:
        script: "inline": plotly's script is in the page, which then takes about 5 MB and is complete in itself.
            "beside": some tens of kB, and the script in `plotly.min.js` in the same folder, one for all pages there.

    Raises:
        FigureError: as `search_playback`; also another `script`.
    """
    if script not in SCRIPTS:
        raise FigureError(f"script must be 'inline' or 'beside', got {script!r}.")
    fig = search_playback(history, num_skipped=num_skipped, site_kinds=site_kinds, title=title, max_frames=max_frames)
    trace = SearchTrace.read(history, num_skipped)
    kinds = site_kinds_of(site_kinds or field(history, "kinds"), trace.preferences.shape[1])
    said = []
    for at in frame_places(len(trace.updates), max_frames):
        word, rows = trace.curve()
        mean = f"; mean {word} {np.mean(rows[at]):.3g}" if rows[at] else ""
        lowest = f"lowest: {written(trace.skipped[at], kinds)}" if trace.skipped[at] else "none marked"
        said.append(f"Update {trace.updates[at]} of {trace.updates[-1]}; {lowest}{mean}")
    figure = fig.to_html(
        full_html=False,
        include_plotlyjs=True if script == "inline" else "directory",
        include_mathjax=False,
        auto_play=False,
        div_id="playback",
        config={"displaylogo": False, "responsive": True},
        post_script=KEYS.replace("SAID", json.dumps(said).replace("</", "<\\/")),
    )
    words = escape(plain(fig.layout.title.text).replace("\n", " "))
    page = PAGE.replace("TITLE", words).replace("SOURCES", "'unsafe-inline'" + " 'self' file:" * (script == "beside"))
    path = Path(path)
    path.write_text(page.replace("FIGURE", figure, 1), encoding="utf-8")
    if script == "beside":
        from plotly.offline import get_plotlyjs

        (path.parent / SCRIPT_FILE).write_text(get_plotlyjs(), encoding="utf-8")
    return path.stat().st_size


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src SOURCES; style-src 'unsafe-inline'; img-src data: blob:">
<title>TITLE</title>
<style>
body { font: 14px Arial, "Liberation Sans", Helvetica, sans-serif; color: #333; margin: 12px auto; max-width: 1100px; }
#playback:focus-visible { outline: 3px solid #0072B2; }
kbd { border: 1px solid #888; border-radius: 3px; padding: 0 4px; }
main { display: flex; flex-direction: column; }
#said, #keys { order: 1; } /* above the figure in the text, since its script writes there; below it on the page */
p { margin: 6px 12px; }
</style>
</head>
<body>
<main>
<p id="said" role="status"></p>
<p id="keys"><kbd>←</kbd> <kbd>→</kbd> one frame, <kbd>Page Up</kbd> <kbd>Page Down</kbd> ten,
<kbd>Home</kbd> <kbd>End</kbd>, <kbd>Space</kbd> play or pause</p>
FIGURE
</main>
</body>
</html>
"""

KEYS = """
(function () {
  const plot = document.getElementById('{plot_id}'), said = SAID, line = document.getElementById('said');
  const slider = () => plot.layout.sliders[0], steps = slider().steps;
  const quick = {mode: 'immediate', transition: {duration: 0}};
  let playing = false;
  const now = () => slider().active || 0;
  const tell = () => { line.textContent = said[now()]; };
  const go = at => Plotly.animate(plot, [steps[Math.max(0, Math.min(steps.length - 1, at))].label],
    {...quick, frame: {duration: 0, redraw: true}}).catch(() => {});
  const play = () => {
    playing = true;
    const from = now() >= steps.length - 1 ? 0 : now();
    Plotly.animate(plot, steps.slice(from).map(step => step.label),
      {...quick, frame: {duration: FRAME, redraw: true}}).then(() => { playing = false; }, () => {});
  };
  const moves = {ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10};
  plot.tabIndex = 0;
  plot.setAttribute('role', 'group');
  plot.setAttribute('aria-label', 'Play-back of the search; arrow keys move between updates, space plays');
  document.addEventListener('keydown', event => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key in moves) { playing = false; go(now() + moves[event.key]); }
    else if (event.key === 'Home') { playing = false; go(0); }
    else if (event.key === 'End') { playing = false; go(steps.length - 1); }
    else if (event.key === ' ') { if (playing) { playing = false; go(now()); } else play(); }
    else return;
    event.preventDefault();
  });
  plot.on('plotly_animatingframe', () => setTimeout(tell, 0));
  tell();
})();
""".replace("FRAME", str(FRAME_MS))
