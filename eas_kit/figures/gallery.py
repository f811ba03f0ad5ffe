"""Pictures of a task's examples, each with its question and answer, pixels shown as they are."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import FigureError, field, new_figure, note

if TYPE_CHECKING:
    import plotly.graph_objects as go

TILE, GAP, LINE, LETTERS = 150, 34, 14.6, 27  # pixels, and letters in a line of text
RIGHT, WRONG, ANSWER = "#00694D", "#B24A00", "#004C80"


def gallery(
    examples: Sequence[Any],
    *,
    predictions: Sequence[str] | None = None,
    columns: int = 4,
    lines: int = 8,
    title: str | None = None,
) -> go.Figure:
    """A grid of examples: the picture, enlarged without smoothing, the question below it, the answer in bold.

    Args:
        examples: objects or dicts with `images` (empty: text only), `question`, `answer`; `context` and `choices` too.
        predictions: a model's answers, one an example; a tick or a cross says whether it is the example's answer.
        columns: tiles in a row.
        lines: lines of question below a picture, at most.

    Raises:
        FigureError: no examples, or another number of predictions.
    """
    examples = list(examples)
    if not examples:
        raise FigureError("gallery needs at least one example; got none.")
    if predictions is not None and len(predictions) != len(examples):
        raise FigureError(f"gallery needs one prediction an example; got {len(predictions)} for {len(examples)}.")
    columns = min(columns, len(examples))
    pictures = [_first_image(example) for example in examples]
    texts = [_question(e, lines + (0 if p is not None else 9)) for e, p in zip(examples, pictures, strict=True)]
    below = 2 if predictions is not None else 1
    heights = []  # of each row of tiles
    for start in range(0, len(examples), columns):
        row = range(start, min(start + columns, len(examples)))
        heights.append(max((TILE if pictures[i] is not None else 0) + (len(texts[i]) + below) * LINE for i in row) + 26)
    width = max(columns * (TILE + GAP) + 20, 480)
    fig = new_figure(title or f"{len(examples)} examples of the task", height=99, width=width, margin=(16, 16, 0, 4))
    fig.update_layout(height=round(sum(heights)) + fig.layout.margin.t + 4)
    wide, tall = width - 32, round(sum(heights))
    for index, (example, picture, text) in enumerate(zip(examples, pictures, texts, strict=True)):
        row, at = divmod(index, columns)
        left, top = at * (TILE + GAP) / wide, 1 - sum(heights[:row]) / tall
        if picture is not None:
            _tile(fig, picture, left, top, TILE / wide, TILE / tall)
            top -= TILE / tall
        place = {"xref": "paper", "yref": "paper", "yanchor": "top", "align": "left", "size": 11}
        note(fig, "<br>".join(text), left, top, yshift=-4, **place)
        drop = -4 - len(text) * LINE - 3
        answer = str(field(example, "answer", default=""))
        note(fig, f"<b>{_line(answer)}</b>", left, top, yshift=drop, colour=ANSWER, **place)
        if predictions is not None:
            said = str(predictions[index]).strip()
            right = said == answer.strip()
            words = f"<b>{'✓' if right else '✗'} {_line(said or '(nothing)', 24)}</b>"
            note(fig, words, left, top, yshift=drop - LINE, colour=RIGHT if right else WRONG, **place)
    if not fig.data:  # text only: without a trace plotly would draw an empty pair of axes
        fig.update_layout(xaxis={"visible": False}, yaxis={"visible": False})
    return fig


def _first_image(example: Any) -> Any | None:
    images = field(example, "images", "image", default=())
    if isinstance(images, Sequence):  # also one that opens its pictures when they are asked for
        return images[0] if len(images) else None
    return images


def _question(example: Any, lines: int) -> list[str]:
    """Context, question and choices as wrapped lines, at most `lines` of them."""
    options = list(map(str, field(example, "choices", default=())))
    answer = str(field(example, "answer", default=""))
    if len(answer) == 1 and answer not in options:  # a letter stands for an option, as in ScienceQA
        options = [f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options)]
    choices = " / ".join(options)
    parts = [field(example, "context", default=""), field(example, "question", default=""), choices]
    rows = [row for part in parts for paragraph in str(part).splitlines() for row in textwrap.wrap(paragraph, LETTERS)]
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1][: LETTERS - 2].rstrip() + " …"]
    return [html.escape(row, quote=False) for row in rows]


def _line(text: str, letters: int = LETTERS) -> str:
    text = " ".join(text.split())
    return html.escape(text if len(text) <= letters else text[: letters - 2].rstrip() + " …", quote=False)


def _tile(fig: go.Figure, picture: Any, left: float, top: float, wide: float, tall: float) -> None:
    """One picture on its own hidden axes, its longer side as long as the tile."""
    source, columns, rows = data_url(picture)
    side = max(columns, rows)
    box = {"x0": left, "x1": left + wide * columns / side, "y0": top - tall * rows / side, "y1": top}
    number = str(len(fig.data) + 1) if fig.data else ""
    bare = {"visible": False, "showgrid": False, "zeroline": False}
    across = {**bare, "domain": [box["x0"], box["x1"]], "range": [-0.5, columns - 0.5], "anchor": f"y{number}"}
    down = {**bare, "domain": [max(box["y0"], 0), top], "range": [rows - 0.5, -0.5], "anchor": f"x{number}"}
    fig.update_layout({f"xaxis{number}": across, f"yaxis{number}": down})
    fig.add_image(source=source, xaxis=f"x{number}", yaxis=f"y{number}", zsmooth=False, hoverinfo="skip")
    fig.add_shape(type="rect", xref="paper", yref="paper", line={"color": "#BBBBBB", "width": 1}, **box)


def data_url(picture: Any) -> tuple[str, int, int]:
    """A PNG data address of a PIL image or an array (H, W[, 3]) of 0..255 or 0..1, with its width and height."""
    from PIL import Image

    if not isinstance(picture, Image.Image):
        array = np.asarray(picture)
        if array.dtype.kind == "f":
            array = (np.clip(array, 0, 1) * 255).round()
        picture = Image.fromarray(array.astype(np.uint8))
    out = io.BytesIO()
    picture.convert("RGB").save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode(), *picture.size
