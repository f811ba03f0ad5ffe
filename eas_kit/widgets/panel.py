"""The skip-mask panel as a widget: a view of `SkipMaskState` that evaluates in the background."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import RLock
from typing import Any

import ipywidgets
import numpy as np
import traitlets

from ..figures import figure_png
from ..figures.preferences import blocks
from ..figures.style import kind_look, listed
from . import parts
from .state import Evaluate, SkipMaskState, Stop, words_of
from .worker import LatestWorker

CHOICES = 48  # examples to choose from: more make a list that nobody reads
NUMBERS = itertools.count()  # of the panels on a page, whose styles must not mix


class SkipMaskWidget(ipywidgets.VBox):
    """The panel. `mask` (sorted tuple of zero-based sites) and `loss` (None while unknown) are traits to observe.

    All of it works by keyboard: Tab moves between the controls, Space or Enter presses, arrows move the slider and the
    choices. `set_mask` changes many toggles with one evaluation. Evaluations run in a thread, one at a time, the newest
    first; what is shown is always of the mask that is shown. `wait()` waits for them, `close()` ends them.

    Args: those of `SkipMaskState`, and
        answers: what answers questions under a mask, a `Playground` or an object with its `answer(mask, i)`,
            `right(i, text)`, `question(i)`, `wanted(i)`, `image(i)` and length. None: no example is shown.
        example: the number of the example at the start.
    """

    mask = traitlets.Tuple()
    loss = traitlets.Float(allow_none=True, default_value=None)

    def __init__(
        self,
        preferences: Any,
        evaluate: Evaluate | None = None,
        *,
        answers: Any = None,
        example: int = 0,
        **arguments: Any,
    ) -> None:
        state = SkipMaskState(preferences, evaluate, **arguments)
        self.state, self.answers = state, answers
        self.worker = LatestWorker(self._failed)
        self._lock, self._quiet, self._turn = RLock(), False, 0
        self._said: dict[tuple[tuple[int, ...], int], tuple[str, bool | None]] = {}  # (mask, example) -> text, right
        self._name = f"skipmask-{next(NUMBERS)}"
        self._style = ipywidgets.HTML(layout={"display": "none"})
        self._make_sites()
        self._make_controls()
        self._make_reports(example)
        self._react()
        wide = {"flex_flow": "row wrap", "align_items": "flex-start"}
        choosing = [self.by] if len(state.rankings) > 1 else []
        choosing += [self.of] if len(self._kinds) > 1 else []
        super().__init__(
            [
                self._style,
                ipywidgets.HBox([self.k, *choosing], layout=wide),
                ipywidgets.HBox(self._buttons, layout=wide),
                self.sites,
                self._meaning,
                self.status,
                self.table,
                ipywidgets.HBox([*([self.card_box] if answers is not None else []), self.picture], layout=wide),
                ipywidgets.HBox([self.path, self.save_button, self.load_button, self.file_status], layout=wide),
            ]
        )
        self.add_class("skipmask")
        self.add_class(self._name)
        self._colour()
        self.set_mask(state.mask)

    # -- parts -------------------------------------------------------------------
    def _make_sites(self) -> None:
        state = self.state
        rows = blocks(state.kinds)
        longest = max(stop - first for _, first, stop in rows)
        self._kinds = list(dict.fromkeys(state.kinds))
        self.toggles = [self._toggle(site) for site in range(state.num_sites)]
        self._values, lines = {}, []
        thin = {"height": "16px", "margin": "0"}
        for begin, end in parts.lines_of(longest):
            layers = ipywidgets.HTML(parts.cells(range(begin, end), 11), layout=thin)
            lines.append(self._line("layer", layers, thin=True))
            for name, first, stop in rows:
                here = first + begin, min(first + end, stop)
                if here[0] < here[1]:
                    row = self._line(name, *self.toggles[slice(*here)])
                    row.add_class(f"skipmask-{name.lower().replace(' ', '-')}")
                    self._values[here] = ipywidgets.HTML(layout=thin)
                    lines += [row, self._line("", self._values[here], thin=True)]
        # one box that scrolls where the page is narrow: the rows then stay above each other, layer by layer
        self.sites = ipywidgets.VBox(lines, layout={"overflow": "auto", "max_width": "100%"})
        self.sites.add_class("skipmask-sites")
        self._meaning = ipywidgets.HTML()

    def _toggle(self, site: int) -> ipywidgets.ToggleButton:
        width = f"{parts.TOGGLE}px"
        toggle = ipywidgets.ToggleButton(
            description=str(site),
            layout={"width": width, "min_width": width, "padding": "0", "margin": "2px 1px 0 1px"},
        )
        toggle.add_class("skipmask-site")
        toggle.add_class(f"skipmask-site-{site}")
        return toggle

    @staticmethod
    def _line(name: str, *rest: ipywidgets.Widget, thin: bool = False) -> ipywidgets.HBox:
        size = {"width": "44px", "min_width": "44px", "margin": "0 4px 0 0", "height": "16px" if thin else "28px"}
        small = f'<div style="font-size:11px;line-height:12px;color:{parts.GREY}">{name}</div>'
        label = ipywidgets.HTML(small, layout=size) if thin else ipywidgets.Label(name, layout=size)
        whole = {"flex_flow": "row nowrap", "align_items": "center", "overflow": "visible", "flex": "0 0 auto"}
        return ipywidgets.HBox([label, *rest], layout=whole)

    def _make_controls(self) -> None:
        state = self.state
        wide = {"description_width": "initial"}
        self.k = ipywidgets.IntSlider(
            0,
            0,
            state.num_sites,
            description="k: sites to skip",
            continuous_update=False,
            style=wide,
            layout={"width": "360px"},
        )
        self.by = ipywidgets.Dropdown(
            options=list(state.rankings), description="preferences by", style=wide, layout={"width": "270px"}
        )
        names = [f"{kind_look(kind)[2]} only" for kind in self._kinds]
        self.of = ipywidgets.Dropdown(
            options=["all sites", *names], description="presets for", style=wide, layout={"width": "190px"}
        )
        tips = {
            "k lowest": "skip the k sites of lowest preference",
            "random k": "skip k sites drawn at random; press again for others",
            "none": "skip nothing",
            "all but one": "of every kind, skip all sites but the one of highest preference",
            "undo": "back to the mask before",
            "redo": "take an undo back",
        }
        self._buttons = [ipywidgets.Button(description=n, tooltip=t, layout={"width": "92px"}) for n, t in tips.items()]
        self.k_lowest_button, self.random_button, self.none_button, self.all_but_one_button = self._buttons[:4]
        self.undo_button, self.redo_button = self._buttons[4:]
        self.path = ipywidgets.Text("mask.json", description="mask file", layout={"width": "320px"}, style=wide)
        self.save_button = ipywidgets.Button(
            description="save", tooltip="write the mask to this file", layout={"width": "70px"}
        )
        self.load_button = ipywidgets.Button(
            description="load", tooltip="read the mask from this file", layout={"width": "70px"}
        )
        self.file_status = ipywidgets.HTML()

    def _make_reports(self, example: int) -> None:
        self.status, self.table, self.card = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.status.add_class("skipmask-status")
        self.table.add_class("skipmask-table")
        self.card.add_class("skipmask-card")
        self.picture = ipywidgets.Image(format="png", layout={"width": "430px"})
        self.picture.add_class("skipmask-picture")
        if self.state.evaluate is None:
            self.picture.layout.display = "none"
        count = min(CHOICES, len(self.answers)) if self.answers is not None else 0
        options = [(f"{i}: {_first_words(self.answers.question(i))}", i) for i in range(count)]
        self.example = ipywidgets.Dropdown(
            options=options,
            value=min(example, count - 1) if count else None,
            description="example",
            style={"description_width": "initial"},
            layout={"width": "370px"},
        )
        self.card_box = ipywidgets.VBox(
            [self.example, self.card], layout={"flex": "1 1 380px", "max_width": "640px", "margin": "0 20px 0 0"}
        )

    def _react(self) -> None:
        for toggle in self.toggles:
            toggle.observe(self._toggled, "value")
        self.k.observe(lambda change: None if self._quiet else self.set_k_lowest(change["new"]), "value")
        self.by.observe(lambda change: self._rank(change["new"]), "value")
        self.example.observe(lambda _: self._refresh(), "value")
        self.k_lowest_button.on_click(lambda _: self.set_k_lowest(self.k.value))
        self.random_button.on_click(lambda _: self.set_random(self.k.value or 1))
        self.none_button.on_click(lambda _: self.set_mask(()))
        self.all_but_one_button.on_click(
            lambda _: self.set_mask(self.state.all_but_one(self.preset_kind), "all but one")
        )
        self.undo_button.on_click(lambda _: self.undo())
        self.redo_button.on_click(lambda _: self.redo())
        self.save_button.on_click(lambda _: self._file("saved to", self.save))
        self.load_button.on_click(lambda _: self._file("loaded from", self.load))

    @property
    def preset_kind(self) -> str | None:
        """The kind that the presets are for; None: all of them."""
        return [None, *self._kinds][self.of.index or 0]

    # -- actions -----------------------------------------------------------------
    def set_mask(self, mask: Iterable[int], made_by: str = "user") -> None:
        """Skips exactly these sites: one evaluation, one change of `mask`. Raises ConfigError if they do not fit."""
        with self._lock:
            self.state.set_mask(mask, made_by)
            self._show_mask()

    def set_k_lowest(self, k: int) -> None:
        """Of the sites that the presets are for, the k of lowest preference."""
        self.set_mask(self.state.k_lowest(k, self.preset_kind), made_by="k lowest")

    def set_random(self, k: int) -> None:
        """Of the sites that the presets are for, k at random."""
        self.set_mask(self.state.random(k, self.preset_kind), made_by="random")

    def undo(self) -> None:
        """Back to the mask before; `redo` takes that back."""
        with self._lock:
            self.state.undo()
            self._show_mask()

    def redo(self) -> None:
        with self._lock:
            self.state.redo()
            self._show_mask()

    def save(self, path: str | Path) -> None:
        self.state.save(path)

    def load(self, path: str | Path) -> None:
        """Raises ConfigError for a file that is missing, broken or of other sites; nothing is changed then."""
        with self._lock:
            self.state.load(path)
            self._show_mask()

    def wait(self, timeout: float | None = None) -> bool:
        """Until all that was asked for is shown, or for `timeout` seconds; True if it is shown."""
        return self.worker.wait(timeout)

    def close(self) -> None:
        """Ends the evaluations and takes the panel off the page."""
        self.worker.close()
        super().close()

    # -- reactions ---------------------------------------------------------------
    def _toggled(self, _change: Any) -> None:
        if not self._quiet:
            self.set_mask([site for site, toggle in enumerate(self.toggles) if toggle.value])

    def _show_mask(self) -> None:
        state = self.state
        self._quiet = True  # the toggles and the slider follow; they must not each evaluate
        try:
            for site, toggle in enumerate(self.toggles):
                toggle.value = site in state.mask
                toggle.icon = "times" if toggle.value else ""  # a cross besides the pressed look: never colour alone
            self.k.value = len(state.mask)
        finally:
            self._quiet = False
        self.undo_button.disabled, self.redo_button.disabled = not state.can_undo, not state.can_redo
        self._refresh()

    def _rank(self, by: str) -> None:
        with self._lock:
            self.state.by = by
            self._colour()

    def _colour(self) -> None:
        state = self.state
        self._style.value = parts.style_sheet(state.preferences, self._name)
        for (first, stop), row in self._values.items():
            row.value = parts.cells([parts.short(v) for v in state.preferences[first:stop]])
        for site, toggle in enumerate(self.toggles):
            kind, value = state.kinds[site], state.preferences[site]
            name, layer = kind_look(kind)[2], site - state.kinds.index(kind)
            known = f"preference {value:.3g}" if np.isfinite(value) else "preference unknown"
            toggle.tooltip = f"skip site {site}: {name} of layer {layer}, {known}"
        by = f" ({state.by})" if len(state.rankings) > 1 else ""
        self._meaning.value = (
            f'<span style="font-size:12px">Below a site: its preference{by}. Orange: among the lowest, skipped'
            " first; blue: among the highest. Cross and dark frame: skipped.</span>"
        )

    # -- evaluations -------------------------------------------------------------
    def _refresh(self) -> None:
        with self._lock:
            self._turn += 1
            state, turn, mask, example = self.state, self._turn, self.state.mask, self.example.value
            state.error, state.result = "", state.tried.get(mask)
            if state.evaluate is not None and state.result is None:
                self.status.value = parts.say(f"skipped {listed(mask)}: evaluating …", parts.GREY)
            else:
                self.status.value = parts.say(state.status())
            self.table.value = parts.numbers_table(state.tried.get(()), state.result)
            self._show_example(mask, example)
            with self.hold_trait_notifications():
                self.mask, self.loss = mask, (state.result or {}).get("loss")
        if state.evaluate is not None or self.answers is not None:
            self.worker.submit(lambda stop: self._work(turn, mask, example, stop))

    def _work(self, turn: int, mask: tuple[int, ...], example: int | None, stop: Stop) -> None:
        """In the worker's thread: everything that there is to know of the mask, each part shown as it comes."""
        state = self.state
        try:
            for one in () if state.evaluate is None else ((), mask):
                if state.numbers_of(one, stop) is None or stop():
                    return
            self._show(turn, lambda: self._show_numbers(mask))
            for one in () if example is None else ((), mask):
                if (one, example) not in self._said:
                    text = self.answers.answer(one, example)
                    self._said[one, example] = text, self.answers.right(example, text)
                self._show(turn, lambda: self._show_example(mask, example))
                if stop():
                    return
            if state.evaluate is not None:
                with self._lock:
                    figure = state.figure()
                drawn = figure_png(figure, scale=1.25)
                self._show(turn, lambda: self.picture.set_trait("value", drawn))
        except Exception as error:  # whatever the model raises belongs on the panel, not in the browser's log
            words = words_of(error)
            self._show(turn, lambda: self._show_error(words))

    def _show(self, turn: int, action: Callable[[], Any]) -> None:
        """Only if nothing newer was asked for since."""
        with self._lock:
            if turn == self._turn and not self.worker.closed:
                action()

    def _show_numbers(self, mask: tuple[int, ...]) -> None:
        state = self.state
        state.result = state.tried[mask] if state.evaluate is not None else None
        self.status.value = parts.say(state.status())
        self.table.value = parts.numbers_table(state.tried.get(()), state.result)
        self.loss = (state.result or {}).get("loss")

    def _show_example(self, mask: tuple[int, ...], example: int | None) -> None:
        if example is None:
            return
        answers = {"nothing skipped": self._said.get(((), example)), "this mask": self._said.get((mask, example))}
        source = self.answers
        try:
            about = source.image(example), source.question(example), source.wanted(example)
        except Exception as error:  # a picture that cannot be opened
            self.card.value = parts.say(words_of(error), parts.WRONG)
            return
        self.card.value = parts.example_card(*about, answers)

    def _show_error(self, words: str) -> None:
        self.state.error = words
        self.status.value = parts.say(self.state.status(), parts.WRONG)

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self._show_error(words_of(error))

    def _file(self, done: str, action: Callable[[str], None]) -> None:
        try:
            action(self.path.value)
            self.file_status.value = parts.say(f"{done} {Path(self.path.value).resolve()}")
        except Exception as error:
            self.file_status.value = parts.say(words_of(error), parts.WRONG)


def _first_words(text: str, letters: int = 46) -> str:
    text = " ".join(text.split())
    return text if len(text) <= letters else text[: letters - 2].rstrip() + " …"
