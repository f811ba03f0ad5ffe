"""Frames of a running display as SVG: a millisecond and a few kB each, no plotly, no matplotlib, no browser.

A frame shows what the final figure will show, plainly: a front end swaps one SVG for the next in place, where it would
rebuild (or ignore) a plotly graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from .gallery import data_url
from .preferences import SearchTrace, blocks, colour_limit
from .style import BLUE, DIVERGING, INK, site_kinds_of

WIDTH, LEFT, RIGHT, TOP = 760, 62, 70, 42  # pixels
PIXELS = 6  # a cell of the heatmap in its own picture
MARKS = 600  # more marks of the lowest sites than this are pixels of that picture, so that a frame stays small


class Drawing:
    """Pieces of one SVG picture."""

    def __init__(self, height: float, title: str) -> None:
        self.height, self.parts = height, []
        self.text(12, 22, title, size=15, weight="bold")

    def text(self, x: float, y: float, words: str, size: int = 12, anchor: str = "start", **style: str) -> None:
        more = "".join(f' font-{name}="{value}"' for name, value in style.items())
        place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
        self.parts.append(f"<text {place}{more}>{escape(words)}</text>")

    def line(self, x: Sequence[float], y: Sequence[float], colour: str = INK, width: float = 1.0) -> None:
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        self.parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>')

    def curve(self, values: Sequence[float], box: tuple[float, float, float, float], name: str, width: int) -> None:
        """A line of the values in the box (left, top, right, bottom), `width` values wide, with its range written."""
        left, top, right, bottom = box
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        at = np.linspace(left, right, max(width, 2))[: len(values)]
        self.line([left, left, right], [top, bottom, bottom])
        heights = bottom - (np.asarray(values) - low) / ((high - low) or 1) * (bottom - top)
        self.line(at, heights, BLUE, 2)
        for value, y in ((high, top + 8), (low, bottom)):
            self.text(left - 6, y, f"{value:.3g}", 11, "end")
        self.text(right + 6, float(heights[-1]) + 4, f"{name} {values[-1]:.3g}", 11)

    def svg(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:.0f}" width="{WIDTH}" '
            f'height="{self.height:.0f}" font-family="Arial, Helvetica, sans-serif" fill="{INK}">'
            f'<rect width="100%" height="100%" fill="white"/>{"".join(self.parts)}</svg>'
        )


def colours(values: np.ndarray, limit: float) -> np.ndarray:
    """(..., 3) bytes of the diverging colours of values in -limit..limit."""
    places = [place for place, _ in DIVERGING]
    steps = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for _, colour in DIVERGING])
    share = (np.clip(values / limit, -1, 1) + 1) / 2
    return np.stack([np.interp(share, places, steps[:, channel]) for channel in range(3)], -1).round().astype(np.uint8)


def preference_frame(
    trace: SearchTrace,
    title: str,
    site_kinds: object = None,
    expected: int | None = None,
    limit: float | None = None,
) -> str:
    """Sites by updates so far, the lowest dotted and named, with the mean reward of each update below.

    Args:
        expected: updates there will be; the picture fills from left to right.
        limit: colours span -limit..limit; by default the largest preference so far.
    """
    name, rows = trace.curve()
    means = [float(np.mean(row)) for row in rows if row]
    done = len(trace.updates)
    trace = trace.thinned()
    sites = trace.preferences.shape[1]
    kinds = site_kinds_of(site_kinds, sites)
    cell = max(12, min(24, 320 // sites))
    bottom = TOP + cell * sites
    drawing = Drawing(bottom + (96 if means else 24), title)
    limit = limit or colour_limit(trace.preferences)
    pixels = colours(trace.preferences.T, limit).repeat(PIXELS, 0).repeat(PIXELS, 1)
    columns, marks = len(trace.updates), sum(map(len, trace.skipped))
    for column, row in enumerate(trace.skipped if marks > MARKS else ()):
        for site in row:
            pixels[site * PIXELS + 2 : site * PIXELS + 4, column * PIXELS + 2 : column * PIXELS + 4] = 17
    source, _, _ = data_url(pixels)
    full = WIDTH - LEFT - RIGHT
    wide = full * min(1.0, done / max(expected or done, done))
    for top, height in ((TOP, cell * sites), (bottom + 34, 52 if means else 0)):  # what is still to come
        drawing.parts.append(
            f'<rect x="{LEFT}" y="{top}" width="{full}" height="{height}" fill="none" stroke="#DDDDDD"/>'
        )
    drawing.parts.append(
        f'<image href="{source}" x="{LEFT}" y="{TOP}" width="{wide:.1f}" height="{cell * sites}" '
        'preserveAspectRatio="none" style="image-rendering:pixelated"/>'
    )
    if marks <= MARKS:
        size = min(5.0, 0.6 * wide / columns)
        squares = [
            f"M{LEFT + (column + 0.5) * wide / columns - size / 2:.1f} {TOP + (site + 0.5) * cell - size / 2:.1f}"
            f"h{size:.1f}v{size:.1f}h-{size:.1f}z"
            for column, row in enumerate(trace.skipped)
            for site in row
        ]
        drawing.parts.append(f'<path class="lowest" d="{"".join(squares)}" fill="#111111"/>')
    for site in range(sites):
        drawing.text(LEFT - 6, TOP + (site + 0.5) * cell + 4, str(site), 11, "end")
    for kind, first, stop in blocks(kinds):
        drawing.text(8, TOP + (first + stop) / 2 * cell + 4, kind)
    for site in trace.skipped[-1]:
        drawing.text(LEFT + wide + 4, TOP + (site + 0.5) * cell + 4, "◂ skip", 11)
    drawing.text(LEFT, bottom + 16, f"update 1 to {trace.updates[-1]}" + (f" of {expected}" if expected else ""), 11)
    if means:
        drawing.curve(means, (LEFT, bottom + 34, LEFT + wide, bottom + 86), f"mean {name}", len(means))
    return drawing.svg()


def curve_frame(
    values: Sequence[float],
    title: str,
    name: str = "loss",
    expected: int | None = None,
    waiting: str = "nothing recorded yet",
) -> str:
    """A line that grows from left to right, over a thin one of every value where the line is a moving mean."""
    drawing = Drawing(220, title)
    if len(values):
        drawing.curve(values, (LEFT, TOP, WIDTH - RIGHT, 190), name, max(expected or 0, len(values)))
    else:
        drawing.text(LEFT, 110, waiting)
    return drawing.svg()
