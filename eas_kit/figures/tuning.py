"""What tuning gave: loss curves, and accuracies of the arms of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import (
    BLUE,
    GREY,
    INK,
    METRICS,
    FigureError,
    arm_name,
    axis,
    colour_of,
    column,
    field,
    label_room,
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

MAX_POINTS = 400  # a curve of more steps is thinned


def records(history: Any, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a history, whatever its form; steps without the metric are left out.

    Raises:
        FigureError: no step holds the metric.
    """
    history = field(history, "records", "steps", "history", default=history)
    if hasattr(history, "columns"):
        history = history.to_dict("records")
    pairs = []
    for number, event in enumerate(history, 1):
        plain = isinstance(event, int | float | np.number)
        value = event if plain else field(event, metric)
        if value is not None and np.isfinite(value):
            pairs.append((number if plain else field(event, "step", "update", default=number), float(value)))
    if not pairs:
        raise FigureError(
            f"this history holds no {metric!r}; a history is one record a step, with 'step' and {metric!r}, "
            "or a data frame with these columns, or plain numbers."
        )
    steps, values = zip(*pairs, strict=True)
    return np.asarray(steps, float), np.asarray(values, float)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean over `window` values, over those there are at both ends."""
    total = np.append(0.0, np.cumsum(values))
    at = np.arange(len(values))
    first, stop = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (total[stop] - total[first]) / (stop - first)


def training_curves(
    histories: Any, *, metric: str = "loss", smooth: int | None = None, log: bool = False, title: str | None = None
) -> go.Figure:
    """Curves of one training run or several: thin every step, thick a moving mean, each named at its end.

    Args:
        histories: name -> history, or one history. A history is what `fit` or `search` returned, its records (dicts
            or events with `step` and the metric), a data frame with these columns, or plain numbers.
        metric: what to draw.
        smooth: steps of the moving mean; by default a 20th of the longest run. 1: no smoothing.
        log: logarithmic y axis.

    Raises:
        FigureError: a history without the metric.
    """
    runs = histories if isinstance(histories, Mapping) and metric not in histories else {"": histories}
    curves = {str(name): records(run, metric) for name, run in runs.items()}
    window = smooth or max(1, max(len(values) for _, values in curves.values()) // 20)
    fig = new_figure(
        title or f"Training {metric} by step" + (f", {len(curves)} runs" if len(curves) > 1 else ""),
        f"thin: every recorded step; thick: moving mean over {window}" if window > 1 else "",
        height=360,
        margin=(66, label_room(curves, 24) + 4, 0, 52),
    )
    ends, values = [], np.concatenate([values for _, values in curves.values()])
    for index, (name, (steps, run)) in enumerate(curves.items()):
        colour, _, dash = colour_of(index)
        line = smoothed(run, window)
        at = sorted({*range(0, len(run), -(-len(run) // MAX_POINTS)), len(run) - 1})
        x = steps[at].tolist()
        if window > 1:
            thin = {"color": rgba(colour, 0.28), "width": 1}
            fig.add_scatter(x=x, y=numbers(run[at], 4), mode="lines", line=thin, name=f"{name} steps", hoverinfo="skip")
        fig.add_scatter(
            x=x,
            y=numbers(line[at], 5),
            mode="lines",
            line={"color": colour, "width": 2.2, "dash": dash},
            name=name or metric,
            hovertemplate=f"{name}<br>step %{{x}}: {metric} %{{y}}<extra></extra>",
        )
        ends.append(np.log10(line[-1]) if log else line[-1])
    span = padded(np.log10(values[values > 0]) if log else values)
    for index, (height, name) in enumerate(zip(spread(ends, 0.062 * (span[1] - span[0])), curves, strict=True)):
        note(fig, f"<b>{name}</b>", 1, height, xref="paper", colour=colour_of(index)[0], xshift=5)
    last = max(steps[-1] for steps, _ in curves.values())
    fig.update_layout(
        xaxis=axis("training step", range=[0, last], showgrid=False),
        yaxis=axis(METRICS.get(metric, metric), range=span, type="log" if log else "linear", **percent(metric)),
    )
    return fig


def arms_accuracy(
    table: pd.DataFrame,
    *,
    metric: str = "accuracy",
    arm: str | None = None,
    zero: bool = True,
    chance: float | None = None,
    split: str = "test",
    title: str | None = None,
) -> go.Figure:
    """Accuracy of the arms of a comparison: a bar at the mean, a dot a seed, the numbers written beside.

    Args:
        table: one row an arm and seed, as `compare.run_arms` makes it; columns `arm` (or `method`, `name`) and
            `accuracy` or `<split>_accuracy` (share of 1). Order is kept.
        zero: bars from zero; False: an axis fitted to the data, for arms that lie close, and no bars.
        chance: accuracy of guessing, as a dotted line.
        split: the data split the numbers come from.

    Raises:
        FigureError: a column is missing.
    """
    arm = column(table, *([arm] if arm else []), "arm", "method", "name")
    value = column(table, f"{split}_{metric}", metric)
    groups = {arm_name(n): table.loc[table[arm] == n, value].to_numpy(float) for n in dict.fromkeys(table[arm])}
    names, means = list(groups), [float(np.nanmean(values)) for values in groups.values()]
    seeds = max(len(values) for values in groups.values())
    texts = [_mean_and_deviation(values, metric) for values in groups.values()]
    best = int(np.argmin(means) if "loss" in metric else np.argmax(means))
    said = [f"{'bar' if zero else 'line'}: mean; dots: seeds; ±: standard deviation over {seeds} seeds"]
    said = (said if seeds > 1 else ["one seed an arm"]) + (["dotted: guessing"] if chance is not None else [])
    fig = new_figure(
        title or f"{metric.capitalize()} on {split}: best {names[best]}, {texts[best]}",
        "; ".join(said),
        height=126 + 32 * len(names),
        margin=(label_room(names), 96, 0, 52),
    )
    for row, (name, values) in enumerate(groups.items()):
        if zero:
            fig.add_bar(
                x=numbers([means[row]]),
                y=[row],
                orientation="h",
                width=0.68,
                marker={"color": rgba(BLUE, 0.65 if row == best else 0.4)},
                name=name,
                hovertemplate=f"{name}<br>mean %{{x}}<extra></extra>",
            )
        else:
            ends = {"x0": means[row], "x1": means[row], "y0": row - 0.32, "y1": row + 0.32}
            fig.add_shape(type="line", line={"color": INK, "width": 2}, **ends)
        if seeds > 1 or not zero:
            shift = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
            fig.add_scatter(
                x=numbers(values),
                y=numbers(row + shift),
                mode="markers",
                marker={"color": "#003A63", "size": 6, "opacity": 0.85},
                name=f"{name}, seeds",
                hovertemplate=f"{name}<br>%{{x}}<extra>one seed</extra>",
            )
        words = f"<b>{texts[row]}</b>" if row == best else texts[row]
        note(fig, words, 1, row, xref="paper", xshift=8)
    everything = [*np.concatenate(list(groups.values())), *([] if chance is None else [chance])]
    span = [0.0, max(everything) * 1.05] if zero else padded(everything)
    if "accuracy" in metric:
        span[1] = 1.0 if zero else min(span[1], 1.002)
    if chance is not None:
        dotted = {"color": GREY, "width": 1.2, "dash": "dot"}
        fig.add_shape(type="line", x0=chance, x1=chance, yref="paper", y0=0, y1=1, line=dotted)
    rows = {"tickvals": list(range(len(names))), "ticktext": names, "range": [len(names) - 0.5, -0.5]}
    fig.update_layout(
        barmode="overlay",
        xaxis=axis(f"{metric} on {split}", range=span, **percent(metric, span[1] - span[0])),
        yaxis=axis(showgrid=False, ticks="", **rows),
    )
    return fig


def _mean_and_deviation(values: np.ndarray, metric: str) -> str:
    times, digits, unit = (100, 1, "%") if "accuracy" in metric else (1, 3, "")
    text = f"{np.nanmean(values) * times:.{digits}f}"
    return (text + f" ± {np.nanstd(values, ddof=1) * times:.{digits}f}" if len(values) > 1 else text) + unit
