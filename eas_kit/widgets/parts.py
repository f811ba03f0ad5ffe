"""The pieces of the skip-mask panel that are text and colour: its style sheet, its tables, an example with answers."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from ..figures.frames import colours

GOOD, WRONG, INK, GREY = "#00694D", "#A33C00", "#222222", "#666666"
NAMES = {  # how the panel writes a number: its name, and its value
    "loss": ("loss (nats per token)", "{:.4f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "ms_per_token": ("time per token", "{:.2f} ms"),
    "speedup": ("speed-up", "{:.2f} times"),
    "flops_saved": ("FLOPs saved", "{:.1%}"),
    "count": ("examples", "{:.0f}"),
}


TOGGLE = 38  # pixels of a toggle
LONGEST_LINE = 20  # toggles that fit, with their label, beside the file browser in a window of 1,280 pixels


def lines_of(sites_in_row: int) -> list[tuple[int, int]]:
    """Where the lines begin and end that a row of sites is broken into: as few as will do, about equally long."""
    count = math.ceil(sites_in_row / LONGEST_LINE)
    ends = [round(sites_in_row * line / count) for line in range(count + 1)]
    return list(pairwise(ends))


def short(value: float) -> str:
    """A preference in at most five letters, '–' if unknown: .012, −.012, 5.00, −12, 1234."""
    if not np.isfinite(value):
        return "–"
    size = abs(value)
    digits = 3 if size < 0.9995 else 2 if size < 9.995 else 0
    text = f"{value:.{digits}f}".replace("-", "−")
    return text.replace("0.", ".", 1) if digits == 3 else text


def site_colours(preferences: np.ndarray) -> list[tuple[str, str]]:
    """Background and ink of every site's toggle, by rank: one site that stands far out would leave the others white.

    Ties share their middle; a site of unknown preference is grey.
    """
    known = preferences[np.isfinite(preferences)]
    pairs = []
    for value in preferences:
        ground = (224, 224, 224)
        if np.isfinite(value):  # the share of the others below it less that above it, -1 to 1
            place = ((known < value).sum() - (known > value).sum()) / max(len(known) - 1, 1)
            ground = tuple(colours(np.array(place), 1.0).tolist())
        red, green, blue = ground
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
        pairs.append((f"rgb({red},{green},{blue})", "#ffffff" if dark else INK))
    return pairs


def style_sheet(preferences: np.ndarray, panel: str) -> str:
    """Each toggle of the panel with class `panel` in its site's colour; pressed ones get a thick dark frame."""
    at = f".{panel}"
    rules = [
        f"{at} .skipmask-site-{site}{{background:{ground}!important;color:{ink}!important}}"
        for site, (ground, ink) in enumerate(site_colours(preferences))
    ]
    rules += [
        f"{at} .skipmask-site{{font-size:12px;line-height:28px;overflow:hidden}}",
        f"{at} .skipmask-site i{{margin-right:1px;font-size:11px}}",
        f"{at} .jupyter-button.mod-active{{box-shadow:inset 0 0 0 3px #111!important;font-weight:bold}}",
        f"{at} .jupyter-button:focus-visible{{outline:3px solid #0072B2!important;outline-offset:1px}}",
        f"{at} table{{border-collapse:collapse;font-size:13px}}",
        f"{at} th,{at} td{{padding:1px 12px 1px 0;text-align:right;white-space:nowrap}}",
        f"{at} th:first-child{{vertical-align:top;text-align:left;font-weight:normal;color:{GREY}}}",
        f"{at} .widget-html-content{{line-height:1.4}}",
    ]
    return f"<style>{''.join(rules)}</style>"


def cells(texts: Sequence[Any], size: int = 10) -> str:
    """Texts in a row under (or over) the toggles, one as wide as a toggle with its margins."""
    style = f"display:inline-block;width:{TOGGLE + 2}px;text-align:center;overflow:hidden"
    row = "".join(f'<span style="{style}">{escape(str(text))}</span>' for text in texts)
    return f'<div style="white-space:nowrap;line-height:12px;font-size:{size}px;color:{GREY}">{row}</div>'


def say(words: str, colour: str = INK) -> str:
    """A line that a screen reader announces when it changes."""
    role = "alert" if colour == WRONG else "status"
    return f'<span role="{role}" style="color:{colour}">{escape(words)}</span>'


def numbers_table(dense: Mapping[str, float] | None, result: Mapping[str, float] | None) -> str:
    """What nothing skipped and the present mask cost, a column a number; "" where the loss is all there is.

    A number named "dense_..." was measured beside this mask's, with nothing skipped: it stands in the row for that.
    """
    beside = {name.removeprefix("dense_"): v for name, v in (result or {}).items() if name.startswith("dense_")}
    dense = dense and {**dense, **beside}
    first = dense or result or {}
    known = [name for name in NAMES if name in first]
    more = [name for name in first if name not in NAMES and name.removeprefix("dense_") not in beside]
    if len(known) + len(more) < 2:
        return ""
    names = {name: NAMES.get(name, (name.replace("_", " "), "{:.4g}")) for name in known + more}
    head = "<th></th>" + "".join(f"<th>{escape(title)}</th>" for title, _ in names.values())
    rows = []
    for title, values in (("nothing skipped", dense), ("this mask", result)):
        written = [form.format(values[n]) if values and n in values else "…" for n, (_, form) in names.items()]
        row = "".join(f"<td>{escape(text.replace('-', '−'))}</td>" for text in written)
        rows.append(f'<tr><th scope="row">{title}</th>{row}</tr>')
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


Answer = tuple[str, bool | None]  # the text, and whether it is right, None where that is not known


def example_card(image: bytes, question: str, wanted: str, answers: Mapping[str, Answer | None]) -> str:
    """An example: its picture, the question, the right answer, and by name who answered what, and whether right.

    An answer that is None is still to come.
    """
    picture = ""
    if image:
        source = "data:image/png;base64," + base64.b64encode(image).decode()
        look = "width:112px;height:112px;object-fit:contain;image-rendering:pixelated;border:1px solid #bbb"
        picture = f'<img src="{source}" alt="the picture of this example" style="{look}">'
    rows = []
    for name, answer in answers.items():
        if answer is None:
            said = f'<span style="color:{GREY}">…</span>'
        else:
            text, right = answer
            mark, colour = {True: ("✓ right", GOOD), False: ("✗ wrong", WRONG), None: ("", INK)}[right]
            said = f'<b>{escape(text or "(nothing)")}</b> <span style="color:{colour};white-space:nowrap">{mark}</span>'
        rows.append((name, said))
    if wanted:
        rows.append(("right answer", escape(wanted)))
    left = "text-align:left;white-space:normal"
    table = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td style="{left}">{said}</td></tr>' for name, said in rows
    )
    asked = escape(question).replace("\n", "<br>")
    return (
        '<div style="display:flex;gap:14px;align-items:flex-start">'
        f'{picture}<div style="max-width:430px"><div style="margin-bottom:6px">{asked}</div>'
        f"<table>{table}</table></div></div>"
    )
