"""A panel to try skip masks by hand: a toggle a site, coloured by preference, and the loss of each mask tried.

`SkipMaskState` is the whole logic, in plain Python: the mask, the presets, the evaluations. `SkipMaskWidget` is a view
of it. `show_skip_mask` shows the widget where a person watches and a static picture of the same state where not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import traitlets

from .figures import figure_png, preference_heatmap
from .figures.frames import colours
from .figures.preferences import blocks, colour_limit, written
from .figures.style import BLUE, GREY, axis, field, listed, lowest, new_figure, note, numbers, padded, site_kinds_of
from .live import live_session, show
from .masks import check_mask, load_mask, save_mask

Evaluate = Callable[[tuple[int, ...]], Any]
WRONG = "#A33C00"


class SkipMaskState:
    """Which sites are skipped, and what that costs.

    Args:
        preferences: (L,), one number a site, lowest skipped first. Zeros if nothing is known yet.
        evaluate: called with a mask, the sorted tuple of skipped sites; returns the loss, or a dict with "loss" and
            more numbers to show. Called once a mask; the result is kept. None: no losses.
        site_kinds: as in `figures.preference_heatmap`.
        mask: skipped at the start.
        seed: of the random preset.
        model: its name, for the mask's file.

    Attributes: `mask`; `result`, a dict with "loss", None if there is none; `error`, the words of what evaluate
    raised, else ""; `tried`, mask -> result in the order of trying; `seconds`, what the last evaluation took.
    """

    def __init__(
        self,
        preferences: Any,
        evaluate: Evaluate | None = None,
        *,
        site_kinds: Any = None,
        mask: Iterable[int] = (),
        seed: int = 0,
        model: str | None = None,
    ) -> None:
        site_kinds = site_kinds or field(preferences, "kinds")  # a search result says it itself
        preferences = field(preferences, "preferences", default=preferences)
        self.preferences = np.asarray(preferences, float).ravel()
        self.num_sites, self.evaluate, self.model = len(self.preferences), evaluate, model
        self.kinds = site_kinds_of(site_kinds, self.num_sites)
        self.rng = np.random.default_rng(seed)
        self.tried: dict[tuple[int, ...], dict[str, float]] = {}
        self.result: dict[str, float] | None = None
        self.error, self.seconds, self.made_by = "", 0.0, "user"
        self.mask = check_mask(mask, self.num_sites)

    def set_mask(self, mask: Iterable[int], made_by: str = "user") -> None:
        """Raises ConfigError for a mask that does not fit; nothing is changed then."""
        self.mask, self.made_by = check_mask(mask, self.num_sites), made_by

    def refresh(self) -> None:
        """Evaluates the mask, and at first nothing skipped, to compare with; each once.

        What goes wrong is kept in `error`, never raised, so that a panel can show it.
        """
        self.error, self.result = "", None
        began = time.perf_counter()
        try:
            for mask in ((), self.mask) if self.evaluate else ():
                if mask not in self.tried:
                    self.tried[mask] = self._numbers(self.evaluate(mask))
            self.result = self.tried.get(self.mask)
        except Exception as error:  # whatever the model raises belongs on the panel, not in the browser's log
            self.error = f"{type(error).__name__}: {error}"
        self.seconds = time.perf_counter() - began

    @staticmethod
    def _numbers(value: Any) -> dict[str, float]:
        values = value if isinstance(value, dict) else {"loss": value}
        shown = {str(name): v for name, v in values.items() if np.ndim(v) == 0 and not isinstance(v, str)}
        return {name: v if isinstance(v, int) else float(v) for name, v in shown.items()}

    def k_lowest(self, k: int) -> list[int]:
        return lowest(self.preferences, k)

    def random(self, k: int) -> list[int]:
        return sorted(self.rng.choice(self.num_sites, k, replace=False).tolist())

    def status(self) -> str:
        """One line: the mask and its numbers, or the error."""
        text = f"skipped {len(self.mask)} of {self.num_sites}: {written(self.mask, self.kinds)}"
        if self.error:
            return f"{text}. Not evaluated: {self.error}"
        if self.result:
            text += "; " + ", ".join(
                f"{n} {v if isinstance(v, int) else format(v, '.4f')}" for n, v in self.result.items()
            )
        dense = self.tried.get(())
        if self.mask and self.result and dense and "loss" in dense and "loss" in self.result:
            text += f" ({self.result['loss'] - dense['loss']:+.4f} against nothing skipped)"
        return text.replace("-", "−")

    def save(self, path: str | Path) -> None:
        kind = "+".join(dict.fromkeys(self.kinds))
        save_mask(path, self.mask, num_sites=self.num_sites, kind=kind, model=self.model, made_by=self.made_by)

    def load(self, path: str | Path) -> None:
        """Raises ConfigError if the file is missing, broken, or of another number of sites."""
        self.set_mask(load_mask(path, num_sites=self.num_sites), made_by="file")

    def figure(self) -> Any:
        """The masks tried: loss against number of skipped sites, the present one marked."""
        known = {mask: result["loss"] for mask, result in self.tried.items() if "loss" in result}
        fig = new_figure(
            "Masks tried: loss by number of skipped sites",
            "filled: the mask shown; dashed: nothing skipped",
            height=250,
            width=560,
        )
        if known:
            here = [mask == self.mask for mask in known]
            fig.add_scatter(
                x=[len(mask) for mask in known],
                y=numbers(list(known.values())),
                mode="markers",
                name="masks",
                marker={
                    "symbol": ["circle" if now else "circle-open" for now in here],
                    "color": [BLUE if now else GREY for now in here],
                    "size": 9,
                },
                customdata=[listed(mask) for mask in known],
                hovertemplate="skipped %{customdata}<br>loss %{y}<extra></extra>",
            )
            if () in known:
                line = {"color": GREY, "width": 1.2, "dash": "dash"}
                fig.add_shape(type="line", xref="x domain", x0=0, x1=1, y0=known[()], y1=known[()], line=line)
            if self.mask in known:
                here_loss = known[self.mask]
                note(fig, f"{here_loss:.3f}", len(self.mask), here_loss, colour=BLUE, xshift=9)
        most = max([len(mask) for mask in known], default=0) + 1
        fig.update_layout(
            xaxis=axis("skipped sites", range=[-0.5, most + 0.5], dtick=1 if most < 13 else 4, showgrid=False),
            yaxis=axis("loss", range=padded(known.values(), 0.15, 0.15), nticks=5),
        )
        return fig


class SkipMaskWidget(ipywidgets.VBox):
    """The panel. `mask` (sorted tuple of zero-based sites) and `loss` (None if unknown) are traits to observe.

    All of it works by keyboard: Tab moves between the controls, Space or Enter presses, arrows move the slider.
    `set_mask` changes many toggles with one evaluation. The arguments are those of `SkipMaskState`.
    """

    mask = traitlets.Tuple()
    loss = traitlets.Float(allow_none=True, default_value=None)

    def __init__(self, preferences: Any, evaluate: Evaluate | None = None, **arguments: Any) -> None:
        state = SkipMaskState(preferences, evaluate, **arguments)
        self.state, self._quiet = state, False
        self.toggles = [self._toggle(site) for site in range(state.num_sites)]
        rows = [self._row(name, self.toggles[first:stop]) for name, first, stop in blocks(state.kinds)]
        self.k = ipywidgets.IntSlider(0, 0, state.num_sites, description="k", continuous_update=False)
        buttons = {}
        for name, tip in {
            "k lowest": "skip the k sites of lowest preference",
            "random k": "skip k sites drawn at random; press again for others",
            "none": "skip nothing",
        }.items():
            buttons[name] = ipywidgets.Button(description=name, tooltip=tip, layout={"width": "90px"})
        self.k_lowest_button, self.random_button, self.none_button = buttons.values()
        self.path = ipywidgets.Text("mask.json", description="file", layout={"width": "260px"})
        self.save_button = ipywidgets.Button(description="save", layout={"width": "70px"})
        self.load_button = ipywidgets.Button(description="load", layout={"width": "70px"})
        self.status = ipywidgets.HTML()
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "560px"})
        self.status.add_class("skipmask-status")
        self.picture.add_class("skipmask-picture")
        self._react()
        meaning = ipywidgets.HTML("orange: lowest preference, skipped first; blue: highest; cross and frame: skipped")
        presets = ipywidgets.HBox([self.k, *buttons.values()], layout={"flex_flow": "row wrap"})
        files = ipywidgets.HBox([self.path, self.save_button, self.load_button])
        style = ipywidgets.HTML(_style(state.preferences), layout={"display": "none"})
        super().__init__([style, presets, *rows, meaning, self.status, self.picture, files])
        self.add_class("skipmask")
        self.set_mask(state.mask)

    # -- parts -------------------------------------------------------------------
    def _toggle(self, site: int) -> ipywidgets.ToggleButton:
        state = self.state
        kind = state.kinds[site]
        name, layer = blocks([kind])[0][0], site - state.kinds.index(kind)
        toggle = ipywidgets.ToggleButton(
            description=str(site),
            tooltip=f"skip site {site}: {name} of layer {layer}, preference {state.preferences[site]:.3g}",
            layout={"width": "38px", "min_width": "38px", "padding": "0", "margin": "2px 1px"},
        )
        toggle.add_class(f"skipmask-site-{site}")
        return toggle

    @staticmethod
    def _row(name: str, toggles: list) -> ipywidgets.HBox:
        row = ipywidgets.HBox(
            [ipywidgets.Label(name, layout={"width": "48px"}), *toggles], layout={"flex_flow": "row wrap"}
        )
        row.add_class(f"skipmask-{name.lower().replace(' ', '-')}")
        return row

    def _react(self) -> None:
        for toggle in self.toggles:
            toggle.observe(self._toggled, "value")
        self.k.observe(lambda change: None if self._quiet else self.set_k_lowest(change["new"]), "value")
        self.k_lowest_button.on_click(lambda _: self.set_k_lowest(self.k.value))
        self.random_button.on_click(lambda _: self.set_random(self.k.value or 1))
        self.none_button.on_click(lambda _: self.set_mask(()))
        self.save_button.on_click(lambda _: self._file("saved to", self.state.save))
        self.load_button.on_click(lambda _: self._file("loaded from", self.load))

    # -- actions -----------------------------------------------------------------
    def set_mask(self, mask: Iterable[int], made_by: str = "user") -> None:
        """Skips exactly these sites: one evaluation, one change of `mask`. Raises ConfigError if they do not fit."""
        self.state.set_mask(mask, made_by)
        self._quiet = True  # the toggles and the slider follow; they must not each evaluate
        try:
            for site, toggle in enumerate(self.toggles):
                toggle.value = site in self.state.mask
                self._mark(site)
            self.k.value = len(self.state.mask)
        finally:
            self._quiet = False
        self._refresh()

    def set_k_lowest(self, k: int) -> None:
        self.set_mask(self.state.k_lowest(k), made_by="k lowest")

    def set_random(self, k: int) -> None:
        self.set_mask(self.state.random(k), made_by="random")

    def save(self, path: str | Path) -> None:
        self.state.save(path)

    def load(self, path: str | Path) -> None:
        self.state.load(path)
        self.set_mask(self.state.mask, made_by="file")

    # -- reactions ---------------------------------------------------------------
    def _toggled(self, _change: Any) -> None:
        if not self._quiet:
            self.set_mask([site for site, toggle in enumerate(self.toggles) if toggle.value])

    def _mark(self, site: int) -> None:
        toggle = self.toggles[site]  # a cross besides the pressed look: never colour alone
        toggle.icon = "times" if toggle.value else ""

    def _refresh(self) -> None:
        state = self.state
        if state.evaluate is not None and state.mask not in state.tried:
            self._say(f"skipped {listed(state.mask)}: evaluating …", GREY)
        state.refresh()
        self._say(state.status(), WRONG if state.error else "#222222")
        if state.evaluate is not None:
            self.picture.value = figure_png(state.figure(), scale=1.25)
        with self.hold_trait_notifications():
            self.mask = state.mask
            self.loss = (state.result or {}).get("loss")

    def _file(self, done: str, action: Callable[[str], None]) -> None:
        try:
            action(self.path.value)
            self._say(f"{done} {self.path.value}; {self.state.status()}", "#222222")
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}", WRONG)

    def _say(self, words: str, colour: str) -> None:
        self.status.value = f'<span role="status" style="color:{colour}">{escape(words)}</span>'


def _style(preferences: np.ndarray) -> str:
    """A style sheet: each toggle in the colour of its site's preference; pressed ones get a thick dark frame."""
    rules = []
    for site, (red, green, blue) in enumerate(colours(preferences, colour_limit(preferences)).tolist()):
        ink = "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "#222222"
        rules.append(f".skipmask-site-{site}{{background:rgb({red},{green},{blue})!important;color:{ink}!important}}")
    pressed = ".skipmask .jupyter-button.mod-active{box-shadow:inset 0 0 0 3px #111!important;font-weight:bold}"
    focus = ".skipmask .jupyter-button:focus-visible{outline:3px solid #0072B2!important;outline-offset:1px}"
    return f"<style>{''.join(rules)}{pressed}{focus}</style>"


def show_skip_mask(
    preferences: Any, evaluate: Evaluate | None = None, **arguments: Any
) -> SkipMaskWidget | SkipMaskState:
    """The panel where a person watches; else a static picture, with no widget in the file. Arguments: SkipMaskState's.

    Returns the widget or the state; both have `mask`, `set_mask`, `save` and `load`.
    """
    if live_session():
        from IPython.display import display

        widget = SkipMaskWidget(preferences, evaluate, **arguments)
        display(widget)
        return widget
    state = SkipMaskState(preferences, evaluate, **arguments)
    state.refresh()
    title = escape(state.status(), quote=False)
    fig = preference_heatmap(state.preferences, skipped=state.mask, site_kinds=state.kinds, title=title)
    fig.layout.title.subtitle.text += "<br>(a static copy: open the notebook in JupyterLab to switch sites)"
    fig.update_layout(height=fig.layout.height + 18, margin={"t": fig.layout.margin.t + 18})
    show(fig)
    return state
