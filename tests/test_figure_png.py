"""The static copy shows the figure's data: other data, other pixels; the right colours in the right places."""

from __future__ import annotations

import io

import numpy as np
import plotly.graph_objects as go
import pytest
from drawn import every_figure, search_history
from PIL import Image

from eas_kit import figures as f


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def near(image: np.ndarray, colour: tuple, tolerance: int = 12) -> np.ndarray:
    return (np.abs(image - np.array(colour)) <= tolerance).all(-1)


def bare(fig: go.Figure, width: int = 200, height: int = 100) -> np.ndarray:
    """Drawn without margins or axes, a pixel a pixel: a place in the data is a place in the picture."""
    hidden = {"visible": False, "showgrid": False}
    fig.update_layout(margin={"l": 0, "r": 0, "t": 0, "b": 0}, xaxis=hidden, yaxis=hidden, width=width, height=height)
    return pixels(f.figure_png(fig, scale=1))


@pytest.mark.slow
def test_every_figure_has_a_small_copy_of_its_size():
    for name, fig in every_figure().items():
        png = f.figure_png(fig)
        assert png[:4] == b"\x89PNG", name
        assert 3_000 < len(png) < 90_000, (name, len(png))
        assert pixels(png).shape[:2] == (round(fig.layout.height * 1.5), round((fig.layout.width or 820) * 1.5)), name


def test_same_data_same_picture_other_data_another():
    one, same, other = (f.figure_png(f.search_figure(search_history(seed=s))) for s in (0, 0, 1))
    assert one == same
    assert one != other


def test_heatmap_cells_are_where_and_what_they_are():
    z = [[0.0, 1.0], [1.0, 0.0]]
    fig = go.Figure(go.Heatmap(z=z, colorscale=[(0, "#ff0000"), (1, "#0000ff")], showscale=False))
    fig.update_yaxes(range=[1.5, -0.5])  # first row on top
    fig.update_xaxes(range=[-0.5, 1.5])
    image = bare(fig)
    assert near(image[25, 50], (255, 0, 0))
    assert near(image[25, 150], (0, 0, 255))
    assert near(image[75, 50], (0, 0, 255))


def test_bars_are_as_long_as_their_values():
    fig = go.Figure(go.Bar(x=[0, 1], y=[1.0, 0.5], marker={"color": "#0072B2"}, width=1))
    fig.update_xaxes(range=[-0.5, 1.5])
    fig.update_yaxes(range=[0, 1])
    blue = near(bare(fig), (0, 0x72, 0xB2))
    assert blue[:, 50].sum() == pytest.approx(100, abs=3)
    assert blue[:, 150].sum() == pytest.approx(50, abs=3)


def test_bars_begin_at_their_base():
    fig = go.Figure()
    for colour, base in (("#ff0000", 0.0), ("#0000ff", 0.5)):
        fig.add_bar(x=[0.5], y=[0], base=[base], orientation="h", marker={"color": colour}, width=1)
    fig.update_layout(barmode="overlay")
    fig.update_xaxes(range=[0, 1])
    fig.update_yaxes(range=[-0.5, 0.5])
    image = bare(fig)
    assert near(image[50, 50], (255, 0, 0))
    assert near(image[50, 150], (0, 0, 255))


def test_grouped_bars_stand_side_by_side():
    fig = go.Figure([go.Bar(x=[0], y=[1.0], marker={"color": c}, name=c) for c in ("#ff0000", "#0000ff")])
    fig.update_layout(barmode="group", bargap=0)
    fig.update_xaxes(range=[-0.5, 0.5])
    fig.update_yaxes(range=[0, 1])
    image = bare(fig)
    assert near(image[50, 50], (255, 0, 0))
    assert near(image[50, 150], (0, 0, 255))


def test_markers_lines_bands_and_notes():
    fig = go.Figure()
    fig.add_scatter(x=[0, 1, 1, 0], y=[0, 0, 0.2, 0.2], fill="toself", fillcolor="rgba(0,255,0,1)", line={"width": 0})
    fig.add_scatter(x=[0.5], y=[0.5], mode="markers", marker={"color": "#ff0000", "size": 20, "symbol": "square"})
    fig.add_scatter(x=[0, 1], y=[0.9, 0.9], mode="lines", line={"color": "#0000ff", "width": 6})
    fig.add_shape(type="line", x0=0.25, x1=0.25, y0=0, y1=1, yref="paper", line={"color": "#000000", "width": 4})
    fig.update_xaxes(range=[0, 1])
    fig.update_yaxes(range=[0, 1])
    image = bare(fig)
    assert near(image[95, 150], (0, 255, 0))
    assert near(image[50, 100], (255, 0, 0))
    assert near(image[10, 150], (0, 0, 255))
    assert near(image[60, 50], (0, 0, 0))
    before = image.copy()
    fig.add_annotation(text="here", x=0.75, y=0.5, showarrow=False)
    assert (bare(fig) != before).any()


def test_images_are_not_smoothed():
    board = np.zeros((2, 4, 3), np.uint8)
    board[0, 1] = (255, 0, 0)
    image = bare(go.Figure(go.Image(z=board)))
    assert near(image[:50, 50:100], (255, 0, 0)).mean() > 0.95
    assert near(image[50:], (0, 0, 0)).mean() > 0.95


def test_category_names_tables_and_histograms():
    names = f.figure_png(go.Figure(go.Bar(x=["a", "b"], y=[1, 2])))
    assert names != f.figure_png(go.Figure(go.Bar(x=["a", "c"], y=[1, 2])))
    table = go.Table(header={"values": ["k"]}, cells={"values": [["1"]]})
    assert f.figure_png(go.Figure(table)) != f.figure_png(go.Figure(table.update(cells={"values": [["2"]]})))
    assert f.figure_png(go.Figure(go.Histogram(x=[1, 1, 2]))) != f.figure_png(go.Figure(go.Histogram(x=[1, 2, 2])))


def test_log_axes():
    fig = go.Figure(go.Scatter(x=[1, 2], y=[10, 1000], mode="markers", marker={"color": "#ff0000", "size": 10}))
    fig.update_yaxes(type="log", range=[0, 4])
    fig.update_xaxes(range=[0, 3])
    red = near(bare(fig, 300, 100), (255, 0, 0))
    assert red[75, 100]
    assert red[25, 200]


def test_what_it_cannot_draw_is_refused_by_name():
    with pytest.raises(f.FigureError, match="a 'pie' trace"):
        f.figure_png(go.Figure(go.Pie(values=[1, 2])))
    with pytest.raises(f.FigureError, match="fill='tonexty'"):
        f.figure_png(go.Figure(go.Scatter(x=[1], y=[1], fill="tonexty")))
    circle = go.Figure(go.Scatter(x=[1], y=[1])).add_shape(type="circle", x0=0, x1=1, y0=0, y1=1)
    with pytest.raises(f.FigureError, match="a 'circle' shape"):
        f.figure_png(circle)
