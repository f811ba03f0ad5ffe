"""A model to try masks on: what skipping costs and saves, and what the model then answers, one mask at a time.

It is what stands behind the skip-mask panel (`eas_kit.widgets`), which knows no torch: it asks for numbers, texts and
pictures. Several threads may ask; they take turns.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import ConfigError, TaskError
from .masks import check_mask
from .measure import compare_latency, flops
from .model import EASModel
from .scorers import SCORERS
from .sites import find_sites
from .slots import skipping
from .tasks.evaluation import evaluating, forced, room

if TYPE_CHECKING:
    import pandas

Stop = Callable[[], bool]


class Playground:
    """A model, a fixed batch of examples, and masks over the model's sites.

    Args:
        model: a base model, whose sites are those of `kinds` and are skipped with nothing in their place; or an
            EASModel, whose sites are its own and have adapters in their place.
        task: of the examples (`eas_kit.load_task`); it collates, parses and grades.
        examples: the fixed batch, such as `task.val[:96]`.
        kinds: of a base model's sites, in the order of their numbers: ("mha", "ffn").
        batch_size: examples in a forward; an evaluation can be stopped between two.
        new_tokens, rounds: tokens that are written to time one of them, and how often, in turn with the dense model.
        generation: for `generate`, beside greedy decoding; `{"merge": "low_rank"}` for an EASModel as it is served.

    Attributes: `site_kinds` (one kind a site), `num_sites`, `examples`.

    Raises TaskError without examples. The model is as before after every call, also after an error.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        task: Any,
        examples: Sequence[Any],
        *,
        kinds: Sequence[str] = ("mha", "ffn"),
        batch_size: int = 32,
        new_tokens: int = 9,
        rounds: int = 5,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.task, self.examples = model, task, list(examples)
        if not self.examples:
            raise TaskError("a playground needs at least one example to evaluate masks on, such as task.val[:96]")
        sites = model.sites if isinstance(model, EASModel) else find_sites(model, tuple(kinds))
        self.site_kinds = [site.kind for site in sites]
        self.num_sites = len(sites)
        self.batch_size, self.new_tokens, self.rounds = batch_size, new_tokens, rounds
        self.generation = dict(generation or {})
        # the adapters' model has a turn already, which its own forwards take; a plain one is given one here
        self._turn = model._turn.lock if isinstance(model, EASModel) else RLock()
        self._batches: list[tuple[list[Any], dict[str, Any]]] = []
        self._dense_flops: int | None = None
        self._room: int | None = None  # new tokens for an answer

    def __len__(self) -> int:
        return len(self.examples)

    # ------------------------------------------------------------------------------------------------- the mask

    @contextmanager
    def skipped(self, mask: Iterable[int] = ()) -> Iterator[torch.nn.Module]:
        """Within the block the model skips these sites, and other threads wait; after it, it is as before.

        Raises ConfigError for a mask that does not fit.
        """
        mask = check_mask(mask, self.num_sites)
        with self._turn, evaluating(self.model):
            if isinstance(self.model, EASModel):
                before, origin = self.model.mask, self.model.mask_origin
                self.model.mask = mask
                try:
                    yield self.model
                finally:
                    self.model.mask = before
                    self.model.mask_origin = origin
            else:
                with skipping(self.model, **{kind: self._numbers(mask, kind) for kind in set(self.site_kinds)}):
                    yield self.model

    def _numbers(self, mask: tuple[int, ...], kind: str) -> list[int]:
        """The numbers within their kind of the skipped sites of one kind."""
        first = self.site_kinds.index(kind)
        return [site - first for site in mask if self.site_kinds[site] == kind]

    def _no_cache(self, mask: tuple[int, ...]) -> dict[str, bool]:
        """Without any attention there is nothing to cache, and a cache without layers cannot tell its length."""
        kept = {kind for site, kind in enumerate(self.site_kinds) if site not in mask}
        return {} if "mha" in kept or "mha" not in self.site_kinds else {"use_cache": False}

    # ----------------------------------------------------------------------------------------------- its numbers

    def evaluate(self, mask: Iterable[int] = (), stop: Stop | None = None) -> dict[str, float] | None:
        """What a mask is worth on the fixed batch; None if `stop()` became true between two batches.

        `score`; flops_saved, the share of the decoder layers' multiply-accumulates that one prompt no longer takes,
        adapters charged; and `times`.
        """
        mask = check_mask(mask, self.num_sites)
        found = self.score(mask, stop)
        if found is None or (stop is not None and stop()):
            return None
        return found | {"flops_saved": self.flops_saved(mask)} | self.times(mask)

    def score(self, mask: Iterable[int] = (), stop: Stop | None = None) -> dict[str, float] | None:
        """What a mask costs on the fixed batch: loss (nats per target token) and accuracy (share of examples whose
        scored part is the most likely text), both by teacher forcing; count. None as for `evaluate`."""
        mask = check_mask(mask, self.num_sites)
        totals, right, count = torch.zeros(3, dtype=torch.float64), 0, 0
        for opened, batch in self._collated(stop):
            if stop is not None and stop():
                return None
            with self.skipped(mask):
                sums, rights = forced(self.task, self.model, opened, batch)
            totals += sums.sum(0).cpu()
            right, count = right + int(rights.sum()), count + len(opened)
        if stop is not None and stop():
            return None
        if count == 0:
            raise TaskError("no example of the fixed batch has pictures that can be opened; choose other examples")
        return {"loss": float(totals[0] / totals[1]), "accuracy": right / count, "count": count}

    def _collated(self, stop: Stop | None) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        """The fixed batch in parts, collated once."""
        device = next(self.model.parameters()).device
        for number, start in enumerate(range(0, len(self.examples), self.batch_size)):
            if stop is not None and stop():
                return
            with self._turn:  # two threads must not both add this part; nor do tokenizers serve two at once
                if number == len(self._batches):
                    opened, _ = self.task.opened(self.examples[start : start + self.batch_size])
                    batch = dict(self.task.collate(opened)) if opened else {}
                    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                    self._batches.append((opened, moved | {"use_cache": False}))
            if self._batches[number][0]:
                yield self._batches[number]

    def flops_saved(self, mask: Iterable[int]) -> float:
        """Share of the decoder layers' multiply-accumulates saved on the first example's prompt, 0 to 1; adapters that
        cost more than they save make it negative."""
        inputs = self._prompt(0) | {"use_cache": False}
        with self._turn:
            if self._dense_flops is None:
                base = self.model.base if isinstance(self.model, EASModel) else self.model
                if base is not self.model:  # dense is the model without its adapters: what its attentions alone cost
                    self._dense_flops = flops(base.config, tokens=int(inputs["input_ids"].shape[1]))["total"]
                else:
                    self._dense_flops = flops(base, inputs)["total"]
            with self.skipped(mask):
                return 1 - flops(self.model, inputs)["total"] / self._dense_flops

    def times(self, mask: Iterable[int]) -> dict[str, float]:
        """Of decoding the first example's prompt: ms_per_token; dense_ms_per_token, of the model with nothing skipped,
        measured in turn with it; and speedup, the median of the rounds' ratios dense / masked.
        """
        mask = check_mask(mask, self.num_sites)

        def arm(skipped: tuple[int, ...]) -> Callable:
            def generate(**inputs: Any) -> Any:
                with self.skipped(skipped):
                    return self.model.generate(**inputs, **self._no_cache(skipped))

            return generate

        arms = {"dense": arm(()), **({"mask": arm(mask)} if mask else {})}
        settings = {"new_tokens": self.new_tokens, "repeats": self.rounds, **self.generation}
        with self._turn:
            found = compare_latency(arms, self._prompt(0), **settings, pad_token_id=self.task.tokenizer.pad_token_id)
        steps = {name: 1000 * times["decode_per_token"]["median"] for name, times in found["arms"].items()}
        return {
            "ms_per_token": steps["mask"] if mask else steps["dense"],
            "dense_ms_per_token": steps["dense"],
            "speedup": found["speedup"]["mask"]["decode"]["median"] if mask else 1.0,
        }

    def rank(self, scorers: Iterable[str] = tuple(SCORERS), **arguments: Any) -> dict[str, np.ndarray]:
        """Scorer -> (num_sites,), lowest skipped first: `eas_kit.scorers` on each kind of site, on split "search".

        `arguments` go to the scorers: split, limit, batch_size, seed. Raises ConfigError for an unknown scorer.
        """
        unknown = [name for name in scorers if name not in SCORERS]
        if unknown:
            raise ConfigError(f"unknown scorer: {', '.join(unknown)}; there are {', '.join(SCORERS)}")
        model = self.model.base if isinstance(self.model, EASModel) else self.model
        kinds, found = dict.fromkeys(self.site_kinds), {}
        with self.skipped():
            for name in scorers:
                parts = [SCORERS[name](model, self.task, kind=kind, **arguments).numpy() for kind in kinds]
                if name == "random":  # one draw for all sites: the same numbers for every kind would tie them
                    seed = arguments.get("seed", 0)
                    parts = [np.random.default_rng(seed).random(self.num_sites)]
                found[name] = np.concatenate(parts)
        return found

    def place(self, values: Any, kinds: Sequence[str] = ("mha",)) -> np.ndarray:
        """(num_sites,): preferences of some kinds' sites, such as a search's, in their places; nan at the others.

        Raises ConfigError if this model's sites of these kinds are others in number.
        """
        values, placed = np.asarray(values, float).ravel(), np.full(self.num_sites, np.nan)
        at = [site for kind in kinds for site in range(self.num_sites) if self.site_kinds[site] == kind]
        if len(at) != len(values):
            raise ConfigError(f"{len(values)} preferences of {'+'.join(kinds)} sites; this model has {len(at)} of them")
        placed[at] = values
        return placed

    def compare(self, masks: Mapping[str, Iterable[int]]) -> pandas.DataFrame:
        """A row a mask: name, mask, and the numbers of `evaluate`."""
        import pandas as pd

        rows = [{"name": name, "mask": check_mask(mask, self.num_sites)} for name, mask in masks.items()]
        return pd.DataFrame([row | (self.evaluate(row["mask"]) or {}) for row in rows])

    # ----------------------------------------------------------------------------------------------- its answers

    def _prompt(self, i: int) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        with self._turn:
            inputs = self.task.collate([self.examples[i]], answers=False)
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

    def answer(self, mask: Iterable[int], i: int) -> str:
        """What the model itself writes for example `i` under the mask, greedily, as text."""
        mask, inputs = check_mask(mask, self.num_sites), self._prompt(i)
        settings = {"do_sample": False, "num_beams": 1, "pad_token_id": self.task.tokenizer.pad_token_id}
        settings |= self.generation | self._no_cache(mask)
        with self.skipped(mask):
            self._room = self._room or room(self.task, self.examples)
            written = self.model.generate(**inputs, max_new_tokens=self._room, **settings)
            new = written[0, inputs["input_ids"].shape[1] :]
            return self.task.tokenizer.decode(new, skip_special_tokens=True).strip()

    def right(self, i: int, text: str) -> bool | None:
        """Whether a written text answers example `i`; None where its answer is not known."""
        example = self.examples[i]
        return bool(self.task.grade(self.task.parse(text, example), example) >= 0.5) if example.answer else None

    def question(self, i: int) -> str:
        """Example `i` as the model is asked, without the tokens of its picture."""
        return self.task.question_text(self.examples[i])

    def wanted(self, i: int) -> str:
        """The right answer of example `i`; "" where it is not known."""
        return self.examples[i].answer

    def image(self, i: int) -> bytes:
        """The first picture of example `i` as PNG, at most 320 pixels a side; b"" for text alone."""
        images = self.examples[i].images
        if not len(images):
            return b""
        picture = images[0].convert("RGB")
        picture.thumbnail((320, 320))
        out = io.BytesIO()
        picture.save(out, format="PNG")
        return out.getvalue()
