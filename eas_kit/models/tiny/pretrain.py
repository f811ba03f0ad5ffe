"""Pretraining of the bundled model, from nothing to a folder that ``eas.load_model`` reads."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from eas_kit.errors import TrainingError
from eas_kit.models.tiny.architecture import make_model, make_processor
from eas_kit.models.tiny.corpus import (
    READING,
    RECALLING,
    WORDNET,
    Corpus,
    labelled_patches,
    read_definitions,
    tokenizer_texts,
)


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, together with the versions of torch and transformers, the number of threads, and
    whether the processor multiplies in bfloat16: on the same machine a second run gives the same weights bit for bit,
    on another kind of machine a model of the same quality."""

    vision_steps: int = 300  # of the vision tower alone, 32 boards each
    seeing_steps: int = 500  # of the whole model, on pictures alone
    reading_steps: int = 4500  # of the whole model, on everything, those included
    steps: int = 5700  # in all: a second, lower cycle of the learning rate ends with more facts
    rows: int = 21  # a step
    row_length: int = 96  # tokens
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    second_share: float = 0.4  # of the learning rate, at the start of the second cycle
    final_share: float = 0.03  # of the learning rate, at the end of each cosine
    weight_decay: float = 0.1  # on matrices, not on gains, biases and embeddings
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    seed: int = 0


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, a cosine down to ``final_share``, and a second cosine from ``second_share`` down again."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if step < recipe.reading_steps:
        start, end, top = recipe.warmup_steps, recipe.reading_steps, 1.0
    else:
        start, end, top = recipe.reading_steps, recipe.steps, recipe.second_share
    done = (step - start) / max(1, end - start)
    return recipe.final_share + (top - recipe.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim == 2 and "embed" not in name else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def pretrain_vision(model, processor, recipe: Recipe) -> float:
    """Teach the vision tower to tell digits apart, patch by patch, with a linear head that is then thrown away.

    As in LLaVA the tower knows how to see before the language model meets it; without this the whole model was
    still at chance on boards after 1,000 steps. Returns the share of patches of the last batch that were right.
    """
    tower = model.model.vision_tower
    head = torch.nn.Linear(tower.config.hidden_size, 11)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-3)
    right = 0.0
    for step in range(recipe.vision_steps):
        pixels, labels = labelled_patches(processor, step, 32, recipe.seed)
        logits = head(tower(pixels).last_hidden_state[:, 1:])  # (32, 9, 11), without the class token
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        right = (logits.argmax(-1) == labels).float().mean().item()
    model.zero_grad(set_to_none=True)
    return right


@contextmanager
def fast_products() -> Iterator[None]:
    """Matrix products may use bfloat16 where the processor has it; the weights and all sums stay float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@fast_products()
def pretrain(
    out: Path, recipe: Recipe, wordnet: Path = WORDNET, resume: bool = False, checkpoint_every: int = 200
) -> Path:
    """Train from scratch, or go on from ``out/checkpoint.pt``; returns the folder with the 16-bit weights.

    Raises TrainingError where the loss is not finite, or a checkpoint of another recipe lies in ``out``.
    """
    out.mkdir(parents=True, exist_ok=True)
    definitions, _ = read_definitions(wordnet)
    processor = make_processor(tokenizer_texts(definitions))
    corpus = Corpus(processor, definitions, recipe.seed)
    model = make_model(processor, recipe.seed)
    model.train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=recipe.betas
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
    checkpoint, log = out / "checkpoint.pt", out / "log.jsonl"
    start, seen = 0, 0.0
    began = last = time.monotonic()
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != json.loads(json.dumps(asdict(recipe))):
            raise TrainingError(
                f"{checkpoint} was made with another recipe ({state['recipe']}); use its settings or an empty --out"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        start = state["step"]
        print(f"continuing after step {start}", flush=True)
    else:
        log.unlink(missing_ok=True)
        right = pretrain_vision(model, processor, recipe)
        print(f"vision tower: {right:.1%} of patches right after {recipe.vision_steps} steps", flush=True)
    for step in range(start, recipe.steps):
        if step < recipe.seeing_steps:
            batch = corpus.seeing_batch(step)
        else:
            mixture = READING if step < recipe.reading_steps else RECALLING
            batch = corpus.reading_batch(step, recipe.rows, recipe.row_length, mixture)
        loss = model(**batch).loss
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} at step {step}; the last checkpoint is {checkpoint}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        seen = loss.item() if seen == 0 else 0.98 * seen + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            left = seconds * (recipe.steps - step - 1) / 60
            print(
                f"step {step + 1}/{recipe.steps}  loss {seen:.3f}  {seconds:.2f} s/step  {left:.0f} min left",
                flush=True,
            )
            with log.open("a") as file:
                now = time.monotonic()
                record = {"step": step + 1, "loss": round(seen, 4), "seconds": round(now - last, 1)}
                file.write(json.dumps(record) + "\n")
                last = now
        if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps:
            state = {
                "recipe": json.loads(json.dumps(asdict(recipe))),
                "step": step + 1,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
    return save(model, processor, out / "weights", recipe)


def save(model, processor, folder: Path, recipe: Recipe) -> Path:
    """Write bfloat16 weights, configuration, processor and recipe; an older ``folder`` is replaced whole."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(new)
    processor.save_pretrained(new)
    facts = {"recipe": asdict(recipe), "mixture": READING, "mixture at the end": RECALLING, "torch": torch.__version__}
    (new / "recipe.json").write_text(json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)
    return folder
