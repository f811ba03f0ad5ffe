"""The picture at the head of README.md, from the files in benchmarks/results: docs/overview.png.

    python benchmarks/draw_overview.py

Left, what the bandit learned of each attention, a row a seed (notebook 02); right, what models tuned without some of
them are worth (notebook 03).
"""

from __future__ import annotations

import io

import pandas as pd
from fill_readme import ROOT, results
from PIL import Image

from eas_kit import figures
from eas_kit.figures.preferences import colour_limit
from eas_kit.figures.style import DIVERGING, axis, new_figure, numbers

TARGET = ROOT / "docs" / "overview.png"
HEIGHT, WIDTHS, SCALE = 330, (470, 590), 1.4  # plotly's pixels; real ones per pixel
ARMS = ("full", "lora", "pia", "pia k=4 bandit", "pia k=4 random", "pia k=6 bandit", "pia k=6 random")


def preferences() -> object:
    """A heatmap of seeds by sites; a cross on what each seed would skip."""
    found = results("02_search_with_bandit")["metrics"]
    values, seeds = list(found["preferences"].values()), list(found["preferences"])
    crosses = [["×" if site in found["skipped"][seed] else "" for site in range(len(values[0]))] for seed in seeds]
    limit = colour_limit(values)
    fig = new_figure(
        "Which attentions are redundant?",
        "preference learned by the bandit: blue is kept,<br>orange is redundant; ×: one of the four skipped",
        height=HEIGHT,
        width=WIDTHS[0],
        margin=(64, 20, 8, 52),
    )
    bare = {"showgrid": False, "showline": False, "ticks": ""}
    sites, rows = list(range(len(values[0]))), list(range(len(seeds)))
    fig.add_heatmap(
        z=numbers(values, 3),
        x=sites,
        y=rows,
        zmin=-limit,
        zmax=limit,
        colorscale=DIVERGING,
        showscale=False,
        xgap=2,
        ygap=2,
        text=crosses,
        texttemplate="%{text}",
        textfont={"size": 15},
    )
    fig.update_layout(
        xaxis=axis("attention of layer (zero-based)", tickvals=sites, range=[-0.5, len(sites) - 0.5], **bare),
        yaxis=axis(tickvals=rows, ticktext=seeds, range=[len(rows) - 0.5, -0.5], **bare),
    )
    return fig


def accuracies() -> object:
    """A bar an arm, a dot a seed."""
    runs = pd.DataFrame(results("03_train_pia")["metrics"]["runs"])
    runs = pd.concat([runs[runs.arm == arm] for arm in ARMS])
    fig = figures.arms_accuracy(runs, title="How good is a model tuned without them?")
    said = f"test accuracy, {runs.seed.nunique()} seeds (dots), equal steps;<br>k of 12 attentions replaced by adapters"
    fig.update_layout(height=HEIGHT, width=WIDTHS[1], margin={"t": fig.layout.margin.t + 18, "r": 108})
    fig.layout.title.subtitle.text = said
    return fig


def draw() -> bytes:
    """Both side by side, as PNG."""
    parts = [Image.open(io.BytesIO(figures.figure_png(fig, scale=SCALE))) for fig in (preferences(), accuracies())]
    whole = Image.new("RGB", (sum(part.width for part in parts), parts[0].height), "white")
    whole.paste(parts[0].convert("RGB"), (0, 0))
    whole.paste(parts[1].convert("RGB"), (parts[0].width, 0))
    out = io.BytesIO()
    whole.quantize(96, dither=Image.Dither.NONE).save(out, format="PNG", optimize=True)
    return out.getvalue()


def main() -> None:
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_bytes(draw())
    print(f"{TARGET.relative_to(ROOT)}  {TARGET.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
