"""Tasks whose answers come out of a closed list, for models with a head that scores each of them (METER).

Nothing is written and nothing parsed: the model returns ``logits`` (B, answers), and its answer is the highest. What
an example is, how an answer is graded and how grades are put together stays the task's, so ``closed(task)`` asks such
a model the questions of any task, with that task's own metric.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature

from eas_kit.errors import NothingOpenedError, TaskError
from eas_kit.tasks import evaluation
from eas_kit.tasks.base import Example, Task
from eas_kit.tasks.evaluation import _batches, _check_ids, _describe, _result, evaluating
from eas_kit.tasks.predictions import Prediction, PredictionsFile


class ClosedTask(Task):
    """Base class: sub-classes set ``answers``, the list in the order of the model's labels."""

    pictures = True
    parser = "none: the answer with the highest score"
    answers: tuple[str, ...] = ()
    method = "closed"

    def question_text(self, example: Example) -> str:
        return example.question

    def target_text(self, example: Example) -> tuple[str, str]:
        return example.answer, ""

    def parse(self, text: str, example: Example) -> str | None:
        return text if text in self.answers else None

    # ------------------------------------------------------------------ text and pictures to tensors
    def target(self, example: Example) -> int | torch.Tensor:
        """The number of the answer, or soft targets (answers,) in float; here: the number.

        Raises TaskError for an answer that is not in the list.
        """
        if example.answer not in self.answers:
            known = ", ".join(self.answers[:6]) + (", ..." if len(self.answers) > 6 else "")
            raise TaskError(
                f"{self.name}: the answer of example {example.id} is {example.answer!r}, which is not one of the"
                f" {len(self.answers)} of this task ({known})"
            )
        return self.answers.index(example.answer)

    def collate(self, examples: Sequence[Example], answers: bool = True) -> BatchFeature:
        """``input_ids``, ``attention_mask`` (B, S), ``pixel_values`` (B, 3, H, W), of pairs (B, 2, 3, H, W).

        With ``answers`` also ``labels``: (B,) classes, or (B, answers) soft targets. Examples whose pictures cannot be
        opened are an error, or left out (``on_error="skip"``), so that B can be smaller.
        """
        examples = self._openable(examples)
        batch = self._inputs([self.question_text(e) for e in examples], examples)
        if answers:
            targets = [self.target(e) for e in examples]
            soft = isinstance(targets[0], torch.Tensor)
            batch["labels"] = torch.stack(targets) if soft else torch.tensor(targets)
        return batch

    def _openable(self, examples: Sequence[Example]) -> list[Example]:
        self._need_processor()
        if len(examples) == 0:
            raise TaskError(f"{self.name}: a batch needs at least one example, got none")
        opened, problems = self.opened(examples)
        if not opened:
            raise NothingOpenedError(
                f"{self.name}: no example of this batch has pictures that can be opened; the first: {problems[0]}"
            )
        return opened

    def _inputs(self, texts: Sequence[str], examples: Sequence[Example]) -> BatchFeature:
        """The texts, and the pictures of the examples."""
        counts = {len(e.images) for e in examples}
        if len(counts) != 1 or not counts <= {1, 2}:
            raise TaskError(
                f"{self.name}: wanted one picture an example, or two in all of them, got {sorted(counts)} in one batch"
            )
        images = [picture for e in examples for picture in e.images]
        cut = {"truncation": True, "max_length": self._longest} if self._longest else {}
        encoded = self.tokenizer(list(texts), padding=True, return_tensors="pt", **cut)
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        if counts == {2}:
            pixels = pixels.unflatten(0, (len(examples), 2))
        return BatchFeature(
            {
                "input_ids": encoded["input_ids"],
                "attention_mask": encoded["attention_mask"],
                "pixel_values": pixels,
            }
        )

    @property
    def _longest(self) -> int | None:
        longest = getattr(self.tokenizer, "model_max_length", None)
        return int(longest) if longest and longest < 1e9 else None  # 1e30 stands for "not known"

    # ------------------------------------------------------------------ scores
    def score(
        self, model, split: str = "val", limit: int | None = None, batch_size: int = 64, workers: int = 0
    ) -> dict[str, Any]:
        """``loss`` (mean over examples), ``accuracy`` (mean grade) and ``count``; one forward a batch."""
        result = self.evaluate(model, split, limit, batch_size, workers=workers)
        return {name: result[name] for name in ("loss", "accuracy", "count")}

    def evaluate(
        self,
        model,
        split: str = "val",
        limit: int | None = None,
        batch_size: int = 64,
        progress: bool = False,
        predictions: str | os.PathLike | None = None,
        workers: int = 0,
        **others: Any,
    ) -> dict[str, Any]:
        """Accuracy in all columns, from the model's highest score.

        Args and result as of ``Task.evaluate``; ``chance`` is the accuracy of the best constant answer to each kind of
        question, which knows the split's answers and sees nothing else.

        Raises:
            TaskError: for settings that make no sense (nothing is generated here), a split that is empty, a model
                whose logits are not one a label, or NaN.
            DataError: for a picture that cannot be opened, or a predictions file of other settings.
        """
        if others:
            raise TaskError(
                f"{self.name}: there is no setting {sorted(others)[0]!r} where answers come out of a closed list; it"
                " has limit, batch_size, progress, predictions, workers"
            )
        evaluation.Settings(batch_size=batch_size, workers=workers)
        examples, began = self.split(split, limit), time.perf_counter()
        _check_ids(self, split, examples)
        known = all(e.answer for e in examples)
        made_by = {"split": split, "method": self.method, "with_loss": known}
        file = None
        if predictions is not None:
            whose = self.about() | made_by | _describe(model)
            file = PredictionsFile(predictions, whose, known={e.id for e in examples})
        found: dict[str, Prediction] = {} if file is None else dict(file.done)
        todo = [i for i, e in enumerate(examples) if e.id not in found or found[e.id].problem is not None]
        title = f"{self.name} {split}" if progress else ""
        with evaluating(model):
            for opened, faulty, batch in _batches(self, examples, todo, batch_size, known, workers, title):
                self.left_out(faulty)
                made = [Prediction(p.record, None, None, problem=p.problem) for p in faulty]
                made += self._predict(model, opened, batch) if opened else []
                found.update((p.id, p) for p in made)
                if file is not None:
                    file.write(made)
        result = _result(self, split, examples, found, self.method)
        chance = self.chance(examples) if known else None
        return result | {"chance": chance, "seconds": time.perf_counter() - began}

    def _predict(self, model, opened: Sequence[Example], batch: dict[str, Any]) -> list[Prediction]:
        device = next(model.parameters()).device
        output = model(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
        logits = output.logits.float()
        if logits.shape != (len(opened), len(self.answers)):
            raise TaskError(
                f"{self.name}: wanted logits {(len(opened), len(self.answers))}, one for each of the answers, got"
                f" {tuple(logits.shape)}; load the model with the head of this task and its list of answers"
            )
        if torch.isnan(logits).any():
            raise TaskError(f"{self.name}: the model's logits are NaN; in half precision try bfloat16 or float32")
        best = [self.answers[n] for n in logits.argmax(-1).tolist()]
        loss = None if output.loss is None else float(output.loss)  # a mean over the batch
        tokens = None if loss is None else 1
        return [Prediction(e.id, None, answer, loss, tokens) for e, answer in zip(opened, best, strict=True)]

    def chance(self, examples: Sequence[Example]) -> float:
        """Mean grade of the best constant answer, by an example's first category."""
        kinds: dict[str, list[Example]] = defaultdict(list)
        for example in examples:
            kinds[example.categories[0] if example.categories else ""].append(example)
        total = 0.0
        for same in kinds.values():
            usual = [answer for answer, _ in Counter(e.answer for e in same).most_common(5)]
            total += max(math.fsum(self.grade(answer, e) for e in same) for answer in usual)
        return total / len(examples)


class Closed(ClosedTask):
    """See ``closed``."""

    def __init__(self, task: Task, answers: Sequence[str]):
        self.task, self.answers = task, tuple(answers)
        self._numbers = {answer: number for number, answer in enumerate(self.answers)}
        self.name, self.seed, self.on_error = task.name, task.seed, task.on_error
        super().__init__(task.processor)
        for role in ("train", "search", "val", "test"):
            setattr(self, role, getattr(task, role))

    def about(self) -> dict[str, Any]:
        return self.task.about() | {"template": "the question alone", "answers": len(self.answers)}

    def target(self, example: Example) -> int | torch.Tensor:
        """Of one true answer its number; of several people's the grade that each of theirs would get.

        For VQAv2 that is 0.3, 0.6, 0.9 and 1 for one, two, three and more of ten people. Answers that are not in the
        list are left out.
        """
        if not example.references:
            return super().target(example)
        soft = torch.zeros(len(self.answers))
        for answer in set(example.references) & self._numbers.keys():
            soft[self._numbers[answer]] = self.task.grade(answer, example)
        return soft

    def grade(self, answer: str | None, example: Example) -> float:
        return self.task.grade(answer, example)

    def summarise(self, grades: Sequence[float], examples: Sequence[Example]) -> dict[str, Any]:
        return self.task.summarise(grades, examples)

    def opened(self, examples: Sequence[Example]):
        return self.task.opened(examples)

    def left_out(self, problems: Sequence[Any]) -> None:
        self.task.left_out(problems)


def closed(task: Task, answers: Sequence[str] | None = None, *, at_least: int = 9) -> Closed:
    """A task's questions for a model with a closed list of answers, graded as that task grades.

    ``task`` as ``load_task`` returns it (of VQAv2, NLVR2, or one's own), with the model's processor. ``answers``: in
    the order of the model's labels; None: the choices that all examples share ("False", "True"), else the answers that
    ``at_least`` so many examples of train have, the most frequent first.

    Raises TaskError where no list can be made, or it names an answer twice.
    """
    if answers is None:
        choices = {e.choices for e in (task.train[i] for i in range(min(50, len(task.train))))}
        if len(choices) == 1 and (shared := next(iter(choices))):
            answers = sorted(shared)
        else:
            counted = Counter(e.answer for e in task.train if e.answer)
            answers = [answer for answer, count in counted.most_common() if count >= at_least]
    if len(answers) < 2 or len(set(answers)) < len(answers):
        raise TaskError(
            f"{task.name}: wanted a list of two answers or more, each once, got {len(answers)} (different:"
            f" {len(set(answers))}); pass answers=[...], or a lower at_least"
        )
    return Closed(task, answers)
