"""What the bundled model can do, measured on held-out digit scans: the numbers of its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eas_kit.arms import LEARNING_RATES
from eas_kit.config import TrainConfig
from eas_kit.models import load_model
from eas_kit.probe import single_site_sweep
from eas_kit.tasks import load_task
from eas_kit.training import fit

FULL_TUNING = {"max_steps": 600, "batch_size": 8, "learning_rate": LEARNING_RATES["full"], "lr_warmup_steps": 20}


def score(folder: Path, seed: int = 0, tune: bool = True) -> dict[str, Any]:
    """Scores of the model in ``folder``; the test splits, of which ``count`` examples each.

    ``reading``: what it was pretrained to state. ``definitions``: loss on dictionary text it never read.
    ``elements``: zero-shot, and after full tuning on ``elements`` (``tune``). ``sites``: loss change on ``reading``
    and on ``definitions`` when one attention or feed-forward is skipped.
    """
    model, processor = load_model(folder, dtype="float32", attn_implementation="eager")
    reading = load_task("reading", processor, sizes={"test": 3000})
    found: dict[str, Any] = {"seed": seed}
    report = reading.evaluate(model, "test")
    found["reading"] = {k: report[k] for k in ("accuracy", "loss", "count", "columns", "column_counts")}
    found["definitions"] = load_task("definitions", processor).score(model, "test")
    elements = load_task("elements", processor)
    for method in ("options", "generate"):
        report = elements.evaluate(model, "test", method=method)
        found[f"elements zero-shot, {method}"] = {k: report[k] for k in ("accuracy", "count", "unparsed", "columns")}
    found["chance on elements"] = sum(1 / len(e.choices) for e in elements.test) / len(elements.test)
    for name in ("reading", "definitions"):
        task = load_task(name, processor)
        sweep = single_site_sweep(model, task, split="val", limit=150, progress=False)
        found[f"sites, {name}"] = {
            kind: [round(x, 4) for x in sweep[sweep["kind"] == kind]["loss_change"]] for kind in ("mha", "ffn")
        }
    if tune:
        model.requires_grad_(True)
        model.train()
        fit(model, elements, TrainConfig(**FULL_TUNING, seed=seed, progress=False))
        model.eval()
        report = elements.evaluate(model, "test")
        found["elements, fully tuned"] = {
            **{k: report[k] for k in ("accuracy", "count", "unparsed", "columns")},
            "training": FULL_TUNING,
        }
    return found


def write_scores(folder: Path, found: dict[str, Any]) -> None:
    """Keep the scores beside the weights, for the card and for tests."""
    (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
