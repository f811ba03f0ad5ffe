"""One look for every figure: colours that colour-blind readers tell apart, a light layout, short bundles.

Numbers go into a figure as plain rounded lists, not as plotly's binary arrays: any front end reads them, a person can
read them in the notebook file, and the static copy is drawn from the very same values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EASError

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's palette. A kind of site keeps its colour and its marker in all figures: colour is never the only cue.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, BLACK, GREY, INK = "#56B4E9", "#E69F00", "#000000", "#767676", "#333333"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE, BLACK, GREY)
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
KINDS = {
    "mha": (BLUE, "circle", "MHA"),
    "ffn": (VERMILLION, "square", "FFN"),
    "layer": (GREEN, "diamond", "whole layer"),
}

# low = redundant, skipped first (orange) ... zero (white) ... high = kept (blue)
DIVERGING = (
    (0.0, "#B35806"),
    (0.17, "#E08214"),
    (0.34, "#FDC98A"),
    (0.5, "#F7F7F7"),
    (0.66, "#A6CEE3"),
    (0.83, "#4393C3"),
    (1.0, "#2166AC"),
)
SEQUENTIAL = ((0.0, "#F7FBFF"), (0.25, "#D0E1F2"), (0.5, "#94C4DF"), (0.75, "#4A98C9"), (1.0, "#1764AB"))
METRICS = {"loss": "loss (nats per token)", "accuracy": "accuracy", "perplexity": "perplexity"}
FONT = "Arial, Liberation Sans, Helvetica, DejaVu Sans, sans-serif"


class FigureError(EASError, ValueError):
    """A figure was asked for from data that do not hold what it shows."""


def numbers(values: Any, digits: int = 6) -> list:
    """Nested lists of floats rounded to `digits` significant digits; anything not finite becomes None (a gap)."""
    array = np.asarray(values)
    if array.ndim > 1:
        return [numbers(row, digits) for row in array]
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in array.astype(float)]


def field(source: Any, *names: str, default: Any = None) -> Any:
    """The first of `names` that `source` has, as a key or as an attribute, and that is not None."""
    for name in names:
        value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
        if value is not None:
            return value
    return default


def column(frame: Any, *names: str, required: bool = True) -> str | None:
    """The first of `names` that is a column of the data frame.

    Raises:
        FigureError: none of them is, and it is required.
    """
    for name in names:
        if name in frame.columns:
            return name
    if required:
        raise FigureError(
            f"this figure needs a column {' or '.join(map(repr, names))}; the table has "
            f"{', '.join(map(repr, frame.columns))}. Rename a column (frame.rename(columns=...)) and call again."
        )
    return None


def site_kinds_of(site_kinds: Any, count: int) -> list[str]:
    """The kind of every site, from nothing (all mha), the config's `kinds`, one name a site, or the sites themselves.

    Raises:
        FigureError: the kinds do not fit the number of sites.
    """
    if site_kinds is None:
        return ["mha"] * count
    names = [str(kind if isinstance(kind, str) else kind.kind) for kind in site_kinds]
    if len(names) == count:
        return names
    if names and len(set(names)) == len(names) and count % len(names) == 0:  # sites are numbered kind after kind
        return [name for name in names for _ in range(count // len(names))]
    raise FigureError(
        f"site_kinds names {len(names)} kinds but there are {count} sites; give one kind a site, "
        f"or the kinds in the order of numbering, e.g. ('mha', 'ffn')."
    )


def lowest(values: Any, k: int) -> list[int]:
    """The k sites with the lowest values, ties to the lower number, as the search itself breaks them."""
    return sorted(np.argsort(np.asarray(values, float), kind="stable")[:k].tolist())


def listed(sites: Iterable[int]) -> str:
    return ", ".join(map(str, sites)) or "none"


def rgba(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def colour_of(index: int) -> tuple[str, str, str]:
    """Colour, marker and dash of the index-th series; markers and dashes move on where colours repeat."""
    return PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)], DASHES[index // len(PALETTE) % len(DASHES)]


def kind_look(kind: str, index: int = 0) -> tuple[str, str, str]:
    """Colour, marker and written name of a kind of site; other names get the next colours."""
    return KINDS.get(str(kind).lower(), (*colour_of(index + 3)[:2], str(kind)))


def axis(title: str = "", **changes: Any) -> dict:
    """An axis as in print: line and ticks outside, light grid, no heavy zero line."""
    base = {
        "title": {"text": title, "standoff": 8, "font": {"size": 12}},
        "showline": True,
        "linecolor": INK,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": INK,
        "gridcolor": "#E8E8E8",
        "zeroline": False,
    }
    return {**base, **changes}


def new_figure(
    title: str,
    subtitle: str = "",
    height: int = 360,
    width: int | None = None,
    margin: Sequence[int] = (64, 24, 0, 56),
    **layout: Any,
) -> go.Figure:
    """An empty figure in the common style. `margin` is left, right, extra top, bottom in pixels."""
    import plotly.graph_objects as go

    left, right, top, bottom = margin
    head = {
        "text": f"<b>{title}</b>",
        "x": 0,
        "xref": "container",
        "xanchor": "left",
        "y": 1,
        "yref": "container",
        "yanchor": "top",
        "pad": {"t": 14, "l": 12},
        "font": {"size": 15, "color": "#111111"},
    }
    if subtitle:
        head["subtitle"] = {"text": subtitle, "font": {"size": 12, "color": "#555555"}}
    top += 26 + 20 * title.count("<br>") + 20 + (18 * (1 + subtitle.count("<br>")) if subtitle else 0)
    fig = go.Figure()
    fig.update_layout(
        template="none",
        title=head,
        height=height,
        font={"family": FONT, "size": 12, "color": INK},
        margin={"l": left, "r": right, "t": top, "b": bottom},
        paper_bgcolor="white",
        plot_bgcolor="white",
        showlegend=False,
        hoverlabel={"font": {"family": FONT}},
        **layout,
    )
    if width:
        fig.update_layout(width=width)
    return fig


def note(
    fig: go.Figure,
    text: str,
    x: Any,
    y: Any,
    *,
    xref: str = "x",
    yref: str = "y",
    colour: str = INK,
    size: int = 12,
    xanchor: str = "left",
    yanchor: str = "middle",
    **more: Any,
) -> None:
    """A label written straight into the figure, in place of a legend entry."""
    fig.add_annotation(
        text=text,
        x=x,
        y=y,
        xref=xref,
        yref=yref,
        xanchor=xanchor,
        yanchor=yanchor,
        showarrow=False,
        font={"color": colour, "size": size},
        **more,
    )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Label heights moved apart to at least `gap`, in the same order, around where they belong."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[float]] = []  # [sum of targets, members]: neighbours that touch move as one
    for i in order:
        groups.append([values[i], 1])
        while len(groups) > 1:
            (a, m), (b, n) = groups[-2:]
            if b / n - a / m >= gap * (m + n) / 2:
                break
            groups[-2:] = [[a + b, m + n]]
    out, at = [0.0] * len(values), 0
    for total, members in groups:
        for j in range(int(members)):
            out[order[at]] = total / members + (j - (members - 1) / 2) * gap
            at += 1
    return out


def padded(values: Iterable[float], low: float = 0.06, high: float = 0.06) -> list[float]:
    """An axis range around the finite values with a share of free space below and above."""
    finite = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not finite:
        return [0.0, 1.0]
    least, most = min(finite), max(finite)
    span = (most - least) or abs(most) * 0.1 or 1.0
    return [least - low * span, most + high * span]


def arm_name(name: Any) -> str:
    """An arm of `compare.run_arms` in words: 'pia k=4 bandit' is 'PIA, 4 skipped (bandit)'. Other names stay."""
    words = {"zero_shot": "zero-shot", "full": "full tuning", "lora": "LoRA", "pia": "PIA"}
    skipping = re.fullmatch(r"pia k=(\d+) (.+)", str(name))
    return f"PIA, {skipping[1]} skipped ({skipping[2]})" if skipping else words.get(str(name), str(name))


def percent(metric: str, span: float = 1.0) -> dict:
    """The tick format of an axis: accuracies are shares and read as per cent."""
    return {"tickformat": ".0%" if span > 0.06 else ".1%"} if "accuracy" in metric else {}


LETTER = 6.6  # pixels, about, of a letter of a label


def label_room(names: Iterable[Any], least: int = 64) -> int:
    """Pixels that the longest row label takes."""
    return max(least, 22 + round(LETTER * max((len(str(name)) for name in names), default=0)))
