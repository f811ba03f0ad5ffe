"""The figures hold the data they were given, mark what they say they mark, and stay small."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from drawn import (
    SITES,
    UPDATES,
    arms,
    beside_published,
    every_figure,
    examples,
    latencies,
    probe_frame,
    scores,
    search_history,
    search_result,
    site_frame,
    spendings,
    tuned_runs,
)

from eas_kit import figures as f
from eas_kit.errors import ConfigError, EASError
from eas_kit.figures.preferences import SearchTrace
from eas_kit.figures.style import lowest, numbers, site_kinds_of, spread
from eas_kit.figures.tradeoff import pareto
from eas_kit.figures.tuning import smoothed


def trace(fig, name, number=0):
    return [t for t in fig.data if t.name == name][number]


def words(fig) -> str:
    return " ".join(
        [fig.layout.title.text, fig.layout.title.subtitle.text or "", *(a.text for a in fig.layout.annotations)]
    )


# -- every figure ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figures():
    return every_figure()


def test_every_function_is_drawn_here(figures):
    made = {name.split(",")[0] for name in figures}
    assert made == set(f.__all__) - {"FigureError", "figure_png", "save_playback"}


def test_bundles_are_small_and_plain(figures):
    for name, fig in figures.items():
        text = fig.to_json()
        assert len(text) < 60_000, name
        assert "bdata" not in text, f"{name} holds a binary array"
        assert fig.layout.template.to_plotly_json().keys() <= {"data"}, name


def test_every_figure_says_what_it_shows(figures):
    for name, fig in figures.items():
        assert len(fig.layout.title.text) > 15, name
        for key, axis in fig.layout.to_plotly_json().items():
            shown = (
                key.startswith(("xaxis", "yaxis")) and axis.get("visible", True) and axis.get("showticklabels", True)
            )
            assert not shown or axis.get("title", {}).get("text") or axis.get("tickvals"), (name, key)


# -- preferences -------------------------------------------------------------------------------------------------------


def test_heatmap_holds_the_preferences():
    history = search_history()
    fig = f.preference_heatmap(history)
    z = np.array(fig.data[0].z)
    assert z.shape == (SITES, UPDATES)
    np.testing.assert_allclose(z, np.array([r["preferences"] for r in history]).T, rtol=1e-3)
    assert list(fig.data[0].x) == list(range(1, UPDATES + 1))


def test_lowest_are_marked_at_every_update():
    history = search_history()
    marks = trace(f.preference_heatmap(history), "3 lowest")
    assert sorted(zip(marks.x, marks.y, strict=True)) == [(r["update"], s) for r in history for s in r["skipped"]]
    fig = f.preference_heatmap(np.array([r["preferences"] for r in history]), num_skipped=2)
    last = [y for x, y in zip(trace(fig, "2 lowest").x, trace(fig, "2 lowest").y, strict=True) if x == UPDATES]
    assert last == lowest(history[-1]["preferences"], 2)


def test_what_the_search_says_is_skipped_wins():
    """With candidates the skipped sites need not be the lowest of all."""
    history = [{"update": 1, "preferences": [0.0, -5.0, 1.0, 2.0], "skipped": [0, 2]}]
    assert SearchTrace.read(history).skipped == [[0, 2]]
    assert "MHA 0, 2" in words(f.preference_heatmap(history))


def test_sites_are_zero_based_from_top():
    fig = f.preference_heatmap(search_history())
    assert list(fig.layout.yaxis.tickvals) == list(range(SITES))
    assert fig.layout.yaxis.range == (SITES - 0.5, -0.5)


def test_colours_are_symmetric_around_zero():
    heat = f.preference_heatmap(search_history()).data[0]
    assert heat.zmin == -heat.zmax


def test_two_kinds_are_numbered_one_after_the_other():
    fig = f.preference_heatmap(search_history(sites=14), site_kinds=("mha", "ffn"))
    assert list(trace(fig, "MHA").y) == list(range(7))
    assert list(trace(fig, "FFN").y) == list(range(7, 14))
    assert "FFN site" in words(fig)


def test_row_of_preferences_is_a_grid():
    fig = f.preference_heatmap([0.5, -1.0, 0.2, 0.1, -2.0, 3.0], num_skipped=2, site_kinds=("mha", "ffn"))
    assert list(trace(fig, "FFN").text[0]) == ["3", "4", "5"]
    cross = trace(fig, "skipped")
    assert [(int(x), round(y)) for x, y in zip(cross.x, cross.y, strict=True)] == [(1, 0), (1, 1)]
    assert "MHA 1; FFN 4" in words(fig)


def test_search_figure_draws_all_rewards_and_their_means():
    history = search_history()
    fig = f.search_figure(search_result())
    points = trace(fig, "one subnetwork")
    assert sorted(points.y) == sorted(numbers([r for h in history for r in h["rewards"]]))
    assert list(trace(fig, "mean").y) == numbers([np.mean(h["rewards"]) for h in history])
    assert fig.layout.xaxis2.matches == "x"
    assert fig.layout.xaxis.range == fig.layout.xaxis2.range


def test_long_searches_are_thinned_and_say_so():
    fig = f.search_figure(search_history(updates=500))
    columns = list(fig.data[0].x)
    assert len(columns) <= 120
    assert columns[-1] == 500
    assert "every 5th update" in words(fig)


def test_preference_errors():
    with pytest.raises(f.FigureError, match="at least one update"):
        f.preference_heatmap([])
    with pytest.raises(f.FigureError, match="needs 'preferences'"):
        f.preference_heatmap([{"update": 1}])
    with pytest.raises(f.FigureError, match="neither 'rewards' nor 'losses'"):
        f.search_figure(np.zeros((3, 5)))
    with pytest.raises(f.FigureError, match=r"names 2 kinds but there are 5 sites"):
        f.preference_heatmap(np.zeros((3, 5)), site_kinds=("mha", "ffn"))
    with pytest.raises(ConfigError, match="numbered 0 to 4"):
        f.preference_heatmap(np.zeros((3, 5)), skipped=[5])
    assert issubclass(f.FigureError, EASError)


# -- redundancy --------------------------------------------------------------------------------------------------------


def test_probe_curves_are_means_with_deviation():
    frame = probe_frame()
    fig = f.probe_curves(frame, metrics=("loss",))
    mha = frame[frame.kind == "mha"].groupby("num_skipped").loss
    assert list(trace(fig, "MHA").x) == [0, 1, 2, 5]
    np.testing.assert_allclose(trace(fig, "MHA").y, [0.25, *mha.mean()], rtol=1e-5)
    upper = trace(fig, "MHA, spread").y[1:4]
    np.testing.assert_allclose(upper, mha.mean() + mha.std(), rtol=1e-5)
    assert len(trace(fig, "FFN, trials").y) == 9
    assert any(shape.y0 == 0.25 for shape in fig.layout.shapes)
    assert "nothing skipped" in words(fig)


def test_probe_kinds_differ_by_more_than_colour():
    fig = f.probe_curves(probe_frame())
    assert trace(fig, "MHA").marker.symbol != trace(fig, "FFN").marker.symbol
    assert trace(fig, "MHA").line.color != trace(fig, "FFN").line.color
    assert {"<b>MHA</b>", "<b>FFN</b>"} <= {a.text for a in fig.layout.annotations}


def test_probe_takes_k_and_a_separate_dense_model():
    frame = probe_frame().query("kind != 'dense'").rename(columns={"num_skipped": "k"})
    assert trace(f.probe_curves(frame, dense={"accuracy": 0.5}), "MHA").y[0] == 0.5
    assert list(trace(f.probe_curves(frame), "MHA").x) == [1, 2, 5]


def test_missing_columns_are_named():
    with pytest.raises(f.FigureError, match=r"needs a column 'num_skipped' or 'k'; the table has 'kind', 'loss'"):
        f.probe_curves(pd.DataFrame({"kind": ["mha"], "loss": [1.0]}))
    with pytest.raises(f.FigureError, match="'accuracy' or 'loss'"):
        f.probe_curves(pd.DataFrame({"kind": ["mha"], "k": [1]}))


def test_single_sites_by_layer_and_clipped():
    fig = f.single_site_bars(site_frame())
    assert list(trace(fig, "MHA").y) == [0.5, 0.01, 0.03]
    assert list(trace(fig, "FFN").x) == [0, 1, 2]
    clipped = f.single_site_bars(site_frame(), clip=1.0)
    assert list(trace(clipped, "FFN").y) == [3.0, 0.2, -0.01]
    assert clipped.layout.yaxis.range[1] == 1.0
    assert "3.00" in words(clipped)


def test_single_sites_from_global_site_numbers():
    frame = site_frame()
    frame["site"] = frame.layer + np.where(frame.kind == "ffn", 3, 0)
    fig = f.single_site_bars(frame.drop(columns="layer"))
    assert list(trace(fig, "FFN").x) == [0, 1, 2]


def test_probe_report_is_taken_whole():
    frame = probe_frame().query("kind != 'dense'").rename(columns={"num_skipped": "k"})
    report = SimpleNamespace(frame=frame, dense={"loss": 0.25, "accuracy": 0.95}, metadata={"split": "val"})
    fig = f.probe_curves(report)
    assert trace(fig, "MHA").y[0] == 0.95
    assert "val split" in words(fig)


# -- choices -----------------------------------------------------------------------------------------------------------


def test_scorers_are_ranked_and_the_lowest_crossed():
    fig = f.scorer_comparison(scores(), 2, low_is_redundant={"cosine": False})
    assert [list(row) for row in fig.data[0].z] == [[3, 1, 2, 4, 0], [4, 0, 1, 3, 2]]
    cross = trace(fig, "skipped")
    assert [(int(x), round(y)) for x, y in zip(cross.x, cross.y, strict=True)] == [(1, 0), (4, 0), (1, 1), (2, 1)]


def test_scorers_from_a_long_table():
    long = scores().rename_axis("site").reset_index().melt("site", var_name="scorer", value_name="score")
    assert f.scorer_comparison(long, 2).data[0].z == f.scorer_comparison(scores(), 2).data[0].z


def test_agreement_of_masks_is_the_shared_part():
    fig = f.agreement_matrix({"a": {0, 1, 2}, "b": (1, 2, 5), "c": [7, 8, 9]})
    np.testing.assert_allclose(fig.data[0].z, [[1, 2 / 3, 0], [2 / 3, 1, 0], [0, 0, 1]], rtol=1e-3)


def test_agreement_of_scores_is_spearman():
    a, b = np.array([0.1, 0.5, 0.2, 0.9]), np.array([3.0, 1.0, 2.0, 0.5])
    fig = f.agreement_matrix({"a": a, "b": b, "a cubed": a**3})
    assert list(fig.layout.xaxis.ticktext) == ["a", "b", "a<br>cubed"]
    long = f.agreement_matrix({"a": a, "single_ablation": b})  # a column's label must not be wider than the column
    assert list(long.layout.xaxis.ticktext) == ["1", "2"]
    assert list(long.layout.yaxis.ticktext) == ["a  1", "single_ablation  2"]
    expected = pd.DataFrame({"a": a, "b": b, "c": a**3}).corr("spearman")
    np.testing.assert_allclose(fig.data[0].z, expected, atol=1e-3)


def test_agreement_errors():
    with pytest.raises(f.FigureError, match="these have 2, 3"):
        f.agreement_matrix({"a": [1, 2], "b": [1, 2, 3]})
    with pytest.raises(f.FigureError, match="'overlap' or 'spearman'; got 'kendall'"):
        f.agreement_matrix({"a": [1, 2], "b": [1, 3]}, measure="kendall")


def test_mask_comparison_has_every_mask_and_mean():
    frame = pd.DataFrame(
        {"method": ["bandit", "random", "random"], "loss": [0.5, 0.7, 0.9], "skipped": [[2, 5], [0, 1], [3, 4]]}
    )
    fig = f.mask_comparison(frame, baseline=0.4)
    assert list(trace(fig, "random").x) == [0.7, 0.9]
    assert list(trace(fig, "bandit").customdata) == ["2, 5"]
    assert {0.5, 0.8, 0.4} <= {round(s.x0, 9) for s in fig.layout.shapes}
    assert "0.800" in words(fig)


def test_masks_whose_names_differ_in_a_number_share_a_row():
    names = ["bandit seed 0", "bandit seed 1", "random 0", "random 11", "single ablation"]
    fig = f.mask_comparison(pd.DataFrame({"name": names, "mask": [(1,)] * 5, "loss": range(5)}))
    assert list(fig.layout.yaxis.ticktext) == ["bandit", "random", "single ablation"]


# -- tuning ------------------------------------------------------------------------------------------------------------


def test_training_curves_take_every_form_of_history():
    records = [{"step": i + 1, "loss": v} for i, v in enumerate([3.0, 2.0, 1.0])]
    forms = {"dicts": records, "frame": pd.DataFrame(records), "numbers": [3.0, 2.0, 1.0], "result": search_result()}
    fig = f.training_curves(forms, smooth=1)
    for name in ("dicts", "frame", "numbers"):
        assert (list(trace(fig, name).x), list(trace(fig, name).y)) == ([1, 2, 3], [3.0, 2.0, 1.0])
    assert len(trace(fig, "result").y) == 5
    assert list(f.training_curves(records).data[-1].y) == [3.0, 2.0, 1.0]
    with pytest.raises(f.FigureError, match="holds no 'accuracy'"):
        f.training_curves(records, metric="accuracy")


def test_smoothing_is_a_moving_mean():
    np.testing.assert_allclose(smoothed(np.array([1.0, 2.0, 6.0, 4.0]), 3), [1.5, 3.0, 4.0, 5.0])
    np.testing.assert_array_equal(smoothed(np.array([1.0, 5.0]), 1), [1.0, 5.0])


def test_arms_hold_means_seeds_and_words():
    fig = f.arms_accuracy(arms(), chance=0.25)
    np.testing.assert_allclose(trace(fig, "LoRA").x, [0.91])
    assert sorted(trace(fig, "LoRA, seeds").x) == [0.9, 0.91, 0.92]
    assert fig.layout.xaxis.range == (0, 1)
    assert "best PIA, 4 skipped, 96.0 ± 1.0%" in fig.layout.title.text
    assert not [t for t in f.arms_accuracy(arms(), zero=False).data if t.type == "bar"]


def test_arms_by_their_own_names_and_columns():
    names = ["zero_shot", "full", "lora", "pia", "pia k=4 bandit"]
    table = pd.DataFrame(
        {"arm": names, "val_accuracy": 0.1, "test_accuracy": [0.3, 0.9, 0.8, 0.85, 0.84], "speedup": 1.0}
    )
    fig = f.arms_accuracy(table)
    assert list(fig.layout.yaxis.ticktext) == ["zero-shot", "full tuning", "LoRA", "PIA", "PIA, 4 skipped (bandit)"]
    assert trace(fig, "full tuning").x[0] == 0.9
    assert trace(f.arms_accuracy(table, split="val"), "full tuning").x[0] == 0.1
    assert trace(f.accuracy_vs_speed(table), "arms").y[0] == 0.3


def test_pareto_front():
    assert pareto(np.array([1.0, 2.0, 2.0, 0.5]), np.array([0.9, 0.8, 0.7, 0.95])) == [0, 1, 3]
    fig = f.accuracy_vs_speed(arms())
    points = trace(fig, "arms")
    filled = [name for name, symbol in zip(points.text, points.marker.symbol, strict=True) if symbol == "circle"]
    assert filled == ["PIA, 4 skipped"]
    slow = arms().rename(columns={"speedup": "ms"})
    assert "less is better" in f.accuracy_vs_speed(slow).layout.xaxis.title.text


def test_the_chosen_arm_is_ringed_and_named():
    fig = f.accuracy_vs_speed(arms(), chosen="PIA, 4 skipped")
    ring = trace(fig, "chosen")
    assert (list(ring.x), list(ring.y), ring.marker.symbol) == ([1.25], [pytest.approx(0.96)], "circle-open")
    assert [note.text for note in fig.layout.annotations if "chosen" in note.text] == ["<b>PIA, 4 skipped, chosen</b>"]
    assert "chosen" not in words(f.accuracy_vs_speed(arms()))
    with pytest.raises(f.FigureError, match="one of the arms zero-shot, LoRA, PIA, 4 skipped, PIA; got 'DAS'"):
        f.accuracy_vs_speed(arms(), chosen="DAS")
    with pytest.raises(f.FigureError, match="at least one row"):
        f.accuracy_vs_speed(arms()[:0])


def test_labels_of_arms_of_one_speed_stand_apart():
    same = pd.DataFrame({"arm": list("abcd"), "accuracy": [0.9, 0.901, 0.902, 0.1], "speedup": [1.2, 1.2, 1.2, 1.0]})
    heights = sorted(note.y for note in f.accuracy_vs_speed(same).layout.annotations if note.text in "abc")
    assert min(np.diff(heights)) > 0.04
    assert np.mean(heights) == pytest.approx(0.901, abs=1e-4)


# -- merging -----------------------------------------------------------------------------------------------------------


def test_merge_scatter_counts_every_logit_and_draws_the_worst():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(5, 701))
    b = a.copy()
    b[3, 17] += 0.5
    fig = f.merge_scatter(a, b)
    assert sum(trace(fig, "differences").y) == a.size
    assert round(b[3, 17], 4) in np.round(np.array(trace(fig, "logits").y, float), 4)
    assert "DIFFER" in fig.layout.title.text
    assert "agree" in f.merge_scatter(a, a + 1e-9).layout.title.text
    assert "largest difference 0" in f.merge_scatter(a, a).layout.title.text
    with pytest.raises(f.FigureError, match=r"\(5, 701\) and \(701, 5\)"):
        f.merge_scatter(a, a.T)


def test_latency_in_milliseconds_with_the_paired_factors():
    fig = f.latency_bars(latencies())
    assert list(trace(fig, "prefill").x) == [40.0, 32.0]
    np.testing.assert_allclose(trace(fig, "decode").error_x.array, [40.0, 30.0])
    assert "1.34×" in words(fig)  # of the rounds' ratios, not 200 / 150


def test_time_shares_are_stacked_and_named_where_there_is_room():
    fig = f.time_shares(spendings())
    dense, folded = 0, 1
    decode = {t.name: t for t in fig.data if t.xaxis == "x2"}
    assert list(decode) == ["attention", "feed-forward", "adapters", "the rest"]  # none of the parts that took nothing
    assert list(decode["attention"].x) == [40.0, 20.0]
    assert list(decode["feed-forward"].base) == [40.0, 20.0]
    assert list(decode["the rest"].base) == [90.0, 71.0]
    assert decode["the rest"].base[dense] + decode["the rest"].x[dense] == 100.0
    assert decode["adapters"].x[folded] == 1.0
    assert trace(fig, "merging").xaxis == "x"  # prefill alone
    said = [note.text for note in fig.layout.annotations]
    assert "attention 40%" in said
    assert "100 ms" in said
    assert not any(note.startswith("adapters") or note == "1%" for note in said), "no room for one per cent"
    shown = [t.name for t in fig.data if t.showlegend]
    assert len(shown) == len(set(shown)) == 6


def test_time_shares_of_one_model_and_its_errors():
    (one, *_) = spendings().values()
    assert {t.name for t in f.time_shares(one, phases=("total",)).data} == {"vision tower", "attention", "feed-forward"}
    with pytest.raises(f.FigureError, match="at least one variant"):
        f.time_shares({})
    with pytest.raises(f.FigureError, match="'fast' lacks the phase 'prefill'"):
        f.time_shares({"dense": one, "fast": {"seconds": {"decode": {}}}})
    with pytest.raises(f.FigureError, match="'odd' has the part 'norms'"):
        f.time_shares({"odd": {"seconds": {"prefill": {"norms": {"median": 1.0}}, "decode": {}}}})


def test_latency_from_single_runs():
    frame = pd.DataFrame(
        [
            (v, p, ms)
            for v, base in (("dense", 10.0), ("merged", 8.0))
            for p in ("prefill", "decode")
            for ms in (base, base + 1, base + 2)
        ],
        columns=["variant", "phase", "ms"],
    )
    fig = f.latency_bars(frame)
    assert list(trace(fig, "decode").x) == [11.0, 9.0]
    assert "1.22×" in words(fig)
    with pytest.raises(f.FigureError, match="one of the variants dense, merged; got 'fast'"):
        f.latency_bars(frame, reference="fast")
    with pytest.raises(f.FigureError, match="'decode' is missing"):
        f.latency_bars(frame[frame.phase == "prefill"])


# -- gallery -----------------------------------------------------------------------------------------------------------


def test_gallery_shows_pixels_words_and_judgement():
    import base64
    import io

    from PIL import Image

    fig = f.gallery(examples(), predictions=["5", "gold", "2"])
    assert [t.type for t in fig.data] == ["image", "image"]
    assert fig.data[0].zsmooth is False
    data = base64.b64decode(fig.data[0].source.split(",")[1])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data)))[..., 0], examples()[0]["images"][0])
    said = words(fig)
    assert "a &lt; b?" in said
    assert "✓ 5" in said
    assert "✗ gold" in said
    assert "<b>iron</b>" in said


def test_gallery_letters_the_options_where_the_answer_is_a_letter():
    lettered = {"question": "Which?", "answer": "B", "choices": ("iron", "gold"), "images": ()}
    assert "(A) iron / (B) gold" in words(f.gallery([lettered]))
    assert "iron / B" in words(f.gallery([lettered | {"choices": ("iron", "B")}]))


def test_gallery_opens_the_first_picture_of_a_sequence():
    from collections.abc import Sequence

    from PIL import Image

    class Lazy(Sequence):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return Image.new("RGB", (3, 5), (0, 0, 90 * i))

    fig = f.gallery([{"question": "a?", "answer": "b", "images": Lazy()}])
    assert fig.data[0].source == f.gallery([{"question": "", "answer": "", "images": (Lazy()[0],)}]).data[0].source


def test_gallery_errors():
    with pytest.raises(f.FigureError, match="at least one example"):
        f.gallery([])
    with pytest.raises(f.FigureError, match="got 1 for 3"):
        f.gallery(examples(), predictions=["a"])


# -- parts -------------------------------------------------------------------------------------------------------------


def test_numbers_round_and_leave_gaps():
    assert numbers([1.23456789, np.nan, np.inf, -0.0001234567]) == [1.23457, None, None, -0.000123457]
    assert numbers(np.array([[1, 2], [3, 4]])) == [[1.0, 2.0], [3.0, 4.0]]


def test_labels_are_spread_apart_in_order():
    out = spread([1.0, 1.0, 5.0], 0.5)
    assert sorted(np.diff(sorted(out)).round(9))[0] >= 0.5
    assert out[2] == 5.0
    assert spread([3.0, 1.0], 0.5) == [3.0, 1.0]


def test_site_kinds():
    assert site_kinds_of(None, 3) == ["mha"] * 3
    assert site_kinds_of(("mha", "ffn"), 4) == ["mha", "mha", "ffn", "ffn"]
    assert site_kinds_of(["mha", "ffn", "mha"], 3) == ["mha", "ffn", "mha"]
    assert site_kinds_of([type("Site", (), {"kind": "ffn"})()], 1) == ["ffn"]


# -- the paper's figures -----------------------------------------------------------------------------------------------


def test_figure_1_has_the_untuned_model_left_and_the_tuned_ones_right():
    probe, runs = probe_frame(), tuned_runs()
    fig = f.redundancy_and_accuracy(probe, runs, dense=0.93)
    left, right = trace(fig, "FFN"), trace(fig, "FFN", 1)
    k = "num_skipped" if "num_skipped" in probe else "k"
    mean = probe[(probe.kind == "ffn") & (probe[k] > 0)].groupby(k)["accuracy"].mean()
    assert list(left.y) == pytest.approx([0.93, *mean], abs=1e-5)
    assert list(right.x) == [0, 2, 3]
    assert list(right.y) == pytest.approx([0.905, 0.705, 0.655])
    assert list(trace(fig, "whole layer").x) == [0, 2, 3]
    assert list(trace(fig, "MHA", 1).y) == pytest.approx([0.905, 0.805, 0.755])  # of the bandit: not of random masks
    assert (left.xaxis, right.xaxis) == ("x", "x2")
    with pytest.raises(f.FigureError, match="needs runs that skip something"):
        f.redundancy_and_accuracy(probe, runs[runs.k == 0])
    with pytest.raises(f.FigureError, match="needs a column 'candidates'"):
        f.redundancy_and_accuracy(probe, runs.drop(columns="candidates"))


def test_skipped_sites_are_dark_in_the_panel_of_their_kind():
    runs = tuned_runs()
    fig = f.skipped_sites(runs, num_layers=7)
    mha, ffn = (np.array(panel.z, float) for panel in fig.data)
    shown = runs[runs["k"] > 0]
    assert mha.shape == ffn.shape == (len(shown), 7)
    for row, run in enumerate(shown.to_dict("records")):
        attentions = {site for site in run["mask"] if site < 7}
        forwards = {site - 7 for site in run["mask"] if site >= 7}
        if run["candidates"] == "layer":  # both go
            forwards = attentions
        assert set(np.flatnonzero(mha[row] == 1)) == attentions
        assert set(np.flatnonzero(ffn[row] == 1)) == forwards
        assert np.isnan(ffn[row]).all() == (run["candidates"] == "mha")
    assert "PIA, 2 skipped (random), seed 1" in fig.layout.yaxis.ticktext
    assert "11.0%" in words(fig)


def test_skipped_sites_of_a_model_with_its_own_kinds_and_errors():
    runs = pd.DataFrame([{"arm": "a", "mask": [0, 4]}, {"arm": "b", "mask": None}])
    fig = f.skipped_sites(runs, num_layers=5, site_kinds=["text", "text", "text", "image", "image"])
    assert [panel.z for panel in fig.data] == [([1, 0, 0],), ([0, 1],)]
    with pytest.raises(f.FigureError, match="a mask skips site 4, but there are 3 sites"):
        f.skipped_sites(runs, num_layers=3)
    with pytest.raises(f.FigureError, match="needs runs that skip something"):
        f.skipped_sites(runs[1:], num_layers=5)


def test_published_bars_stand_beside_measured_ones_and_say_how_many_are_known():
    fig = f.measured_beside_published(beside_published(), "Avg")
    measured, published = fig.data
    assert list(measured.x) == [95.0, 91.0, None]
    assert list(published.x) == [90.0, None, 88.0]
    assert list(fig.layout.yaxis.ticktext) == ["full", "EAS8", "DAS"]  # of "none" there is nothing to show
    assert list(measured.error_x.array) == [1.5, 0.0, 0.0]
    assert "2 of 3 known to us" in words(fig)
    assert "95 | 90" in words(fig)
    with pytest.raises(f.FigureError, match="no column 'IMG'; the table has Avg"):
        f.measured_beside_published(beside_published(), "IMG")
    with pytest.raises(f.FigureError, match="nothing of 'Avg' is measured or published"):
        f.measured_beside_published(beside_published()[-1:], "Avg")
