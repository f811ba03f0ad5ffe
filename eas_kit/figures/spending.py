"""Where the time goes: a model's parts, prefill and decode apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import (
    BLUE,
    GREEN,
    LETTER,
    PURPLE,
    SKY,
    VERMILLION,
    FigureError,
    axis,
    label_room,
    new_figure,
    note,
    numbers,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

# part -> its colour (a kind of site keeps its own), the colour of words on it, its name
PARTS = {
    "vision": (SKY, "#111111", "vision tower"),
    "attention": (BLUE, "white", "attention"),
    "ffn": (VERMILLION, "white", "feed-forward"),
    "adapters": (GREEN, "white", "adapters"),
    "merging": (PURPLE, "#111111", "merging"),
    "other": ("#D9D9D9", "#111111", "the rest"),
}
BETWEEN = 0.06  # panels, as a share of the width
WIDTH = 820  # pixels that a figure without a width of its own has
RIGHT, ROOM = 20, 1.2  # margin in pixels; axis beyond the longest bar, for the sum


def time_shares(
    times: Mapping[str, Any], *, phases: tuple[str, ...] = ("prefill", "decode"), title: str | None = None
) -> go.Figure:
    """Where the time goes: a bar a variant, as long as its time, cut into the parts of the model; a panel a phase.

    Args:
        times: variant -> what `measure.time_parts` returned, or one such result.
        phases: of prefill, decode, total; from left to right.

    Raises:
        FigureError: no variant, or one without a phase or with a part that is not known.
    """
    times = {"model": times} if "seconds" in times else times
    if not times:
        raise FigureError("time_shares needs at least one variant, as {'dense': measure.time_parts(...)}.")
    for name, found in times.items():
        seconds = found.get("seconds", {}) if isinstance(found, Mapping) else {}
        missing = [phase for phase in phases if phase not in seconds]
        strange = {part for parts in seconds.values() for part in parts} - set(PARTS)
        if missing or strange:
            said = f"lacks the phase {missing[0]!r}" if missing else f"has the part {sorted(strange)[0]!r}"
            raise FigureError(
                f"time_shares wants what measure.time_parts returns, parts {', '.join(PARTS)} of "
                f"{', '.join(phases)}; {name!r} {said}."
            )
    names = [str(name) for name in times]
    runs = min(int(found.get("repeats", 1)) for found in times.values())
    room = label_room(names)
    fig = new_figure(
        title or f"Where the time of {' and '.join(phases)} goes",
        "share of the bar written into it" + (f"; medians of {runs} runs" if runs > 1 else "; one run each"),
        height=178 + 40 * len(names),
        margin=(room, RIGHT, 48, 52),  # above: the phases' names, the legend
        barmode="overlay",
    )
    wide = (1 - BETWEEN * (len(phases) - 1)) / len(phases)
    found = {
        phase: {part: _medians(times, phase, part) for part in PARTS if _medians(times, phase, part).any()}
        for phase in phases
    }
    named: set[str] = set()  # in the legend
    for panel, phase in enumerate(phases):
        number, left = str(panel + 1) if panel else "", panel * (wide + BETWEEN)
        places = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        refs = {"xref": f"x{number}", "yref": f"y{number}"}
        sums = np.sum(list(found[phase].values()), axis=0) if found[phase] else np.zeros(len(names))
        longest = float(sums.max()) or 1.0
        pixels = (WIDTH - room - RIGHT) * wide / (longest * ROOM)  # of a millisecond
        start = np.zeros(len(names))
        for part, spent in found[phase].items():
            colour, ink, words = PARTS[part]
            fig.add_bar(
                x=numbers(spent, 4),
                y=list(range(len(names))),
                base=numbers(start, 4),
                orientation="h",
                width=0.66,
                marker={"color": colour},
                name=words,
                legendgroup=part,
                showlegend=part not in named,
                text=[f"{share:.0%}" for share in spent / np.maximum(sums, 1e-12)],
                textposition="none",
                hovertemplate=f"{phase}, {words}<br>%{{x}} ms, %{{text}}<extra></extra>",
                **places,
            )
            named.add(part)
            for row, ms in enumerate(spent):
                text = _fitting(words, ms / (sums[row] or 1.0), ms * pixels)
                if text:
                    middle = {"xanchor": "center", "colour": ink, "size": 11}
                    note(
                        fig,
                        text,
                        float(f"{start[row] + ms / 2:.6g}"),
                        row,
                        xref=f"x{number}",
                        yref=f"y{number}",
                        **middle,
                    )
            start = start + spent
        for row, ms in enumerate(sums):
            note(fig, f"{ms:.3g} ms", float(f"{ms:.6g}"), row, xshift=5, **refs)
        note(fig, f"<b>{phase}</b>", 0, 1, xref=f"x{number} domain", yref="paper", yanchor="bottom", yshift=2)
        rows = {"tickvals": list(range(len(names))), "ticktext": names, "showticklabels": panel == 0}
        below = axis("milliseconds", domain=[left, left + wide], anchor=f"y{number}", nticks=5)
        beside = axis(anchor=f"x{number}", range=[len(names) - 0.5, -0.5], showgrid=False, ticks="", **rows)
        fig.update_layout({f"xaxis{number}": {**below, "range": [0, longest * ROOM]}, f"yaxis{number}": beside})
    tall = fig.layout.height - fig.layout.margin.t - fig.layout.margin.b
    above = round(1 + 22 / tall, 4)  # over the phases' names
    fig.update_layout(
        showlegend=True,
        legend={"x": 0, "xanchor": "left", "y": above, "yanchor": "bottom", "orientation": "h", "traceorder": "normal"},
    )
    return fig


def _medians(times: Mapping[str, Any], phase: str, part: str) -> np.ndarray:
    """Milliseconds of one part, a variant each; a part that a result does not have took none."""
    return np.array([1e3 * found["seconds"][phase].get(part, {}).get("median", 0.0) for found in times.values()])


def _fitting(words: str, share: float, pixels: float) -> str:
    """The name and share that stand in a piece of a bar, the share alone, or nothing, by its room."""
    for text in (f"{words} {share:.0%}", f"{share:.0%}"):
        if len(text) * LETTER + 4 <= pixels:
            return text
    return ""
