"""How redundant are attentions and feed-forwards? Skip some, tune nothing, look at the loss (paper, Fig. 1b).

A skipped attention or feed-forward adds nothing to the residual stream, and no adapter takes its place. Both kinds
are probed with the very same random sets of layers, so that they can be compared set by set.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .bandit import draw_masks
from .config import read_json
from .errors import ConfigError
from .sites import find_sites
from .slots import skipping
from .tasks import check_task

if TYPE_CHECKING:
    import pandas

KINDS = ("mha", "ffn", "layer")


@dataclass
class ProbeReport:
    """What `probe_redundancy` measured.

    `rows`: one dict a run (kind, k, trial, mask, loss, accuracy); `frame` is the same as a DataFrame. `dense`: loss
    and accuracy with nothing skipped. `metadata`: split, count of examples, seed, trials, num_sites, task.
    """

    rows: list[dict]
    dense: dict[str, float]
    runs_per_second: float
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def frame(self) -> pandas.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.rows, columns=["kind", "k", "trial", "mask", "loss", "accuracy"])

    @property
    def summary(self) -> pandas.DataFrame:
        """One row per kind and k: trials, and of loss and accuracy the mean, the sd over trials (ddof 1), and the
        mean's change from dense."""
        groups = self.frame.groupby(["kind", "k"], sort=False)
        table = groups.agg(
            trials=("loss", "size"),
            loss=("loss", "mean"),
            loss_sd=("loss", "std"),
            accuracy=("accuracy", "mean"),
            accuracy_sd=("accuracy", "std"),
        ).reset_index()
        table["loss_change"] = table["loss"] - self.dense["loss"]
        table["accuracy_change"] = table["accuracy"] - self.dense["accuracy"]
        return table

    def save(self, path: str | Path) -> None:
        values = {"rows": self.rows, "dense": self.dense, "runs_per_second": self.runs_per_second}
        Path(path).write_text(json.dumps(values | {"metadata": self.metadata}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ProbeReport:
        values = read_json(path, what="probe report")
        try:
            report = cls(**values)
        except TypeError as error:
            raise ConfigError(f"{path} is not a probe report ({error}).") from None
        for row in report.rows:
            row["mask"] = tuple(row["mask"])
        return report


def probe_redundancy(
    model: nn.Module,
    task: Any,
    kinds: Sequence[str] = ("mha", "ffn"),
    num_skipped: int | Sequence[int] = (1, 2, 4),
    trials: int = 5,
    seed: int = 0,
    split: str = "val",
    limit: int | None = None,
    batch_size: int = 64,
    callback: Callable[[dict], Any] | None = None,
    progress: bool = True,
) -> ProbeReport:
    """Skips k random sites of each kind, several times, without tuning, and scores the model each time.

    kinds: "mha", "ffn", or "layer" (both at the same layers). num_skipped: the k's. trials: random sets of layers per
    k, all different (fewer if there are not that many); the same for every kind. split, limit, batch_size go to
    `task.score`: teacher-forced loss and accuracy. callback: called with each row as soon as it is measured.

    Raises ConfigError for an unknown kind, or a k that leaves no layer, TaskError for a task without
    `score`.
    """
    check_task("probe_redundancy", task, "score")
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    num_skipped = (num_skipped,) if isinstance(num_skipped, int) else tuple(num_skipped)
    num_layers = len(find_sites(model))
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"kinds: wanted some of {KINDS}, got {kind!r}")
    for k in num_skipped:
        if not 0 < k < num_layers:
            raise ConfigError(f"num_skipped: wanted numbers from 1 to {num_layers - 1}, got {k}")
    masks = random_masks(num_layers, num_skipped, trials, seed)
    began = time.perf_counter()
    dense = task.score(model, split, limit=limit, batch_size=batch_size)
    rows = []
    for k, trial, mask, kind in _watched([(*m, kind) for m in masks for kind in kinds], "probe", progress):
        found = score_without(model, task, kind, mask, split, limit, batch_size)
        rows.append({"kind": kind, "k": k, "trial": trial, "mask": mask, **found})
        if callback is not None:
            callback(rows[-1])
    seconds = time.perf_counter() - began
    metadata = {
        "task": getattr(task, "name", type(task).__name__),
        "split": split,
        "count": dense["count"],
        "seed": seed,
        "trials": trials,
        "num_sites": num_layers,
        "seconds": seconds,
    }
    rows.sort(key=lambda row: (kinds.index(row["kind"]), row["k"], row["trial"]))
    return ProbeReport(rows, _numbers(dense), (len(rows) + 1) / seconds, metadata)


def single_site_sweep(
    model: nn.Module,
    task: Any,
    kinds: Sequence[str] = ("mha", "ffn"),
    split: str = "val",
    limit: int | None = None,
    batch_size: int = 64,
    callback: Callable[[dict], Any] | None = None,
    progress: bool = True,
) -> pandas.DataFrame:
    """Skips each single site by itself: kind, site, loss, accuracy, and their changes from dense (loss_change, ...)."""
    import pandas as pd

    check_task("single_site_sweep", task, "score")
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    dense = _numbers(task.score(model, split, limit=limit, batch_size=batch_size))
    rows = []
    pairs = [(kind, site) for kind in kinds for site in range(len(find_sites(model)))]
    for kind, site in _watched(pairs, "sweep", progress):
        found = score_without(model, task, kind, (site,), split, limit, batch_size)
        change = {f"{name}_change": found[name] - dense[name] for name in ("loss", "accuracy")}
        rows.append({"kind": kind, "site": site, **found, **change})
        if callback is not None:
            callback(rows[-1])
    return pd.DataFrame(rows)


def score_without(
    model: nn.Module,
    task: Any,
    kind: str,
    mask: Sequence[int],
    split: str = "val",
    limit: int | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """loss and accuracy with these sites skipped and nothing in their place. kind "layer": attention and FFN both."""
    if kind not in KINDS:
        raise ConfigError(f"kind: wanted one of {KINDS}, got {kind!r}")
    mha, ffn = (() if kind == "ffn" else mask), (() if kind == "mha" else mask)
    with skipping(model, mha=mha, ffn=ffn):
        return _numbers(task.score(model, split, limit=limit, batch_size=batch_size))


def random_masks(num_layers: int, num_skipped: Iterable[int], trials: int, seed: int) -> list[tuple]:
    """(k, trial, mask) with different masks within a k; a mask depends on (seed, k, trial), not on the other k's."""
    found = []
    for k in num_skipped:
        rng = np.random.default_rng([seed, k])
        wanted = min(trials, math.comb(num_layers, k))
        masks = draw_masks(torch.zeros(num_layers), k, wanted, rng)
        found += [(k, trial, mask) for trial, mask in enumerate(masks)]
    return found


def _numbers(score: dict) -> dict[str, float]:
    return {"loss": float(score["loss"]), "accuracy": float(score["accuracy"])}


def _watched(items: list, title: str, progress: bool) -> Iterator:
    from tqdm.auto import tqdm

    return iter(tqdm(items, desc=title, unit="run", disable=not progress))
