"""What `tiny-meter` can do, and what it learns with attentions skipped: the numbers of its model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eas_kit.bandit import draw_masks
from eas_kit.config import EASConfig, SearchConfig, TrainConfig
from eas_kit.model import attach
from eas_kit.models import load_model
from eas_kit.tasks import load_task
from eas_kit.training import fit, search

TASKS = {"vqa": "boards-vqa", "nlvr2": "boards-nlvr2", "retrieval": "boards-retrieval"}
RANKED = 50  # boards in a retrieval, each with two captions
RANK = 16
TUNING = {"batch_size": 32, "learning_rate": 2e-3, "lr_warmup_steps": 20, "progress": False}
SEARCH = {"warmup_steps": 20, "updates": 8, "train_steps_per_update": 4, "reward_batch_size": 48}


def score(seed: int = 0) -> dict[str, Any]:
    """The bundled weights, untuned, on the test splits; of retrieval RANKED boards."""
    found: dict[str, Any] = {"seed": seed}
    for head, name in TASKS.items():
        model, processor = load_model("tiny-meter", task=head)
        task = load_task(name, processor, seed=seed)
        limit = RANKED if head == "retrieval" else None
        report = task.evaluate(model, "test", limit=limit)
        kept = ("accuracy", "loss", "count", "columns", "chance", "consistency")
        found[name] = {key: report[key] for key in kept if key in report}
    return found


def tune(
    name: str = "boards-vqa", num_skipped: Sequence[int] = (4, 8, 12), steps: int = 200, seed: int = 0
) -> list[dict[str, Any]]:
    """Test accuracy after as many tuning steps: nothing skipped (the head alone trains), and k of 24 by two choices.

    Every arm starts from the bundled weights and tunes head and adapters on train for `steps` steps; the bandit's
    search comes before and its adapters are drawn anew, so that all arms train alike.
    """
    head = next(task for task, known in TASKS.items() if known == name)
    rows = [_arm(head, name, "none", 0, steps, seed)]
    for k in num_skipped:
        rows += [_arm(head, name, by, k, steps, seed) for by in ("random", "bandit")]
    return rows


def _arm(head: str, name: str, by: str, k: int, steps: int, seed: int) -> dict[str, Any]:
    model, processor = load_model("tiny-meter", task=head)
    task = load_task(name, processor, seed=seed)
    mask: tuple[int, ...] = ()
    if by == "bandit":
        mask = search(_attached(model, seed), task, SearchConfig(num_skipped=k, seed=seed, **TUNING | SEARCH)).skipped
        model, _ = load_model("tiny-meter", task=head)
    elif k:
        (mask,) = draw_masks(torch.zeros(24), k, 1, np.random.default_rng([seed, k]))
    net = _attached(model, seed)
    net.mask = mask
    fit(net, task, TrainConfig(max_steps=steps, seed=seed, **TUNING))
    report = task.evaluate(net.eval(), "test", limit=RANKED if head == "retrieval" else None)
    row = {"task": name, "by": by, "k": k, "mask": list(mask), "steps": steps, "seed": seed}
    return row | {key: report[key] for key in ("accuracy", "loss", "columns")}


def _attached(model: Any, seed: int):
    torch.manual_seed(seed)
    return attach(model, EASConfig(skip_rank=RANK, adapt_rank=0))


def write_scores(folder: Path, found: dict[str, Any]) -> None:
    """Keep the scores beside the weights, for the card and for tests."""
    (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
