"""``python -m eas_kit.models.tiny --out DIR``: pretrain the bundled model from scratch."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from eas_kit.models.tiny.corpus import WORDNET
from eas_kit.models.tiny.pretrain import Recipe, pretrain


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eas_kit.models.tiny", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and weights")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="folder with WordNet's data.noun etc.")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is fastest at this size")
    for name in ("steps", "learning_rate", "seed"):
        field = next(f for f in fields(Recipe) if f.name == name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = Recipe(steps=given.steps, learning_rate=given.learning_rate, seed=given.seed)
    print(f"wrote {pretrain(given.out, recipe, given.wordnet, given.resume)}")


if __name__ == "__main__":
    main()
