"""``python -m eas_kit.models.tiny --out DIR``: pretrain the bundled model from scratch, and measure it."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path

import torch

from eas_kit.models.tiny.card import write_card
from eas_kit.models.tiny.corpus import WORDNET
from eas_kit.models.tiny.pretrain import Recipe, pretrain
from eas_kit.models.tiny.scores import score, write_scores


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eas_kit.models.tiny", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and weights")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--score", action="store_true", help="only measure OUT/weights and write its model card")
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="folder with WordNet's data.noun etc.")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is fastest at this size")
    for field in fields(Recipe):
        if isinstance(field.default, int | float):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.score:
        recipe = Recipe(**{f.name: getattr(given, f.name) for f in fields(Recipe) if hasattr(given, f.name)})
        print(f"wrote {pretrain(given.out, recipe, given.wordnet, given.resume)}", flush=True)
    folder = given.out / "weights"
    found = score(folder, given.seed)
    write_scores(folder, found)
    write_card(folder, found, minutes_of(given.out / "log.jsonl"))
    for name, value in found.items():
        print(f"{name}: {json.dumps(value)}")


def minutes_of(log: Path) -> str:
    """Training time as the log has it, cut-off runs included."""
    seconds = [json.loads(line).get("seconds", 0.0) for line in log.read_text().splitlines()] if log.exists() else []
    return f"{sum(seconds) / 60:.0f} minutes" if sum(seconds) else "some minutes"


if __name__ == "__main__":
    main()
