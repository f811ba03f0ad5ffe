"""The static copy of a plotly figure, drawn by matplotlib from the figure's own traces and layout.

Plotly's exporter starts a Chrome, and a notebook run on a bare machine has none. This converter reads the same
`go.Figure` that the browser gets, so the picture cannot show other data than the interactive one. It covers what this
package's figures use (heatmap, scatter, bar, histogram, image, table) and refuses the rest by name.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from .canvas import DASHES, PT, Canvas, formatted, plain, rgba
from .style import FigureError

MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "x": "X",
    "cross": "P",
    "triangle-up": "^",
    "triangle-down": "v",
    "star": "*",
}
VIRIDIS = ((0.0, "#440154"), (0.25, "#3b528b"), (0.5, "#21918c"), (0.75, "#5ec962"), (1.0, "#fde725"))


def figure_png(fig: Any, width: int | None = None, height: int | None = None, scale: float = 1.5) -> bytes:
    """PNG bytes of a plotly figure, without a browser (about 0.2 s, 10-60 kB).

    Args:
        fig: a `go.Figure` of heatmap, scatter, bar, histogram, image and table traces.
        width, height: in plotly's pixels; by default the layout's own, else 820 x 400.
        scale: real pixels per plotly pixel.

    Raises:
        FigureError: a trace, fill or shape of another type.
    """
    from PIL import Image

    canvas = Canvas(fig, width or fig.layout.width or 820, height or fig.layout.height or 400, scale)
    shown = [trace for trace in fig.data if trace.visible in (None, True)]
    for order, trace in enumerate(shown, start=2):
        if trace.type not in _DRAW:
            raise FigureError(f"figure_png draws {', '.join(_DRAW)} traces; this figure has a {trace.type!r} trace.")
        _DRAW[trace.type](canvas, trace, order, shown)
    canvas.finish_axes()
    canvas.shapes()
    canvas.notes()
    canvas.titles()
    if fig.layout.showlegend:
        canvas.legend({trace.name for trace in shown if trace.name and trace.showlegend is not False})
    raw, out = io.BytesIO(), io.BytesIO()
    canvas.figure.savefig(raw, format="png", facecolor="white")
    # a palette: a third of the bytes, no visible change; flat colours and the soft edges of letters need few
    colours = 256 if any(trace.type in ("heatmap", "image") for trace in shown) else 64
    Image.open(raw).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(out, format="PNG", optimize=True)
    return out.getvalue()


def _each(value: Any, count: int, default: Any = None) -> list:
    """A style that plotly takes for all points or point by point, point by point."""
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    return [default if value is None else value] * count


def _heatmap(canvas: Canvas, trace: Any, order: int, _shown: list) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    ax, xs, ys = canvas.pair(trace.xaxis, trace.yaxis)
    z = np.array([[np.nan if v is None else v for v in row] for row in trace.z], float)
    x = xs.place(trace.x if trace.x is not None else range(z.shape[1]))
    y = ys.place(trace.y if trace.y is not None else range(z.shape[0]))
    finite = z[np.isfinite(z)] if np.isfinite(z).any() else np.array([0.0, 1.0])
    low = finite.min() if trace.zmin is None else trace.zmin
    high = finite.max() if trace.zmax is None else trace.zmax
    high = high if high > low else low + 1
    colours = [(place, rgba(colour)) for place, colour in trace.colorscale or VIRIDIS]
    cmap = LinearSegmentedColormap.from_list("trace", colours)
    gap = trace.xgap or 0
    edge = {"edgecolors": "white", "linewidth": gap * PT} if gap else {}
    mesh = ax.pcolormesh(
        _edges(x), _edges(y), np.ma.masked_invalid(z), cmap=cmap, vmin=low, vmax=high, zorder=order, **edge
    )
    if trace.texttemplate and trace.text is not None:
        words = {**canvas.words(trace.textfont), "ha": "center", "va": "center", "zorder": order + 1}
        for i, j in zip(*np.nonzero(np.isfinite(z)), strict=True):
            dark = np.dot(cmap((z[i, j] - low) / (high - low))[:3], (0.299, 0.587, 0.114)) < 0.55
            ax.text(x[j], y[i], plain(trace.text[i][j]), **{**words, "color": "white" if dark else "#222222"})
    if trace.showscale is not False:
        _colorbar(canvas, trace.colorbar, mesh)


def _edges(centres: np.ndarray) -> np.ndarray:
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - middles[0], *middles, 2 * centres[-1] - middles[-1]])


def _colorbar(canvas: Canvas, spec: Any, mesh: Any) -> None:
    left, middle = canvas.paper(1.02 if spec.x is None else spec.x, 0.5 if spec.y is None else spec.y)
    whole = 1 if spec.lenmode == "pixels" else canvas.height - canvas.top - canvas.bottom
    length = (whole * (spec.len or 1) - 20) / canvas.height  # plotly pads the bar by ten pixels at each end
    width = (spec.thickness or 30) / canvas.width
    cax = canvas.figure.add_axes((left + 10 / canvas.width, middle - length / 2, width, length))
    bar = canvas.figure.colorbar(mesh, cax=cax)
    bar.outline.set_visible(False)
    if spec.tickvals is not None:
        bar.set_ticks(list(spec.tickvals), labels=[plain(t) for t in spec.ticktext or spec.tickvals])
    else:
        bar.formatter = lambda v, _: formatted(spec.tickformat, v)
        bar.update_ticks()
    cax.tick_params(length=0, **canvas.ticks(spec.tickfont))
    if spec.title.text:
        cax.set_title(plain(spec.title.text), loc="left", pad=6 * PT, **canvas.words(spec.title.font))


def _scatter(canvas: Canvas, trace: Any, order: int, _shown: list) -> None:
    ax, xs, ys = canvas.pair(trace.xaxis, trace.yaxis)
    x, y = xs.place(trace.x), ys.place(trace.y)
    mode, line, opacity = trace.mode or "lines", trace.line, 1.0 if trace.opacity is None else trace.opacity
    if trace.fill == "toself":
        ax.fill(x, y, facecolor=rgba(trace.fillcolor, opacity), edgecolor="none", zorder=order)
    elif trace.fill == "tozeroy":
        ax.fill_between(x, 0, y, facecolor=rgba(trace.fillcolor, opacity), edgecolor="none", zorder=order)
    elif trace.fill not in (None, "none"):
        raise FigureError(f"figure_png fills 'toself' and 'tozeroy'; this trace has fill={trace.fill!r}.")
    if "lines" in mode and line.width != 0:
        ax.plot(
            x,
            y,
            color=rgba(line.color, opacity),
            lw=(line.width or 2) * PT,
            ls=DASHES.get(line.dash or "solid", "-"),
            drawstyle={"hv": "steps-post", "vh": "steps-pre"}.get(line.shape, "default"),
            label=trace.name,
            zorder=order,
        )
    if "markers" in mode:
        _markers(ax, trace, x, y, opacity, order)
    if "text" in mode:
        _texts(canvas, ax, trace, x, y, order)
    _errors(ax, trace, x, y, order)


def _markers(ax: Any, trace: Any, x: np.ndarray, y: np.ndarray, opacity: float, order: int) -> None:
    marker, count = trace.marker, len(x)
    symbols, colours = _each(marker.symbol, count, "circle"), _each(marker.color, count)
    sizes = np.asarray(_each(marker.size, count, 6), float) * PT
    opacity *= 1.0 if marker.opacity is None else marker.opacity
    for symbol in dict.fromkeys(symbols):  # matplotlib draws one symbol at a time
        at = [i for i in range(count) if symbols[i] == symbol]
        hollow = symbol.endswith("-open")
        faces = [rgba(colours[i], opacity) for i in at]
        ax.scatter(
            x[at],
            y[at],
            s=sizes[at] ** 2,
            marker=MARKERS.get(symbol.removesuffix("-open"), "o"),
            facecolors="none" if hollow else faces,
            edgecolors=faces if hollow else rgba(marker.line.color or "white", opacity),
            linewidths=(marker.line.width or (1.5 if hollow else 0)) * PT,
            clip_on=trace.cliponaxis is not False,
            label=None if "lines" in (trace.mode or "lines") else trace.name,
            zorder=order + 0.1,
        )


def _texts(canvas: Canvas, ax: Any, trace: Any, x: np.ndarray, y: np.ndarray, order: int) -> None:
    for i, where in enumerate(_each(trace.textposition, len(x), "middle center")):
        height, side = where.split()
        ax.annotate(
            plain(trace.text[i]),
            (x[i], y[i]),
            xytext=({"left": -7, "right": 7}.get(side, 0) * PT, {"top": 7, "bottom": -7}.get(height, 0) * PT),
            textcoords="offset points",
            ha={"left": "right", "right": "left"}.get(side, "center"),
            va={"top": "bottom", "bottom": "top"}.get(height, "center"),
            zorder=order + 1,
            **canvas.words(trace.textfont),
        )


def _errors(ax: Any, trace: Any, x: np.ndarray, y: np.ndarray, order: int) -> None:
    for name, error in (("xerr", trace.error_x), ("yerr", trace.error_y)):
        if error.array is not None:
            above = np.nan_to_num(np.asarray(error.array, float))
            below = above if error.arrayminus is None else np.nan_to_num(np.asarray(error.arrayminus, float))
            ax.errorbar(
                x,
                y,
                fmt="none",
                ecolor=rgba(error.color),
                elinewidth=(error.thickness or 1.5) * PT,
                capsize=(4 if error.width is None else error.width) * PT,
                zorder=order + 0.5,
                **{name: [below, above]},
            )


def _bar(canvas: Canvas, trace: Any, order: int, shown: list) -> None:
    ax, xs, ys = canvas.pair(trace.xaxis, trace.yaxis)
    x, y = xs.place(trace.x), ys.place(trace.y)
    flat = trace.orientation == "h"
    at, length = (y, x) if flat else (x, y)
    group = [t for t in shown if t.type == "bar" and (t.xaxis, t.yaxis) == (trace.xaxis, trace.yaxis)]
    if canvas.layout.barmode not in (None, "group"):
        group = [trace]
    unit = np.diff(np.unique(at)).min() if len(np.unique(at)) > 1 else 1.0
    share = 1 - (0.2 if canvas.layout.bargap is None else canvas.layout.bargap)
    width = unit * share / len(group) if trace.width is None else float(np.max(trace.width))
    index = next(i for i, other in enumerate(group) if other is trace)
    at = at + (index - (len(group) - 1) / 2) * width
    colours = [rgba(colour, trace.opacity) for colour in _each(trace.marker.color, len(at))]
    base = np.zeros(len(at)) if trace.base is None else np.asarray(_each(trace.base, len(at)), float)
    draw, start = (ax.barh, "left") if flat else (ax.bar, "bottom")
    draw(at, length, width, color=colours, zorder=order, label=trace.name, **{start: base})
    _errors(ax, trace, *((base + length, at) if flat else (at, base + length)), order)


def _histogram(canvas: Canvas, trace: Any, order: int, _shown: list) -> None:
    ax, xs, _ = canvas.pair(trace.xaxis, trace.yaxis)
    colour = rgba(trace.marker.color, trace.opacity)
    ax.hist(xs.place(trace.x), bins=trace.nbinsx or 30, color=colour, zorder=order, label=trace.name)


def _image(canvas: Canvas, trace: Any, order: int, _shown: list) -> None:
    from PIL import Image

    ax, _, _ = canvas.pair(trace.xaxis, trace.yaxis)
    if trace.source is not None:
        data = base64.b64decode(trace.source.split(",", 1)[1])
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    else:
        pixels = np.asarray(trace.z, np.uint8)[..., :3]
    rows, columns = pixels.shape[:2]
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)  # a pixel's centre has whole coordinates
    ax.imshow(pixels, extent=extent, interpolation="nearest", aspect="auto", zorder=order)


def _table(canvas: Canvas, trace: Any, _order: int, _shown: list) -> None:
    ax = canvas.box(trace.domain.x or (0, 1), trace.domain.y or (0, 1))
    ax.axis("off")
    columns = [[plain(value) for value in values] for values in trace.cells["values"]]
    names = [plain(value) for value in trace.header["values"]]
    rows = [list(row) for row in zip(*columns, strict=True)]
    drawn = ax.table(rows, colLabels=names, bbox=(0, 0, 1, 1), cellLoc="left")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(canvas.words()["fontsize"])
    for cell in drawn.get_celld().values():
        cell.set_edgecolor("#DDDDDD")


_DRAW: dict[str, Callable[[Canvas, Any, int, list], None]] = {
    "heatmap": _heatmap,
    "scatter": _scatter,
    "bar": _bar,
    "histogram": _histogram,
    "image": _image,
    "table": _table,
}
