"""What skipping costs against what it saves: accuracy and speed of the arms of a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .style import (
    BLUE,
    GREY,
    INK,
    LETTER,
    VERMILLION,
    FigureError,
    arm_name,
    axis,
    column,
    new_figure,
    note,
    numbers,
    padded,
    percent,
    spread,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SPEED = {
    "speedup": "speed-up over the dense model (×)",
    "ms_per_token": "milliseconds per token",
    "macs": "multiply-accumulates (G)",
    "params": "trainable parameters",
}
PLOT = 710  # pixels between the margins, about


def accuracy_vs_speed(
    table: pd.DataFrame,
    *,
    accuracy: str = "accuracy",
    speed: str | None = None,
    arm: str | None = None,
    chosen: str | None = None,
    title: str | None = None,
) -> go.Figure:
    """Accuracy against speed, a point an arm (mean, whiskers over the seeds' range), the Pareto front as a line.

    Args:
        table: one row an arm (and seed); columns `arm` (or `method`, `name`), `accuracy`, and `speedup` (more is
            better) or one of `ms_per_token`, `ms`, `seconds`, `macs`, `params` (less is better), or `speed`'s.
        chosen: the arm that was decided for: ringed, and "chosen" written into its label.

    Raises:
        FigureError: a column is missing, there are no rows, or `chosen` is none of the arms.
    """
    arm = column(table, *([arm] if arm else []), "arm", "method", "name")
    accuracy = column(table, accuracy, f"test_{accuracy}")
    wanted = [speed] if speed else []
    speed = column(table, *wanted, "speedup", "ms_per_token", "ms", "seconds", "macs", "flops", "params")
    names = list(dict.fromkeys(table[arm]))
    if not names:
        raise FigureError("accuracy_vs_speed needs at least one row, an arm each; the table is empty.")
    if chosen is not None and chosen not in names:
        raise FigureError(f"chosen must be one of the arms {', '.join(map(str, names))}; got {chosen!r}.")
    groups = [table[table[arm] == name] for name in names]
    x = np.array([group[speed].mean() for group in groups])
    y = np.array([group[accuracy].mean() for group in groups])
    low, high = (np.array([getattr(group[accuracy], end)() for group in groups]) for end in ("min", "max"))
    more = "speed" in speed or "per_second" in speed
    front = sorted(pareto(x if more else -x, y), key=lambda i: x[i])
    fig = new_figure(
        title or f"Accuracy against {speed.replace('_', ' ')}: {len(front)} of {len(names)} arms on the front",
        "filled: no other arm is better in both; open: beaten" + ("; whiskers: seeds" if (high > low).any() else ""),
        height=400,
        margin=(70, 40, 0, 56),
    )
    if chosen is not None:
        at = names.index(chosen)
        ring = {"symbol": "circle-open", "size": 20, "color": VERMILLION, "line": {"width": 2}}
        point = {"x": numbers(x[[at]]), "y": numbers(y[[at]])}
        fig.add_scatter(**point, mode="markers", marker=ring, name="chosen", hoverinfo="skip")
    dotted = {"color": BLUE, "width": 1.5, "dash": "dot"}
    front_x, front_y = numbers(x[front]), numbers(y[front])
    fig.add_scatter(x=front_x, y=front_y, mode="lines", line=dotted, name="front", hoverinfo="skip")
    whisker = {"array": numbers(high - y), "arrayminus": numbers(y - low), "color": GREY}
    fig.add_scatter(
        x=numbers(x),
        y=numbers(y),
        mode="markers",
        name="arms",
        text=[arm_name(name) for name in names],
        marker={
            "color": [BLUE if i in front else GREY for i in range(len(names))],
            "symbol": ["circle" if i in front else "circle-open" for i in range(len(names))],
            "size": 10,
        },
        error_y={"type": "data", "thickness": 1, "width": 3, **whisker} if (high > low).any() else None,
        hovertemplate="%{text}<br>accuracy %{y}<br>" + speed.replace("_", " ") + " %{x}<extra></extra>",
    )
    span, across = padded([*low, *high], 0.12, 0.12), padded(x, 0.1, 0.14)
    labels = [arm_name(name) + (", chosen" if name == chosen else "") for name in names]
    lengths = [len(label) * LETTER * 1.1 * (across[1] - across[0]) / PLOT for label in labels]
    for i, (side, height) in enumerate(_label_places(x, y, lengths, 0.058 * (span[1] - span[0]))):
        is_chosen, sign = names[i] == chosen, 1 if side == "right" else -1
        if abs(height - y[i]) > 0.04 * (span[1] - span[0]):  # moved away: a line leads back
            ends = {
                "x": numbers([x[i], x[i] + sign * (8 if chosen is None else 14) * (across[1] - across[0]) / PLOT]),
                "y": numbers([y[i], height]),
            }
            fig.add_scatter(**ends, mode="lines", line={"color": GREY, "width": 0.8}, name="leader", hoverinfo="skip")
        words = f"<b>{labels[i]}</b>" if is_chosen else labels[i]
        place = {"xanchor": "left" if sign > 0 else "right", "xshift": sign * (9 if chosen is None else 15)}
        at = float(f"{x[i]:.6g}"), float(f"{height:.6g}")
        note(fig, words, *at, colour=VERMILLION if is_chosen else INK, **place)
    name = SPEED.get(speed, speed.replace("_", " ")) + ("" if more else ", less is better")
    fig.update_layout(
        xaxis=axis(name, range=across),
        yaxis=axis("accuracy", range=span, **percent("accuracy", float(np.ptp(y)) / 2)),
    )
    return fig


def pareto(gain: np.ndarray, value: np.ndarray) -> list[int]:
    """Points that no other beats: at least as good in both, better in one."""
    better = (gain[None] >= gain[:, None]) & (value[None] >= value[:, None])
    strictly = (gain[None] > gain[:, None]) | (value[None] > value[:, None])
    return np.flatnonzero(~(better & strictly).any(axis=1)).tolist()


def _label_places(x: np.ndarray, y: np.ndarray, lengths: list[float], gap: float) -> list[tuple[str, float]]:
    """Side and height of each point's label: towards the middle, and apart from those that it would lie upon."""
    middle = (x.min() + x.max()) / 2
    sides = ["right" if one <= middle else "left" for one in x]
    starts = [one if side == "right" else one - length for one, side, length in zip(x, sides, lengths, strict=True)]
    heights, groups, end = [0.0] * len(x), [], -np.inf
    for i in sorted(range(len(x)), key=lambda i: starts[i]):
        if starts[i] >= end:
            groups.append([])
        groups[-1].append(i)
        end = max(end, starts[i] + lengths[i])
    for group in groups:
        for i, height in zip(group, spread([y[j] for j in group], gap), strict=True):
            heights[i] = height
    return list(zip(sides, heights, strict=True))
