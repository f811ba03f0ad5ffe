"""Live displays without a kernel and without a browser: what would be sent to the notebook is caught and read."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import plotly.graph_objects as go
import pytest
from drawn import SITES, search_history

from eas_kit import live
from eas_kit.errors import ConfigError


@pytest.fixture
def sent(monkeypatch):
    """What goes to the notebook: (data, metadata, display_id, update)."""
    out = []
    monkeypatch.setattr(
        live,
        "_display",
        lambda data, metadata, display_id=None, update=False: out.append((data, metadata, display_id, update)),
    )
    monkeypatch.setattr(live, "in_kernel", lambda: True)
    return out


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setenv(live.OVERRIDE, "live")


@pytest.fixture(autouse=True)
def unwatched(monkeypatch):
    for name in (live.OVERRIDE, "JPY_SESSION_NAME", "VSCODE_PID", "SERVER_SOFTWARE"):
        monkeypatch.delenv(name, raising=False)


def events(total=None):
    """As `eas_kit.search` sends them: a training step, then an update."""
    for record in search_history():
        step = record["update"] * 2
        yield SimpleNamespace(
            kind="step", phase="search", step=step, total_steps=total, loss=1.0 / step, preferences=None
        )
        yield SimpleNamespace(kind="update", phase="search", step=step, total_steps=total, loss=None, **record)


def test_who_watches(monkeypatch):
    assert not live.live_session()
    monkeypatch.setattr(live, "in_kernel", lambda: True)
    assert not live.live_session()
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert live.live_session()
    monkeypatch.setenv(live.OVERRIDE, "static")
    assert not live.live_session()
    monkeypatch.setenv(live.OVERRIDE, "sometimes")
    with pytest.raises(ConfigError, match=r"'live', 'static' or 'auto' \(or unset\); it is 'sometimes'"):
        live.live_session()


def test_show_adds_the_picture_only_where_nobody_watches(sent, monkeypatch):
    fig = go.Figure(go.Scatter(x=[1], y=[2]), layout={"title": {"text": "<b>A point</b>"}})
    live.show(fig)
    monkeypatch.setenv(live.OVERRIDE, "live")
    live.show(fig)
    (static, metadata, *_), (watched, *_) = sent
    assert set(static) == {live.PLOTLY, "image/png", "text/plain"}
    assert metadata["image/png"]["alt"] == "A point"
    assert set(watched) == {live.PLOTLY, "text/plain"}
    assert static["text/plain"] == "<figure: A point>"
    assert static[live.PLOTLY]["data"][0]["y"] == [2]


def test_show_in_a_script_prints_the_title(capsys):
    live.show(go.Figure(layout={"title": {"text": "Nothing"}}))
    assert capsys.readouterr().out == "<figure: Nothing>\n"


def test_frames_are_svg_in_one_output_and_the_end_is_plotly(sent, watched):
    with live.LivePreferenceHeatmap(min_interval=0) as display:
        for event in events():
            display(event)
    kinds = [set(data) - {"text/plain"} for data, *_ in sent]
    assert kinds == [{"image/svg+xml"}] * 22 + [{live.PLOTLY}]
    assert len({display_id for _, _, display_id, _ in sent}) == 1
    assert [update for *_, update in sent] == [False] + [True] * 22
    frame = sent[-2][0]["image/svg+xml"]
    assert "search, step 22" in frame
    assert frame.count("◂ skip") == 3
    assert all(f">{site}</text>" in frame for site in range(SITES))
    assert len(frame) < 20_000


def test_final_figure_holds_the_last_state(sent):
    with live.LivePreferenceHeatmap() as display:
        for event in events():
            display(event)
    assert len(sent) == 1  # nobody watches: no frames
    data = sent[0][0]
    assert set(data) == {live.PLOTLY, "image/png", "text/plain"}
    z = data[live.PLOTLY]["data"][0]["z"]
    assert [row[-1] for row in z] == pytest.approx(search_history()[-1]["preferences"], rel=1e-3)
    assert len(json.dumps(data)) < 80_000


def test_throttle(sent, watched):
    display = live.LivePreferenceHeatmap(min_interval=1000)
    for event in events():
        display(event)
    display.close()
    assert display.frames == 1
    assert len(sent) == 2


def test_warm_up_shows_before_the_first_update(sent, watched):
    display = live.LivePreferenceHeatmap(min_interval=0)
    display({"kind": "step", "phase": "warmup", "step": 3, "total_steps": 50})
    assert "warmup, step 3 of 50" in sent[0][0]["image/svg+xml"]


def test_closes_itself_at_the_last_step(sent):
    display = live.LivePreferenceHeatmap()
    for event in events(total=22):
        display(event)
    assert display.finished
    assert len(sent) == 1
    assert "(" not in sent[0][0]["text/plain"]
    display.close()
    assert len(sent) == 1


def test_a_plotly_output_is_never_followed_by_another(sent, watched):
    """JupyterLab would keep the first."""
    display = live.LivePreferenceHeatmap(min_interval=1000)
    for event in events():
        display(event)
    display.close()
    display({"update": 12, "step": 24, "preferences": [0.0] * SITES, "skipped": [0]})
    display.close()
    kinds = [live.PLOTLY in data for data, *_ in sent]
    assert kinds == [False, True, False, True]


def test_stopped_early_says_so(sent):
    with live.LivePreferenceHeatmap() as display:  # the search itself swallows the interrupt and returns
        for event in list(events(total=100))[:6]:
            display(event)
    assert "(stopped at step 6 of 100)" in sent[0][0]["text/plain"]


def test_an_exception_draws_and_goes_on(sent):
    with pytest.raises(KeyboardInterrupt), live.LivePreferenceHeatmap() as display:
        display(next(e for e in events() if e.kind == "update"))
        raise KeyboardInterrupt
    assert "(stopped)" in sent[0][0]["text/plain"]


def test_nothing_recorded(sent):
    live.LivePreferenceHeatmap().close()
    assert sent[0][0] == {"text/plain": "<live figure: nothing recorded>"}


def test_two_kinds_and_a_known_number_of_updates(sent, watched):
    display = live.LivePreferenceHeatmap(site_kinds=("mha", "ffn"), num_updates=40, min_interval=0)
    for record in search_history(sites=14):
        display(record)
    display.close()
    assert "update 1 to 11 of 40" in sent[-2][0]["image/svg+xml"]
    assert ">FFN</text>" in sent[-2][0]["image/svg+xml"]
    assert sent[-1][0][live.PLOTLY]["data"][1]["name"] == "FFN"


def test_live_loss(sent, watched):
    display = live.LiveLoss(min_interval=0)
    for step in range(1, 6):
        display(SimpleNamespace(step=step, total_steps=5, loss=1 / step))
    display(SimpleNamespace(step=5, total_steps=5, loss=None, preferences=[0.0]))  # a search's update comes last
    assert display.finished
    assert "step 4 of 5" in sent[-2][0]["image/svg+xml"]
    final = sent[-1][0][live.PLOTLY]["data"][-1]
    assert final["y"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5], rel=1e-3)


def loaded(imports: str) -> str:
    heavy = ("plotly", "matplotlib", "ipywidgets", "IPython", "torch")
    code = f"import sys, {imports}; print([name for name in {heavy} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_imports_are_lazy():
    assert loaded("eas_kit") == "[]"
    assert loaded("eas_kit.figures, eas_kit.live") == "[]"
