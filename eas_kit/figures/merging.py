"""What the merge gave: the same logits, less time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import (
    BLUE,
    GREY,
    INK,
    VERMILLION,
    FigureError,
    axis,
    colour_of,
    column,
    label_room,
    new_figure,
    note,
    numbers,
    padded,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MAX_POINTS = 600  # logits drawn; all are counted
BETWEEN = 0.08  # panels, as a share of the width


def merge_scatter(unmerged: Any, merged: Any, *, tolerance: float = 1e-4, title: str | None = None) -> go.Figure:
    """Merged against unmerged logits on the diagonal, and a histogram of their differences.

    Args:
        unmerged, merged: logits of one shape, arrays or tensors.
        tolerance: bound of the difference relative to the largest |logit|.

    Raises:
        FigureError: shapes differ, or there are none.
    """
    a, b = (np.asarray(v.detach().double().cpu() if hasattr(v, "detach") else v, float) for v in (unmerged, merged))
    if a.shape != b.shape or not a.size:
        raise FigureError(f"merged and unmerged logits must have one shape, not empty; got {a.shape} and {b.shape}.")
    a, b = a.ravel(), b.ravel()
    gap = b - a
    scale, worst = float(np.abs(a).max()) or 1.0, float(np.abs(gap).max())
    bound, half = tolerance * scale, worst or 1e-12
    same = worst <= bound
    head = "Merged and unmerged logits agree" if same else "Merged and unmerged logits DIFFER"
    fig = new_figure(
        title or f"{head}: largest difference {_tiny(worst)}",
        f"{a.size:,} logits up to {scale:.3g} in size; relative {_tiny(worst / scale)}, bound {_tiny(tolerance)}",
        height=370,
        margin=(66, 24, 0, 54),
    )
    # evenly through the array, and the worst in any case
    keep = np.unique(
        np.append(np.linspace(0, a.size - 1, min(a.size, MAX_POINTS)).astype(int), np.argsort(-np.abs(gap))[:20])
    )
    ends = padded([a.min(), a.max(), b.min(), b.max()])
    fig.add_scatter(x=ends, y=ends, mode="lines", line={"color": GREY, "width": 1}, name="equal", hoverinfo="skip")
    fig.add_scatter(
        x=numbers(a[keep]),
        y=numbers(b[keep]),
        mode="markers",
        marker={"color": BLUE, "size": 4, "opacity": 0.5},
        name="logits",
        hovertemplate="unmerged %{x}<br>merged %{y}<extra></extra>",
    )
    counts, edges = np.histogram(gap, bins=41, range=(-half, half))
    fig.add_bar(
        x=numbers((edges[1:] + edges[:-1]) / 2),
        y=counts.tolist(),
        width=float(edges[1] - edges[0]),
        marker={"color": BLUE},
        name="differences",
        hovertemplate="difference %{x:.2e}<br>%{y} logits<extra></extra>",
        xaxis="x2",
        yaxis="y2",
    )
    inside = {"xref": "x2 domain", "yref": "y2 domain"}
    if same:
        words = f"bound ± {_tiny(bound)},<br>{bound / half:,.0f} times this panel's width" if worst else "no difference"
        note(fig, words, 1, 1, colour=GREY, size=11, xanchor="right", yanchor="top", align="right", **inside)
    else:
        for side in (-bound, bound):
            dashed = {"color": VERMILLION, "width": 1.2, "dash": "dash"}
            fig.add_shape(type="line", xref="x2", x0=side, x1=side, yref="y2 domain", y0=0, y1=1, line=dashed)
        words = {"colour": VERMILLION, "size": 11, "xanchor": "right", "yanchor": "top"}
        note(fig, f"dashed: bound ± {_tiny(bound)}", 1, 1, **words, **inside)
    ticks = [-half, 0.0, half]
    fig.update_layout(
        bargap=0,
        xaxis=axis("unmerged logit", domain=[0, 0.42], range=ends),
        yaxis=axis("merged logit", range=ends),
        xaxis2=axis(
            "merged − unmerged",
            domain=[0.58, 1],
            anchor="y2",
            tickvals=ticks,
            ticktext=[_tiny(v) for v in ticks],
            range=[-1.08 * half, 1.08 * half],
            showgrid=False,
        ),
        yaxis2=axis("number of logits", anchor="x2", range=[0, max(int(counts.max()) * 1.3, 1)], nticks=5),
    )
    return fig


def _tiny(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}".replace("-", "−").replace("e−0", "e−").replace(".0e", "e")


def latency_bars(
    times: pd.DataFrame | Mapping[str, Any],
    *,
    phases: tuple[str, ...] = ("prefill", "decode"),
    reference: str | None = None,
    title: str | None = None,
) -> go.Figure:
    """Time of prefill and decode apart: a bar a variant at the median, whiskers from quartile to quartile.

    Args:
        times: what `measure.compare_latency` returned (its speed-ups, taken round by round, are the ones written); or
            a data frame of one row a run, columns `variant` (or `arm`, `name`), `phase`, and `ms` or `seconds`.
        phases: which, from left to right.
        reference: what the factors refer to; by default the comparison's baseline, else the first variant.

    Raises:
        FigureError: a column, a phase or the reference is missing.
    """
    summary, factors, reference, runs = (
        _from_frame(times, reference) if hasattr(times, "columns") else _from_dict(times, reference)
    )
    names = list(summary)
    missing = [phase for phase in phases if not all(phase in parts for parts in summary.values())]
    if missing:
        raise FigureError(
            f"latency_bars wants the phases {', '.join(phases)} of every variant; {missing[0]!r} is missing."
        )
    fig = new_figure(
        title or f"Time of {' and '.join(phases)}; in brackets: times as fast as {reference}",
        f"bar: median of {runs} runs; whiskers: quartiles" if runs > 1 else "one run each",
        height=140 + 40 * len(names),
        margin=(label_room(names), 40, 18, 52),
    )
    wide = (1 - BETWEEN * (len(phases) - 1)) / len(phases)
    for panel, phase in enumerate(phases):
        number, left = str(panel + 1) if panel else "", panel * (wide + BETWEEN)
        low, median, high = (
            np.array([[summary[name][phase][end] for end in ("low", "median", "high")] for name in names]).T * 1e3
        )
        places = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        fig.add_bar(
            x=numbers(median),
            y=list(range(len(names))),
            orientation="h",
            width=0.66,
            marker={"color": [GREY if name == reference else colour_of(row)[0] for row, name in enumerate(names)]},
            error_x={
                "type": "data",
                "array": numbers(high - median),
                "arrayminus": numbers(median - low),
                "thickness": 1.2,
                "width": 4,
                "color": INK,
            },
            customdata=names,
            name=phase,
            hovertemplate=f"%{{customdata}}, {phase}<br>%{{x}} ms<extra></extra>",
            **places,
        )
        for row, name in enumerate(names):
            factor = factors.get(name, {}).get(phase)
            words = f"{median[row]:.3g} ms" + (f" (<b>{factor:.2f}×</b>)" if factor and name != reference else "")
            note(fig, words, float(high[row]), row, xref=f"x{number}", yref=f"y{number}", xshift=7)
        note(fig, f"<b>{phase}</b>", 0, 1, xref=f"x{number} domain", yref="paper", yanchor="bottom", yshift=2)
        rows = {"tickvals": list(range(len(names))), "ticktext": names, "showticklabels": panel == 0}
        span = [0, float(high.max()) * 1.42]
        fig.update_layout(
            {
                f"xaxis{number}": axis(
                    "milliseconds", domain=[left, left + wide], anchor=f"y{number}", range=span, nticks=5
                ),
                f"yaxis{number}": axis(
                    anchor=f"x{number}", range=[len(names) - 0.5, -0.5], showgrid=False, ticks="", **rows
                ),
            }
        )
    return fig


def _from_dict(times: Mapping[str, Any], reference: str | None) -> tuple[dict, dict, str, int]:
    arms = times.get("arms", times)
    baseline = times.get("baseline")
    chosen = reference or baseline or next(iter(arms))
    if chosen not in arms:
        raise FigureError(f"reference must be one of the variants {', '.join(arms)}; got {chosen!r}.")
    if chosen == baseline:
        factors = {n: {part: ratio["median"] for part, ratio in parts.items()} for n, parts in times["speedup"].items()}
    else:
        factors = _ratios(arms, chosen)
    return dict(arms), factors, chosen, int(times.get("repeats", 0) or 0)


def _from_frame(frame: pd.DataFrame, reference: str | None) -> tuple[dict, dict, str, int]:
    variant, phase = column(frame, "variant", "arm", "name", "model"), column(frame, "phase")
    value = column(frame, "ms", "seconds")
    unit = 1e-3 if value == "ms" else 1.0
    arms: dict[str, dict] = {str(name): {} for name in dict.fromkeys(frame[variant])}
    groups = frame.groupby([variant, phase])[value]
    for (name, part), runs in groups:
        low, median, high = np.percentile(runs.to_numpy(float) * unit, (25, 50, 75))
        arms[str(name)][part] = {"low": low, "median": median, "high": high}
    summary, _, chosen, _ = _from_dict(arms, reference)
    return summary, _ratios(arms, chosen), chosen, int(groups.size().max())


def _ratios(arms: Mapping[str, Any], reference: str) -> dict[str, dict[str, float]]:
    """Reference over variant, of the medians."""
    parts = {part: spread["median"] for part, spread in arms[reference].items() if isinstance(spread, Mapping)}
    return {n: {part: median / arm[part]["median"] for part, median in parts.items()} for n, arm in arms.items()}
