"""Choices of sites side by side: how scorers rank them, how far choices agree, what the chosen masks are worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import (
    DIVERGING,
    GREY,
    INK,
    LETTER,
    METRICS,
    SEQUENTIAL,
    VERMILLION,
    FigureError,
    axis,
    colour_of,
    column,
    label_room,
    listed,
    lowest,
    new_figure,
    note,
    numbers,
    padded,
    percent,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

BARE = {"showgrid": False, "showline": False, "ticks": ""}


def scorer_comparison(
    table: pd.DataFrame,
    num_skipped: int,
    *,
    low_is_redundant: bool | Mapping[str, bool] = True,
    title: str | None = None,
) -> go.Figure:
    """How each scorer ranks the sites: a row a scorer, 0 the site it skips first, crosses on the k it would skip.

    Args:
        table: sites down (in order), scorers across, as `scorers.score_table` makes it; or long, with columns `scorer`,
            `site`, and `score`.
        num_skipped: k.
        low_is_redundant: whether a low score means redundant, for all scorers or by name (default for those unnamed).

    Raises:
        FigureError: a long table lacks a column.
    """
    if "scorer" in table.columns:
        score = column(table, "score", "value", "importance")
        table = table.pivot_table(index=column(table, "site"), columns="scorer", values=score, sort=False).sort_index()
    table = table.select_dtypes("number").drop(columns=["site", "layer"], errors="ignore")
    by_name = low_is_redundant if isinstance(low_is_redundant, Mapping) else {}
    default = True if by_name else bool(low_is_redundant)
    names, sites = [str(name).replace("_", " ") for name in table.columns], len(table)
    scores = [table[c].to_numpy(float) * (1 if by_name.get(c, default) else -1) for c in table.columns]
    ranks = [np.argsort(np.argsort(row, kind="stable"), kind="stable").tolist() for row in scores]
    fig = new_figure(
        title or f"Sites ranked by {len(names)} scorers; crosses: the {num_skipped} each would skip",
        "0: most redundant, skipped first (orange)",
        height=118 + 40 * len(names),
        margin=(label_room(names), 30, 0, 50),
    )
    fig.add_heatmap(
        z=ranks,
        x=list(range(sites)),
        y=list(range(len(names))),
        zmin=0,
        zmax=sites - 1,
        colorscale=DIVERGING,
        showscale=False,
        xgap=2,
        ygap=2,
        text=[[str(rank) for rank in row] for row in ranks],
        texttemplate="%{text}",
        textfont={"size": 11},
        customdata=[numbers(table[c]) for c in table.columns],
        hovertemplate="site %{x}<br>rank %{z}, score %{customdata}<extra></extra>",
    )
    marked = [(site, row) for row, values in enumerate(scores) for site in lowest(values, num_skipped)]
    fig.add_scatter(
        x=[site + 0.33 for site, _ in marked],
        y=[row - 0.26 for _, row in marked],
        mode="markers",
        name="skipped",
        marker={"symbol": "x", "size": 7, "color": "#111111"},
        hoverinfo="skip",
    )
    fig.update_layout(
        xaxis=axis("site (zero-based)", tickvals=list(range(sites)), range=[-0.5, sites - 0.5], **BARE),
        yaxis=axis(tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.5, -0.5], **BARE),
    )
    return fig


def agreement_matrix(
    choices: Mapping[str, Any] | pd.DataFrame, *, measure: str | None = None, title: str | None = None
) -> go.Figure:
    """How far choices agree, each with each: the shared part of the skipped sites, or the rank correlation.

    Args:
        choices: name -> mask (whole numbers; |A and B| / k), or name -> scores or preferences, one a site (Spearman),
            or a square data frame computed elsewhere.
        measure: "overlap" or "spearman"; by default whole numbers are masks, other numbers scores.

    Raises:
        FigureError: choices of different size, or an unknown measure.
    """
    if hasattr(choices, "columns"):
        names, matrix, measure = [str(c) for c in choices.columns], choices.to_numpy(float), measure or "agreement"
    else:
        names, values = [str(name) for name in choices], [np.asarray(list(v)) for v in choices.values()]
        measure = measure or ("overlap" if all(v.dtype.kind in "iu" for v in values) else "spearman")
        matrix = _agreement(values, measure)
    said = {"overlap": "shared part of the skipped sites", "spearman": "rank correlation (Spearman)"}.get(
        measure, measure
    )
    pairs = matrix[~np.eye(len(names), dtype=bool)]
    signed = float(np.nanmin(matrix)) < 0
    side = max(36, min(54, 420 // len(names)))
    rows, columns = names, [name.replace(" ", "<br>") for name in names]
    if max(len(word) for name in names for word in name.split() or [""]) * LETTER > side:  # would be turned and cut off
        columns = [str(number) for number in range(1, len(names) + 1)]
        rows = [f"{name}  {number}" for name, number in zip(names, columns, strict=True)]
    room = label_room(rows)
    fig = new_figure(
        title or f"Agreement: {said}",
        f"mean over pairs {np.nanmean(pairs):.2f}, range {np.nanmin(pairs):.2f} to {np.nanmax(pairs):.2f}"
        if len(pairs)
        else "",
        height=side * len(names) + 150,
        width=max(440, room + side * len(names) + 60),
        margin=(room, 40, 0, 66),
    )
    fig.add_heatmap(
        z=numbers(matrix, 4),
        x=list(range(len(names))),
        y=list(range(len(names))),
        zmin=-1 if signed else 0,
        zmax=1,
        colorscale=DIVERGING if signed else SEQUENTIAL,
        showscale=False,
        xgap=2,
        ygap=2,
        text=[[f"{v:.2f}".replace("-", "−") for v in row] for row in matrix],
        texttemplate="%{text}",
        textfont={"size": 11},
        customdata=[[f"{a}, {b}" for b in names] for a in names],
        hovertemplate="%{customdata}: %{z}<extra></extra>",
    )
    at, end = list(range(len(names))), len(names) - 0.5
    fig.update_layout(
        xaxis=axis(tickvals=at, ticktext=columns, range=[-0.5, end], **BARE),
        yaxis=axis(tickvals=at, ticktext=rows, range=[end, -0.5], **BARE),
    )
    return fig


def _agreement(values: list[np.ndarray], measure: str) -> np.ndarray:
    sizes = {len(v) for v in values}
    if len(sizes) != 1:
        raise FigureError(
            f"agreement_matrix compares choices of one size; these have {listed(sorted(sizes))}. Compare equal k."
        )
    if measure == "overlap":
        sets = [set(v.tolist()) for v in values]
        return np.array([[len(a & b) / max(len(a), 1) for b in sets] for a in sets])
    if measure == "spearman":
        import pandas as pd

        return np.atleast_2d(np.corrcoef([pd.Series(v.astype(float)).rank().to_numpy() for v in values]))
    raise FigureError(f"measure must be 'overlap' or 'spearman'; got {measure!r}.")


def mask_comparison(
    frame: pd.DataFrame,
    *,
    value: str | None = None,
    group: str | None = None,
    baseline: float | None = None,
    split: str | None = None,
    title: str | None = None,
) -> go.Figure:
    """What masks of one size are worth: a row a way of choosing, a dot a mask, a bar at the mean.

    Args:
        frame: one row a mask, as `stability.score_masks` makes it (names that differ in a last number only share a
            row); columns `method` (or `made_by`, `source`, `name`, `arm`, or `group`'s) and `loss` (or
            `reward`, `accuracy`, or `value`'s). A column `skipped` or `mask` goes into the hover text.
        baseline: the value with nothing skipped, as a dashed line.
        split: the data split, said in the subtitle.

    Raises:
        FigureError: a column is missing.
    """
    group = column(frame, *([group] if group else []), "method", "made_by", "source", "name", "arm")
    value = column(frame, *([value] if value else []), "loss", "reward", "accuracy")
    mask = column(frame, "skipped", "mask", required=False)
    if group == "name":  # 'random 0', 'random 1' are one way of choosing
        frame = frame.assign(name=frame[group].astype(str).str.replace(r"[\s,]*(seed\s*)?\d+$", "", regex=True))
    names = list(dict.fromkeys(frame[group]))
    better = "lower is better" if "loss" in value else "higher is better"
    fig = new_figure(
        title or f"Masks of one size, by how they were chosen: {value}",
        f"dot: one mask; bar: mean; {better}" + (f"; {split} split" if split else ""),
        height=140 + 38 * len(names),
        margin=(label_room(names), 70, 14, 52),
    )
    for row, name in enumerate(names):
        mine = frame[frame[group] == name]
        colour, marker, _ = (GREY, "circle", "") if "random" in str(name).lower() else colour_of(row)
        values = mine[value].to_numpy(float)
        # spread over the row so that equal values show, the same way every time
        shift = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else np.zeros(1)
        shift = np.random.default_rng(0).permutation(shift)
        fig.add_scatter(
            x=numbers(values),
            y=numbers(row + shift),
            mode="markers",
            name=str(name),
            marker={"color": colour, "size": 8, "opacity": 0.65, "symbol": marker},
            customdata=[m if isinstance(m, str) else listed(m) for m in mine[mask]] if mask else None,
            hovertemplate=f"{name}<br>{value} %{{x}}"
            + ("<br>skipped %{customdata}" if mask else "")
            + "<extra></extra>",
        )
        mean = float(np.nanmean(values))
        ends = {"x0": mean, "x1": mean, "y0": row - 0.36, "y1": row + 0.36}
        fig.add_shape(type="line", line={"color": INK, "width": 2}, **ends)
        note(fig, f"{mean:.3f}", 1, row, xref="paper", xshift=8)
    note(fig, "mean", 1, 1, xref="paper", yref="paper", colour=GREY, size=11, xshift=8, yanchor="bottom")
    if baseline is not None:
        dashed = {"color": VERMILLION, "width": 1.2, "dash": "dash"}
        fig.add_shape(type="line", x0=baseline, x1=baseline, yref="paper", y0=0, y1=1, line=dashed)
        above = {"colour": VERMILLION, "size": 11, "xanchor": "center", "yanchor": "bottom"}
        note(fig, "nothing skipped", baseline, 1, yref="paper", **above)
    span = padded([*frame[value], *([] if baseline is None else [baseline])])
    rows = {"tickvals": list(range(len(names))), "ticktext": [str(name) for name in names]}
    fig.update_layout(
        xaxis=axis(METRICS.get(value, value), range=span, **percent(value)),
        yaxis=axis(range=[len(names) - 0.5, -0.5], showgrid=False, ticks="", **rows),
    )
    return fig
