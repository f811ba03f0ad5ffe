"""The model card beside the weights, written from the measured scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

_CARD = """\
---
license: apache-2.0
library_name: transformers
---
# tiny-meter

METER small enough for one CPU core: RoBERTa (2 layers), CLIP's vision tower (2 blocks, 24 x 24 pixels in 3 x 3
patches) and 6 co-attention layers a stream, width 64, 4 heads, feed-forward 128. {millions:.2f} M parameters with its three
heads, bfloat16, {megabytes:.1f} MB. It exists to show on METER's own parts what Effective Attention Skipping does; it is of
no other use.

## How it was made

`python -m eas_kit.models.tiny_meter --out DIR`, from random weights, {minutes:.1f} minutes of one core; `recipe.json` holds
every setting. Each tower first learns by itself what is where ({tower_steps} steps); then the whole model reads captions
with half of their digits masked and answers questions ({seeing_steps} steps), and then, up to step {steps}, three tasks:
questions on a board (kinds {question}), sentences on two boards (kinds {sentence}), and whether a caption of one or two digits is true of
a board. The tasks' other kinds are new to it. All pictures are of scikit-learn's handwritten digits (UCI, CC BY 4.0);
scans are split by digit into train / search / val / test, and only train was seen.

## Scores

Untuned, split test, seed {seed}, float32 (`python -m eas_kit.models.tiny_meter --score`); all of it in `scores.json`. *Guess*:
the best constant answer to each kind of question. *Known*, *new*: kinds that pretraining had, and that it had not.

| task | accuracy | guess | known | new |
| --- | --- | --- | --- | --- |
{scores}

Retrieval, {pairs} pairs: {recalls}; in any order R@1 would be {any_order:.1%}. It reads single cells ({cell:.1%} of the
questions of kind cell; guessing: 10%). Where a number is that of guessing, the head has learned nothing yet.

## Tuned with and without attentions

{steps_tuned} steps of batch 32, rank {rank}, seed {seed}, split test (`python -m eas_kit.models.tiny_meter --tune`). One seed
and few steps: the pipeline at work, not a ranking of masks. With nothing skipped there is no adapter, and the head alone
trains.

| task | skipped of 24 | by | accuracy | loss | sites |
| --- | --- | --- | --- | --- | --- |
{tuned}
"""


def write_card(folder: Path, found: dict[str, Any], minutes: float) -> None:
    """Write ``folder/README.md`` from the scores and the recipe in ``folder``."""
    from eas_kit.models.meter_loading import HEADS_FILE
    from eas_kit.tasks.board_texts import PRETRAINED

    from .scores import RANK

    recipe = json.loads((folder / "recipe.json").read_text())["recipe"]
    files = (folder / "model.safetensors", folder / HEADS_FILE)
    count = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if not name.startswith("head.")]  # noqa: SIM118, not a dict
            count += sum(opened.get_tensor(name).numel() for name in names)
    rows = []
    for name in ("boards-vqa", "boards-nlvr2"):
        one = found[name]
        columns = [f"{one['columns'][key]:.1%}" for key in ("known", "new")]
        rows.append(f"| {name} | {one['accuracy']:.1%} | {one['chance']:.1%} | {' | '.join(columns)} |")
    ranked = json.loads(json.dumps(found["boards-retrieval"]))  # whose keys are texts, as in the file
    tuned = [
        f"| {row['task']} | {row['k']} | {row['by']} | {row['accuracy']:.1%} |"
        f" {'' if row['loss'] is None else format(row['loss'], '.3f')} | {row['mask'] or 'none'} |"
        for row in found.get("tuned", ())
    ]
    text = _CARD.format(
        millions=count / 1e6,
        megabytes=sum(file.stat().st_size for file in files) / 1e6,
        minutes=minutes,
        question=", ".join(PRETRAINED["question"]),
        sentence=", ".join(PRETRAINED["sentence"]),
        seed=found["seed"],
        scores="\n".join(rows),
        pairs=f"{ranked['count']:,}",
        recalls=", ".join(f"{key} {value:.1%}" for key, value in ranked["columns"].items()),
        any_order=ranked["chance"]["text_retrieval"]["1"],
        cell=found["boards-vqa"]["columns"]["cell"],
        tuned="\n".join(tuned),
        steps_tuned=found["tuned"][0]["steps"] if found.get("tuned") else "No",
        rank=RANK,
        **{key: recipe[key] for key in ("tower_steps", "seeing_steps", "steps")},
    )
    (folder / "README.md").write_text(text)
