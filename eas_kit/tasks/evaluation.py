"""Scores of a model on a task: by teacher forcing, by what it writes, and by what it wrote earlier."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from eas_kit.errors import DataError, EASError, TaskError
from eas_kit.modes import eval_mode
from eas_kit.sites import unwrap
from eas_kit.slots import NoAttention, NoFeedForward
from eas_kit.tasks.metrics import by_category
from eas_kit.tasks.predictions import Prediction, PredictionsFile, read_predictions

IGNORED = -100  # the label of positions that carry no loss
MEASURED = 2_000  # answers of a split that are made to tokens before the first is written: some seconds
SHOWN = 5  # texts of unparsed answers in a result


@dataclass(frozen=True)
class Settings:
    """How answers are got from a model."""

    method: str = "generate"
    batch_size: int = 64
    workers: int = 0
    with_loss: bool = True
    progress: bool = False
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.method not in ("generate", "options"):
            raise TaskError(f"method is 'generate' or 'options', not {self.method!r}")
        for name, least in (("batch_size", 1), ("workers", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise TaskError(f"{name} is a whole number from {least} up, not {value!r}")


@contextmanager
def evaluating(model) -> Iterator[None]:
    """Dropout off and no gradients inside; the mode of every module comes back after."""
    with eval_mode(model), torch.inference_mode():
        yield


# ---------------------------------------------------------------------- batches
class _Batches(Dataset):
    """Item i: (examples, problems with others, the collated batch) of the i-th batch.

    answers: with the wanted answers, prompts alone, or (None) nothing collated. What is collated comes with the numbers
    of its examples alone, as pictures need not travel from a worker twice; else with the opened examples. An error is
    an item too: raised in a worker it would come out with that process's traceback for a message.
    """

    def __init__(self, task, examples: Sequence, batches: list[list[int]], answers: bool | None):
        self.task, self.examples, self.batches, self.answers = task, examples, batches, answers

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int):
        try:
            return self._batch(i)
        except EASError as error:
            return error

    def _batch(self, i: int):
        numbers, opened, problems = [], [], []
        for number in self.batches[i]:
            found, faulty = self.task.opened([self.examples[number]])
            numbers += [number] * len(found)
            opened, problems = opened + found, problems + faulty
        if self.answers is None or not opened:
            return opened, problems, {}
        return numbers, problems, dict(self.task.collate(opened, answers=self.answers))


def _batches(
    task, examples: Sequence, numbers: Iterable[int], at_once: int, answers: bool | None, workers: int, title: str = ""
):
    """Batches of examples of like length, so that they hold little padding; the longest first: memory fails early."""

    def length(i: int) -> tuple[int, int]:
        text = len(task.question_text(examples[i]))
        return len(examples[i].images), text + (sum(map(len, task.target_text(examples[i]))) if answers else 0)

    order = sorted(numbers, key=length, reverse=True)
    parts = [order[start : start + at_once] for start in range(0, len(order), at_once)]
    loader = DataLoader(_Batches(task, examples, parts, answers), batch_size=None, num_workers=workers)
    if title:
        from tqdm.auto import tqdm

        loader = tqdm(loader, desc=title, leave=False)
    for item in loader:
        if isinstance(item, EASError):
            raise item
        found, problems, batch = item
        yield [examples[n] for n in found] if batch else found, problems, batch


# ---------------------------------------------------------------------- teacher forcing
def forced(task, model, examples: Sequence, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch by teacher forcing.

    (B, 3) by example: sum of losses in nats, count of target tokens, count of those hit; and (B,) bool, right.
    """
    losses, hit, counted, scored = _by_token(task, model, examples, batch)
    right = (hit | ~scored).all(1)
    return torch.stack([losses.sum(1), counted.sum(1).double(), (hit & counted).sum(1).double()], 1), right


def _by_token(task, model, examples: Sequence, batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, S - 1) each: losses in nats, whether hit; whether a target's token, whether of its scored part."""
    device = next(model.parameters()).device
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    logits = model(**batch).logits[:, :-1][counted].float()  # (T, vocabulary): prompts are long, and carry no loss
    wanted, counted = labels[counted], counted.cpu()
    each = cross_entropy(logits, wanted, reduction="none").cpu().double()
    losses = torch.zeros(counted.shape, dtype=torch.float64).masked_scatter_(counted, each)
    hit = torch.zeros_like(counted).masked_scatter_(counted, (logits.argmax(-1) == wanted).cpu())
    first = torch.tensor([task.target_ids(e)[1] for e in examples])
    return losses, hit, counted, counted & (counted.cumsum(1) <= first[:, None])  # 1 at the first target token


def score(task, model, split: str, limit: int | None, batch_size: int, workers: int = 0) -> dict[str, Any]:
    """See ``Task.score``."""
    Settings(batch_size=batch_size, workers=workers)
    examples = task.split(split, limit)
    total, right, count, problems = torch.zeros(3, dtype=torch.float64), 0, 0, []
    with evaluating(model):
        for opened, faulty, batch in _batches(task, examples, range(len(examples)), batch_size, True, workers):
            problems += faulty
            task.left_out(faulty)
            if not opened:
                continue
            sums, rights = forced(task, model, opened, batch)
            total += sums.sum(0)
            right += int(rights.sum())
            count += len(opened)
    if count == 0:
        _nothing_left(task, split, problems[0].problem)
    loss, tokens, hits = total.tolist()
    return {"loss": loss / tokens, "accuracy": right / count, "token_accuracy": hits / tokens, "count": count}


def _nothing_left(task, split: str, first: str):
    raise DataError(f"{task.name}: no example of {split} has pictures that can be opened; the first: {first}")


# ---------------------------------------------------------------------- answers
def room(task, examples: Sequence) -> int:
    """New tokens for a written answer: the same for every example, whatever batch it falls into.

    They are counted in the MEASURED answers with the most characters.
    """
    if task.max_new_tokens is not None:
        return task.max_new_tokens
    known = {task.target_text(e)[0]: e for e in examples if e.answer}  # many have the same answer
    longest = sorted(known, key=len, reverse=True)[:MEASURED]
    return max((task.target_ids(known[text])[1] for text in longest), default=12) + 4


def _room_in(task, split: str, examples: Sequence) -> int:
    """That of the whole split, so that a part can be gone on with; examples made when asked for are not all made."""
    whole = task.split(split)
    return room(task, whole if isinstance(whole, list | tuple) else examples)


def _written(task, model, examples: Sequence, inputs, new_tokens: int, generation: dict[str, Any]) -> list[str]:
    device = next(model.parameters()).device
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    greedy = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
    greedy["pad_token_id"] = task.tokenizer.pad_token_id
    written = model.generate(**inputs, **(greedy | generation))
    return task.tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answers(task, model, examples: Sequence) -> list[str | None]:
    """See ``Task.answers``."""
    opened, _ = task.opened(examples)
    found: dict[str, str | None] = {}
    if opened:
        with evaluating(model):
            texts = _written(task, model, opened, task.collate(opened, answers=False), room(task, examples), {})
        found = {e.id: task.parse(text, e) for text, e in zip(texts, opened, strict=True)}
    return [found.get(e.id) for e in examples]


def _by_option(task, model, examples: Sequence) -> list[str]:
    missing = [e.id for e in examples if not task.candidates(e)]
    if missing:
        raise TaskError(f"{task.name}: example {missing[0]} has no options; use method='generate'")
    trial = [(i, c) for i, e in enumerate(examples) for c in task.candidates(e)]
    variants = [replace(examples[i], answer=c, explanation="") for i, c in trial]
    losses, _, _, scored = _by_token(task, model, variants, task.collate(variants))
    mean = ((losses * scored).sum(1) / scored.sum(1)).tolist()
    wrong = next((variant for variant, value in zip(variants, mean, strict=True) if math.isnan(value)), None)
    if wrong is not None:  # smaller than nothing: no option would be chosen
        raise TaskError(
            f"{task.name}: the model's loss of {wrong.answer!r} as answer to {wrong.id} is NaN; in half precision try"
            " bfloat16 or float32"
        )
    best: list[tuple[float, str]] = [(float("inf"), "")] * len(examples)
    for (i, choice), value in zip(trial, mean, strict=True):
        best[i] = min(best[i], (value, choice))
    return [choice for _, choice in best]


def evaluate(
    task, model, split: str, limit: int | None, settings: Settings, path: str | Path | None = None
) -> dict[str, Any]:
    """See ``Task.evaluate``."""
    examples = task.split(split, limit)
    began = time.perf_counter()
    with_loss = settings.with_loss and all(e.answer for e in examples)
    new_tokens = _room_in(task, split, examples) if settings.method == "generate" else 0
    made_by = {
        "split": split,
        "method": settings.method,
        "max_new_tokens": new_tokens,
        "generation": settings.generation,
        "with_loss": with_loss,
    }
    _check_ids(task, split, examples)
    file = None if path is None else PredictionsFile(path, task.about() | made_by | _describe(model))
    found: dict[str, Prediction] = {} if file is None else dict(file.done)
    strange = _strange(task, split, examples, found)
    if strange is not None:
        raise DataError(f"{path} holds an answer to {strange!r}, which is not in split {split}; give another file")
    # pictures that could not be opened are tried again
    todo = [i for i, e in enumerate(examples) if e.id not in found or found[e.id].problem is not None]
    at_once = settings.batch_size
    if settings.method == "options":  # every option is a row of its own
        at_once = max(1, at_once // max(1, *(len(task.candidates(e)) for e in examples)))
    title = f"{task.name} {split}" if settings.progress else ""
    prompts = False if settings.method == "generate" else None
    with evaluating(model):
        for opened, faulty, batch in _batches(task, examples, todo, at_once, prompts, settings.workers, title):
            task.left_out(faulty)
            made = [Prediction(p.record, None, None, problem=p.problem) for p in faulty]
            if opened:
                made += _predict(task, model, opened, batch, settings, new_tokens, with_loss)
            found.update((p.id, p) for p in made)
            if file is not None:
                file.write(made)
    result = _result(task, split, examples, found, settings.method)
    return result | {"seconds": time.perf_counter() - began}


def _predict(task, model, opened, batch, settings: Settings, new_tokens: int, with_loss: bool) -> list[Prediction]:
    """Answers of one batch, and their losses."""
    if settings.method == "generate":
        texts = _written(task, model, opened, batch, new_tokens, settings.generation)
        parsed = [task.parse(text, example) for text, example in zip(texts, opened, strict=True)]
    else:
        texts, parsed = [None] * len(opened), _by_option(task, model, opened)
    losses = tokens = [None] * len(opened)
    if with_loss:
        labelled = task.with_answers(batch, opened) if batch else task.collate(opened)
        sums, _ = forced(task, model, opened, labelled)
        losses, tokens = sums[:, 0].tolist(), [int(n) for n in sums[:, 1].tolist()]
    rows = zip(opened, texts, parsed, losses, tokens, strict=True)
    return [Prediction(e.id, text, answer, loss, count) for e, text, answer, loss, count in rows]


def _describe(model) -> dict[str, Any]:
    """What tells one model from another in a predictions file, so that no answers of another one are taken over.

    Blocks of ``eas.skipping`` and of a static merge leave the parameters as they are, and answer otherwise.
    """
    name = getattr(getattr(unwrap(model), "config", None), "_name_or_path", None)
    mask = getattr(model, "mask", None)
    skipping = [path for path, module in model.named_modules() if isinstance(module, NoAttention | NoFeedForward)]
    return {
        "model": type(model).__name__,
        "model_name": name,
        "mask": None if mask is None else list(mask),
        "skipping": skipping or None,
        "merged": True if getattr(model, "is_merged", False) else None,
        "weights": weights_digest(model),
    }


def weights_digest(model) -> str:
    """A hash of 64 numbers or more from every parameter: training moves all of them."""
    digest = hashlib.sha256()
    for key, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        if not flat.is_meta and len(flat):  # offloaded weights are elsewhere
            some = flat[:: max(1, len(flat) // 64)].cpu().double()
            digest.update(f"{key} {parameter.dtype} ".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_ids(task, split: str, examples: Sequence) -> None:
    """Answers are kept by id: of two examples with one id, each would get the answer of the later."""
    seen: set[str] = set()
    for example in examples:
        if not isinstance(example.id, str):
            raise TaskError(f"{task.name}: an example's id is a text, not {example.id!r}; files keep answers by it")
        if example.id in seen:
            raise TaskError(f"{task.name}: two examples of {split} have the id {example.id!r}; give each its own")
        seen.add(example.id)


def _strange(task, split: str, examples: Sequence, found: Iterable[str]) -> str | None:
    """The first id that the split does not have; the whole split is looked at only where ``examples`` lack one."""
    unknown = set(found) - {e.id for e in examples}
    if unknown and len(examples) < len(task.split(split)):
        unknown -= {e.id for e in task.split(split)}
    return next((i for i in found if i in unknown), None)


# ---------------------------------------------------------------------- results
def score_predictions(task, path: str | Path, split: str, limit: int | None = None) -> dict[str, Any]:
    """See ``Task.score_predictions``."""
    examples = task.split(split, limit)
    found = _read_parsed(task, path, split, examples)
    method = "generate" if any(found[e.id].text is not None for e in examples) else "answers as given"
    return _result(task, split, examples, found, method) | {"predictions": str(path)}


def answers_in(task, path: str | Path, split: str) -> dict[str, str | None]:
    """The parsed answers of a predictions file by the ids of a split, in its order."""
    examples = task.split(split)
    found = _read_parsed(task, path, split, examples)
    return {e.id: found[e.id].answer for e in examples}


def _read_parsed(task, path: str | Path, split: str, examples: Sequence) -> dict[str, Prediction]:
    """Predictions by id, texts parsed anew; DataError if they are not those of the examples."""
    _check_ids(task, split, examples)
    found = {p.id: p for p in read_predictions(path)}
    unknown = _strange(task, split, examples, found)
    missing = [e.id for e in examples if e.id not in found]
    if unknown is not None or missing:
        which = f"id {unknown!r} is not in it"
        if unknown is None:
            which = f"{len(missing)} ids are missing, as {missing[0]!r}"
        raise DataError(
            f"{task.name}: {path} does not fit split {split} of {len(examples)} examples: {which}. Is it of another"
            " split, or was the run that made it stopped? (A run over a part, limit=N, is scored with limit=N or"
            f" sizes={{{split!r}: N}})"
        )
    for example in examples:
        one = found[example.id]
        if isinstance(one.answer, list):
            raise DataError(f"{path}: the answer to {one.id!r} should be a text or null, it is {one.answer!r:.60}")
        if one.text is not None:
            found[example.id] = replace(one, answer=task.parse(one.text, example))
    return found


def _result(task, split: str, examples: Sequence, found: Mapping[str, Prediction], method: str) -> dict[str, Any]:
    kept = [e for e in examples if found[e.id].problem is None]
    made = [found[e.id] for e in kept]
    if not kept:
        _nothing_left(task, split, found[examples[0].id].problem)
    unparsed = [p for p in made if p.answer is None]
    known = all(e.answer for e in kept)
    grades = [task.grade(p.answer, e) for p, e in zip(made, kept, strict=True)] if known else []
    columns, counts = by_category(grades, [e.categories for e in kept]) if known else ({}, {})
    has_loss = all(p.loss is not None for p in made)
    parsers = {"generate": task.parser, "options": "most likely option per token"}
    return task.about() | {
        "accuracy": sum(grades) / len(grades) if known else None,
        "loss": sum(p.loss for p in made) / sum(p.tokens for p in made) if has_loss else None,
        "count": len(kept),
        "split": split,
        "parser": parsers.get(method, "none: answers as given"),
        "method": method,
        "unparsed": len(unparsed),
        "unparsed_examples": [{"id": p.id, "text": p.text} for p in unparsed[:SHOWN]],
        "skipped": len(examples) - len(kept),
        "columns": columns,
        "column_counts": counts,
        **(task.summarise(grades, kept) if known else {}),
    }
