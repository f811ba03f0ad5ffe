"""A matplotlib canvas laid out as plotly lays out a figure: margins, axes, titles, notes and boxes, pixel for pixel.

The traces themselves are drawn by `png.py`. Only the Agg canvas is used, no pyplot state.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from .style import FigureError

DPI = 100  # plotly's pixels to matplotlib's inches; `scale` multiplies the real pixels
PT = 72 / DPI  # one plotly pixel in points
DASHES = {"solid": "-", "dash": (0, (5, 3)), "dot": (0, (1.2, 2)), "dashdot": (0, (5, 2, 1, 2))}


@functools.cache
def _fonts() -> tuple[list[str], float]:
    """Families that exist here, and a factor for their width (DejaVu, always there, runs wider than Arial)."""
    from matplotlib import font_manager

    known = set(font_manager.get_font_names())
    found = [name for name in ("Arial", "Liberation Sans", "Helvetica") if name in known]
    return [*found, "DejaVu Sans"], 1.0 if found else 0.9


def rgba(value: Any, opacity: float | None = None) -> tuple[float, ...]:
    """A plotly colour (name, hex, rgb(), rgba()) as four shares."""
    from matplotlib.colors import to_rgba

    if isinstance(value, str) and value.startswith("rgb"):
        parts = [float(part) for part in re.findall(r"[\d.]+", value)]
        shares = (*(part / 255 for part in parts[:3]), parts[3] if len(parts) > 3 else 1.0)
    else:
        shares = to_rgba(value or "#333333")
    return (*shares[:3], shares[3] * (1.0 if opacity is None else opacity))


def plain(value: Any) -> str:
    """The words of plotly's small HTML, safe from matplotlib's mathematics."""
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<br\s*/?>", "\n", str(value)))).replace("$", r"\$")


def weight(value: Any) -> str:
    return "bold" if str(value).startswith("<b>") else "normal"


def formatted(spec: str | None, value: float) -> str:
    """A number by plotly's (d3's) format, as far as Python's is the same, with a real minus."""
    spec = (spec or "g").replace("~", "")
    return format(round(value) if spec.endswith("d") else value, spec).replace("-", "−")


class Axis:
    """One axis of the layout. Category names become positions, as plotly does."""

    def __init__(self, layout: Any, name: str) -> None:
        self.spec = getattr(layout, f"{name[0]}axis{name[1:]}", None)
        self.categories: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        value = getattr(self.spec, key, None)
        return default if value is None else value

    @property
    def log(self) -> bool:
        return self.get("type") == "log"

    def place(self, values: Iterable[Any]) -> np.ndarray:
        out = []
        for value in values:
            if isinstance(value, str):
                if value not in self.categories:
                    self.categories.append(value)
                value = self.categories.index(value)
            out.append(np.nan if value is None else float(value))
        return np.asarray(out, float)


class Canvas:
    """Width and height in plotly's pixels."""

    def __init__(self, fig: Any, width: int, height: int, scale: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.layout, self.width, self.height = fig.layout, width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI * scale, facecolor="white")
        FigureCanvasAgg(self.figure)
        margin = fig.layout.margin
        sides = ((margin.l, 80), (margin.r, 80), (margin.t, 100), (margin.b, 80))
        self.left, self.right, self.top, self.bottom = (default if v is None else v for v, default in sides)
        self.families, self.shrink = _fonts()
        self.axes: dict[tuple[str, str], Any] = {}
        self.specs: dict[str, Axis] = {}

    # -- places ------------------------------------------------------------------
    def paper(self, x: float, y: float) -> tuple[float, float]:
        """Plotly's paper coordinates (the box inside the margins) as matplotlib's figure coordinates."""
        return (
            (self.left + x * (self.width - self.left - self.right)) / self.width,
            (self.bottom + y * (self.height - self.top - self.bottom)) / self.height,
        )

    def box(self, x: tuple[float, float], y: tuple[float, float]) -> Any:
        (left, bottom), (right, top) = self.paper(x[0], y[0]), self.paper(x[1], y[1])
        return self.figure.add_axes((left, bottom, right - left, top - bottom))

    def axis(self, name: str) -> Axis:
        return self.specs.setdefault(name, Axis(self.layout, name))

    def pair(self, xname: str | None, yname: str | None) -> tuple[Any, Axis, Axis]:
        """Matplotlib's axes for a pair of plotly's axis names, with the two layouts."""
        key = (xname or "x", yname or "y")
        x, y = self.axis(key[0]), self.axis(key[1])
        if key not in self.axes:
            self.axes[key] = self.box(x.get("domain", (0, 1)), y.get("domain", (0, 1)))
        return self.axes[key], x, y

    def point(self, x: Any, y: Any, xref: str | None, yref: str | None, logs: bool) -> tuple[float, float]:
        """A place in paper, axis or axis-domain coordinates as figure coordinates.

        `logs`: values on a logarithmic axis are logarithms already (notes), not data (lines and boxes).
        """
        share = [self._share(x, xref or "x", 0, logs), self._share(y, yref or "y", 1, logs)]
        return self.paper(*share)

    def _share(self, value: Any, ref: str, dimension: int, logs: bool) -> float:
        if ref == "paper":
            return float(value)
        name = ref.split()[0]
        spec = self.axis(name)
        low, high = spec.get("domain", (0, 1))
        if ref.endswith("domain"):
            return low + float(value) * (high - low)
        ax = next((ax for key, ax in self.axes.items() if key[dimension] == name), None)
        if ax is None:
            raise FigureError(f"a note or line refers to axis {name!r}, but no trace is drawn on it.")
        ends = np.array(ax.get_ylim() if dimension else ax.get_xlim())
        at = spec.place([value])[0]
        if spec.log:
            ends, at = np.log10(ends), at if logs else np.log10(at)
        return low + (at - ends[0]) / (ends[1] - ends[0]) * (high - low)

    def words(self, font: Any = None) -> dict:
        """Size, colour and family of a text, the figure's own where the text says nothing."""
        size = (font and font.size) or self.layout.font.size or 12
        colour = rgba((font and font.color) or self.layout.font.color)
        return {"fontsize": size * PT * self.shrink, "color": colour, "fontfamily": self.families}

    def ticks(self, font: Any = None) -> dict:
        words = self.words(font)
        names = {"labelsize": "fontsize", "labelcolor": "color", "labelfontfamily": "fontfamily"}
        return {name: words[key] for name, key in names.items()}

    # -- axes --------------------------------------------------------------------
    def finish_axes(self) -> None:
        for (xname, yname), ax in self.axes.items():
            x, y = self.specs[xname], self.specs[yname]
            self._finish(ax, ax.xaxis, x, "x")
            self._finish(ax, ax.yaxis, y, "y")
            shown = {"left": y.get("showline", False), "bottom": x.get("showline", False)}
            for side, spine in ax.spines.items():
                spine.set(visible=shown.get(side, False), linewidth=PT, color=rgba(x.get("linecolor")), zorder=900)

    def _finish(self, ax: Any, target: Any, axis: Axis, letter: str) -> None:
        from matplotlib.ticker import NullLocator

        if axis.log:
            getattr(ax, f"set_{letter}scale")("log")
        if axis.get("range") is not None:
            ends = [10.0**v if axis.log else v for v in axis.get("range")]
            getattr(ax, f"set_{letter}lim")(*ends)
        elif axis.get("autorange") == "reversed":
            getattr(ax, f"invert_{letter}axis")()
        target.set_minor_locator(NullLocator())
        self._place_ticks(target, axis)
        visible = axis.get("visible", True)
        length = axis.get("ticklen", 4) * PT if axis.get("ticks") == "outside" and visible else 0
        label = {"x": "labelbottom", "y": "labelleft"}[letter]
        ticks = {**self.ticks(axis.get("tickfont")), label: visible and axis.get("showticklabels", True)}
        ax.tick_params(axis=letter, length=length, width=PT, **ticks)
        if axis.get("showgrid", True) and visible:
            ax.grid(True, axis=letter, color=rgba(axis.get("gridcolor", "#eeeeee")), lw=PT, zorder=0)
            ax.set_axisbelow(True)
        if axis.get("zeroline", False):
            line = ax.axvline if letter == "x" else ax.axhline
            line(0, color=rgba(axis.get("zerolinecolor")), lw=PT, zorder=1)
        title = axis.get("title")
        if title is not None and title.text:
            getattr(ax, f"set_{letter}label")(plain(title.text), labelpad=6 * PT, **self.words(title.font))

    def _place_ticks(self, target: Any, axis: Axis) -> None:
        from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, MultipleLocator

        values, names, spec = axis.get("tickvals"), axis.get("ticktext"), axis.get("tickformat")
        if axis.categories and values is None:
            values, names = range(len(axis.categories)), axis.categories
        if values is not None:
            target.set_major_locator(FixedLocator(list(values)))
            at = {float(v): plain(n) for v, n in zip(values, names, strict=True)} if names is not None else {}
            target.set_major_formatter(FuncFormatter(lambda v, _: at.get(float(v), formatted(spec, v))))
            return
        if not axis.log:
            step = axis.get("dtick")
            limited = MaxNLocator(axis.get("nticks", 7), steps=[1, 2, 5, 10])
            target.set_major_locator(MultipleLocator(step) if step is not None else limited)
        if spec or axis.log:
            target.set_major_formatter(FuncFormatter(lambda v, _: formatted(spec, v)))

    # -- what lies over the axes ---------------------------------------------------
    def shapes(self) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Rectangle

        for shape in self.layout.shapes:
            x0, y0 = self.point(shape.x0, shape.y0, shape.xref, shape.yref, logs=False)
            x1, y1 = self.point(shape.x1, shape.y1, shape.xref, shape.yref, logs=False)
            colour, dash = rgba(shape.line.color, shape.opacity), DASHES.get(shape.line.dash or "solid", "-")
            width = (2 if shape.line.width is None else shape.line.width) * PT
            if shape.type == "line":
                artist: Any = Line2D([x0, x1], [y0, y1], color=colour, lw=width, ls=dash)
            elif shape.type == "rect":
                face = rgba(shape.fillcolor, shape.opacity) if shape.fillcolor else "none"
                artist = Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=face, edgecolor=colour, lw=width, ls=dash)
            else:
                raise FigureError(f"figure_png draws line and rect shapes; this figure has a {shape.type!r} shape.")
            artist.set(transform=self.figure.transFigure, zorder=800)
            self.figure.add_artist(artist)

    def notes(self) -> None:
        for item in self.layout.annotations:
            x, y = self.point(item.x, item.y, item.xref, item.yref, logs=True)
            self.figure.text(
                x + (item.xshift or 0) / self.width,
                y + (item.yshift or 0) / self.height,
                plain(item.text),
                weight=weight(item.text),
                ha=item.xanchor if item.xanchor in ("left", "right") else "center",
                va=item.yanchor if item.yanchor in ("top", "bottom") else "center",
                rotation=-(item.textangle or 0),
                multialignment=item.align or "center",
                linespacing=1.35,
                zorder=1000,
                **self.words(item.font),
            )

    def titles(self) -> None:
        title = self.layout.title
        if not title.text:
            return
        left, top = (title.pad.l or 0) / self.width, 1 - (14 if title.pad.t is None else title.pad.t) / self.height
        words = {"va": "top", "linespacing": 1.25}
        self.figure.text(left, top, plain(title.text), weight=weight(title.text), **words, **self.words(title.font))
        if title.subtitle.text:
            drop = (title.font.size or 17) * 1.25 * (1 + plain(title.text).count("\n")) + 6
            subtitle = plain(title.subtitle.text)
            self.figure.text(left, top - drop / self.height, subtitle, **words, **self.words(title.subtitle.font))

    def legend(self, names: set[str]) -> None:
        """The entries of these names, where the layout puts the legend."""
        found: dict[str, Any] = {}
        for ax in self.axes.values():
            for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
                if name in names:
                    found.setdefault(name, handle)
        if not found:
            return
        spec = self.layout.legend
        side = spec.xanchor if spec.xanchor in ("left", "right", "center") else "left"
        height = {"bottom": "lower", "middle": "center"}.get(spec.yanchor, "upper")
        self.figure.legend(
            found.values(),
            [plain(name) for name in found],
            loc="center" if (height, side) == ("center", "center") else f"{height} {side}",
            bbox_to_anchor=self.paper(1.02 if spec.x is None else spec.x, 1 if spec.y is None else spec.y),
            ncols=len(found) if spec.orientation == "h" else 1,
            handlelength=1.2,
            frameon=False,
            borderaxespad=0,
            prop={"family": self.families, "size": self.words()["fontsize"]},
        ).set_zorder(1001)
