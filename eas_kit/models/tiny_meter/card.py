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
every setting.

1. Each tower by itself ({tower_steps} steps): the same linear heads name digit and place of each patch and of each
   digit in a caption, so that pictures and texts speak of both alike.
2. Captions of four digits, some masked, some replaced (up to step {reading_steps}): at each digit, which one the board has
   there, and whether the caption's is less, the same or more; beside it, and in 3, a few questions and whole captions.
3. The same, and of digits in a row whether the board has them at all (up to step {seeing_steps}).
4. The three tasks (up to step {steps}): questions on a board (kinds {question}), sentences on two boards
   (kinds {sentence}), whether a caption of one or two digits is true of a board. The tasks' other
   kinds ({new}), and captions of three digits, are new to it.

All pictures are of scikit-learn's handwritten digits (UCI, CC BY 4.0); scans are split by digit into train / search /
val / test, and only train was seen.

## Scores

Untuned, split test, seed {seed}, float32 (`python -m eas_kit.models.tiny_meter --score`); all of it in `scores.json`. *Guess*:
the best constant answer to each kind of question. *Known*, *new*: kinds that pretraining had, and that it had not.

| task | accuracy | guess | known | new |
| --- | --- | --- | --- | --- |
{scores}

Retrieval, {pairs} pairs: {recalls}; in any order R@1 would be {any_order:.1%}. A caption of two digits is true of
every hundredth board: of {ranked} boards, in every second case of one that it was not written for, so that not even a
faultless judge has all.

Kind by kind: {kinds}.

## Tuned with and without attentions

{steps_tuned} steps of batch {batch}, learning rate {rate:g}, seed {seed}, split test (`python -m
eas_kit.models.tiny_meter --tune`, a task each). The base is frozen. *By*, and what trains (*trained* counts the parameters):
"untuned" nothing; "head" the head alone; "lora" the head and LoRA of rank {lora} on queries and values of all 24 attentions,
about as many parameters as the adapters of 8 sites; "random" and "bandit" the head and the adapters of rank {rank} at the
skipped sites, drawn at random or found by a short search. So "lora" is the row to compare with, and "head" says what
comes without adapters. One seed and few steps: what skipping costs here, not a ranking of masks. Of retrieval the
accuracy is the mean of the six recalls.

| task | skipped of 24 | by | trained | accuracy | known | new | sites |
| --- | --- | --- | --- | --- | --- | --- | --- |
{tuned}
"""


def write_card(folder: Path, found: dict[str, Any], minutes: float) -> None:
    """Write ``folder/README.md`` from the scores and the recipe in ``folder``."""
    from eas_kit.models.meter_loading import HEADS_FILE
    from eas_kit.tasks.board_texts import PRETRAINED, QUESTIONS, SENTENCES

    from .scores import LORA_RANK, RANK, RANKED, TUNING

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
    kinds = {
        kind: share
        for name in ("boards-vqa", "boards-nlvr2")
        for kind, share in found[name]["columns"].items()
        if kind not in ("known", "new")
    }
    new = [kind for kind in (*QUESTIONS, *SENTENCES) if kind not in PRETRAINED["question"] + PRETRAINED["sentence"]]
    text = _CARD.format(
        millions=count / 1e6,
        megabytes=sum(file.stat().st_size for file in files) / 1e6,
        minutes=minutes,
        question=", ".join(PRETRAINED["question"]),
        sentence=", ".join(PRETRAINED["sentence"]),
        new=", ".join(new),
        seed=found["seed"],
        scores="\n".join(rows),
        pairs=f"{ranked['count']:,}",
        recalls=", ".join(f"{key} {value:.1%}" for key, value in ranked["columns"].items()),
        ranked=RANKED,
        any_order=ranked["chance"]["text_retrieval"]["1"],
        kinds=", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items()),
        tuned="\n".join(_tuned(found)),
        steps_tuned=found["tuned"][0]["steps"] if found.get("tuned") else "No",
        batch=TUNING["batch_size"],
        rate=TUNING["learning_rate"],
        lora=LORA_RANK,
        rank=RANK,
        **{key: recipe[key] for key in ("tower_steps", "reading_steps", "seeing_steps", "steps")},
    )
    (folder / "README.md").write_text(text)


def _tuned(found: dict[str, Any]) -> list[str]:
    """Lines of the table: of each task that was tuned, first the untuned model."""
    lines, told = [], set()
    for row in found.get("tuned", ()):
        if row["task"] not in told:
            told.add(row["task"])
            lines.append(
                _line({"task": row["task"], "k": 0, "by": "untuned", "trained": 0, "mask": []} | found[row["task"]])
            )
        lines.append(_line(row))
    return lines


def _line(row: dict[str, Any]) -> str:
    split = [f"{row['columns'][key]:.1%}" if key in row["columns"] else "" for key in ("known", "new")]
    cells = (row["task"], row["k"], row["by"], f"{row['trained']:,}", f"{row['accuracy']:.1%}", *split)
    return f"| {' | '.join(map(str, cells))} | {', '.join(map(str, row['mask'])) or 'none'} |"
