"""What the skip-mask panel knows, in plain Python: the mask, how it came about, and what the masks tried cost."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..figures.preferences import written
from ..figures.style import BLUE, GREY, axis, field, listed, new_figure, note, numbers, padded, site_kinds_of
from ..masks import check_mask, load_mask, save_mask

Evaluate = Callable[..., Any]
Stop = Callable[[], bool]


def never() -> bool:
    return False


class SkipMaskState:
    """Which sites are skipped, and what that costs.

    Args:
        preferences: (L,), one number a site, lowest skipped first; zeros if nothing is known yet, nan where a site's is
            unknown. Or a search's result; or a dict of several, name -> one of these, to choose from (the first is
            chosen at the start).
        evaluate: called with a mask, the sorted tuple of skipped sites; returns the loss, or a dict with "loss" and
            more numbers to show. Called once a mask; the result is kept. If it has an argument `stop`, it gets a
            function that says that its result is no longer wanted, and may then return None. None: no losses.
        site_kinds: as in `figures.preference_heatmap`.
        mask: skipped at the start.
        seed: of the random preset.
        model: its name, for the mask's file.

    Attributes: `mask`; `rankings`, name -> preferences, and `by`, the chosen one's name; `result`, a dict with "loss",
    None if there is none; `error`, the words of what evaluate raised, else ""; `tried`, mask -> result in the order of
    trying; `seconds`, what the last evaluation took.
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
        several = isinstance(preferences, Mapping) and "preferences" not in preferences
        named = dict(preferences) if several else {"preference": preferences}
        if not named:
            raise ConfigError("the panel needs at least one ranking, such as np.zeros(num_sites); got none")
        for ranking in named.values():
            site_kinds = site_kinds or field(ranking, "kinds")  # a search result says it itself
        self.rankings = {
            name: np.asarray(field(ranking, "preferences", default=ranking), float).ravel()
            for name, ranking in named.items()
        }
        self.by = next(iter(self.rankings))
        self.num_sites, self.evaluate, self.model = len(self.preferences), evaluate, model
        lengths = {name: len(values) for name, values in self.rankings.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"rankings of the same sites are wanted; got {lengths} numbers")
        self.kinds = site_kinds_of(site_kinds, self.num_sites)
        self.rng = np.random.default_rng(seed)
        self.tried: dict[tuple[int, ...], dict[str, float]] = {}
        self.result: dict[str, float] | None = None
        self.error, self.seconds, self.made_by = "", 0.0, "user"
        self._takes_stop = evaluate is not None and _has_argument(evaluate, "stop")
        self._past: list[tuple[tuple[int, ...], str]] = []
        self._future: list[tuple[tuple[int, ...], str]] = []
        self.mask = check_mask(mask, self.num_sites)

    @property
    def preferences(self) -> np.ndarray:
        """(L,), of the chosen ranking."""
        return self.rankings[self.by]

    # ------------------------------------------------------------------------------------------------- the mask

    def set_mask(self, mask: Iterable[int], made_by: str = "user") -> None:
        """Raises ConfigError for a mask that does not fit; nothing is changed then."""
        mask = check_mask(mask, self.num_sites)
        if mask != self.mask:
            self._past.append((self.mask, self.made_by))
            self._future.clear()
        self.mask, self.made_by = mask, made_by

    @property
    def can_undo(self) -> bool:
        return bool(self._past)

    @property
    def can_redo(self) -> bool:
        return bool(self._future)

    def undo(self) -> None:
        """Back to the mask before; nothing if there is none."""
        self._step(self._past, self._future)

    def redo(self) -> None:
        """Takes an undo back; nothing if there is none."""
        self._step(self._future, self._past)

    def _step(self, back: list, forth: list) -> None:
        if back:
            forth.append((self.mask, self.made_by))
            self.mask, self.made_by = back.pop()

    def sites_of(self, kind: str | None = None) -> list[int]:
        """All sites, or those of one kind."""
        return [site for site in range(self.num_sites) if kind in (None, self.kinds[site])]

    def k_lowest(self, k: int, kind: str | None = None) -> list[int]:
        """The k sites of lowest preference, ties to the lower number; those of unknown preference never."""
        known = [site for site in self.sites_of(kind) if np.isfinite(self.preferences[site])]
        return sorted(sorted(known, key=lambda site: (self.preferences[site], site))[:k])

    def random(self, k: int, kind: str | None = None) -> list[int]:
        sites = self.sites_of(kind)
        return sorted(self.rng.choice(sites, min(k, len(sites)), replace=False).tolist())

    def all_but_one(self, kind: str | None = None) -> list[int]:
        """All sites of every kind (or of one) but the one of highest preference, ties to the lower number."""
        skipped = []
        for one in dict.fromkeys(self.kinds) if kind is None else (kind,):
            sites = self.sites_of(one)
            known = np.nan_to_num(self.preferences[sites], nan=-np.inf)
            kept = sites[int(np.argmax(known))]
            skipped += [site for site in sites if site != kept]
        return sorted(skipped)

    # ----------------------------------------------------------------------------------------------- its numbers

    def numbers_of(self, mask: tuple[int, ...], stop: Stop = never) -> dict[str, float] | None:
        """What a mask costs, computed once; None without `evaluate`, or if it was stopped. Raises what that raises."""
        if self.evaluate is None:
            return None
        if mask not in self.tried:
            began = time.perf_counter()
            value = self.evaluate(mask, stop=stop) if self._takes_stop else self.evaluate(mask)
            self.seconds = time.perf_counter() - began
            if value is None and stop():
                return None
            if value is None:
                raise ConfigError(f"evaluate returned None for the mask {list(mask)}; wanted the loss, or a dict")
            self.tried[mask] = _numbers(value)
        return self.tried[mask]

    def refresh(self) -> None:
        """Evaluates the mask, and at first nothing skipped, to compare with; each once.

        What goes wrong is kept in `error`, never raised, so that a panel can show it.
        """
        self.error, self.result = "", None
        try:
            self.numbers_of(())
            self.result = self.numbers_of(self.mask)
        except Exception as error:  # whatever the model raises belongs on the panel, not in the browser's log
            self.error = words_of(error)

    def status(self) -> str:
        """One line: the mask, its loss and accuracy, or the error."""
        text = f"skipped {len(self.mask)} of {self.num_sites}: {written(self.mask, self.kinds)}"
        if self.error:
            return f"{text}. Not evaluated: {self.error}"
        result, dense = self.result or {}, self.tried.get((), {})
        if "loss" in result:
            text += f"; loss {result['loss']:.4f}"
            if self.mask and "loss" in dense:
                text += f" ({result['loss'] - dense['loss']:+.4f} against nothing skipped)"
        if "accuracy" in result:
            text += f"; accuracy {result['accuracy']:.1%}"
        return text.replace("-", "−")

    # ------------------------------------------------------------------------------------------------- its file

    def save(self, path: str | Path) -> None:
        """The mask's file (`eas_kit.masks`).

        A mask of one kind alone is written for that kind's sites, as a search of that kind writes it, so that a model
        with adapters there takes it. Raises OSError if the file cannot be written.
        """
        kinds, skipped = list(dict.fromkeys(self.kinds)), self.mask
        used = dict.fromkeys(self.kinds[site] for site in skipped)
        if len(used) == 1:
            kinds = list(used)
            skipped = [site - self.kinds.index(kinds[0]) for site in skipped]
        count = sum(kind in kinds for kind in self.kinds)
        save_mask(path, skipped, num_sites=count, kind="+".join(kinds), model=self.model, made_by=self.made_by)

    def load(self, path: str | Path) -> None:
        """Raises ConfigError if the file is missing, broken, or of other sites."""
        self.set_mask(load_mask(path, site_kinds=self.kinds), made_by="file")

    # ---------------------------------------------------------------------------------------------- its picture

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
                note(fig, f"{here_loss:.3f}", len(self.mask), here_loss, colour=BLUE, xshift=9, yshift=8)
        most = max([len(mask) for mask in known], default=0) + 1
        fig.update_layout(
            xaxis=axis("skipped sites", range=[-0.5, most + 0.5], dtick=1 if most < 13 else 4, showgrid=False),
            yaxis=axis("loss", range=padded(known.values(), 0.15, 0.15), nticks=5),
        )
        return fig


def words_of(error: Exception) -> str:
    """An exception as the panel writes it."""
    return f"{type(error).__name__}: {error}"


def _numbers(value: Any) -> dict[str, float]:
    values = value if isinstance(value, dict) else {"loss": value}
    shown = {str(name): v for name, v in values.items() if np.ndim(v) == 0 and not isinstance(v, str)}
    return {name: v if isinstance(v, int) else float(v) for name, v in shown.items()}


def _has_argument(function: Callable, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in without a signature
        return False
