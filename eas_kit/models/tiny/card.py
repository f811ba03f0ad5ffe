"""The model card beside the weights, written from the measured scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_PROBED = ("reading", "definitions")
_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The bundled model of eas_kit

A LLaVA small enough for two CPU cores: `LlavaForConditionalGeneration` with a CLIP vision tower (2 layers, width 96,
24 x 24 pixels in 3 x 3 patches), a two-layer projector, and a Llama decoder (12 layers, width 128, feed-forward 352,
4 heads, vocabulary 2,048, tied embeddings). {millions:.1f} M parameters, bfloat16, {megabytes:.1f} MB. It exists to show
on real parts what Effective Attention Skipping does; it is of no other use.

## How it was made

`python -m eas_kit.models.tiny --out DIR`, from random weights, {minutes} on one core; `recipe.json` holds every
setting. First the vision tower alone learns to tell digits apart ({vision_steps} steps, with a linear head that is then
thrown away); then the whole model reads boards and numbers, one picture a row ({seeing_steps} steps), and then packed rows
of everything, up to step {steps}, in two cycles of the learning rate. (Where a picture no longer fits into a row, a
definition takes its place.) No LayerDrop, no dropout, nothing that treats attentions and feed-forwards unlike.

| data | licence | share of the documents | and in the last {last} steps |
| --- | --- | --- | --- |
| WordNet 3.0's 117,659 definitions, one in a hundred held out | WordNet licence (Princeton University) | {definition:.0%} | {end[definition]:.0%} |
| statements about the 118 elements, from the package mendeleev | MIT | {fact:.0%} | {end[fact]:.0%} |
| pictures of atomic numbers, in handwritten digits | scikit-learn's digits (UCI, CC BY 4.0) | {number:.0%} | {end[number]:.0%} |
| pictures of 3 x 3 boards of handwritten digits | the same | {board:.0%} | {end[board]:.0%} |

Digit scans are split by digit into train / search / val / test (60 / 10 / 10 / 20 %); only train was seen. The question
format of the tasks `elements` and `digits` does not occur in pretraining.

## Scores

Measured by `python -m eas_kit.models.tiny --out DIR --score`, split test, seed {seed}, in float32; all of it in `scores.json`.

| what | accuracy | count |
| --- | --- | --- |
{scores}

Loss on held-out definitions: {definitions:.2f} a token ({definitions_accuracy:.0%} of tokens are the most likely one).

Loss change when one attention or feed-forward is skipped (split val, 150 examples, no tuning). Sites that
cost more than 0.05: {heavy}.

| layer | {layers} |
| --- |{rule}
{sites}

## Tuned with and without attentions

Notebook 03's comparison, `eas-kit run 03_train_pia --params notebooks/params/full.yaml`; the table is written by
`benchmarks/fill_readme.py`.

{tuning}

## Limits

It knows nothing but the above. It reads one picture a question, with unscaled digits in the nine cells of a grid. It
does not follow instructions, does not chat, and cannot bind option letters: answers are the options' texts. WordNet's
definitions contain dated and offensive words, so its text can, too.
"""


def _heavy(found: dict[str, Any]) -> str:
    """How many sites cost more than 0.05 alone, in words."""
    counts = [
        " and ".join(f"{sum(x > 0.05 for x in found[f'sites, {task}'][key])} on {task}" for task in _PROBED)
        for key in ("mha", "ffn")
    ]
    return f"attentions {counts[0]}, feed-forwards {counts[1]}"


def _kept_tuning(card: Path) -> str:
    """The block of numbers that another script wrote into the card, or an empty one to be filled."""
    block = re.compile(r"<!-- numbers:tuning -->\n.*?<!-- /numbers:tuning -->", re.DOTALL)
    found = block.search(card.read_text()) if card.exists() else None
    return found[0] if found else "<!-- numbers:tuning -->\n<!-- /numbers:tuning -->"


def write_card(folder: Path, found: dict[str, Any], minutes: str) -> None:
    """Write ``folder/README.md`` from the scores and the recipe in ``folder``."""
    facts = json.loads((folder / "recipe.json").read_text())
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    reading = found["reading"]
    rows = [(f"reading: {k}", v, reading["column_counts"][k]) for k, v in reading["columns"].items()]
    names = {
        "elements zero-shot, options": "elements, zero-shot, the likeliest option",
        "elements zero-shot, generate": "elements, zero-shot, greedy text parsed as an answer",
        "elements, fully tuned": "elements, fully tuned",
    }
    rows += [(name, found[key]["accuracy"], found[key]["count"]) for key, name in names.items() if key in found]
    rows.append(("elements, guessing", found["chance on elements"], ""))
    layers = len(found["sites, reading"]["mha"])
    sites = [
        f"| {kind}, {task} | " + " | ".join(f"{x:+.2f}" for x in found[f"sites, {task}"][key]) + " |"
        for task in _PROBED
        for kind, key in (("attention", "mha"), ("feed-forward", "ffn"))
    ]
    text = _CARD.format(
        millions=size / 2e6,
        megabytes=size / 1e6,
        minutes=minutes,
        **{k: facts["recipe"][k] for k in ("vision_steps", "seeing_steps", "steps")},
        **facts["mixture"],
        end=facts["mixture at the end"],
        last=facts["recipe"]["steps"] - facts["recipe"]["reading_steps"],
        seed=found["seed"],
        scores="\n".join(f"| {name} | {value:.1%} | {count} |" for name, value, count in rows),
        definitions=found["definitions"]["loss"],
        definitions_accuracy=found["definitions"]["accuracy"],
        layers=" | ".join(map(str, range(layers))),
        rule=" --- |" * layers,
        sites="\n".join(sites),
        heavy=_heavy(found),
        tuning=_kept_tuning(folder / "README.md"),
    )
    (folder / "README.md").write_text(text)
