"""Retrieval as METER learns it: a picture meets a caption of its own and captions of others, to score its own highest.

``MatchingTask`` makes such batches and ranks all pairs; ``boards.py`` has one of its kind, and ``matching(task)`` makes
one of Flickr30K, which by itself asks a model that writes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature

from eas_kit.errors import TaskError
from eas_kit.tasks import retrieval
from eas_kit.tasks.answers import plain_words
from eas_kit.tasks.base import ROLES, Example
from eas_kit.tasks.closed import ClosedTask
from eas_kit.tasks.evaluation import _batches, evaluating


class MatchingTask(ClosedTask):
    """An example is a picture with its captions (``references``).

    ``score`` says how often its own caption scores highest of 1 + ``false_texts``, and the loss; ``evaluate`` ranks all
    pairs: R@1, R@5, R@10.
    """

    parser = "none: pairs are ranked by their score"
    answers = ("match",)

    def __init__(self, processor, false_texts: int = 15):
        if not isinstance(false_texts, int) or isinstance(false_texts, bool) or false_texts < 1:
            raise TaskError(f"{self.name}: false_texts is a whole number from 1 up, not {false_texts!r}")
        super().__init__(processor)
        self.false_texts = false_texts

    def check_numbers(self) -> None:
        """TaskError for a role with too few pictures to draw false captions from; call it when the splits are set."""
        for role in ROLES:
            count = len(getattr(self, role))
            if 0 < count <= self.false_texts:
                raise TaskError(
                    f"{self.name}: false_texts={self.false_texts} wants more pictures than that in every role; {role}"
                    f" has {count}"
                )

    # ------------------------------------------------------------------ what a sub-class may know better
    def role_of(self, example: Example) -> str:
        """The role that an example belongs to."""
        if not hasattr(self, "_roles"):
            self._roles = {e.id: role for role in ROLES for e in getattr(self, role)}
        return self._roles[example.id]

    def captions(self, role: str, number: int) -> Sequence[str]:
        """The captions of a role's picture, without opening it."""
        return getattr(self, role)[number].references

    def describes(self, text: str, example: Example) -> bool:
        """Whether a caption is true of a picture, as far as can be told: here, whether it is one of its own."""
        own = {" ".join(plain_words(caption)) for caption in example.references}
        return " ".join(plain_words(text)) in own

    # ------------------------------------------------------------------ training: one caption among others
    def texts(self, example: Example) -> list[str]:
        """One of the example's captions, then ``false_texts`` of others of its role; the same ones every time."""
        role = self.role_of(example)
        rng, count = random.Random(f"{self.seed} false texts {example.id}"), len(getattr(self, role))
        texts = [rng.choice(example.references)]
        for _ in range(1000 * self.false_texts):
            text = rng.choice(self.captions(role, rng.randrange(count)))
            if not self.describes(text, example):
                texts.append(text)
            if len(texts) > self.false_texts:
                return texts
        raise TaskError(
            f"{self.name}: the captions of {role} all describe picture {example.id}; wanted some that do not"
        )

    def collate(self, examples: Sequence[Example], answers: bool = True) -> BatchFeature:
        """With ``answers``: ``input_ids`` (B, 1 + false_texts, S), the picture's own caption first, ``labels`` all 0.

        Without: ``input_ids`` (B, S), the first caption of each.
        """
        examples = self._openable(examples)
        if not answers:
            return self._inputs([e.references[0] for e in examples], examples)
        batch = self._inputs([text for e in examples for text in self.texts(e)], examples)
        for name in ("input_ids", "attention_mask"):
            batch[name] = batch[name].unflatten(0, (len(examples), 1 + self.false_texts))
        batch["labels"] = torch.zeros(len(examples), dtype=torch.long)
        return batch

    def score(
        self, model, split: str = "val", limit: int | None = None, batch_size: int = 64, workers: int = 0
    ) -> dict[str, Any]:
        """``accuracy``: how often the picture's own caption scores highest of 1 + false_texts; ``loss``, ``count``."""
        examples, loss, right, count = self.split(split, limit), 0.0, 0, 0
        device = next(model.parameters()).device
        with evaluating(model):
            for opened, faulty, batch in _batches(self, examples, range(len(examples)), batch_size, True, workers):
                self.left_out(faulty)
                if not opened:
                    continue
                output = model(**{k: v.to(device) for k, v in batch.items()})
                loss += float(output.loss) * len(opened)
                right += int((output.logits[:, :1] > output.logits[:, 1:]).all(1).sum())
                count += len(opened)
        if count == 0:
            raise TaskError(f"{self.name}: no picture of {split} can be opened")
        return {"loss": loss / count, "accuracy": right / count, "count": count}

    # ------------------------------------------------------------------ ranking
    def captioned(self, split: str) -> Sequence[Example]:
        """The pictures of a role, each with its captions."""
        return self.split(split)

    def evaluate(
        self,
        model,
        split: str = "val",
        limit: int | None = None,
        batch_size: int = 64,
        progress: bool = False,
        predictions: str | os.PathLike | None = None,
        captions_per_image: int | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """R@1, R@5, R@10 of both directions, from the score of every picture with every caption.

        As ``Flickr30K.retrieve`` with method "matching": ``limit`` pictures (drawn by the task's seed; None: all),
        ``text_retrieval`` and ``image_retrieval``, ``chance``, ``accuracy`` (the mean of the six), ``columns``,
        ``count`` of pairs. The cost is pictures x captions pairs.
        """
        if others:
            raise TaskError(
                f"{self.name}: there is no setting {sorted(others)[0]!r} in retrieval; it has limit, batch_size,"
                " captions_per_image, progress, predictions"
            )
        gallery = retrieval.draw(self, self.captioned(split), split, limit, captions_per_image, self.seed)
        return retrieval.retrieve(self, model, gallery, split, "matching", batch_size, progress, predictions)


class Matching(MatchingTask):
    """See ``matching``."""

    def __init__(self, task: Any, false_texts: int, sizes: Mapping[str, int]):
        self.task, self.name, self.seed, self.on_error = task, task.name, task.seed, task.on_error
        super().__init__(task.processor, false_texts)
        for role in ROLES:
            pictures = task.captioned(role) if len(getattr(task, role)) else ()
            if (size := sizes.get(role)) is not None and size < len(pictures):
                drawn = random.Random(f"{task.seed} pictures {role}").sample(range(len(pictures)), size)
                pictures = [pictures[i] for i in sorted(drawn)]
            setattr(self, role, pictures)
        self.check_numbers()

    def about(self) -> dict[str, Any]:
        return self.task.about()

    def opened(self, examples: Sequence[Example]):
        return self.task.opened(examples)

    def left_out(self, problems: Sequence[Any]) -> None:
        self.task.left_out(problems)


def matching(task: Any, false_texts: int = 15, sizes: Mapping[str, int] | None = None) -> Matching:
    """A task of captioned pictures (Flickr30K, as ``load_task`` returns it) for a model with a matching head.

    ``sizes``: by role, how many of the pictures, drawn by the task's seed; all of them where it says nothing. (The
    sizes that the task itself was loaded with are of its questions.)

    Raises TaskError for a task without ``captioned``, and for roles with too few pictures.
    """
    if not hasattr(task, "captioned"):
        raise TaskError(
            f"matching: wanted a task of captioned pictures, as flickr30k; this {type(task).__name__} has no captioned;"
            " for questions with a closed list of answers there is eas_kit.tasks.closed.closed(task)"
        )
    return Matching(task, false_texts, sizes or {})
