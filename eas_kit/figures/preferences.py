"""What the bandit learned: preferences of the sites over updates, and the rewards that moved them (eq. 14-16)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..masks import check_mask
from .style import (
    BLUE,
    DIVERGING,
    GREY,
    INK,
    FigureError,
    axis,
    field,
    kind_look,
    listed,
    lowest,
    new_figure,
    note,
    numbers,
    padded,
    site_kinds_of,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_COLUMNS = 120  # more updates than this are thinned: the eye sees no more, and the notebook file stays small
BLACK = "#111111"


@dataclass
class SearchTrace:
    """A search as arrays: `preferences` (T, L), `updates` (T,), and T lists each of `skipped`, `rewards`, `losses`."""

    preferences: np.ndarray
    updates: list[int]
    skipped: list[list[int]]
    rewards: list[list[float]]
    losses: list[list[float]]

    @classmethod
    def read(cls, history: Any, num_skipped: int | None = None) -> SearchTrace:
        """From a search's result, its history (dicts or events, one an update), or preferences (T, L).

        Raises:
            FigureError: no updates, or updates without preferences.
        """
        history = field(history, "history", default=history)
        if hasattr(history, "__array__"):
            history = np.atleast_2d(np.asarray(history, float))
        events = [{"preferences": event} if isinstance(event, list | np.ndarray) else event for event in history]
        if not events:
            raise FigureError("a search without updates has no preferences to draw; run it for at least one update.")
        rows = [field(event, "preferences") for event in events]
        if any(row is None for row in rows):
            raise FigureError(
                "every update in a search's history needs 'preferences', one number a site; one has none."
            )
        matrix = np.asarray([np.asarray(row, float).ravel() for row in rows])
        skipped = [field(event, "skipped") for event in events]
        for t, (row, given) in enumerate(zip(matrix, skipped, strict=True)):
            fits = given is not None and num_skipped in (None, len(given))  # the search knows its candidates, we do not
            skipped[t] = list(check_mask(given, matrix.shape[1])) if fits else lowest(row, num_skipped or 0)
        updates = [int(field(event, "update", "step", default=t)) for t, event in enumerate(events, 1)]
        lists = [[[float(v) for v in field(e, name, default=[])] for e in events] for name in ("rewards", "losses")]
        return cls(matrix, updates, skipped, *lists)

    def thinned(self, columns: int = MAX_COLUMNS) -> SearchTrace:
        """Every n-th update, the last always among them."""
        count = len(self.updates)
        every = math.ceil(count / columns)
        return self.at(list(range(count - 1, -1, -every))[::-1])

    def until(self, count: int) -> SearchTrace:
        """The first `count` updates."""
        return self.at(list(range(count)))

    def at(self, at: list[int]) -> SearchTrace:
        """The updates at these positions."""
        lists = ([values[t] for t in at] for values in (self.updates, self.skipped, self.rewards, self.losses))
        return SearchTrace(self.preferences[at], *lists)

    def curve(self) -> tuple[str, list[list[float]]]:
        """What there is to draw below the heatmap: the rewards, else the losses."""
        return ("reward", self.rewards) if any(self.rewards) else ("loss", self.losses)


def blocks(kinds: list[str]) -> list[tuple[str, int, int]]:
    """Runs of equal kinds: written name, first site, one past the last."""
    starts = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]]
    return [(kind_look(kinds[a])[2], a, b) for a, b in zip(starts, [*starts[1:], len(kinds)], strict=True)]


def colour_limit(values: Any) -> float:
    """The colour range is symmetric around zero, where preferences start: -limit..limit."""
    finite = np.abs(np.asarray(values, float))
    most = finite[np.isfinite(finite)].max(initial=0.0)
    return float(f"{most:.3g}") or 1.0


def written(sites: Iterable[int], kinds: list[str]) -> str:
    """'MHA 2, 5' or 'MHA 2; FFN 14'."""
    sites = list(sites)
    groups = {kind: [site for site in sites if kinds[site] == kind] for kind in dict.fromkeys(kinds[s] for s in sites)}
    return "; ".join(f"{kind_look(kind)[2]} {listed(group)}" for kind, group in groups.items()) or "none"


def preference_heatmap(
    history: Any,
    *,
    num_skipped: int | None = None,
    skipped: Iterable[int] | None = None,
    site_kinds: Any = None,
    title: str | None = None,
    limit: float | None = None,
) -> go.Figure:
    """Preference of every site: low (skipped first) in orange, high (kept) in blue.

    A history or a (T, L) matrix gives updates from left to right and sites from top to bottom; a square marks the
    sites that were lowest at that update. One row of preferences (L,) gives layers by kinds, a cross on skipped sites.

    Args:
        history: a search's result or history, or preferences (T, L) or (L,).
        num_skipped: k, how many of the lowest to mark; the history says it itself.
        skipped: the sites finally skipped, if they are not the lowest of the last update.
        site_kinds: None (as the result says, else all attention), the config's `kinds`, one kind a site, or the sites.
        limit: colours span -limit..limit; by default the largest preference.

    Raises:
        FigureError: no updates, or kinds that do not fit. ConfigError: sites out of range.
    """
    if _is_row(history):
        return _grid(np.asarray(history, float), num_skipped, skipped, site_kinds, title, limit)
    trace = SearchTrace.read(history, num_skipped)
    return over_time(trace, skipped, site_kinds or field(history, "kinds"), title, limit, curve=False)


def search_figure(
    history: Any,
    *,
    num_skipped: int | None = None,
    skipped: Iterable[int] | None = None,
    site_kinds: Any = None,
    title: str | None = None,
) -> go.Figure:
    """`preference_heatmap` over time and, below it on the same axis, the rewards of the compared subnetworks.

    Raises:
        FigureError: as `preference_heatmap`; also a history with neither rewards nor losses.
    """
    trace = SearchTrace.read(history, num_skipped)
    if not any(trace.curve()[1]):
        raise FigureError(
            "search_figure draws the rewards of each update, and this history has neither 'rewards' nor 'losses'; "
            "pass the search's result, or use preference_heatmap."
        )
    return over_time(trace, skipped, site_kinds or field(history, "kinds"), title, None, curve=True)


def _is_row(history: Any) -> bool:
    """One number a site, rather than updates."""
    if field(history, "history") is not None or isinstance(history, Mapping):
        return False
    if isinstance(history, list | tuple):
        return bool(history) and all(isinstance(value, int | float | np.number) for value in history)
    return np.ndim(history) == 1 and np.asarray(history).dtype.kind in "fiu"


def over_time(
    full: SearchTrace,
    skipped: Iterable[int] | None,
    site_kinds: Any,
    title: str | None,
    limit: float | None,
    curve: bool,
) -> go.Figure:
    """Sites by updates; with `curve`, the rewards below on the same axis."""
    trace = full.thinned()
    count, sites = trace.preferences.shape
    kinds = site_kinds_of(site_kinds, sites)
    final = list(check_mask(skipped, sites)) if skipped is not None else trace.skipped[-1]
    after = f"{full.updates[-1]} update{'s' if full.updates[-1] != 1 else ''}"
    title = title or (f"Skipped after {after}: {written(final, kinds)}" if final else f"Preferences over {after}")
    every = trace.updates[-1] - trace.updates[-2] if count > 1 else 1
    k = len(trace.skipped[-1])
    subtitle = f"squares: the {k} sites of lowest preference at that update" if k else "orange: lowest; blue: highest"
    subtitle += f" (every {every}th update drawn)" if len(full.updates) > count else ""
    cell = max(13, min(26, 340 // sites))
    height = cell * sites + 118 + (164 if curve else 0)
    fig = new_figure(title, subtitle, height=height, margin=(74, 118, 0, 52))
    split = 1 - cell * sites / (height - fig.layout.margin.t - fig.layout.margin.b) if curve else 0.0
    limit = limit or colour_limit(trace.preferences)
    bar = _colour_bar(limit, x=1.055, y=(1 + split) / 2, len=min(220, cell * sites + 20))
    for number, (name, first, stop) in enumerate(blocks(kinds)):
        fig.add_heatmap(
            z=numbers(trace.preferences[:, first:stop].T, 4),
            x=trace.updates,
            y=list(range(first, stop)),
            zmin=-limit,
            zmax=limit,
            colorscale=DIVERGING,
            showscale=number == 0,
            colorbar=bar,
            name=name,
            hovertemplate=f"{name} site %{{y}}, update %{{x}}<br>preference %{{z}}<extra></extra>",
        )
        middle = (first + stop - 1) / 2
        note(fig, f"{name} site", 0, middle, xref="paper", xanchor="center", xshift=-46, textangle=-90)
        if first:
            edge = {"xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": first - 0.5, "y1": first - 0.5}
            fig.add_shape(type="line", line={"color": INK, "width": 1.5}, **edge)
    marked = [(update, site) for update, row in zip(trace.updates, trace.skipped, strict=True) for site in row]
    if marked:
        fig.add_scatter(
            x=[update for update, _ in marked],
            y=[site for _, site in marked],
            mode="markers",
            name=f"{k} lowest",
            marker={"symbol": "square", "size": max(3, min(5, cell // 3, round(450 / count))), "color": BLACK},
            hoverinfo="skip",
        )
    for site in final:
        note(fig, "◂ skip", 1, site, xref="paper", colour=BLACK, size=11, xshift=3)
    span = [trace.updates[0] - every / 2, trace.updates[-1] + every / 2]
    few = {"tickvals": trace.updates} if count <= 6 else {"nticks": 8, "tickformat": "d"}
    time = axis("update of the search", range=span, showgrid=False, **few)
    fig.update_layout(
        xaxis={**time, **({"title": None, "showticklabels": False} if curve else {})},
        yaxis=axis(
            range=[sites - 0.5, -0.5],
            tickvals=list(range(sites)),
            domain=[split, 1],
            showgrid=False,
            showline=False,
            ticks="",
        ),
    )
    if curve:
        top = split - 44 / (height - fig.layout.margin.t - fig.layout.margin.b) + 0.02
        _reward_curve(fig, trace, {**time, "anchor": "y2", "matches": "x"}, top)
    return fig


def _reward_curve(fig: go.Figure, trace: SearchTrace, time: dict, top: float) -> None:
    word, rows = trace.curve()
    points = [(update, value) for update, values in zip(trace.updates, rows, strict=True) for value in values]
    means = numbers([np.mean(values) if values else np.nan for values in rows])
    lower = {"xaxis": "x2", "yaxis": "y2"}
    fig.add_scatter(
        x=[update for update, _ in points],
        y=numbers([value for _, value in points]),
        mode="markers",
        name="one subnetwork",
        marker={"size": 5, "color": GREY, "opacity": 0.55},
        hovertemplate=f"update %{{x}}<br>{word} %{{y}}<extra>one subnetwork</extra>",
        **lower,
    )
    fig.add_scatter(
        x=trace.updates,
        y=means,
        mode="lines",
        name="mean",
        line={"color": BLUE, "width": 2},
        hovertemplate=f"update %{{x}}<br>mean {word} %{{y}}<extra></extra>",
        **lower,
    )
    span = padded([value for _, value in points])
    fig.update_layout(xaxis2=time, yaxis2=axis(word, domain=[0, top], anchor="x2", range=span, nticks=4))
    if means[-1] is not None:
        note(fig, "mean", 1, means[-1], xref="paper", yref="y2", colour=BLUE, xshift=5)


def _colour_bar(limit: float, **changes: Any) -> dict:
    ends = [-limit, 0, limit]
    text = {"tickvals": ends, "ticktext": [f"{v:.2g}".replace("-", "−") for v in ends], "outlinewidth": 0}
    return {
        "title": {"text": "preference", "font": {"size": 12}},
        "thickness": 14,
        "lenmode": "pixels",
        **text,
        **changes,
    }


def _grid(
    values: np.ndarray,
    k: int | None,
    skipped: Iterable[int] | None,
    site_kinds: Any,
    title: str | None,
    limit: float | None,
) -> go.Figure:
    sites = len(values)
    kinds = site_kinds_of(site_kinds, sites)
    marked = list(check_mask(skipped, sites)) if skipped is not None else lowest(values, k or 0)
    rows = blocks(kinds)
    widest = max(stop - first for _, first, stop in rows)
    limit = limit or colour_limit(values)
    subtitle = "cross: skipped; orange: lowest preference, blue: highest; the number in a cell is its site"
    title = title or f"Preference of each site; skipped: {written(marked, kinds)}"
    fig = new_figure(title, subtitle, height=126 + 52 * len(rows), margin=(64, 110, 0, 50))
    for row, (name, first, stop) in enumerate(rows):
        fig.add_heatmap(
            z=[numbers(values[first:stop], 4)],
            x=list(range(stop - first)),
            y=[row],
            zmin=-limit,
            zmax=limit,
            colorscale=DIVERGING,
            xgap=2,
            ygap=2,
            showscale=row == 0,
            colorbar=_colour_bar(limit, x=1.01, len=max(84, 52 * len(rows))),
            text=[[str(site) for site in range(first, stop)]],
            texttemplate="%{text}",
            textfont={"size": 11},
            name=name,
            hovertemplate=f"site %{{text}}: {name} of layer %{{x}}<br>preference %{{z}}<extra></extra>",
        )
    places = {first + i: (i, row) for row, (_, first, stop) in enumerate(rows) for i in range(stop - first)}
    fig.add_scatter(
        x=[places[site][0] + 0.32 for site in marked],  # in the cell's corner, clear of its number
        y=[places[site][1] - 0.3 for site in marked],
        mode="markers",
        name="skipped",
        marker={"symbol": "x", "size": 8, "color": BLACK},
        hoverinfo="skip",
    )
    bare = {"showgrid": False, "showline": False, "ticks": ""}
    names = [name for name, _, _ in rows]
    fig.update_layout(
        xaxis=axis("layer (zero-based)", range=[-0.5, widest - 0.5], tickvals=list(range(widest)), **bare),
        yaxis=axis(range=[len(rows) - 0.5, -0.5], tickvals=list(range(len(rows))), ticktext=names, **bare),
    )
    return fig
