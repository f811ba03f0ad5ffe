"""What `tiny-meter` can do, and what it learns with attentions skipped: the numbers of its model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from eas_kit.bandit import draw_masks
from eas_kit.config import EASConfig, SearchConfig, TrainConfig
from eas_kit.model import attach
from eas_kit.models import load_model
from eas_kit.tasks import load_task
from eas_kit.training import fit, search

TASKS = {"vqa": "boards-vqa", "nlvr2": "boards-nlvr2", "retrieval": "boards-retrieval"}
RANKED = 50  # boards in a retrieval, each with two captions
RANK = 16
LORA_RANK = 4
FALSE_TEXTS = 7
TUNING = {"batch_size": 16, "learning_rate": 2e-3, "lr_warmup_steps": 20, "progress": False}
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
    """Test accuracy after as many tuning steps: nothing skipped, and k of 24 by two choices.

    Every arm starts from the bundled weights and tunes on train for `steps` steps: "head" the head alone, "lora" the
    head and LoRA of LORA_RANK on queries and values of all 24 attentions (none skipped; about as many parameters as
    the adapters of 8 skipped sites), "random" and "bandit" the head and the adapters of the k skipped sites. The
    bandit's search comes before and its adapters are drawn anew, so that all arms train alike.
    """
    head = next(task for task, known in TASKS.items() if known == name)
    arms = [("head", 0), ("lora", 0), *((by, k) for k in num_skipped for by in ("random", "bandit"))]
    return [_arm(head, name, by, k, steps, seed) for by, k in arms]


def _arm(head: str, name: str, by: str, k: int, steps: int, seed: int) -> dict[str, Any]:
    model, processor = load_model("tiny-meter", task=head)
    task = load_task(name, processor, seed=seed, **({"false_texts": FALSE_TEXTS} if head == "retrieval" else {}))
    mask: tuple[int, ...] = ()
    if by == "bandit":
        mask = search(_attached(model, seed), task, SearchConfig(num_skipped=k, seed=seed, **TUNING | SEARCH)).skipped
        model, _ = load_model("tiny-meter", task=head)
    elif k:
        (mask,) = draw_masks(torch.zeros(24), k, 1, np.random.default_rng([seed, k]))
    if by == "lora":
        net = _with_lora(model, seed)
        trained = [p for p in net.parameters() if p.requires_grad]
    else:
        net = _attached(model, seed)
        net.mask = mask
        trained = net.trainable_parameters(active=True)
    row = {"task": name, "by": by, "k": k, "mask": list(mask), "steps": steps, "seed": seed}
    row["trained"] = sum(p.numel() for p in trained)
    fit(net, task, TrainConfig(max_steps=steps, seed=seed, **TUNING))
    report = task.evaluate(net.eval(), "test", limit=RANKED if head == "retrieval" else None)
    return row | {key: report[key] for key in ("accuracy", "loss", "columns")}


def _attached(model: Any, seed: int):
    torch.manual_seed(seed)
    return attach(model, EASConfig(skip_rank=RANK, adapt_rank=0))


def _with_lora(model: Any, seed: int):
    torch.manual_seed(seed)
    targets = r"(text|image)_layers\.\d+\.(attention|crossattention)\.self\.(query|value)"
    return get_peft_model(
        model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets, modules_to_save=["head"])
    )


def write_scores(folder: Path, found: dict[str, Any]) -> None:
    """Keep the scores beside the weights, for the card and for tests."""
    (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
