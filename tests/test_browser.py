"""Readers' clicks, in a real JupyterLab in a real Chromium: the notebooks that have something to touch.

One server for all. Each notebook is opened and run once; the tests of a notebook share that page and begin at a state
that they set themselves. Screenshots go to the folder that EAS_KIT_SCREENSHOTS names, else to pytest's own.
"""

from __future__ import annotations

import json
import re

import pytest
from lab import BADGE, RUN, Browser, Lab, why_not

from eas_kit.masks import read_mask

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]

SEARCH = "with LivePreferenceHeatmap("
TOUCH = "show_skip_mask("


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with Browser() as chromium:
        yield chromium


def in_good_order(page) -> None:
    assert page.problems == []
    assert page.outside <= {BADGE}, "the page may ask nothing of other machines"


def is_a_graph(cell) -> None:
    """The cell's output is plotly's interactive graph, not a picture of one."""
    cell.locator(".js-plotly-plot .main-svg").first.wait_for()
    cell.locator(".jp-RenderedPlotly img").wait_for(state="hidden")


# -- 00 ------------------------------------------------------------------------------------------------------------


def test_the_start_page_opens_and_runs(lab, browser, screenshots):
    page = browser.open(lab, lab.add("00_start_here"))
    assert page.page.locator(".jp-Notebook h1").first.inner_text().startswith("Start here")
    page.run_all()
    is_a_graph(page.show_cell(page.cell_with("figures.gallery(")))
    page.screenshot(screenshots, "00_opening", 0)
    page.screenshot(screenshots, "00_gallery", page.cell_with("figures.gallery("))
    answers_an_exercise(page, screenshots)
    in_good_order(page)
    page.close()


def answers_an_exercise(page, screenshots) -> None:
    """No answer, a wrong one, and that of the solution folded above, put into the cell as a reader does."""
    number = page.cell_with("exercises.most_needed_attention(")
    cell = page.show_cell(number)
    cell.get_by_text("… not answered yet").wait_for()
    (solution,) = re.findall(r"```python\n(.*?)```", page.cells()[number - 1]["source"], re.DOTALL)
    asked = page.cells()[number]["source"].splitlines()[-1]
    for answer, verdict in (("vital = 11", "✗ not yet right: without attention 11"), (solution, "✓ right: without")):
        page.write(number, f"{answer}\n{asked}")
        page.run_cell(number)
        cell.get_by_text(verdict).wait_for()
    page.screenshot(screenshots, "00_exercise", number)


# -- 02: the search ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(lab, browser):
    """Notebook 02, run to its end with the pictures of its search counted."""
    small = {"seeds": [0], "warmup_steps": 3, "updates": 12, "reward_batch_size": 16, "random_masks": 1, "limit": 12}
    page = browser.open(lab, lab.add("02_search_with_bandit", small))
    search = page.cell_with(SEARCH)
    page.show_cell(search)
    page.watch_pictures(search)
    page.run_all()
    yield page
    page.close()


def test_the_heatmap_moves_while_the_search_runs(searched, screenshots):
    assert searched.pictures() >= 3
    search = searched.cell_with(SEARCH)
    is_a_graph(searched.show_cell(search))
    searched.screenshot(screenshots, "02_search", search)
    in_good_order(searched)


def test_nothing_is_cut_off_and_figures_keep_their_height_at_any_width(searched):
    for width in (1920, 1100, 1280):  # plotly forgot the height of figures when the window changed
        searched.page.set_viewport_size({"width": width, "height": 900})
        figure = searched.show_cell(searched.cell_with("figures.training_curves(")).locator(".js-plotly-plot")
        figure.locator(".main-svg").first.wait_for()
        assert figure.bounding_box()["height"] > 200
    wide = (
        "n => [...n.querySelectorAll('.jp-MarkdownOutput, .cm-scroller')].some(n => n.scrollWidth > n.clientWidth + 1)"
    )
    cut = [cell["source"] for cell in searched.cells() if searched.show_cell(cell["index"]).evaluate(wide)]
    assert cut == []


# -- 02: the panel -------------------------------------------------------------------------------------------------


class Panel:
    """The panel of skip masks on a page: what a reader sees of it, and clicks."""

    def __init__(self, page, sites: int = 12) -> None:
        self.page, self.sites, self.cell = page, sites, page.show_cell(page.cell_with(TOUCH))
        self.box = self.cell.locator(".skipmask").first
        self.box.wait_for()

    def toggle(self, site: int):
        return self.box.locator(f".skipmask-site-{site}")

    def press(self, name: str) -> None:
        self.box.get_by_role("button", name=name, exact=True).click()

    def begin_at_none(self) -> None:
        self.press("none")
        self.shows(f"skipped 0 of {self.sites}")

    def shows(self, *words: str) -> None:
        """Until the panel says all of these, the loss among them."""
        shown = "words => words.every(w => document.querySelector('.skipmask').innerText.includes(w))"
        self.page.wait(shown, [*words, "; loss "])

    def mask(self) -> tuple[int, ...]:
        """The sites whose toggles look pressed."""
        pressed = [self.toggle(site).evaluate("t => t.classList.contains('mod-active')") for site in range(self.sites)]
        return tuple(site for site, is_pressed in enumerate(pressed) if is_pressed)

    def picture(self) -> str:
        """The address of the picture of the masks tried, another one for each drawing."""
        return self.box.locator(".skipmask-picture").get_attribute("src")

    def draws_another_than(self, picture: str) -> None:
        now = "document.querySelector('.skipmask-picture')"
        self.page.wait(f"before => {now}.src !== before && {now}.complete", picture)

    def tried(self) -> int:
        return int(self.page.ask("len(panel.state.tried)"))


@pytest.fixture
def panel(searched):
    panel = Panel(searched)
    panel.begin_at_none()
    return panel


def test_a_toggle_skips_its_site_and_is_evaluated(panel, screenshots):
    site = next(s for s in (5, 6, 7) if f"({s},)" not in panel.page.ask("list(panel.state.tried)"))
    tried, picture = panel.tried(), panel.picture()
    panel.toggle(site).click()
    panel.shows(f"skipped 1 of 12: MHA {site};")
    assert panel.mask() == (site,)
    assert panel.tried() == tried + 1
    panel.draws_another_than(picture)
    panel.page.screenshot(screenshots, "02_panel", panel.page.cell_with(TOUCH))
    panel.toggle(site).click()
    panel.shows("skipped 0 of 12")
    assert panel.mask() == ()
    assert panel.tried() == tried + 1  # nothing skipped was known already
    in_good_order(panel.page)


def test_presets_set_many_toggles_with_one_evaluation(panel):
    panel.toggle(2).click()
    panel.shows("skipped 1 of 12: MHA 2;")
    tried = panel.tried()
    panel.press("random k")
    panel.shows("skipped 1 of 12")
    panel.box.locator(".noUi-handle").focus()
    for k in (2, 3):
        panel.page.page.keyboard.press("ArrowRight")
        panel.shows(f"skipped {k} of 12")
    assert list(panel.mask()) == json.loads(panel.page.ask("[int(site) for site in panel.state.k_lowest(3)]"))
    assert tried <= panel.tried() <= tried + 3
    panel.press("none")
    panel.shows("skipped 0 of 12")
    assert panel.mask() == ()
    in_good_order(panel.page)


def test_space_presses_the_focused_toggle(panel):
    panel.toggle(3).focus()
    panel.page.page.keyboard.press("Tab")
    panel.page.page.keyboard.press("Space")
    panel.shows("skipped 1 of 12: MHA 4;")
    assert panel.mask() == (4,)
    assert panel.toggle(4).evaluate("t => t === document.activeElement")  # where the next key goes
    panel.page.page.keyboard.press("Space")
    panel.shows("skipped 0 of 12")
    in_good_order(panel.page)


def test_a_saved_mask_is_a_mask_file(panel, lab):
    for site in (9, 1):
        panel.toggle(site).click()
        panel.shows(f" {site};" if site == 9 else "skipped 2 of 12: MHA 1, 9;")
    panel.press("save")
    panel.shows("saved to", "mask.json")
    record = read_mask(lab.root / "notebooks" / "mask.json")
    assert (record["skipped"], record["num_sites"], record["kind"], record["model"]) == ([1, 9], 12, "mha", "tiny")
    panel.press("none")
    panel.shows("skipped 0 of 12")
    panel.press("load")
    panel.shows("loaded from", "mask.json")
    assert panel.mask() == (1, 9)
    in_good_order(panel.page)


def test_a_saved_notebook_is_there_after_a_reload(searched, screenshots):
    file = searched.saved()
    search = searched.cell_with(SEARCH)
    kept = json.loads(file.read_text())["cells"][search]["outputs"]
    assert "application/vnd.plotly.v1+json" in {mime for output in kept for mime in output.get("data", {})}
    searched.page.reload(wait_until="domcontentloaded")
    searched.ready()
    assert all(cell["count"] for cell in searched.cells() if cell["type"] == "code")
    cell = searched.show_cell(search)
    cell.locator(".jp-RenderedPlotly img").wait_for()  # JupyterLab saves a picture with the graph, shows it first,
    cell.locator(".jp-RenderedPlotly").hover()  # and makes the graph again when the mouse comes
    is_a_graph(cell)
    panel = Panel(searched)  # the kernel lives on, and so does its panel
    panel.begin_at_none()
    panel.toggle(8).click()
    panel.shows("skipped 1 of 12: MHA 8;")
    searched.screenshot(screenshots, "02_reloaded", searched.cell_with(TOUCH))
    in_good_order(searched)


# -- 02: stopped ---------------------------------------------------------------------------------------------------


ENDLESS = {"warmup_steps": 3, "updates": 400, "reward_batch_size": 16}


def ends_stopped(page, search: int) -> None:
    """The search ends before its time, with its result and a picture that says so, and no error."""
    page.ready()
    cell = page.show_cell(search)
    is_a_graph(cell)
    assert "stopped at step" in cell.locator(".gtitle").first.text_content()
    assert [error for cell in page.cells() for error in cell["errors"]] == []
    # the page may draw the state after one update twice, so that two pictures do not mean two updates
    assert page.ask("1 <= len(live.events) == len(result.history) < updates") == "True"
    assert page.ask("len(result.skipped) == num_skipped") == "True"


def test_the_interrupt_button_ends_a_search_with_its_picture(lab, browser, screenshots):
    page = browser.open(lab, lab.add("02_search_with_bandit", ENDLESS, "02_interrupted"))
    search = page.cell_with(SEARCH)
    page.watch_pictures(search)
    page.begin_until(search)
    page.wait("() => window.picturesSeen.size >= 2", seconds=RUN)
    page.page.get_by_role("button", name="Interrupt the kernel").click()
    ends_stopped(page, search)
    page.screenshot(screenshots, "02_interrupted", search)
    in_good_order(page)
    page.close()


def test_the_buttons_hold_a_search_and_end_it_and_a_slider_plays_it_back(lab, browser, screenshots):
    page = browser.open(lab, lab.add("02_search_with_bandit", ENDLESS, "02_stopped"))
    search = page.cell_with(SEARCH)
    page.watch_pictures(search)
    page.begin_until(search)
    bar = page.show_cell(search).locator(".eas-run-bar").first
    page.wait("() => window.picturesSeen.size >= 2", seconds=RUN)
    bar.get_by_role("button", name="Pause").click()
    bar.get_by_text("Paused after step").wait_for()
    page.screenshot(screenshots, "02_paused", search)
    seen = page.pictures()
    bar.get_by_role("button", name="Resume").click()
    page.wait("seen => window.picturesSeen.size > seen", seen)
    bar.get_by_role("button", name="Stop").click()
    ends_stopped(page, search)
    cell = page.show_cell(search)
    slider = cell.locator(".eas-run-bar .noUi-handle")
    slider.focus()
    page.page.keyboard.press("ArrowLeft")
    cell.locator(".jp-RenderedSVG img").wait_for()  # an earlier update, drawn as it was
    page.page.keyboard.press("ArrowRight")
    is_a_graph(cell)  # the end again
    page.screenshot(screenshots, "02_stopped", search)
    in_good_order(page)
    page.close()


# -- 06 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(lab, browser):
    small = {"scorers": ["single_ablation"], "trials": 1, "examples": 24, "score_limit": 8}
    page = browser.open(lab, lab.add("06_skip_mask_playground", small))
    page.run_all()
    yield page
    page.close()


@pytest.fixture
def playground(played):
    panel = Panel(played, sites=24)
    panel.begin_at_none()
    return panel


def test_the_playground_answers_beside_the_dense_model(playground, screenshots):
    page, card = playground.page, playground.box.locator(".skipmask-card")
    answered = "before => { const c = document.querySelector('.skipmask-card').innerText;"
    answered += " return c !== before && c.includes('this mask') && !c.includes('…'); }"
    page.wait(answered, "")
    before, picture = card.inner_text(), playground.picture()
    playground.toggle(12).click()  # the first feed-forward, without which hardly an answer is left
    playground.shows("skipped 1 of 24: FFN 12;", "against nothing skipped")
    page.wait(answered, before)
    rows = [row.split("\t") for row in card.inner_text().splitlines() if "\t" in row]
    assert [row[0] for row in rows][:2] == ["nothing skipped", "this mask"]
    assert rows[0][1] != rows[1][1]
    playground.draws_another_than(picture)
    shown = playground.box.locator(".skipmask-table").inner_text()
    for words in ("time per token", "FLOPs saved", "nothing skipped", "this mask"):
        assert words in shown
    page.screenshot(screenshots, "06_panel", page.cell_with(TOUCH))
    after = card.inner_text()
    playground.box.get_by_label("example").select_option(index=3)
    page.wait(answered, after)
    in_good_order(page)


def test_the_newest_click_wins(playground):
    for site in (1, 4, 15):
        playground.toggle(site).click()
    playground.shows("skipped 3 of 24: MHA 1, 4; FFN 15;")
    assert playground.mask() == (1, 4, 15)
    loss = float(playground.page.ask("panel.state.tried[(1, 4, 15)]['loss']"))
    playground.shows(f"loss {loss:.4f}")
    in_good_order(playground.page)


def test_undo_and_all_but_one(playground):
    playground.toggle(7).click()
    playground.shows("skipped 1 of 24: MHA 7;")
    playground.press("all but one")
    playground.shows("skipped 22 of 24")
    assert len(playground.mask()) == 22
    playground.press("undo")
    playground.shows("skipped 1 of 24: MHA 7;")
    playground.press("redo")
    playground.shows("skipped 22 of 24")
    in_good_order(playground.page)


def test_the_playgrounds_mask_is_a_mask_file(playground, lab):
    for site in (2, 20):
        playground.toggle(site).click()
    playground.shows("skipped 2 of 24: MHA 2; FFN 20;")
    playground.box.get_by_label("mask file").fill("mine.json")
    playground.press("save")
    playground.shows("saved to", "mine.json")
    record = read_mask(lab.root / "notebooks" / "mine.json")
    assert (record["skipped"], record["num_sites"], record["model"]) == ([2, 20], 24, "tiny")
    in_good_order(playground.page)
