"""The skip-mask panel by its traits and by the very messages a browser sends: no kernel, no browser."""

from __future__ import annotations

import base64
import json
import threading

import numpy as np
import pytest
from drawn import search_result

from eas_kit import live, widgets
from eas_kit.errors import ConfigError
from eas_kit.masks import load_mask, read_mask, save_mask
from eas_kit.widgets import SkipMaskState, SkipMaskWidget, parts, show_skip_mask
from eas_kit.widgets.parts import short, site_colours

PREFERENCES = [3.0, 1.0, 2.0, 0.0, 5.0, 4.0]  # sites 0..2 MHA, 3..5 FFN


@pytest.fixture
def calls():
    return []


@pytest.fixture
def panel(calls):
    def evaluate(mask):
        calls.append(mask)
        return 0.5 + 0.1 * len(mask)

    panel = settled(SkipMaskWidget(PREFERENCES, evaluate, site_kinds=("mha", "ffn")))
    yield panel
    panel.close()


def settled(panel):
    """The panel when all evaluations are shown."""
    assert panel.wait(20)
    return panel


def press(button, panel=None):
    """What the front end sends when a button is pressed, by mouse or by keyboard."""
    button._handle_msg({"content": {"data": {"method": "custom", "content": {"event": "click"}}}, "buffers": []})
    if panel is not None:
        settled(panel)


def switch(control, value, panel=None, trait="value"):
    """What the front end sends when a toggle is switched, or another control is set."""
    data = {"method": "update", "state": {trait: value}, "buffer_paths": []}
    control._handle_msg({"content": {"data": data}, "buffers": []})
    if panel is not None:
        settled(panel)


def rows_of(panel):
    return [line for line in panel.sites.children if any(c.startswith("skipmask-") for c in line._dom_classes)]


def test_starts_with_nothing_skipped(panel, calls):
    assert panel.mask == ()
    assert panel.loss == 0.5
    assert calls == [()]
    assert "skipped 0 of 6: none; loss 0.5000" in panel.status.value


def test_a_click_evaluates_once(panel, calls):
    switch(panel.toggles[4], True, panel)
    assert panel.mask == (4,)
    assert calls == [(), (4,)]
    assert "skipped 1 of 6: FFN 4; loss 0.6000 (+0.1000 against nothing skipped)" in panel.status.value
    switch(panel.toggles[4], False, panel)
    assert calls == [(), (4,)]  # known already
    assert panel.mask == ()


def test_toggles_carry_site_numbers_rows_and_colours(panel):
    assert [t.description for t in panel.toggles] == ["0", "1", "2", "3", "4", "5"]
    assert panel.toggles[4].tooltip == "skip site 4: FFN of layer 1, preference 5"
    assert [row.children[0].value for row in rows_of(panel)] == ["MHA", "FFN"]
    sheet = panel.children[0].value
    assert all(f".skipmask-site-{site}{{" in sheet for site in range(6))
    assert ".skipmask-site-3{background:rgb(179,88,6)!important;color:#ffffff" in sheet  # the lowest
    assert ".skipmask-site-4{background:rgb(33,102,172)!important;color:#ffffff" in sheet  # the highest
    assert "focus-visible" in sheet
    written = "".join(row.value for row in panel._values.values())
    assert all(f">{text}</span>" in written for text in ("3.00", "1.00", "2.00", ".000", "5.00", "4.00"))


def test_two_panels_on_a_page_do_not_share_colours():
    one, other = SkipMaskWidget([1.0, 2.0]), SkipMaskWidget([2.0, 1.0])
    (name,) = set(one._dom_classes) - set(other._dom_classes)
    assert f".{name} .skipmask-site-0{{" in one.children[0].value
    assert name not in other.children[0].value


def test_colours_are_ranks_so_that_one_large_number_leaves_the_others_their_colours():
    grounds = [ground for ground, _ in site_colours(np.array([0.0, 1.0, 1.0, 1000.0]))]
    assert grounds == [ground for ground, _ in site_colours(np.array([0.0, 1.0, 1.0, 2.0]))]
    assert grounds[1:3] == ["rgb(247,247,247)"] * 2  # the middle
    assert {ground for ground, _ in site_colours(np.zeros(3))} == {"rgb(247,247,247)"}


def test_skipped_is_more_than_a_colour(panel):
    panel.set_mask([1, 4])
    assert [t.icon for t in panel.toggles] == ["", "times", "", "", "times", ""]


def test_presets_are_one_evaluation_each(panel, calls):
    switch(panel.k, 2, panel)
    assert panel.mask == (1, 3)
    assert calls == [(), (1, 3)]
    press(panel.random_button, panel)
    assert len(panel.mask) == 2
    assert panel.k.value == 2
    press(panel.k_lowest_button, panel)
    assert panel.mask == (1, 3)
    press(panel.all_but_one_button, panel)
    assert panel.mask == (1, 2, 3, 5)  # site 0 is the highest MHA, 4 the highest FFN
    press(panel.none_button, panel)
    assert panel.mask == ()
    assert panel.k.value == 0
    assert len(calls) == len(set(calls)) <= 4
    switch(panel.k, 2, panel)  # the slider was reset, so the same k works again
    assert panel.mask == (1, 3)


def test_presets_for_one_kind_alone(panel):
    assert panel.of.index == 0  # a choice that is None would leave the list blank
    switch(panel.of, 2, trait="index")  # all sites, MHA only, FFN only
    assert panel.preset_kind == "ffn"
    switch(panel.k, 2, panel)
    assert panel.mask == (3, 5)
    press(panel.random_button, panel)
    assert set(panel.mask) <= {3, 4, 5}
    press(panel.all_but_one_button, panel)
    assert panel.mask == (3, 5)
    switch(panel.k, 5, panel)  # there are three of them
    assert panel.mask == (3, 4, 5)


def test_undo_and_redo(panel, calls):
    assert panel.undo_button.disabled
    assert panel.redo_button.disabled
    switch(panel.toggles[1], True, panel)
    switch(panel.k, 3, panel)
    assert panel.mask == (1, 2, 3)
    before = len(calls)
    press(panel.undo_button, panel)
    assert panel.mask == (1,)
    assert [t.value for t in panel.toggles] == [False, True, False, False, False, False]
    press(panel.undo_button, panel)
    assert panel.mask == ()
    assert panel.undo_button.disabled
    press(panel.undo_button, panel)  # a browser can be a click behind
    press(panel.redo_button, panel)
    assert panel.mask == (1,)
    switch(panel.toggles[0], True, panel)
    assert panel.redo_button.disabled  # another way was taken
    assert len(calls) == before + 1


def test_undone_masks_say_how_they_came_about(panel):
    panel.set_k_lowest(1)
    panel.set_mask([5])
    panel.undo()
    assert panel.state.made_by == "k lowest"


def test_rankings_to_choose_from(calls):
    rankings = {"bandit": [0.0, 2.0, np.nan, np.nan], "ablation": [3.0, 0.5, -0.25, 1.0]}
    panel = SkipMaskWidget(rankings, lambda mask: calls.append(mask) or 1.0, site_kinds=("mha", "ffn"))
    assert panel.toggles[2].tooltip == "skip site 2: FFN of layer 0, preference unknown"
    assert ".skipmask-site-2{background:rgb(224,224,224)" in panel.children[0].value
    panel.set_k_lowest(3)
    assert panel.mask == (0, 1)  # what is not known is not chosen
    settled(panel)
    before = list(calls)
    switch(panel.by, 1, panel, trait="index")
    assert calls == before  # other colours, the same mask
    assert panel.toggles[2].tooltip.endswith("preference -0.25")
    assert "−.250" in panel._values[2, 4].value
    panel.set_k_lowest(3)
    assert panel.mask == (1, 2, 3)


def test_poor_rankings_are_refused():
    with pytest.raises(ConfigError, match=r"rankings of the same sites are wanted; got {'a': 2, 'b': 3} numbers"):
        SkipMaskState({"a": [1, 2], "b": [1, 2, 3]})
    with pytest.raises(ConfigError, match="needs at least one ranking"):
        SkipMaskState({})


def test_random_is_seeded():
    drawn = [SkipMaskWidget(PREFERENCES, seed=3).state.random(4) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert SkipMaskWidget(PREFERENCES, seed=4).state.random(4) != drawn[0] or len(set(drawn[0])) == 4


def test_loss_is_that_of_the_mask_or_unknown(panel):
    seen = []
    panel.observe(lambda change: seen.append((change["name"], change["new"], panel.mask)), ["mask", "loss"])
    panel.set_mask([5, 0, 2])
    settled(panel)
    assert sorted(seen[:2], key=str) == [("loss", None, (0, 2, 5)), ("mask", (0, 2, 5), (0, 2, 5))]
    assert seen[2:] == [("loss", pytest.approx(0.8), (0, 2, 5))]


def test_errors_are_shown_and_the_panel_lives_on(calls):
    def evaluate(mask):
        if 0 in mask:
            raise RuntimeError("no <model>")
        return 1.0

    panel = SkipMaskWidget(PREFERENCES, evaluate)
    switch(panel.toggles[0], True, panel)
    assert panel.loss is None
    assert panel.mask == (0,)
    assert "RuntimeError: no &lt;model&gt;" in panel.status.value
    assert 'role="alert"' in panel.status.value
    switch(panel.toggles[0], False, panel)
    assert panel.loss == 1.0
    assert "RuntimeError" not in panel.status.value


def test_an_evaluate_that_returns_nothing_is_an_error():
    panel = settled(SkipMaskWidget(PREFERENCES, lambda mask: None))
    assert "ConfigError: evaluate returned None for the mask []; wanted the loss" in panel.status.value


class Slow:
    """An evaluate that says when it runs and goes on when it is told to."""

    def __init__(self, takes_stop=False):
        self.calls, self.stopped = [], []
        self.runs, self.go = threading.Semaphore(0), threading.Semaphore(0)
        if takes_stop:
            self.evaluate = lambda mask, stop: self.plain(mask, stop)
        else:
            self.evaluate = lambda mask: self.plain(mask)

    def plain(self, mask, stop=None):
        self.calls.append(mask)
        self.runs.release()
        assert self.go.acquire(timeout=20)
        if stop is not None and stop():
            self.stopped.append(mask)
            return None
        return 0.5 + 0.1 * len(mask)

    def panel(self):
        """A panel that has evaluated nothing skipped."""
        self.go.release()
        panel = settled(SkipMaskWidget(PREFERENCES, self.evaluate))
        assert self.runs.acquire(timeout=20)
        return panel


def test_a_newer_click_drops_the_one_that_waits_and_hides_the_one_that_runs():
    slow = Slow()
    panel = slow.panel()
    shown = []
    panel.observe(lambda change: shown.append(change["new"]), "loss")
    switch(panel.toggles[0], True)
    assert slow.runs.acquire(timeout=20)  # it runs; the page was not held up
    assert "skipped 0: evaluating …" in panel.status.value
    switch(panel.toggles[1], True)
    switch(panel.toggles[2], True)
    assert panel.mask == (0, 1, 2)
    slow.go.release()
    slow.go.release()
    settled(panel)
    assert slow.calls == [(), (0,), (0, 1, 2)]
    assert [loss for loss in shown if loss is not None] == [pytest.approx(0.8)]
    assert "skipped 3 of 6: MHA 0, 1, 2; loss 0.8000" in panel.status.value
    assert panel.state.tried[(0,)] == {"loss": pytest.approx(0.6)}  # finished, so known from now on


def test_an_evaluation_that_looks_is_stopped():
    slow = Slow(takes_stop=True)
    panel = slow.panel()
    switch(panel.toggles[0], True)
    assert slow.runs.acquire(timeout=20)
    switch(panel.toggles[0], False)
    slow.go.release()
    settled(panel)
    assert slow.stopped == [(0,)]
    assert (0,) not in panel.state.tried
    assert panel.loss == 0.5
    assert "evaluating" not in panel.status.value


def test_an_error_of_an_older_click_is_not_shown():
    runs, go = threading.Event(), threading.Event()

    def evaluate(mask):
        if mask:
            runs.set()
            assert go.wait(20)
            raise RuntimeError("too late")
        return 1.0

    panel = settled(SkipMaskWidget(PREFERENCES, evaluate))
    switch(panel.toggles[0], True)
    assert runs.wait(20)
    switch(panel.toggles[0], False)
    go.set()
    settled(panel)
    assert "too late" not in panel.status.value
    assert panel.loss == 1.0


def test_close_ends_the_evaluations():
    slow = Slow(takes_stop=True)
    panel = slow.panel()
    switch(panel.toggles[0], True)
    assert slow.runs.acquire(timeout=20)
    before = panel.status.value
    panel.close()
    slow.go.release()
    settled(panel)
    assert slow.stopped == [(0,)]
    assert panel.status.value == before
    assert not [thread for thread in threading.enumerate() if thread is panel.worker._thread]
    panel.worker.submit(lambda stop: slow.calls.append("after the end"))
    settled(panel)
    assert slow.calls == [(), (0,)]


def test_no_thread_is_left_when_there_is_nothing_to_do(panel):
    assert panel.worker._thread is None


def test_a_mask_that_does_not_fit_changes_nothing(panel, calls):
    panel.set_mask([2])
    with pytest.raises(ConfigError, match="numbered 0 to 5"):
        panel.set_mask([6])
    assert panel.mask == (2,)
    assert panel.toggles[2].value


def test_more_numbers_than_the_loss():
    numbers = {"loss": 0.25, "accuracy": 0.75, "flops_saved": 0.125, "count": 24, "my_number": 3.5, "split": "val"}
    panel = settled(SkipMaskWidget(PREFERENCES, lambda mask: numbers))
    assert panel.loss == 0.25
    assert "loss 0.2500; accuracy 75.0%" in panel.status.value
    for text in ("75.0%", "12.5%", "FLOPs saved", "my number", "3.5", "nothing skipped", "this mask"):
        assert f">{text}<" in panel.table.value
    assert "split" not in panel.table.value


def test_times_of_the_dense_model_are_those_measured_beside_the_mask():
    def evaluate(mask):
        return {"loss": 1.0, "ms_per_token": 5.0, "dense_ms_per_token": 8.0 if mask else 5.0}

    panel = SkipMaskWidget(PREFERENCES, evaluate, mask=[1])
    settled(panel)
    dense, mine = panel.table.value.split("<tr>")[2:]
    assert ">8.00 ms<" in dense
    assert ">5.00 ms<" in mine
    assert "dense ms" not in panel.table.value


def test_a_loss_alone_makes_no_table(panel):
    assert panel.table.value == ""


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Answers:
    """Answers as a playground gives them: right as long as at most one site is skipped."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 3

    def answer(self, mask, i):
        self.asked.append((mask, i))
        if i == 2 and mask:
            raise RuntimeError("no answer")
        return "79" if len(mask) < 2 else "<7"

    def right(self, i, text):
        return text == "79"

    def question(self, i):
        return f"question {i}: the number is"

    def wanted(self, i):
        return "79"

    def image(self, i):
        if i == 1:
            raise OSError("no picture")
        return PIXEL


def test_an_example_is_answered_with_and_without_the_mask():
    answers = Answers()
    panel = settled(SkipMaskWidget(PREFERENCES, answers=answers))
    assert answers.asked == [((), 0)]
    assert panel.example.options == tuple((f"{i}: question {i}: the number is", i) for i in range(3))
    assert 'alt="the picture of this example"' in panel.card.value
    assert panel.card.value.count("✓ right") == 2
    switch(panel.k, 2, panel)
    assert answers.asked == [((), 0), ((1, 3), 0)]
    assert "<b>&lt;7</b>" in panel.card.value
    assert panel.card.value.count("✓ right") == panel.card.value.count("✗ wrong") == 1
    switch(panel.example, 2, panel, trait="index")
    assert answers.asked[2:] == [((), 2), ((1, 3), 2)]
    assert "question 2" in panel.card.value
    assert "RuntimeError: no answer" in panel.status.value
    switch(panel.example, 1, panel, trait="index")
    assert "OSError: no picture" in panel.card.value
    switch(panel.example, 0, panel, trait="index")
    assert len(answers.asked) == 6  # examples 0 and 1 and 2, two masks each, once


def test_without_evaluate_it_only_makes_masks():
    panel = SkipMaskWidget(PREFERENCES)
    panel.set_k_lowest(1)
    assert panel.mask == (3,)
    assert panel.loss is None


def test_picture_follows(panel):
    before = panel.picture.value
    assert before[:4] == b"\x89PNG"
    panel.set_mask([1])
    settled(panel)
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
    press(panel.load_button, panel)
    assert panel.mask == (1, 3)
    assert "loaded from" in panel.file_status.value
    panel.path.value = str(tmp_path / "other.json")
    press(panel.load_button, panel)
    assert "ConfigError" in panel.file_status.value
    assert 'role="alert"' in panel.file_status.value
    assert panel.mask == (1, 3)
    assert panel.toggles[3].value


def test_a_mask_of_one_kind_is_the_file_that_a_search_of_that_kind_writes(panel, tmp_path):
    searched, mine = tmp_path / "searched.json", tmp_path / "mine.json"
    save_mask(searched, [0, 2], num_sites=3, kind="mha", model="tiny", made_by="search", seed=0)
    panel.load(searched)
    assert panel.mask == (0, 2)
    panel.save(mine)
    assert load_mask(mine, num_sites=3) == (0, 2)
    assert read_mask(mine)["kind"] == "mha"
    panel.set_mask([3, 5])
    panel.save(mine)
    assert {"kind": "ffn", "num_sites": 3, "skipped": [0, 2]}.items() <= read_mask(mine).items()
    panel.load(mine)
    assert panel.mask == (3, 5)


def test_a_mask_of_other_sites_is_refused_and_changes_nothing(panel, tmp_path):
    panel.set_mask([4])
    panel.path.value = str(tmp_path / "other.json")
    save_mask(panel.path.value, [1], num_sites=12, kind="mha", model="large")
    press(panel.load_button, panel)
    assert "was made for 12 sites of mha (large), here are 3 mha, 3 ffn" in panel.file_status.value
    assert panel.mask == (4,)


def test_thirty_two_layers_fit_into_a_notebook():
    panel = SkipMaskWidget(np.linspace(-1, 1, 64), site_kinds=("mha", "ffn"))
    rows = rows_of(panel)
    assert [len(row.children) for row in rows] == [17, 17, 17, 17]  # a label, and half of the layers
    assert [row.children[1].description for row in rows] == ["0", "32", "16", "48"]  # both kinds of a layer in a column
    for row in rows:
        total = 0
        for child in row.children:
            assert child.layout.width == child.layout.min_width  # fixed: no text can make it wider
            right, left = ([*child.layout.margin.split(), child.layout.margin.split()[1]][at] for at in (1, 3))
            total += sum(int(size.removesuffix("px")) for size in (child.layout.width, right, left))
        assert total <= 848  # what JupyterLab leaves of 1,280 pixels beside the list of files
    assert panel.sites.layout.overflow == "auto"  # a narrower page scrolls; rows stay above each other


@pytest.mark.parametrize(
    ("sites", "lines"),
    [(12, [(0, 12)]), (20, [(0, 20)]), (23, [(0, 12), (12, 23)]), (47, [(0, 16), (16, 31), (31, 47)])],
)
def test_rows_are_broken_into_few_lines_of_about_one_length(sites, lines):
    assert parts.lines_of(sites) == lines


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.012, ".012"),
        (-0.5, "−.500"),
        (0.9999, "1.00"),
        (-5, "−5.00"),
        (12.34, "12"),
        (-99.99, "−100"),
        (np.nan, "–"),
    ],
)
def test_preferences_are_written_shortly(value, text):
    assert short(value) == text


def test_headless_output_is_small_and_holds_no_widget(monkeypatch):
    monkeypatch.setenv(live.OVERRIDE, "static")
    bundles = []
    monkeypatch.setattr(widgets, "show", lambda fig: bundles.append(live.figure_bundle(fig)))
    monkeypatch.setattr(widgets, "SkipMaskWidget", None)
    show_skip_mask(np.linspace(-1, 1, 64), lambda mask: 0.5, answers=Answers(), site_kinds=("mha", "ffn"), mask=[3, 40])
    ((data, _),) = bundles
    assert "image/png" in data
    assert not [kind for kind in data if "widget" in kind]
    assert len(json.dumps(data)) < 100_000


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
