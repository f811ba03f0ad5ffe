"""How much a model needs its sites, measured by skipping them without tuning (the paper's Fig. 1b and Table 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import (
    GREY,
    INK,
    METRICS,
    axis,
    column,
    kind_look,
    new_figure,
    note,
    numbers,
    padded,
    percent,
    rgba,
    spread,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

DENSE = ("dense", "none", "nothing")  # as kind: rows of the model with nothing skipped
BETWEEN = 0.19  # panels, as a share of the width


def probe_curves(
    frame: pd.DataFrame | Any,
    *,
    metrics: Iterable[str] = ("accuracy", "loss"),
    dense: Mapping[str, float] | None = None,
    split: str | None = None,
    title: str | None = None,
) -> go.Figure:
    """Quality against the number of skipped sites, a line a kind (Fig. 1b), a panel a metric.

    Lines are means over trials, bands one standard deviation, dots single trials; dashed: nothing skipped.

    Args:
        frame: what `probe_redundancy` returned, or a table of one row a trial; columns `kind`, `num_skipped` (or `k`),
            and the metrics. Rows with nothing skipped, or of kind "dense", are the dense model.
        metrics: columns to draw; those not in the frame are left out. Accuracy is a share of 1.
        dense: the dense model's metrics, if no row of the frame holds them.
        split: the data split, said in the subtitle.

    Raises:
        FigureError: a column is missing, or no metric is there.
    """
    if hasattr(frame, "frame"):
        dense, split = dense or frame.dense, split or frame.metadata.get("split")
        frame = frame.frame
    kind, k = column(frame, "kind"), column(frame, "num_skipped", "k")
    metrics = [name for name in metrics if name in frame.columns] or [column(frame, *metrics)]
    without = frame[(frame[k] == 0) | frame[kind].astype(str).str.lower().isin(DENSE)]
    frame = frame.drop(without.index)
    looks = {name: kind_look(name, at) for at, name in enumerate(dict.fromkeys(frame[kind]))}
    trials = int(frame.groupby([kind, k]).size().max())
    subtitle = f"line: mean; band: ± 1 standard deviation; dots: single trials (up to {trials} a point)"
    names = " or ".join(look[2] for look in looks.values())
    fig = new_figure(
        title or f"Skipping k random {names} sites, without tuning",
        subtitle + (f"; {split} split" if split else ""),
        height=380,
        margin=(66, 92, 0, 52),
    )
    wide = (1 - BETWEEN * (len(metrics) - 1)) / len(metrics)
    counts = sorted(set(frame[k]))
    for panel, metric in enumerate(metrics):
        number = str(panel + 1) if panel else ""
        left = panel * (wide + BETWEEN)
        span = padded([*frame[metric], *without[metric]], 0.06, 0.1)
        below = axis("skipped sites k", tickvals=[0, *counts], range=[-0.25, counts[-1] + 0.15], showgrid=False)
        fig.update_layout(
            {
                f"xaxis{number}": {**below, "domain": [left, left + wide], "anchor": f"y{number}"},
                f"yaxis{number}": axis(METRICS.get(metric, metric), anchor=f"x{number}", range=span, **percent(metric)),
            }
        )
        start = (dense or {}).get(metric, float(without[metric].mean()) if len(without) else None)
        places = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        ends = [
            draw_curve(fig, frame[frame[kind] == name], k, metric, start, look, places) for name, look in looks.items()
        ]
        inside = {"xref": f"x{number} domain", "yref": f"y{number}"}
        heights = spread(ends, 0.075 * (span[1] - span[0]))
        for height, (colour, _, name) in zip(heights, looks.values(), strict=True):
            note(fig, f"<b>{name.removeprefix('whole ')}</b>", 1, height, colour=colour, xshift=4, **inside)
        if start is not None:
            line = {"color": GREY, "width": 1.2, "dash": "dash"}
            fig.add_shape(type="line", x0=0, x1=1, y0=start, y1=start, line=line, **inside)
            side = "top" if metric in ("loss", "perplexity") else "bottom"  # away from the curves
            note(fig, "nothing skipped", 1, start, colour=GREY, size=11, xanchor="right", yanchor=side, **inside)
    return fig


def draw_curve(
    fig: go.Figure, trials: pd.DataFrame, k: str, metric: str, start: float | None, look: tuple, places: dict
) -> float:
    """One kind in one panel; returns the height at its right end."""
    colour, marker, name = look
    groups = trials.groupby(k)[metric]
    mean, deviation = groups.mean(), groups.std(ddof=1).fillna(0.0)
    x, y, band = mean.index.tolist(), mean.to_numpy(float), deviation.to_numpy(float)
    if start is not None:
        x, y, band = [0, *x], np.append(start, y), np.append(0.0, band)
    if band.any():
        fig.add_scatter(
            x=x + x[::-1],
            y=numbers(np.concatenate([y + band, (y - band)[::-1]])),
            mode="lines",
            line={"width": 0, "color": colour},
            fill="toself",
            fillcolor=rgba(colour, 0.15),
            name=f"{name}, spread",
            hoverinfo="skip",
            **places,
        )
    fig.add_scatter(
        x=trials[k].tolist(),
        y=numbers(trials[metric]),
        mode="markers",
        marker={"color": colour, "size": 5, "opacity": 0.45, "symbol": marker},
        name=f"{name}, trials",
        hovertemplate=f"{name}, k = %{{x}}<br>{metric} %{{y}}<extra>one trial</extra>",
        **places,
    )
    fig.add_scatter(
        x=x,
        y=numbers(y),
        mode="lines+markers",
        line={"color": colour, "width": 2.5},
        marker={"color": colour, "size": 8, "symbol": marker},
        name=name,
        hovertemplate=f"{name}, k = %{{x}}<br>mean {metric} %{{y}}<extra></extra>",
        **places,
    )
    return float(y[-1])


def single_site_bars(
    frame: pd.DataFrame,
    *,
    metric: str | None = None,
    threshold: float | None = 0.05,
    clip: float | None = None,
    split: str | None = None,
    title: str | None = None,
) -> go.Figure:
    """What skipping one site alone costs: the change of loss by layer, kinds side by side.

    Args:
        frame: one row a site; columns `kind`, `layer` (or `site`), and the change: `metric`, or one of `loss_change`,
            `delta_loss`, `change`. Several rows of a site (trials, seeds) become the mean and a whisker over the range.
        threshold: a dotted line to compare with (None: no line).
        clip: end of the axis; longer bars are cut and their value written into them, so one tall bar hides no other.
        split: the data split, said in the subtitle.

    Raises:
        FigureError: a column is missing.
    """
    kind, place = column(frame, "kind"), column(frame, "layer", "site", "index")
    value = column(frame, *([metric] if metric else []), "loss_change", "delta_loss", "change")
    looks = {name: kind_look(name, at) for at, name in enumerate(dict.fromkeys(frame[kind]))}
    said = [f"dotted line: a change of {threshold:g}"] if threshold is not None else []
    said += [f"{split} split"] if split else []
    names = " or one ".join(look[2] for look in looks.values())
    fig = new_figure(
        title or f"Cost of skipping one {names} alone, without tuning",
        "; ".join(said),
        height=340,
        margin=(70, 20, 0, 52),
        barmode="group",
        bargap=0.25,
    )
    layers, everything = 0, [0.0]
    for at, (kind_name, (colour, _, name)) in enumerate(looks.items()):
        groups = frame[frame[kind] == kind_name].groupby(place)[value]
        mean, least, most = groups.mean(), groups.min(), groups.max()
        where = mean.index.to_numpy() - (0 if place == "layer" else mean.index.min())  # FFN sites follow the MHA sites
        layers = max(layers, int(where.max()) + 1)
        everything += [*least, *most]
        whisker = {"array": numbers(most - mean), "arrayminus": numbers(mean - least), "color": INK}
        fig.add_bar(
            x=where.tolist(),
            y=numbers(mean),
            marker={"color": colour},
            error_y={"type": "data", "thickness": 1, "width": 2, **whisker} if (most > least).any() else None,
            name=name,
            hovertemplate=f"{name} of layer %{{x}}<br>change %{{y}}<extra></extra>",
        )
        offset = (at - (len(looks) - 1) / 2) * 0.75 / len(looks)
        for layer, change in zip(where, mean, strict=True):
            if clip is not None and change > clip:
                words = {"textangle": -90, "xanchor": "center", "yanchor": "top", "yshift": -4, "size": 11}
                note(fig, f"{change:.2f} ▸", layer + offset, clip, colour="white", **words)
    span = padded(everything, 0.02, 0.08)
    if clip is not None:
        span[1] = min(span[1], clip)
    if threshold is not None:
        dotted = {"color": GREY, "width": 1.2, "dash": "dot"}
        fig.add_shape(type="line", xref="paper", x0=0, x1=1, y0=threshold, y1=threshold, line=dotted)
    fig.update_layout(
        showlegend=len(looks) > 1,
        legend={"x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom", "orientation": "h"},
        xaxis=axis("layer (zero-based)", tickvals=list(range(layers)), range=[-0.6, layers - 0.4], showgrid=False),
        yaxis=axis("change of loss (nats per token)", range=span, zeroline=True, zerolinecolor=INK),
    )
    return fig
