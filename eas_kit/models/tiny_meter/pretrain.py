"""Pretraining of `tiny-meter`, from nothing to a folder that ``eas.load_model("tiny-meter")`` reads."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from eas_kit.errors import TrainingError
from eas_kit.models.meter import Meter, make_head
from eas_kit.models.tiny.pretrain import parameter_groups
from eas_kit.models.tiny_meter.architecture import LABELS, WIDTH, make_model, make_processor
from eas_kit.models.tiny_meter.corpus import IGNORED, Corpus, Rows, labelled_patches
from eas_kit.tasks.board_texts import CELLS

TOWER_ROWS = 32
DIGITWISE = ("words", "present")  # objectives of each digit of a text; the others are of the whole
HEADS_FILE = "heads.safetensors"


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, together with the versions of torch and transformers and the kind of processor."""

    tower_steps: int = 150  # of each tower by itself, on 32 boards and 32 captions
    reading_steps: int = 350  # the end of what is where in captions
    seeing_steps: int = 750  # the end of what is there at all, beside
    steps: int = 2800  # in all
    reading: tuple[int, ...] = (32, 0, 8, 0, 8)  # examples a step: words, present, vqa, nlvr2, retrieval
    seeing: tuple[int, ...] = (16, 12, 24, 0, 12)
    mixture: tuple[int, ...] = (6, 6, 32, 12, 12)
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    final_share: float = 0.03  # of the learning rate, at the end of the cosine
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    seed: int = 0

    def counts(self, step: int) -> dict[str, int]:
        """Examples of each objective in a step."""
        counts = (
            self.reading if step < self.reading_steps else self.seeing if step < self.seeing_steps else self.mixture
        )
        return dict(zip((*DIGITWISE, *LABELS), counts, strict=True))

    def rate(self, step: int) -> float:
        """Factor of the learning rate: linear warm-up, then a cosine down to `final_share`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done))


class Pretraining(nn.Module):
    """The model with a head for every task beside the one it has, and two for the words of captions."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = make_model("nlvr2", seed)  # the task with the most token types
        width = WIDTH
        heads = {task: make_head(task, width, len(LABELS[task])) for task in LABELS if task != "nlvr2"}
        heads |= {
            "words": nn.Linear(width, 10),
            "order": nn.Linear(width, 3),
            "same": nn.Linear(width, 2),
            "present": nn.Linear(width, 2),
        }
        self.heads = nn.ModuleDict(heads)
        self.heads.apply(self.model._init_weights)
        self.heads["nlvr2"] = self.model.head

    @staticmethod
    def _told(name: str, labels: Tensor, order: Tensor | None) -> dict[str, Tensor]:
        """What the heads of the digits are to say. Less or more is asked beside the same or not: a difference can be
        learned little by little, where to be equal is all or nothing."""
        if name == "present":
            return {name: labels}
        return {name: labels, "order": order, "same": torch.where(order == IGNORED, order, (order == 1).long())}

    def forward(self, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        """The sum of the objectives' mean losses, and the share of right answers of each."""
        model = self.model
        text = model.encode_text(rows.input_ids, rows.attention_mask)
        image = model.encode_image(rows.pixel_values)
        text, image = model.streams(text, image, rows.attention_mask, rows.image_type)
        pooled = model.pool(text, image)
        total, right = text.new_zeros(()), {}
        for name, part in rows.parts.items():
            labels = rows.labels[name]
            if name in DIGITWISE:
                loss = text.new_zeros(())
                for what, told in self._told(name, labels, rows.order).items():
                    logits, told = self.heads[what](text[part]).flatten(0, 1), told.flatten()
                    loss = loss + F.cross_entropy(logits, told, ignore_index=IGNORED)
                    right[what] = (logits.argmax(-1) == told)[told != IGNORED].float().mean().item()
            else:
                features = pooled[part]
                if name == "nlvr2":
                    features = torch.cat(features.chunk(2), dim=-1)
                logits = self.heads[name](features)
                if name == "retrieval":
                    loss = F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
                    right[name] = ((logits[:, 0] > 0) == labels.bool()).float().mean().item()
                else:
                    loss = F.cross_entropy(logits, labels)
                    right[name] = (logits.argmax(-1) == labels).float().mean().item()
            total = total + loss
        return total, right


def pretrain_towers(model: Meter, corpus: Corpus, recipe: Recipe) -> tuple[float, float]:
    """Each tower by itself, as RoBERTa and CLIP are pretrained before METER: what is where.

    Linear heads, thrown away after, name digit and place of each patch, and of each digit in a caption: the same heads
    for both, so that pictures and texts speak of places and of digits alike when they meet. Without the place the model
    knew after 600 steps which digits a board has, and not where; without the digit of the captions, on 2 x 2 boards, it
    read every cell after 300 steps, and after 550 could not tell yet whether a caption's digit is the same. Returns the
    shares of the last batch's patches and of its words' places that were right.
    """
    digits, places = nn.Linear(WIDTH, 11), nn.Linear(WIDTH, CELLS)
    grid = torch.arange(CELLS).repeat(TOWER_ROWS)
    owners = (model.vision, model.image_transform, model.text, model.text_transform, digits, places)
    optimizer = torch.optim.AdamW([p for owner in owners for p in owner.parameters()], lr=2e-3)
    right = (0.0, 0.0)
    for step in range(recipe.tower_steps):
        images, labels = labelled_patches(step, TOWER_ROWS, recipe.seed)
        ids, mask, where, which = corpus.placed_words(step, TOWER_ROWS)
        patches = model.encode_image(images)[:, 1:].flatten(0, 1)  # (rows * cells, d)
        words = model.encode_text(ids, mask).flatten(0, 1)
        named, placed = digits(patches), places(words)
        loss = F.cross_entropy(named, labels.flatten()) + F.cross_entropy(places(patches), grid)
        loss = loss + F.cross_entropy(placed, where.flatten(), ignore_index=IGNORED)
        (loss + F.cross_entropy(digits(words), which.flatten(), ignore_index=IGNORED)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        said = where.flatten() != IGNORED
        right = (
            (named.argmax(-1) == labels.flatten()).float().mean().item(),
            (placed.argmax(-1) == where.flatten())[said].float().mean().item(),
        )
    model.zero_grad(set_to_none=True)
    return right


def pretrain(out: Path, recipe: Recipe, resume: bool = False, checkpoint_every: int = 200) -> Path:
    """Train from scratch, or go on from ``out/checkpoint.pt``; returns the folder with the 16-bit weights.

    Raises TrainingError where the loss is not finite, or a checkpoint of another recipe lies in ``out``.
    """
    out.mkdir(parents=True, exist_ok=True)
    processor = make_processor()
    corpus, net = Corpus(processor, recipe.seed), Pretraining(recipe.seed)
    net.train()
    optimizer = torch.optim.AdamW(
        parameter_groups(net, recipe.weight_decay), lr=recipe.learning_rate, betas=recipe.betas, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    checkpoint, log = out / "checkpoint.pt", out / "log.jsonl"
    made_by = json.loads(json.dumps(asdict(recipe)))
    start, seen, logged = 0, {}, 0.0
    began = time.process_time()  # a busy machine takes longer, and no more of its cores
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != made_by:
            raise TrainingError(
                f"{checkpoint} was made with another recipe ({state['recipe']}); use its settings or an empty --out"
            )
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        start = state["step"]
    else:
        log.unlink(missing_ok=True)
        right = pretrain_towers(net.model, corpus, recipe)
        print("towers: {:.1%} of digits, {:.1%} of places in texts right".format(*right), flush=True)
    for step in range(start, recipe.steps):
        loss, right = net(corpus.batch(step, recipe.counts(step)))
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} at step {step}; the last checkpoint is {checkpoint}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        for name, share in right.items():
            seen[name] = share if name not in seen else 0.97 * seen[name] + 0.03 * share
        if (step + 1) % 50 == 0:
            minutes = (time.process_time() - began) / 60
            shares = {name: round(share, 3) for name, share in seen.items()}
            print(f"step {step + 1}/{recipe.steps}  {minutes:.1f} min  {shares}", flush=True)
            with log.open("a") as file:
                record = {"step": step + 1, "cpu_minutes": round(minutes - logged, 2), "right": shares}
                file.write(json.dumps(record) + "\n")
            logged = minutes
        if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps:
            state = {"recipe": made_by, "step": step + 1, "net": net.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
    spent = sum(json.loads(line)["cpu_minutes"] for line in log.read_text().splitlines()) if log.exists() else 0.0
    return save(net, processor, out / "weights", recipe, spent)


def save(net: Pretraining, processor, folder: Path, recipe: Recipe, minutes: float = 0.0) -> Path:
    """Write bfloat16 weights, heads, configuration, processor and recipe; an older ``folder`` is replaced whole."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    net.model.to(torch.bfloat16).save_pretrained(new)
    processor.save_pretrained(new)
    heads = {
        f"{task}.{name}": value.to(torch.bfloat16).contiguous()
        for task in LABELS
        for name, value in net.heads[task].state_dict().items()
    }
    save_file(heads, new / HEADS_FILE, metadata={"format": "pt"})
    facts = {"recipe": asdict(recipe), "cpu_minutes": round(minutes, 1), "torch": torch.__version__}
    (new / "recipe.json").write_text(json.dumps(facts, indent=1) + "\n")
    for file in new.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)
    return folder
