"""The paper's figures and tables from our own results: what is redundant (Fig. 1), what is skipped (Fig. 4), and
measured beside published.

What Figure 4 of the paper shows is not known to us; `skipped_sites` is the natural picture: which sites each run skips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .redundancy import draw_curve
from .style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    FigureError,
    arm_name,
    axis,
    column,
    kind_look,
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

KEPT = "#EDEDED"


def redundancy_and_accuracy(
    probe: pd.DataFrame,
    arms: pd.DataFrame,
    *,
    dense: float | None = None,
    split: str = "test",
    title: str | None = None,
) -> go.Figure:
    """Fig. 1: left, the untuned model without k random sites of a kind; right, the tuned one without k chosen ones.

    Lines are means, bands one standard deviation over masks (left) and seeds (right), dots single masks and seeds.

    Args:
        probe: one row a mask, as `probe_redundancy` makes its frame; columns `kind`, `num_skipped` (or `k`),
            `accuracy`.
        arms: one row a run of `compare.run_arms`; columns `candidates`, `k`, `<split>_accuracy`. Of runs of "pia" those
            of the bandit are drawn, if there are any; runs with k = 0 belong to every kind.
        dense: the untuned model's accuracy with nothing skipped.

    Raises:
        FigureError: a column is missing, or no run skips anything.
    """
    kind, k, left_value = column(probe, "kind"), column(probe, "num_skipped", "k"), column(probe, "accuracy")
    candidates, right_value = column(arms, "candidates"), column(arms, f"{split}_accuracy", "accuracy")
    if "chosen_by" in arms:
        bandit = arms["chosen_by"].eq("bandit") | arms["k"].eq(0)
        arms = arms[bandit] if (bandit & arms["k"].gt(0)).any() else arms
    arms = arms[arms["method"].eq("pia")] if "method" in arms else arms
    skipping = arms[arms["k"] > 0]
    if not len(skipping):
        raise FigureError("redundancy_and_accuracy needs runs that skip something (k above 0); there are none.")
    plain = arms[arms["k"] == 0][right_value]
    fig = new_figure(
        title or "Without k of a kind: untuned and chosen at random, tuned and chosen by the bandit",
        "line: mean; band: ± 1 standard deviation over masks (left) and seeds (right); dots: single ones",
        height=390,
        margin=(66, 96, 18, 52),
    )
    panels = [
        (probe[probe[k] > 0], kind, k, left_value, dense, "untuned"),
        (skipping, candidates, "k", right_value, float(plain.mean()) if len(plain) else None, f"tuned, {split}"),
    ]
    values = [*probe[left_value], *arms[right_value], *([dense] if dense is not None else [])]
    span = padded(values, 0.06, 0.06)
    for panel, (frame, group, count, value, start, words) in enumerate(panels):
        number = str(panel + 1) if panel else ""
        left = panel * 0.6
        below = axis(
            "skipped sites k",
            tickvals=[0, *sorted(set(frame[count]))],
            range=[-0.3, max(frame[count]) + 0.2],
            showgrid=False,
        )
        beside = axis("accuracy", anchor=f"x{number}", range=span, **percent("accuracy"))
        fig.update_layout(
            {
                f"xaxis{number}": {**below, "domain": [left, left + 0.4], "anchor": f"y{number}"},
                f"yaxis{number}": beside,
            }
        )
        looks = {name: kind_look(name, at) for at, name in enumerate(dict.fromkeys(frame[group]))}
        places = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        ends = [
            draw_curve(fig, frame[frame[group] == n], count, value, start, look, places) for n, look in looks.items()
        ]
        inside = {"xref": f"x{number} domain", "yref": f"y{number}"}
        for height, (colour, _, name) in zip(spread(ends, 0.07 * (span[1] - span[0])), looks.values(), strict=True):
            note(fig, f"<b>{name.removeprefix('whole ')}</b>", 1, height, colour=colour, xshift=6, **inside)
        above = {"xref": f"x{number} domain", "yref": "paper", "yanchor": "bottom"}
        note(fig, words, 0, 1.01, colour=GREY, **above)
        if start is not None:
            line = {"color": GREY, "width": 1.2, "dash": "dash"}
            fig.add_shape(type="line", x0=0, x1=1, y0=start, y1=start, line=line, **inside)
    return fig


def skipped_sites(
    runs: pd.DataFrame,
    *,
    num_layers: int,
    site_kinds: Sequence[str] | None = None,
    value: str | None = None,
    title: str | None = None,
) -> go.Figure:
    """Which sites are skipped: a row a run, a column a site, a panel a kind; dark cells are skipped (cf. Fig. 4).

    Args:
        runs: columns `mask` (zero-based sites), `arm` (or `row`, `task`), and perhaps `seed`, `candidates`. Runs with
            an empty mask are left out.
        num_layers: layers of the model; of a model with attentions alone as sites, their number.
        site_kinds: the kind of every site, where sites are not the attentions of a decoder (and its feed-forwards after
            them, in runs with candidates "ffn" or "mha+ffn").
        value: a column written beside each row; `test_accuracy` if it is there.

    Raises:
        FigureError: a column is missing, no run skips anything, or a mask names a site that is not there.
    """
    mask = column(runs, "mask", "skipped")
    name = column(runs, "row", "arm", "task", "name")
    value = value or column(runs, "test_accuracy", "accuracy", required=False)
    lines = [line for line in runs.to_dict("records") if len(line[mask] if line[mask] is not None else ())]
    if not lines:
        raise FigureError("skipped_sites needs runs that skip something; every mask is empty.")
    skipped = [_by_kind(line, mask, num_layers, site_kinds) for line in lines]
    kinds = list(dict.fromkeys(kind for found in skipped for kind in found))
    labels = [_label(line, name) for line in lines]
    fig = new_figure(
        title or f"Which sites are skipped, in {len(lines)} runs",
        "dark: skipped; light: kept; white: not a candidate" + (f"; right: {value.replace('_', ' ')}" if value else ""),
        height=150 + 20 * len(lines),
        margin=(label_room(labels), 70 if value else 24, 16, 50),
    )
    wide = (1 - 0.05 * (len(kinds) - 1)) / len(kinds)
    for panel, kind in enumerate(kinds):
        number = str(panel + 1) if panel else ""
        colour, _, words = kind_look(kind, panel)
        left = panel * (wide + 0.05)
        rows = [found.get(kind) for found in skipped]
        length = max(len(row) for row in rows if row is not None)
        z = [[np.nan] * length if row is None else [float(cell) for cell in row] for row in rows]
        fig.add_heatmap(
            z=numbers(z),
            x=list(range(length)),
            y=list(range(len(lines))),
            zmin=0,
            zmax=1,
            colorscale=[[0.0, KEPT], [1.0, colour]],
            showscale=False,
            xgap=2,
            ygap=2,
            name=words,
            text=labels,
            hovertemplate=f"{words} %{{x}}<extra></extra>",
            xaxis=f"x{number}",
            yaxis=f"y{number}",
        )
        ticks = {"tickvals": list(range(length)), "ticktext": [str(i) for i in range(length)]}
        down = {"tickvals": list(range(len(lines))), "ticktext": labels, "range": [len(lines) - 0.5, -0.5]}
        shown = {"showticklabels": not panel, "ticks": "", "showgrid": False, "showline": False}
        across = axis(f"{words} of layer", showgrid=False, range=[-0.5, length - 0.5], **ticks)
        fig.update_layout(
            {
                f"xaxis{number}": {**across, "domain": [left, left + wide], "anchor": f"y{number}", "showline": False},
                f"yaxis{number}": {**axis(anchor=f"x{number}"), **down, **shown},
            }
        )
    if value:
        for at, line in enumerate(lines):
            words = f"{line[value]:.1%}" if "accuracy" in value else f"{line[value]:.3g}"
            note(fig, words, 1, at, xref="paper", xshift=8, size=11)
    return fig


def _by_kind(
    line: Mapping[str, Any], mask: str, layers: int, site_kinds: Sequence[str] | None
) -> dict[str, list[bool]]:
    """For each kind of site of a run, which of its sites are skipped."""
    sites, candidates = list(line[mask]), line.get("candidates") or "mha"
    if site_kinds is None and candidates == "layer":
        kinds = ["layer"] * layers
    elif site_kinds is None:
        kinds = ["mha"] * layers + ["ffn"] * layers * (candidates in ("ffn", "mha+ffn"))
    else:
        kinds = list(site_kinds)
    wrong = [site for site in sites if not 0 <= site < len(kinds)]
    if wrong:
        raise FigureError(
            f"a mask skips site {wrong[0]}, but there are {len(kinds)} sites; give num_layers or site_kinds."
        )
    found: dict[str, list[bool]] = {}
    for site, kind in enumerate(kinds):
        found.setdefault(kind, []).append(site in sites)
    if "layer" in found:  # a layer is its attention and its feed-forward
        found = {"mha": found["layer"], "ffn": found["layer"]}
    return found


def _label(line: Mapping[str, Any], name: str) -> str:
    seed = f", seed {line['seed']}" if "seed" in line else ""
    return f"{arm_name(line[name])}{seed}"


def measured_beside_published(found: pd.DataFrame, column_name: str, *, title: str | None = None) -> go.Figure:
    """Bars of one column of a table, a row each: what was measured (with its spread over seeds), and the paper's.

    The two are of different models and data. A row of which the paper's figure is not known has one bar.

    Args:
        found: of `tables.beside`.
        column_name: of the paper's table, such as "Avg".

    Raises:
        FigureError: there is no such column, or nothing of it is measured or published.
    """
    cells = found[found["column"] == column_name]
    if not len(cells):
        known = ", ".join(dict.fromkeys(found["column"]))
        raise FigureError(f"measured_beside_published: no column {column_name!r}; the table has {known}.")
    cells = cells[cells["measured"].notna() | cells["published"].notna()]
    if not len(cells):
        raise FigureError(f"measured_beside_published: nothing of {column_name!r} is measured or published.")
    rows, unit = list(cells["row"]), cells["unit"].iloc[0]
    known, runs = int(cells["published"].notna().sum()), int(cells["runs"].max())
    said = ["blue: measured here"] + ([f"whisker: ± 1 standard deviation, up to {runs} runs"] if runs > 1 else [])
    said.append(f"orange: the paper's, of its own model ({known} of {len(rows)} known to us)")
    fig = new_figure(
        title or f"Table {cells['table'].iloc[0]}, {column_name}: measured, and published",
        "; ".join(said),
        height=140 + 34 * len(rows),
        margin=(label_room(rows), 90, 0, 52),
        barmode="overlay",
    )
    places = np.arange(len(rows))
    deviation = cells["sd"].fillna(0.0).to_numpy(float)
    whisker = {"type": "data", "array": numbers(deviation), "color": INK, "thickness": 1, "width": 3}
    fig.add_bar(
        x=numbers(cells["measured"]),
        y=numbers(places - 0.19),
        width=0.34,
        orientation="h",
        marker={"color": rgba(BLUE, 0.65)},
        error_x=whisker if deviation.any() else None,
        name="measured",
        hovertemplate="measured %{x}<extra></extra>",
    )
    fig.add_bar(
        x=numbers(cells["published"]),
        y=numbers(places + 0.19),
        width=0.34,
        orientation="h",
        marker={"color": rgba(ORANGE, 0.5)},
        name="published",
        hovertemplate="published %{x}<extra></extra>",
    )
    for at, cell in zip(places, cells.to_dict("records"), strict=True):
        words = [f"{cell[part]:.4g}" for part in ("measured", "published") if cell[part] == cell[part]]
        note(fig, " | ".join(words), 1, float(at), xref="paper", xshift=6, size=11)
    span = padded([0.0, *cells["measured"], *cells["published"]], 0.02, 0.06)
    down = {"tickvals": list(range(len(rows))), "ticktext": rows, "range": [len(rows) - 0.5, -0.5]}
    fig.update_layout(
        xaxis=axis(f"{column_name} ({unit})", range=[min(span[0], 0.0), span[1]]),
        yaxis=axis(showgrid=False, ticks="", **down),
    )
    return fig
