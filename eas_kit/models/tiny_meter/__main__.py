"""``python -m eas_kit.models.tiny_meter``: pretrain the bundled METER from scratch (--out), --score it, --tune it."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path

import torch

from eas_kit.models.meter_loading import TINY
from eas_kit.models.tiny_meter.card import write_card
from eas_kit.models.tiny_meter.pretrain import Recipe, pretrain
from eas_kit.models.tiny_meter.scores import TASKS, score, tune, write_scores

STAGES = ("reading", "seeing", "mixture")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eas_kit.models.tiny_meter", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for checkpoints, log and weights")
    what.add_argument("--score", action="store_true", help="measure the bundled weights and write their card")
    what.add_argument("--tune", action="store_true", help="tune the bundled weights with attentions skipped")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--task", choices=TASKS.values(), default="boards-vqa", help="of --tune")
    parser.add_argument("--tuning-steps", type=int, default=200, help="of --tune")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is fastest at this size")
    for field in fields(Recipe):
        if isinstance(field.default, int | float):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    for name in STAGES:
        default = getattr(Recipe(), name)
        parser.add_argument(f"--{name}", type=int, nargs=len(default), default=default, help="examples a step")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.out:
        settings = {f.name: getattr(given, f.name) for f in fields(Recipe) if hasattr(given, f.name)}
        recipe = Recipe(**settings | {name: tuple(settings[name]) for name in STAGES})
        print(f"wrote {pretrain(given.out, recipe, given.resume)}; move it to {TINY}, then --score", flush=True)
        return
    scores = TINY / "scores.json"
    found = json.loads(scores.read_text()) if scores.exists() else {}
    if given.score:
        found = {"tuned": found.get("tuned", [])} | score(given.seed)
    else:
        rows = tune(given.task, steps=given.tuning_steps, seed=given.seed)
        found["tuned"] = [row for row in found.get("tuned", []) if row["task"] != given.task] + rows
    write_scores(TINY, found)
    write_card(TINY, found, json.loads((TINY / "recipe.json").read_text())["cpu_minutes"])
    for name, value in found.items():
        print(f"{name}: {json.dumps(value)}")


if __name__ == "__main__":
    main()
