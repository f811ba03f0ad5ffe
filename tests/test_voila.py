"""Notebook 06 as an app: voila serves the panel and the figures without code, by the README's own command."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from lab import BADGE, RUN, STEP, Browser, copy_notebook, served, voila

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(bool(voila()), reason=voila() or "-")]

# voila's pages are made for JupyterLab 4.2 and ask a CDN for an icon font; plotly's renderer then finds no place to
# keep a picture of what it has drawn. Nothing of that is missed on the page.
HARMLESS = re.compile(r"setData is not a function|net::ERR|Failed to load resource")


def command(folder: Path) -> list[str]:
    """The README's, on a copy of the notebook with small parameters."""
    (line,) = re.findall(r"^voila .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    _, notebook, *options = shlex.split(line)
    name = Path(notebook).stem
    small = {"scorers": ["single_ablation"], "trials": 1, "examples": 24, "score_limit": 8}
    copy_notebook(name, folder / f"{name}.ipynb", small)
    return [sys.executable, "-m", "voila", str(folder / f"{name}.ipynb"), *options, "--no-browser"]


def test_the_playground_as_an_app(tmp_path, screenshots):
    problems, outside = [], set()

    def refuse(route):
        outside.add(route.request.url)
        route.fulfill(status=200, content_type="image/svg+xml" if route.request.url == BADGE else "text/css", body="")

    with served(command(tmp_path), tmp_path / "voila.log") as address, Browser() as browser:
        page = browser.page()
        page.set_default_timeout(STEP * 1000)
        page.on("pageerror", lambda error: HARMLESS.search(str(error)) or problems.append(str(error)))
        page.on("console", lambda m: m.type == "error" and not HARMLESS.search(m.text) and problems.append(m.text))
        page.route(lambda url: not url.startswith((address, "data:", "blob:")), refuse)
        page.goto(address, timeout=1000 * RUN)  # voila answers when the cells have run
        panel = page.locator(".skipmask")
        panel.wait_for(timeout=1000 * RUN)
        page.get_by_text("What we saw").wait_for(timeout=1000 * RUN)
        assert "import eas_kit" not in page.inner_text("body"), "no code"
        assert page.get_by_text("not answered yet").count() == page.get_by_text("previous:").count() == 0

        figure = page.locator(".js-plotly-plot").first
        figure.locator(".main-svg").first.wait_for()
        page.set_viewport_size({"width": 1920, "height": 1080})
        page.wait_for_function("() => innerWidth === 1920")
        assert figure.bounding_box()["height"] > 200, "a figure stays when the window changes"

        panel.locator(".skipmask-site-12").click()
        says = "words => document.querySelector('.skipmask').innerText.includes(words)"
        page.wait_for_function(says, arg="skipped 1 of 24: FFN 12; loss")
        for width in (1920, 1280):
            page.set_viewport_size({"width": width, "height": width * 9 // 16 + 180})
            panel.scroll_into_view_if_needed()
            page.screenshot(path=screenshots / f"06_voila_{width}.png")
    assert problems == []
    assert {url for url in outside if "fontawesome" not in url} <= {BADGE}
