"""The comparison of tuning methods: one table, one loop, one budget, one report for every row (`arms.Arm`).

Every tuned arm gets the same number of steps, batches and schedule; the learning rate is the method's own, from a
table or chosen on `val` from a grid. Each run is a JSON file in a folder, so a comparison can be stopped, resumed,
and filled by several processes at once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from . import __version__
from .arms import BASELINES, LEARNING_RATES, Arm, Plan
from .bandit import draw_masks, lowest
from .cache import Busy, cached
from .checkpoint import rng_state, set_rng_state
from .config import TrainConfig
from .counting import flops, parameters
from .errors import ConfigError, MergeError, NothingOpenedError
from .merging import check_foldable
from .model import EASModel, attach
from .modes import eval_mode
from .probe import score_without
from .scorers import SCORERS
from .sites import names_its_sites
from .tasks.evaluation import weights_digest
from .tasks.matching import MatchingTask
from .timing import latency
from .training import candidate_sites, fit, search

if TYPE_CHECKING:
    import pandas

COLUMNS = (
    *("arm", "method", "k", "chosen_by", "seed", "mask", "learning_rate"),
    *("val_accuracy", "val_loss", "test_accuracy", "test_loss", "unparsed"),
    *("trainable", "trainable_share", "steps", "seconds", "search_steps", "search_seconds", "scorer"),
    "test_columns",
    *("candidates", "settings", "macs", "merged_macs"),
    *("prefill_seconds", "decode_seconds", "merged_prefill_seconds", "merged_decode_seconds"),
)
"""Of the table. `trainable_share` is of the base model's parameters. `macs`: multiply-accumulates of the decoder layers
on one prompt of val as the tuned model stands (of a model without a decoder, METER: all of them), `merged_macs` with
its adapters folded away. `prefill_seconds` and `decode_seconds` (a token) are medians on the same prompt, unmerged and
merged, where the plan asks for times."""


def run_arms(
    task: Any,
    make_model: Callable[[], nn.Module],
    arms: Sequence[Arm],
    seeds: Sequence[int] = (0,),
    out_dir: str | Path = "arms",
    plan: Plan | None = None,
    learning_rates: Mapping[str, float] = LEARNING_RATES,
    grid: Mapping[str, Sequence[float]] | None = None,
    model_name: str = "",
    made_with: Mapping[str, Any] | None = None,
    log: Callable[[str], Any] = print,
    wait: bool = True,
) -> pandas.DataFrame:
    """Runs every arm with every seed and returns one row for each.

    make_model: a fresh base model, the same each time. grid: for a method, learning rates to choose from: the plain
    method (k = 0, first seed) is run with each, and the best accuracy on `val` (then loss) wins; `test` is reported
    for all runs and never chosen by (`arms.GRIDS` has one for every method; DAS, of which nothing trains without
    skipping, is tried with k random layers). model_name goes into the files' keys, to keep models apart, and
    so does made_with: settings of model and task that are not seen in weights and questions.
    Runs that another process is working on are waited for, or left out without `wait`.
    Raises ConfigError for settings of an arm that make no sense before anything runs.
    """
    for arm in arms:
        (plan or Plan()).key(arm)
    table = _Table(task, make_model, plan or Plan(), Path(out_dir), model_name, made_with or {}, log)
    order = [(arm, seed) for seed in seeds for arm in arms]
    jobs, rows, told = order, {}, False
    while jobs:
        busy = []
        for arm, seed in jobs:
            try:
                rate = table.learning_rate(arm, seeds[0], learning_rates, grid or {})
                rows[arm, seed] = table.run(arm, seed, rate)
            except Busy as claim:
                busy.append((arm, seed))
                waiting_for = claim
        if len(busy) == len(jobs):
            if not wait:
                break
            if not told:
                log(f"waiting for another process ({waiting_for} in {out_dir}; delete it if there is none)")
                told = True
            time.sleep(2.0)
        jobs = busy
    return _frame([rows[job] for job in order if job in rows])


def summary(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Mean and sd over seeds of each arm, in the order of the runs."""
    groups = frame.groupby(["arm", "k"], sort=False)
    found = groups.agg(
        seeds=("seed", "size"),
        test_accuracy=("test_accuracy", "mean"),
        test_accuracy_sd=("test_accuracy", "std"),
        test_loss=("test_loss", "mean"),
        val_accuracy=("val_accuracy", "mean"),
        val_loss=("val_loss", "mean"),
        trainable_share=("trainable_share", "mean"),
        seconds=("seconds", "mean"),
        search_seconds=("search_seconds", "mean"),
    )
    return found.reset_index()


class _Table:
    def __init__(self, task, make_model, plan: Plan, folder: Path, model_name: str, made_with: Mapping, log):
        self.task, self.make_model, self.plan, self.folder, self.log = task, make_model, plan, folder, log
        sizes = [len(getattr(task, split)) for split in ("train", "search", "val", "test")]
        self.base_key = {
            "task": task.name,
            "sizes": sizes,
            "texts": _digest(task),
            "model": model_name,
            "weights": weights_digest(model := make_model()),
            "version": __version__,
        }
        if plan.latency is not None:
            if names_its_sites(model):
                raise ConfigError(
                    f"Plan.latency: times are of written answers, and {type(model).__name__} writes none; leave it out"
                )
            self.base_key["device"] = next(model.parameters()).device.type
        self.base_key |= {"made_with": dict(made_with)} if made_with else {}

    def learning_rate(self, arm: Arm, seed: int, rates: Mapping[str, float], grid: Mapping) -> float | None:
        method = arm.method
        if method == "zero_shot":
            return None
        if method not in grid:
            if method not in rates:
                raise ConfigError(f"learning_rates has no {method!r}; give one, or a grid to choose from")
            return rates[method]
        runs = [(self.run(arm.plain, seed, rate), rate) for rate in grid[method]]
        return min(runs, key=lambda run: (-run[0]["val_accuracy"], run[0]["val_loss"]))[1]

    def run(self, arm: Arm, seed: int, rate: float | None) -> dict:
        drawn = 0 if arm.method == "zero_shot" else seed  # nothing is drawn: one run serves all seeds
        key = self.base_key | {"plan": self.plan.key(arm), "arm": arm.key(), "seed": drawn, "learning_rate": rate}
        name = f"{arm.file_name}-seed{drawn}"
        return cached(self.folder, name, key, lambda: self._run(arm, drawn, rate)) | {"seed": seed}

    def _run(self, arm: Arm, seed: int, rate: float | None) -> dict:
        plan, task = self.plan, self.task
        before = rng_state()
        torch.manual_seed(seed)  # of new adapters and LoRA matrices
        try:
            row = {"arm": arm.name, "method": arm.method, "k": arm.k, "chosen_by": arm.chosen_by, "seed": seed}
            row |= {"mask": [], "learning_rate": rate, "steps": 0, "seconds": 0.0}
            row |= {"candidates": arm.candidates, "settings": dict(arm.settings)}
            net, extra = self._prepare(arm, seed)
            row |= extra
            if arm.method != "zero_shot":
                config = TrainConfig.from_dict(
                    plan.train.to_dict() | {"max_steps": plan.steps, "learning_rate": rate, "seed": seed}
                )
                history = fit(net, task, config)
                if history.interrupted:  # half a run is no result, and would be read as one
                    raise KeyboardInterrupt
                row |= {"steps": len(history), "seconds": history.seconds}
        finally:
            set_rng_state(before)
        settings = plan.zero_shot if arm.method == "zero_shot" else plan.evaluate
        for split in ("val", "test"):
            found = task.evaluate(net, split, **settings)
            if isinstance(task, MatchingTask):  # ranking has no loss; this is that of the batches it trains on
                at_once = max(1, settings.get("batch_size", 64) // (1 + task.false_texts))  # pairs, as in evaluate
                found["loss"] = task.score(net, split, limit=settings.get("limit"), batch_size=at_once)["loss"]
            row |= {f"{split}_{part}": found[part] for part in ("accuracy", "loss")}
            row["details"] = row.get("details", {}) | {split: found}
        row["unparsed"] = row["details"]["test"].get("unparsed")
        row["test_columns"] = row["details"]["test"].get("columns")
        row |= self._costs(net)
        self.log(f"{arm.name}, seed {seed}: val {row['val_accuracy']:.3f}, test {row['test_accuracy']:.3f}")
        return row

    def _prepare(self, arm: Arm, seed: int) -> tuple[nn.Module, dict]:
        """The model of an arm, ready to be tuned, and its columns."""
        plan, base = self.plan, self.make_model()
        total = sum(p.numel() for p in base.parameters())

        def share(trained: int) -> dict:
            return {"trainable": trained, "trainable_share": trained / total}

        if arm.method == "zero_shot":
            return base, share(0)
        if arm.method in BASELINES:
            net, _ = BASELINES[arm.method](base, **plan.settings(arm))
            return net, share(sum(p.numel() for p in net.parameters() if p.requires_grad))
        net, extra = attach(base, plan.eas_config(arm)), {}
        if arm.k:
            net, extra = self._choose(net, arm, seed)
        extra["mask"] = list(net.mask)
        return net, share(parameters(net)["active"]["total"]) | extra

    def _costs(self, net: nn.Module) -> dict[str, Any]:
        """Multiply-accumulates of one prompt, and times, if the plan asks for them; merged too, where that is exact."""
        device = next(net.parameters()).device
        batch = self._prompt()
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        calls = {"": net}
        counted = flops(net, inputs)
        found = {"macs": counted["total"] + (counted["other"] if names_its_sites(net) else 0)}
        if isinstance(net, EASModel):
            try:
                check_foldable(net)
            except MergeError:
                pass
            else:
                attentions = [site.index for site in net.sites if site.kind == "mha"]
                mask = [attentions.index(site) for site in net.mask]
                found["merged_macs"] = flops(net, tokens=inputs["input_ids"].shape[1], mask=mask)["total"]
                calls["merged_"] = partial(net.generate, merge=True)
        if self.plan.latency is not None:
            with eval_mode(net):
                for name, call in calls.items():
                    times = latency(call, inputs, **self.plan.latency)
                    found[f"{name}prefill_seconds"] = times["prefill"]["median"]
                    if "decode_per_token" in times:
                        found[f"{name}decode_seconds"] = times["decode_per_token"]["median"]
        return found

    def _prompt(self) -> Any:
        """The first prompt of val whose pictures open."""
        for i in range(len(self.task.val)):
            try:
                return self.task.collate([self.task.val[i]], answers=False)
            except NothingOpenedError:
                pass
        raise NothingOpenedError(f"{self.task.name}: no example of val can be opened")

    def _choose(self, net: EASModel, arm: Arm, seed: int) -> tuple[EASModel, dict]:
        """Sets the mask in the way of the arm."""
        extra: dict[str, Any] = {}
        kinds = [site.kind for site in net.sites]
        wanted = None if arm.candidates == "mha+ffn" else arm.candidates
        candidates = candidate_sites(wanted, kinds)
        if arm.chosen_by == "random":
            zeros = torch.zeros(net.num_sites)
            net.mask = draw_masks(zeros, arm.k, 1, np.random.default_rng([seed, arm.k]), candidates)[0]
        elif arm.chosen_by == "scorer":
            kind = {} if arm.candidates == "mha" else {"kind": arm.candidates}
            found = cached(
                self.folder,
                f"scorer-k{arm.k}",
                self.base_key | {"scorers": "best", "k": arm.k, "limit": self.plan.score_limit} | kind,
                lambda: best_scorer(self.make_model(), self.task, arm.k, self.plan.score_limit, **kind),
            )
            net.mask, extra = [candidates[i] for i in found["mask"]], {"scorer": found["scorer"]}
        else:
            config, eas = self.plan.search_config(arm, seed), self.plan.eas_config(arm)
            key = self.base_key | {"search": config.identity(), "eas": eas.identity()}

            def find() -> dict:
                result = search(net, self.task, config)
                if result.interrupted:
                    raise KeyboardInterrupt
                return asdict(result) | {"preferences": result.preferences.tolist()}

            if self.plan.tune_on:
                found = find()  # the adapters are wanted, too, and they are in no file
            else:
                found = cached(self.folder, f"search-k{arm.k}-seed{seed}", key, find)
                torch.manual_seed(seed)
                net = attach(self.make_model(), eas)
            net.mask = found["skipped"]
            extra = {"search_steps": len(found["steps"]), "search_seconds": found["seconds"]}
        return net, extra


def best_scorer(model: nn.Module, task: Any, k: int, limit: int | None = None, kind: str = "mha") -> dict[str, Any]:
    """The mask of the scorer whose k sites cost the untuned model least on `val`: mask, scorer, losses of all."""
    losses, masks = {}, {}
    for name, scorer in SCORERS.items():
        if name == "random":
            continue
        masks[name] = lowest(scorer(model, task, kind, limit=limit), k)
        losses[name] = score_without(model, task, kind, masks[name], "val", limit)["loss"]
    best = min(losses, key=losses.get)
    return {"mask": list(masks[best]), "scorer": best, "losses": losses}


def _digest(task: Any) -> str:
    """Tells tasks apart that share a name: of what they say of themselves and the first questions of every split."""
    parts = [getattr(task, "template", ""), getattr(task, "parser", "")]
    if hasattr(task, "about"):  # has the seed: all of AID's questions are alike, whichever pictures were drawn
        parts.append(json.dumps(task.about(), sort_keys=True, default=str))
    for split in ("train", "search", "val", "test"):
        examples = getattr(task, split)
        for i in range(min(5, len(examples))):
            example = examples[i]
            parts += [
                getattr(example, "id", ""),
                getattr(example, "question", ""),
                getattr(example, "explanation", ""),
                getattr(example, "answer", ""),
            ]
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:10]


def _frame(rows: list[dict]) -> pandas.DataFrame:
    import pandas as pd

    return pd.DataFrame([{column: row.get(column) for column in COLUMNS} for row in rows], columns=list(COLUMNS))
