"""The skip-mask panel by its traits and by the very messages a browser sends: no kernel, no browser."""

from __future__ import annotations

import json

import numpy as np
import pytest
from drawn import search_result

from eas_kit import live, widgets
from eas_kit.errors import ConfigError
from eas_kit.widgets import SkipMaskState, SkipMaskWidget, show_skip_mask

PREFERENCES = [3.0, 1.0, 2.0, 0.0, 5.0, 4.0]  # sites 0..2 MHA, 3..5 FFN


@pytest.fixture
def calls():
    return []


@pytest.fixture
def panel(calls):
    def evaluate(mask):
        calls.append(mask)
        return 0.5 + 0.1 * len(mask)

    return SkipMaskWidget(PREFERENCES, evaluate, site_kinds=("mha", "ffn"))


def press(button):
    """What the front end sends when a button is pressed, by mouse or by keyboard."""
    button._handle_msg({"content": {"data": {"method": "custom", "content": {"event": "click"}}}, "buffers": []})


def switch(toggle, value):
    """What the front end sends when a toggle is switched."""
    data = {"method": "update", "state": {"value": value}, "buffer_paths": []}
    toggle._handle_msg({"content": {"data": data}, "buffers": []})


def test_starts_with_nothing_skipped(panel, calls):
    assert panel.mask == ()
    assert panel.loss == 0.5
    assert calls == [()]
    assert "skipped 0 of 6: none; loss 0.5000" in panel.status.value


def test_a_click_evaluates_once(panel, calls):
    switch(panel.toggles[4], True)
    assert panel.mask == (4,)
    assert calls == [(), (4,)]
    assert "skipped 1 of 6: FFN 4; loss 0.6000 (+0.1000 against nothing skipped)" in panel.status.value
    switch(panel.toggles[4], False)
    assert calls == [(), (4,)]  # known already
    assert panel.mask == ()


def test_toggles_carry_site_numbers_rows_and_colours(panel):
    assert [t.description for t in panel.toggles] == ["0", "1", "2", "3", "4", "5"]
    assert panel.toggles[4].tooltip == "skip site 4: FFN of layer 1, preference 5"
    rows = [child for child in panel.children if any(c.startswith("skipmask-") for c in child._dom_classes)][:2]
    assert [row.children[0].value for row in rows] == ["MHA", "FFN"]
    sheet = panel.children[0].value
    assert all(f".skipmask-site-{site}{{" in sheet for site in range(6))
    assert "rgb(247,247,247)" in sheet  # preference 0 is the middle of the colours
    assert "focus-visible" in sheet


def test_skipped_is_more_than_a_colour(panel):
    panel.set_mask([1, 4])
    assert [t.icon for t in panel.toggles] == ["", "times", "", "", "times", ""]


def test_presets_are_one_evaluation_each(panel, calls):
    panel.k.value = 2
    assert panel.mask == (1, 3)
    assert calls == [(), (1, 3)]
    press(panel.random_button)
    assert len(panel.mask) == 2
    assert panel.k.value == 2
    press(panel.k_lowest_button)
    assert panel.mask == (1, 3)
    press(panel.none_button)
    assert panel.mask == ()
    assert panel.k.value == 0
    panel.k.value = 2  # the slider was reset, so the same k works again
    assert panel.mask == (1, 3)


def test_random_is_seeded():
    drawn = [SkipMaskWidget(PREFERENCES, seed=3).state.random(4) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert SkipMaskWidget(PREFERENCES, seed=4).state.random(4) != drawn[0] or len(set(drawn[0])) == 4


def test_mask_changes_once_with_its_loss(panel):
    seen = []
    panel.observe(lambda change: seen.append((change["name"], change["new"])), ["mask", "loss"])
    panel.set_mask([5, 0, 2])
    assert sorted(seen, key=str) == [("loss", pytest.approx(0.8)), ("mask", (0, 2, 5))]


def test_errors_are_shown_and_the_panel_lives_on(calls):
    def evaluate(mask):
        if 0 in mask:
            raise RuntimeError("no <model>")
        return 1.0

    panel = SkipMaskWidget(PREFERENCES, evaluate)
    switch(panel.toggles[0], True)
    assert panel.loss is None
    assert panel.mask == (0,)
    assert "RuntimeError: no &lt;model&gt;" in panel.status.value
    switch(panel.toggles[0], False)
    assert panel.loss == 1.0


def test_a_mask_that_does_not_fit_changes_nothing(panel, calls):
    panel.set_mask([2])
    with pytest.raises(ConfigError, match="numbered 0 to 5"):
        panel.set_mask([6])
    assert panel.mask == (2,)
    assert panel.toggles[2].value


def test_more_numbers_than_the_loss():
    panel = SkipMaskWidget(PREFERENCES, lambda mask: {"loss": 0.25, "accuracy": 0.75, "count": 24, "split": "val"})
    assert panel.loss == 0.25
    assert "loss 0.2500, accuracy 0.7500, count 24" in panel.status.value


def test_without_evaluate_it_only_makes_masks():
    panel = SkipMaskWidget(PREFERENCES)
    panel.set_k_lowest(1)
    assert panel.mask == (3,)
    assert panel.loss is None


def test_picture_follows(panel):
    before = panel.picture.value
    assert before[:4] == b"\x89PNG"
    panel.set_mask([1])
    assert panel.picture.value != before


def test_files(panel, tmp_path):
    panel.set_k_lowest(2)
    panel.path.value = str(tmp_path / "mask.json")
    press(panel.save_button)
    record = json.loads((tmp_path / "mask.json").read_text())
    assert (record["skipped"], record["num_sites"], record["kind"], record["made_by"]) == (
        [1, 3],
        6,
        "mha+ffn",
        "k lowest",
    )
    press(panel.none_button)
    press(panel.load_button)
    assert panel.mask == (1, 3)
    assert "loaded from" in panel.status.value
    panel.path.value = str(tmp_path / "other.json")
    press(panel.load_button)
    assert "ConfigError" in panel.status.value
    assert panel.mask == (1, 3)


def test_takes_a_search_result():
    result = search_result()
    state = SkipMaskState(result)
    np.testing.assert_array_equal(state.preferences, result.preferences)
    assert tuple(state.k_lowest(3)) == result.skipped


def test_static_copy_makes_no_widget(monkeypatch):
    monkeypatch.setenv(live.OVERRIDE, "static")
    shown = []
    monkeypatch.setattr(widgets, "show", shown.append)
    monkeypatch.setattr(widgets, "SkipMaskWidget", None)
    state = show_skip_mask(PREFERENCES, lambda mask: 0.5, site_kinds=("mha", "ffn"), mask=[3, 1])
    assert state.mask == (1, 3)
    title = shown[0].layout.title
    assert "skipped 2 of 6: MHA 1; FFN 3; loss 0.5000" in title.text
    assert "static copy" in title.subtitle.text


def test_live_shows_the_widget(monkeypatch):
    monkeypatch.setenv(live.OVERRIDE, "live")
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    widget = show_skip_mask(PREFERENCES, mask=[2])
    assert shown == [widget]
    assert widget.mask == (2,)
