"""Live displays without a kernel and without a browser: what would be sent to the notebook is caught and read."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import plotly.graph_objects as go
import pytest
import toys
from drawn import SITES, search_history

import eas_kit as eas
from eas_kit import controls, live
from eas_kit import display as outputs
from eas_kit.errors import ConfigError

EVERY = {"min_interval": 0, "max_share": 1e9, "buttons": False}  # a frame an event, and nothing beside


@pytest.fixture
def sent(monkeypatch):
    """What goes to the notebook: (data, metadata, display_id, update)."""
    out = []
    monkeypatch.setattr(
        outputs,
        "emit",
        lambda data, metadata, display_id=None, update=False: out.append((data, metadata, display_id, update)),
    )
    monkeypatch.setattr(outputs, "in_kernel", lambda: True)
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
    monkeypatch.setattr(outputs, "in_kernel", lambda: True)
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
    with live.LivePreferenceHeatmap(**EVERY) as display:
        for event in events():
            display(event)
    kinds = [set(data) - {"text/plain"} for data, *_ in sent]
    assert kinds == [{"image/svg+xml"}] * 22 + [{live.PLOTLY}]
    assert len({display_id for _, _, display_id, _ in sent}) == 1
    assert [update for *_, update in sent] == [False] + [True] * 22
    frame = sent[-2][0]["image/svg+xml"]
    assert "search, step 22" in frame
    assert frame.count("◂ skip") == 3
    assert frame.count("h5.0v5.0h-5.0z") == 3 * 11  # the lowest of each update
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


class Clock:
    """Time that passes only when it is told to, and while a frame is drawn."""

    def __init__(self, monkeypatch, costs: float):
        self.now = 0.0
        monkeypatch.setattr(live.LiveFigure, "clock", staticmethod(lambda: self.now))
        original = live.LivePreferenceHeatmap.frame

        def frame(heatmap):
            self.now += costs
            return original(heatmap)

        monkeypatch.setattr(live.LivePreferenceHeatmap, "frame", frame)


def drawn_at(monkeypatch, costs, seconds=0.1, steps=100, **settings):
    """The steps after which a frame was drawn, and the display; steps take `seconds` each, a frame `costs`."""
    clock, frames = Clock(monkeypatch, costs), []
    shown = live.LivePreferenceHeatmap(buttons=False, **settings)
    for step in range(1, steps + 1):
        clock.now += seconds
        shown({"update": step, "step": step, "preferences": [0.0, 1.0], "skipped": [0]})
        frames += [step] * (shown.frames - len(frames))
    return frames, shown, clock


def test_throttle_leaves_seconds_between_frames(sent, watched, monkeypatch):
    frames, _, _ = drawn_at(monkeypatch, costs=0.0, seconds=0.125, steps=12, min_interval=0.5)
    assert frames == [1, 5, 9]


def test_throttle_keeps_drawing_to_its_share(sent, watched, monkeypatch):
    """The first frame comes at once; n frames of 0.1 s are 5 % of 2 n seconds, and so one a 1.9 s of steps."""
    frames, shown, clock = drawn_at(monkeypatch, costs=0.1, seconds=0.1)
    assert frames == [1, 40, 59, 78, 97]
    assert shown.drawing == pytest.approx(0.5)
    assert shown.drawing <= 0.05 * clock.now
    frames, shown, _ = drawn_at(monkeypatch, costs=0.1, seconds=0.1, max_share=0.25)
    assert len(frames) > 10


def test_time_on_hold_pays_for_no_frames(sent, watched, monkeypatch):
    clock = Clock(monkeypatch, 0.1)
    shown = live.LivePreferenceHeatmap(buttons=False)
    record = {"preferences": [0.0, 1.0], "skipped": [0]}
    shown({"update": 1, **record})
    shown.pause()

    def obey():
        clock.now += 3600
        shown.resume()

    monkeypatch.setattr(shown.control, "obey", obey)
    shown({"update": 2, **record})
    assert shown.frames == 2  # the first, and the state that it held at
    clock.now += 1
    shown({"update": 3, **record})
    assert shown.frames == 2
    assert shown.held == pytest.approx(3600.1)  # and that picture


def test_warm_up_shows_before_the_first_update(sent, watched):
    display = live.LivePreferenceHeatmap(**EVERY)
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
    display = live.LivePreferenceHeatmap(min_interval=1000, buttons=False)
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
    display = live.LivePreferenceHeatmap(site_kinds=("mha", "ffn"), num_updates=40, **EVERY)
    for record in search_history(sites=14):
        display(record)
    display.close()
    assert "update 1 to 11 of 40" in sent[-2][0]["image/svg+xml"]
    assert ">FFN</text>" in sent[-2][0]["image/svg+xml"]
    assert sent[-1][0][live.PLOTLY]["data"][1]["name"] == "FFN"


def test_live_loss(sent, watched):
    display = live.LiveLoss(**EVERY)
    for step in range(1, 6):
        display(SimpleNamespace(step=step, total_steps=5, loss=1 / step))
    display(SimpleNamespace(step=5, total_steps=5, loss=None, preferences=[0.0]))  # a search's update comes last
    assert display.finished
    assert "step 4 of 5" in sent[-2][0]["image/svg+xml"]
    final = sent[-1][0][live.PLOTLY]["data"][-1]
    assert final["y"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5], rel=1e-3)


def test_hold_and_stop_end_a_search_with_its_result(toy_task, sent, watched):
    """The buttons, as another thread presses them: hold after update 1, go on, stop after update 2."""
    steps, reached = [], threading.Event()

    class Watched(live.LivePreferenceHeatmap):
        def _say(self, words=""):
            super()._say(words)
            if words:
                assert words == f"Paused after step {self.step} of 9."
                reached.set()

    def press():
        assert reached.wait(60)
        before = len(steps)
        time.sleep(0.3)
        held.append(len(steps) == before)
        shown.resume()

    def note(event):
        steps.append(event.step)
        if event.kind == "update":
            {1: shown.pause, 2: shown.stop}[event.update]()

    held, other = [], threading.Thread(target=press)
    base = toys.make_llava(0)
    net = eas.attach(base, eas.EASConfig(skip_rank=4))
    config = eas.SearchConfig(
        num_skipped=2, warmup_steps=1, updates=4, train_steps_per_update=2, batch_size=4, reward_batch_size=4
    )
    other.start()
    with Watched(min_interval=0) as shown:
        result = eas.search(net, toy_task, config, callbacks=[note, shown])
    other.join()
    assert held == [True]
    assert result.interrupted
    assert [record["update"] for record in result.history] == [1, 2]
    assert result.preferences.tolist() == result.history[-1]["preferences"]
    assert len(result.skipped) == 2
    assert net.mask == result.skipped
    assert len(result.steps) == 5  # 1 of warm-up, 2 an update
    assert "(stopped at step 5 of 9)" in sent[-1][0]["text/plain"]
    assert not shown.control.stopping  # ready for another run


def test_interrupt_ends_a_hold(monkeypatch):
    """Also inside the training loop, whose own handler only notes the signal."""
    control = controls.RunControl()
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        control.pause()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            control.obey()
        assert control.stopping
        assert not control.paused  # a step's second event does not wait again
        assert signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, None)
    finally:
        signal.signal(signal.SIGINT, before)


def test_control():
    control = controls.RunControl()
    control.obey()
    control.stop()
    control.pause()  # too late
    assert control.stopping
    assert not control.paused
    with pytest.raises(KeyboardInterrupt):
        control.obey()
    control.reset()
    control.obey()


def press(button):
    """What the front end sends when a button is pressed."""
    button._handle_msg({"content": {"data": {"method": "custom", "content": {"event": "click"}}}, "buffers": []})


@pytest.fixture
def heatmap(sent, watched, monkeypatch):
    monkeypatch.setattr(controls, "buttons_work", lambda: True)
    return live.LivePreferenceHeatmap(min_interval=0, max_share=1e9)


def test_bar_asks_and_says(heatmap, sent):
    first, second, *rest = events(total=100)
    heatmap(first)
    heatmap(second)
    bar = heatmap.bar
    assert "application/vnd.jupyter.widget-view+json" in sent[0][0]
    assert sent[0][2] != sent[1][2]  # its own output, above the picture
    assert bar.box.children == (bar.pause, bar.stop, bar.words)
    press(bar.pause)
    assert heatmap.control.paused
    assert (bar.pause.description, bar.words.value) == ("Resume", "Pausing after this step ...")
    press(bar.pause)
    assert not heatmap.control.paused
    assert (bar.pause.description, bar.words.value) == ("Pause", "")
    press(bar.stop)
    assert bar.words.value == "Stopping after this step ..."
    assert bar.pause.disabled
    assert bar.stop.disabled
    with pytest.raises(KeyboardInterrupt):
        heatmap(rest[0])


def test_messages_of_the_bar_go_where_the_front_end_sends_them(heatmap):
    """A stand-in for ipykernel's comm: in a kernel, `comm` is one that routes."""
    widget = SimpleNamespace(comm=SimpleNamespace())
    controls.reach_at_once(widget, SimpleNamespace(comm=None))
    assert widget.comm._reply_subshell_for({"method": "custom"}, "a subshell") == "a subshell"


def test_where_clicks_do_not_arrive_the_bar_names_the_interrupt_button(sent, watched):
    heatmap = live.LivePreferenceHeatmap(min_interval=0)
    heatmap(next(events(total=100)))
    assert not controls.buttons_work()  # no kernel here
    assert heatmap.bar.box.children == (heatmap.bar.words,)
    assert heatmap.bar.words.value == controls.ADVICE


def test_buttons_work_with_subshells_only(monkeypatch):
    features = ["debugger", "kernel subshells"]
    shell = SimpleNamespace(kernel=SimpleNamespace(kernel_info={"supported_features": features}))
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    assert controls.buttons_work()
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5")
    assert not controls.buttons_work()
    monkeypatch.delenv("SERVER_SOFTWARE")
    features.remove("kernel subshells")
    assert not controls.buttons_work()


def test_slider_plays_back_what_was_shown(heatmap, sent):
    for event in events(total=22):
        heatmap(event)
    bar = heatmap.bar
    assert bar.box.children == (bar.play, bar.slider, bar.words)
    assert (bar.slider.min, bar.slider.max, bar.slider.value) == (1, 11, 11)
    final = sent[-1][0]
    assert live.PLOTLY in final
    for number in (4, 10):
        bar.slider.value = number
        svg = sent[-1][0]["image/svg+xml"]
        assert f"update {number}</text>" in svg
        assert f"update 1 to {number} of 11" in svg
        rows = [float(y) for y in re.findall(r'y="([0-9.]+)"[^>]*>◂ skip', svg)]
        assert [round((y - 46) / 24 - 0.5) for y in rows] == search_history()[number - 1]["skipped"]
    bar.slider.value = 11
    assert sent[-1][0] == final


def test_short_and_empty_searches_have_no_slider(heatmap, sent):
    heatmap(next(events(total=100)))
    heatmap.close()
    assert heatmap.bar is None
    assert {"text/plain": ""} in [data for data, *_ in sent]


def test_headless_is_one_small_picture_and_no_widgets(sent):
    from ipywidgets import Widget

    made = []
    Widget.on_widget_constructed(made.append)
    shown = live.LivePreferenceHeatmap(("mha", "ffn"))
    for record in search_history(sites=64, updates=400, k=16):
        shown(record)
    shown.close()
    Widget.on_widget_constructed(None)
    assert shown.bar is None
    assert not made
    assert len(sent) == 1
    assert len(json.dumps(sent[0][0]["image/png"])) < 100_000


def loaded(imports: str) -> str:
    heavy = ("plotly", "matplotlib", "ipywidgets", "IPython", "torch")
    code = f"import sys, {imports}; print([name for name in {heavy} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_imports_are_lazy():
    assert loaded("eas_kit") == "[]"
    assert loaded("eas_kit.figures, eas_kit.live") == "[]"
