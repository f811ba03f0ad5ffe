"""Retrieval by a model that reads a picture and a caption together: every pair is scored, ranks give R@1, R@5, R@10.

Text retrieval: all captions are ranked for each picture, and R@k is the share of pictures with at least one of their
own among the first k. Image retrieval: all pictures are ranked for each caption, and R@k is the share of captions whose
picture is among the first k. Ties do not help (``metrics.recall_at``).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eas_kit.errors import DataError, TaskError
from eas_kit.tasks.base import Example
from eas_kit.tasks.evaluation import IGNORED, _describe, evaluating
from eas_kit.tasks.metrics import recall_at
from eas_kit.tasks.predictions import Prediction, PredictionsFile, read_predictions, settings_path

KS = (1, 5, 10)
METHODS = ("yes_no", "matching")
MATCHING = "the caption alone, as the matching head was trained"
DRAWN = "pictures at random by seed, those of 10 are among those of 20; captions: the first of each picture"


# ---------------------------------------------------------------------- what is ranked
@dataclass(frozen=True)
class Gallery:
    """The pictures, and the captions of all of them in one list: ``owner[j]`` is the number of caption j's picture.

    ``subset`` says how it was drawn, and from how many.
    """

    pictures: Sequence[Example]  # references: the captions
    captions: Sequence[str]
    owner: np.ndarray  # (N,)
    subset: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """A hash of names and captions in order: whether scores are those of this gallery."""
        listed = [(e.id, list(e.references)) for e in self.pictures]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def draw(
    task, pictures: Sequence[Example], split: str, images: int | None, captions_per_image: int | None, seed: int
) -> Gallery:
    """So many of the pictures (None: all), in their order, with so many captions of each (None: all).

    Raises:
        TaskError: for less than two pictures, or less than one caption.
    """
    for name, value, least in (("images", images, 2), ("captions_per_image", captions_per_image, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise TaskError(f"{task.name}: {name} is a whole number from {least} up, or None for all; not {value!r}")
    if len(pictures) < 2:
        raise TaskError(f"{task.name}: retrieval wants two pictures or more, {split} has {len(pictures)}")
    order = random.Random(f"{seed} retrieval {split}").sample(range(len(pictures)), len(pictures))
    chosen = [pictures[i] for i in sorted(order[:images])]
    chosen = [replace(e, references=e.references[:captions_per_image]) for e in chosen]
    owner = np.repeat(np.arange(len(chosen)), [len(e.references) for e in chosen])
    subset = {"images": len(chosen), "of": len(pictures), "captions": len(owner)}
    subset |= {"captions_per_image": captions_per_image or "all", "seed": seed, "drawn": DRAWN}
    return Gallery(chosen, [c for e in chosen for c in e.references], owner, subset)


# ---------------------------------------------------------------------- the score of a pair
def yes_no_scores(task, model, picture: Example, captions: Sequence[str]) -> torch.Tensor:
    """(B,) log p of Yes - log p of No at the first token in which the two answers differ, one forward for both.

    As teacher forcing reads them: the answer stands behind its prompt, so that the model can tell them apart by the
    labels, and what both answers begin with (a blank) has been read. The two log p have the same normaliser, so this is
    the difference of two logits.
    """
    pairs = [task.pair(picture, caption, True) for caption in captions]
    yes, no = (task.target_ids(task.pair(picture, captions[0], matching))[0] for matching in (True, False))
    place = next((i for i, (a, b) in enumerate(zip(yes, no)) if a != b), None)
    if place is None:
        raise TaskError(
            f"{task.name}: this tokenizer writes Yes and No in the same way, {yes}, so they cannot be told apart; take"
            " method='matching', or another model"
        )
    batch = _on_device(task.collate(pairs), model)
    first = (batch["labels"] != IGNORED).int().argmax(1)  # (B,), where the answer begins
    logits = model(**batch).logits[torch.arange(len(pairs), device=first.device), first - 1 + place].float()
    return logits[:, yes[place]] - logits[:, no[place]]


def matching_scores(task, model, picture: Example, captions: Sequence[str]) -> torch.Tensor:
    """(B,) scores of a matching head: (B, 1) as it is, of (B, 2) the second less the first.

    The head is the output's ``itm_score`` (BLIP) or ``logits`` (ViLT, BridgeTower, and models like METER that are
    called in their way).
    """
    longest = min(
        getattr(task.tokenizer, "model_max_length", math.inf),
        getattr(getattr(model, "config", None), "max_position_embeddings", math.inf),
    )
    cut = {"truncation": True, "max_length": int(longest)} if longest < 1e9 else {}  # 1e30 stands for "not known"
    images = [picture.images[0]] * len(captions)
    batch = task.processor(images=images, text=list(captions), padding=True, return_tensors="pt", **cut)
    output = model(**_on_device(batch, model, cast=True))
    for name in ("itm_score", "logits"):
        found = getattr(output, name, None)
        if isinstance(found, torch.Tensor):
            break
    else:
        raise TaskError(
            f"{task.name}: wanted logits or itm_score in the output of {type(model).__name__}, it has"
            f" {', '.join(output.keys())}; take a model with a head for image-text matching"
        )
    if found.ndim != 2 or len(found) != len(captions) or found.shape[1] not in (1, 2):
        raise TaskError(
            f"{task.name}: wanted {name} of {type(model).__name__} as (B, 1) or (B, 2) for B = {len(captions)} pairs,"
            f" got {tuple(found.shape)}; for a model that writes take method='yes_no'"
        )
    return (found[:, -1] - found[:, 0] if found.shape[1] == 2 else found[:, 0]).float()


def _on_device(batch: Mapping[str, Any], model, cast: bool = False) -> dict[str, Any]:
    parameter = next(model.parameters())
    moved = {k: v.to(parameter.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    if not cast:
        return moved
    floats = (k for k, v in moved.items() if isinstance(v, torch.Tensor) and v.is_floating_point())
    return moved | {k: moved[k].to(parameter.dtype) for k in floats}


# ---------------------------------------------------------------------- all pairs
def retrieve(
    task, model, gallery: Gallery, split: str, method: str, batch_size: int, progress: bool, path: str | Path | None
) -> dict[str, Any]:
    """See ``Flickr30K.retrieve``."""
    if method not in METHODS:
        raise TaskError(f"{task.name}: the method of retrieval is one of {', '.join(METHODS)}, not {method!r}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise TaskError(f"batch_size is a whole number from 1 up, not {batch_size!r}")
    if task.processor is None:
        raise TaskError(f"{task.name} was loaded without a processor, to score answers only; load it with the model's")
    began = time.perf_counter()
    made_by = _said(task, gallery, split, method)
    settings = made_by | {"gallery": gallery.digest, "model": _describe(model)}
    file = None if path is None else PredictionsFile(path, settings, known={e.id for e in gallery.pictures})
    found = {} if file is None else dict(file.done)
    # pictures that could not be opened are tried again
    todo = [e for e in gallery.pictures if e.id not in found or found[e.id].problem is not None]
    if progress:
        from tqdm.auto import tqdm

        todo = tqdm(todo, desc=f"{task.name} {split}, {len(gallery.captions):,} captions a picture", leave=False)
    score = yes_no_scores if method == "yes_no" else matching_scores
    with evaluating(model):
        for picture in todo:
            opened, problems = task.opened([picture])  # once for all captions
            if opened:
                row = Prediction(picture.id, None, _row(task, model, score, opened[0], gallery.captions, batch_size))
            else:
                row = Prediction(picture.id, None, None, problem=problems[0].problem)
            found[picture.id] = row
            if file is not None:
                file.write([row])
    return _result(task, gallery, found, made_by) | {"seconds": time.perf_counter() - began}


def _row(task, model, score, picture: Example, captions: Sequence[str], batch_size: int) -> list[float]:
    """The scores of a picture with all captions. Batches hold captions of like length, the longest first."""
    order = sorted(range(len(captions)), key=lambda i: len(captions[i]), reverse=True)
    row = [0.0] * len(captions)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        values = score(task, model, picture, [captions[i] for i in numbers]).tolist()
        for number, value in zip(numbers, values, strict=True):
            if math.isnan(value):
                raise TaskError(
                    f"{task.name}: the model's score of picture {picture.id} with {captions[number]!r} is NaN; in half"
                    " precision try bfloat16 or float32"
                )
            row[number] = value
    return row


def score_file(task, path: str | Path) -> dict[str, Any]:
    """See ``Flickr30K.score_retrieval``."""
    beside = settings_path(path)
    if not beside.exists():
        raise DataError(f"{path}: there is no {beside.name} beside it, which says what was ranked; give both files")
    settings = json.loads(beside.read_text(encoding="utf-8"))
    if "gallery" not in settings:
        raise DataError(f"{path} holds no scores of retrieval, by {beside.name}; wanted a file that retrieve made")
    split, subset = settings["split"], settings["subset"]
    some = subset["captions_per_image"]
    pictures = task.captioned(split)
    gallery = draw(task, pictures, split, subset["images"], None if some == "all" else some, subset["seed"])
    if gallery.digest != settings["gallery"]:
        raise DataError(
            f"{path} was made with other pictures or captions than those of {split} here; load the task from the same"
            " data, with the same seed and held_out"
        )
    found = {p.id: p for p in read_predictions(path)}
    missing = [e.id for e in gallery.pictures if e.id not in found]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(gallery.pictures)} pictures have no scores, as {missing[0]!r}; retrieve"
            " with the same settings goes on where the run stopped"
        )
    return _result(task, gallery, found, _said(task, gallery, split, settings["method"])) | {"scores": str(path)}


def _said(task, gallery: Gallery, split: str, method: str) -> dict[str, Any]:
    template = {} if method == "yes_no" else {"template": MATCHING}
    return task.about() | template | {"split": split, "method": method, "subset": dict(gallery.subset)}


def _result(task, gallery: Gallery, found: Mapping[str, Prediction], said: Mapping[str, Any]) -> dict[str, Any]:
    kept = [i for i, e in enumerate(gallery.pictures) if found[e.id].problem is None]
    if len(kept) < 2:
        first = next(p.problem for p in found.values() if p.problem)
        raise DataError(f"{task.name}: less than two pictures can be opened; the first that cannot: {first}")
    for i in kept:
        row, picture = found[gallery.pictures[i].id].answer, gallery.pictures[i].id
        if not isinstance(row, list) or len(row) != len(gallery.captions):
            got = f"{len(row)}" if isinstance(row, list) else repr(row)
            raise DataError(f"picture {picture}: wanted {len(gallery.captions)} scores, one a caption, got {got}")
    theirs = np.isin(gallery.owner, kept)  # captions of pictures that are left out go too
    scores = np.array([found[gallery.pictures[i].id].answer for i in kept], dtype=np.float64)[:, theirs]  # (M, N)
    relevant = np.array(kept)[:, None] == gallery.owner[theirs][None]
    text, image = recall_at(scores, relevant, KS), recall_at(scores.T, relevant.T, KS)
    both = {"TR": text, "IR": image}
    return dict(said) | {
        "text_retrieval": text,
        "image_retrieval": image,
        "chance": {"text_retrieval": _chance(relevant), "image_retrieval": _chance(relevant.T)},
        "accuracy": (sum(text.values()) + sum(image.values())) / (2 * len(KS)),
        "loss": None,
        "columns": {f"{name}@{k}": share for name, shares in both.items() for k, share in shares.items()},
        "count": scores.size,
        "skipped": len(gallery.pictures) - len(kept),
    }


def _chance(relevant: np.ndarray) -> dict[int, float]:
    """R@k of an order at random: 1 - C(n - c, k) / C(n, k) for a query with c relevant ones of n items; the mean."""
    n, own = relevant.shape[1], [int(c) for c in relevant.sum(1)]
    whole = {k: math.comb(n, min(k, n)) for k in KS}  # integers: rounded once
    return {k: math.fsum((whole[k] - math.comb(n - c, min(k, n))) / whole[k] for c in own) / len(own) for k in KS}
