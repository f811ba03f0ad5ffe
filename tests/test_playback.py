"""The play-back of a search: every frame holds what the history says, and the file needs nothing but itself."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from drawn import search_history, search_result

from eas_kit import figures, live
from eas_kit.figures import FigureError
from eas_kit.figures.playback import frame_places


def bars(figure):
    return [frame.data[-1] for frame in figure.frames]


def test_frames_equal_the_history():
    result = search_result(updates=12)
    figure = figures.search_playback(result)
    assert [frame.name for frame in figure.frames] == [str(update) for update in range(1, 13)]
    for record, bar in zip(result.history, bars(figure), strict=True):
        assert list(bar.x) == pytest.approx(record["preferences"], rel=1e-3)
        assert [site for site, text in enumerate(bar.text) if text] == record["skipped"]
        assert set(bar.text) == {"", "skip"}


def test_veil_covers_what_is_to_come_on_the_heatmap_and_the_curve():
    figure = figures.search_playback(search_history(updates=12))
    for frame in figure.frames:
        upper, lower = frame.data[:2]
        start = int(frame.name) + 0.5
        assert list(upper.x) == list(lower.x) == [start, 12.5, 12.5, start, start]
        assert list(upper.y) == [6.5, 6.5, -0.5, -0.5, 6.5]  # seven sites, from the bottom up
    veils = [trace for trace in figure.data if trace.name == "still to come"]
    assert [trace.xaxis for trace in veils] == ["x", "x2"]


def test_figure_shows_its_last_frame_before_it_is_moved():
    figure = figures.search_playback(search_history(updates=12))
    last = figure.frames[-1]
    assert list(figure.data[-1].x) == list(last.data[-1].x)
    assert last.traces == tuple(range(len(figure.data) - 3, len(figure.data)))
    assert figure.layout.sliders[0].active == 11


def test_slider_and_buttons_drive_the_frames():
    figure = figures.search_playback(search_history(updates=12))
    names = [frame.name for frame in figure.frames]
    assert [step.args[0] for step in figure.layout.sliders[0].steps] == [(name,) for name in names]
    play, pause = figure.layout.updatemenus[0].buttons
    assert (play.method, play.args[0]) == ("animate", None)
    assert (pause.method, pause.args[0]) == ("animate", (None,))


def test_long_searches_keep_to_fifty_light_frames():
    figure = figures.search_playback(search_history(sites=64, updates=400, k=16), site_kinds=("mha", "ffn"))
    names = [int(frame.name) for frame in figure.frames]
    assert (len(names), names[0], names[-1]) == (50, 1, 400)
    assert len(json.dumps(figure.to_plotly_json()["frames"])) < 150_000


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(1, 50, [0]), (3, 50, [0, 1, 2]), (5, 3, [0, 2, 4]), (100, 2, [0, 99]), (50, 50, list(range(50)))],
)
def test_places_of_the_frames(count, most, expected):
    assert frame_places(count, most) == expected


def test_preferences_alone_have_no_curve():
    figure = figures.search_playback([record["preferences"] for record in search_history()], num_skipped=2)
    assert "yaxis2" not in figure.layout
    assert [len(frame.data) for frame in figure.frames] == [2] * 11
    assert [sum(map(bool, bar.text)) for bar in bars(figure)] == [2] * 11


def test_output_holds_the_frames_only_where_someone_can_play_them():
    figure = figures.search_playback(search_history())
    watched, _ = live.figure_bundle(figure, live=True)
    static, _ = live.figure_bundle(figure, live=False)
    assert [frame["name"] for frame in watched[live.PLOTLY]["frames"]] == [str(update) for update in range(1, 12)]
    assert "frames" not in static[live.PLOTLY]


class Page(HTMLParser):
    """What the tags of a page ask for."""

    def __init__(self, text):
        super().__init__()
        self.links, self.policy = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.links += [values[name] for name in ("src", "href") if name in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]


def test_page_is_complete_in_itself(tmp_path):
    path = tmp_path / "search.html"
    history = search_history(updates=12)
    size = figures.save_playback(search_result(updates=12), path)
    assert size == path.stat().st_size
    assert 4_000_000 < size < 6_000_000
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.links == []
    assert page.policy.startswith("default-src 'none'; script-src 'unsafe-inline';")  # the browser sees to it
    said = json.loads(re.search(r"said = (\[.*?\]), line", text)[1])
    assert len(said) == 12
    for record, line in zip(history, said, strict=True):
        sites = ", ".join(map(str, record["skipped"]))
        assert line.startswith(f"Update {record['update']} of 12; lowest: MHA {sites}; mean reward 0.")
    assert [f'"name":"{update}"' in text for update in range(1, 13)] == [True] * 12


def test_page_beside_its_script(tmp_path):
    path = tmp_path / "search.html"
    assert figures.save_playback(search_history(), path, script="beside") < 60_000
    assert Page(path.read_text(encoding="utf-8")).links == ["plotly.min.js"]
    assert (tmp_path / "plotly.min.js").stat().st_size > 4_000_000


def test_titles_cannot_become_markup(tmp_path):
    path = tmp_path / "search.html"
    figures.save_playback(search_history(), path, script="beside", title="a </title><img src=x> b")
    assert Page(path.read_text(encoding="utf-8")).links == ["plotly.min.js"]


def test_display_saves_what_it_has_seen(tmp_path):
    shown = live.LivePreferenceHeatmap(title="Mine")
    for record in search_history()[:5]:
        shown(record)
    shown.save_html(tmp_path / "a.html", script="beside")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<title>Mine</title>" in text
    assert "Update 5 of 5" in text


def test_errors(tmp_path):
    with pytest.raises(FigureError, match="a search without updates has no preferences to draw"):
        figures.search_playback([])
    with pytest.raises(FigureError, match="at least 2 frames, its first and its last; max_frames is 1"):
        figures.search_playback(search_history(), max_frames=1)
    with pytest.raises(FigureError, match="script must be 'inline' or 'beside', got 'cdn'"):
        figures.save_playback(search_history(), tmp_path / "a.html", script="cdn")
    assert not list(tmp_path.iterdir())
