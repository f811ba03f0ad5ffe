"""`fit` and `search`: adapters tuned on task.train, and the bandit's search for redundant sites around it.

`search` follows the paper's section 3.4: warm-up with uniformly random skips, then, every few training steps, H
subnetworks are compared on one held-out batch of task.search and the preferences move (bandit.py, eq. 14-16). Both
drive the same loop (loop.py), which also resumes, stops on Ctrl-C and runs in several processes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .bandit import Bandit
from .config import SearchConfig, TrainConfig, read_json
from .errors import ConfigError, TrainingError
from .loop import Event, Loop
from .masks import save_mask
from .processes import Order
from .sites import unwrap
from .tasks import check_task

Callback = Callable[[Event], Any]


@dataclass
class History:
    """What `fit` did. `records`: one dict per step (step, phase, loss, learning_rate, grad_norm, mask)."""

    records: list[dict]
    interrupted: bool = False
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self):
        return iter(self.records)

    def __getitem__(self, index):
        return self.records[index]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]

    @property
    def frame(self):
        """The records as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.records)


@dataclass
class SearchResult:
    """What `search` found.

    `preferences` (L,) float64, lower = more redundant; `skipped`, the k candidates of lowest preference (none if it
    was stopped before the first update); `history`, one dict per update (update, step, preferences, masks, losses,
    rewards, counts, skipped); `steps`, one dict per training step; `interrupted`, True if it was stopped before the
    end.
    """

    preferences: torch.Tensor
    skipped: tuple[int, ...]
    history: list[dict]
    steps: list[dict] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0
    kinds: tuple[str, ...] = ("mha",)
    config: dict = field(default_factory=dict)

    @property
    def num_sites(self) -> int:
        return len(self.preferences)

    def save(self, path: str | Path) -> None:
        """Everything as one JSON file."""
        values = asdict(self) | {"preferences": self.preferences.tolist(), "format": 1}
        Path(path).write_text(json.dumps(values) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        values = read_json(path, what="search result")
        try:
            values = {name: values[name] for name in cls.__dataclass_fields__}
        except KeyError as missing:
            raise ConfigError(f"{path} is not a search result: it has no {missing}.") from None
        values["preferences"] = torch.tensor(values["preferences"], dtype=torch.float64)
        values["skipped"], values["kinds"] = tuple(values["skipped"]), tuple(values["kinds"])
        return cls(**values)

    def save_mask(self, path: str | Path, model: str | None = None) -> None:
        """The chosen mask as a mask file (eas_kit.masks)."""
        kind = "+".join(self.kinds)
        seed = self.config.get("seed")
        save_mask(path, self.skipped, num_sites=self.num_sites, kind=kind, model=model, made_by="search", seed=seed)


def fit(net: nn.Module, task, config: TrainConfig | None = None, callbacks: Iterable[Callback] = ()) -> History:
    """Tunes what requires a gradient in `net` on task.train: adapters of an EASModel, of a peft model, or all weights.

    Each callback is called with an `Event` after every step. Ctrl-C (or a callback's KeyboardInterrupt) ends it after
    the step it is in: the history comes back with `interrupted` set and, with `output_dir`, a checkpoint to resume.

    Raises TrainingError if nothing requires a gradient, or if the loss stops being finite (the weights are then
    those of the last good step), TaskError if the task has no `train` or no `collate`.
    """
    check_task("fit", task, "train", "collate")
    config = config or TrainConfig()
    per_step = config.batch_size * config.gradient_accumulation_steps
    total = config.max_steps or max(1, math.ceil(config.epochs * len(task.train) / per_step))
    mask = tuple(net.mask) if hasattr(net, "mask") else None
    if mask is not None and hasattr(net, "trainable_parameters") and not net.trainable_parameters(active=True):
        raise TrainingError(
            f"Nothing to train: with mask {list(mask)} and adapt_rank {net.config.adapt_rank} no adapter is at work. "
            "Set net.mask to the sites to skip, or attach with adapt_rank above 0."
        )
    about = _about(net, task) | {"mask": mask}
    loop, began = Loop(net, task.train, task.collate, config, total, callbacks, "train", about), time.perf_counter()
    with loop.running():
        for _ in loop.steps():
            loop.train_step("train", mask)
    return History(loop.records, loop.interrupted, time.perf_counter() - began)


def search(
    net: nn.Module, task, config: SearchConfig | None = None, callbacks: Iterable[Callback] = ()
) -> SearchResult:
    """Finds `config.num_skipped` redundant sites of an EASModel while training its adapters (eq. 14-16).

    At the end the chosen sites are skipped (`net.mask`), ready to be tuned on with `fit`. Callbacks get an `Event`
    after every training step ("step") and after every update of the preferences ("update"). Ctrl-C ends it after the
    step it is in, with what was learned so far in the result (`interrupted`); with `output_dir` it can be resumed.

    In several processes each sees its part of every batch; draws, losses and preferences are the same in all of them.

    Raises ConfigError if the candidates leave no choice, TrainingError if the loss stops being finite, TaskError
    if the task has no `train`, `search` or `collate`.
    """
    config = config or SearchConfig()
    if not hasattr(net, "sites") or not hasattr(net, "mask"):
        raise TrainingError(
            f"search needs a model with adapters at its sites, got {type(net).__name__}; call attach(model) first"
        )
    check_task("search", task, "train", "search", "collate")
    if len(task.search) == 0:
        raise TrainingError("task.search has no examples, so there is nothing to reward subnetworks with.")
    kinds = [site.kind for site in net.sites]
    candidates = candidate_sites(config.candidates, kinds)
    attentions = {i for i, kind in enumerate(kinds) if kind != "ffn"}
    may_go = set(range(len(kinds)) if candidates is None else candidates)
    if attentions and attentions <= may_go and len(attentions) <= config.num_skipped < len(may_go):
        raise ConfigError(
            f"num_skipped={config.num_skipped} could skip all {len(attentions)} attentions, and one has to stay: "
            "ask for fewer, or leave an attention out of SearchConfig.candidates."
        )
    before = net.mask
    bandit = Bandit(
        len(kinds),
        config.num_skipped,
        config.num_subnetworks,
        config.preference_lr,
        config.reward,
        candidates,
        config.seed,
        config.draws,
    )
    held_out = Order(len(task.search), config.seed, purpose=1)
    about = _about(net, task)
    loop = Loop(net, task.train, task.collate, config, config.total_steps, callbacks, "search", about)
    began = time.perf_counter()

    def update() -> None:
        size = config.reward_batch_size
        batch = [task.search[i] for i in held_out.take(len(bandit.history) * size, size)]

        def loss(mask: tuple[int, ...]) -> float:
            net.mask = mask
            return loop.loss(batch)

        record = bandit.update(loss)
        record["step"] = loop.done + 1
        values = {key: value for key, value in record.items() if key != "step"}
        loop.event("update", "search", **values)

    with loop.running(bandit.state_dict, bandit.load_state_dict):
        for step in loop.steps():
            warming = step < config.warmup_steps
            mask = bandit.random_mask() if warming else bandit.draw()[0]
            net.mask = mask
            loop.train_step("warmup" if warming else "search", mask)
            trained = step + 1 - config.warmup_steps
            if trained > 0 and trained % config.train_steps_per_update == 0:
                update()
    if bandit.history:
        net.mask, net.mask_origin = bandit.skipped, {"made_by": "search", "seed": config.seed}
    else:  # stopped before anything was compared: there is nothing to choose by
        net.mask = before
    return SearchResult(
        preferences=bandit.preferences.clone(),
        skipped=bandit.skipped if bandit.history else (),
        history=bandit.history,
        steps=loop.records,
        interrupted=loop.interrupted,
        seconds=time.perf_counter() - began,
        kinds=tuple(dict.fromkeys(kinds)),
        config=config.to_dict(),
    )


def _about(net: nn.Module, task) -> dict[str, Any]:
    """What a resumed run must share with the first besides its settings."""
    found = {"task": getattr(task, "name", None), "model": type(unwrap(net)).__name__}
    if hasattr(net, "adapters"):
        found |= {f"adapters.{name}": value for name, value in net.config.identity().items()}
    return found


def candidate_sites(candidates: str | Iterable[int] | None, kinds: list[str]) -> list[int] | None:
    """SearchConfig.candidates as site numbers; None: all. `kinds`: the kind of each of the L sites."""
    if candidates is None or not isinstance(candidates, str):
        return None if candidates is None else list(candidates)
    sites = [i for i, kind in enumerate(kinds) if kind == candidates]
    if not sites:
        raise ConfigError(
            f"candidates={candidates!r}, but the model's sites are {sorted(set(kinds))}. Attach adapters to that kind: "
            f"EASConfig(kinds=({candidates!r},))."
        )
    return sites
