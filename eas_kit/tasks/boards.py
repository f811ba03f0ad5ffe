"""Tasks ``boards-vqa``, ``boards-nlvr2``, ``boards-retrieval``: METER's three, on boards of handwritten digits.

For ``tiny-meter`` or any model of the kind (a closed list of answers, pairs of pictures, a score of text and picture).
Each role has digit scans of its own. Columns are the kinds, and whether ``tiny-meter`` knows the kind from its
pretraining or meets it here (``known`` / ``new``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from eas_kit.errors import TaskError
from eas_kit.tasks import board_texts as said
from eas_kit.tasks import retrieval
from eas_kit.tasks.base import ROLES, Example
from eas_kit.tasks.closed import ClosedTask
from eas_kit.tasks.digit_images import draw_board
from eas_kit.tasks.evaluation import _batches, evaluating
from eas_kit.tasks.metrics import consistency

SIZES = {"train": 20_000, "search": 500, "val": 500, "test": 1_000}
PICTURES = {"train": 5_000, "search": 500, "val": 200, "test": 200}


def _known(what: str, kind: str) -> str:
    return "known" if kind in said.PRETRAINED[what] else "new"


class BoardsVQA(ClosedTask):
    """See the module: questions on one board, 14 answers."""

    name = "boards-vqa"
    template = "a question on a board -> one of 14 answers"
    answers = said.ANSWERS

    def __init__(self, processor, sizes: dict[str, int] | None = None, seed: int = 0):
        super().__init__(processor)
        self.seed = seed
        self.set_splits(self._make, SIZES, sizes)

    def _make(self, role: str, i: int) -> Example:
        rng = np.random.default_rng((self.seed, 3, ROLES.index(role), i))
        kind = said.QUESTIONS[i % len(said.QUESTIONS)]
        board = rng.integers(10, size=(3, 3))
        question, answer, choices = said.question(kind, board, rng)
        picture = draw_board(board, role, rng)
        columns = (kind, _known("question", kind))
        return Example(f"{role}-{i}", question, answer, choices, images=(picture,), categories=columns)


class BoardsNLVR2(ClosedTask):
    """See the module: is a sentence true of two boards? Each sentence is judged of two pairs, true of one of them.

    The result also has ``consistency``, the share of sentences that are judged rightly of both.
    """

    name = "boards-nlvr2"
    template = "a sentence on two boards -> false or true"
    answers = said.TRUTH

    def __init__(self, processor, sizes: dict[str, int] | None = None, seed: int = 0):
        super().__init__(processor)
        self.seed = seed
        self.set_splits(self._make, SIZES, sizes)

    def _make(self, role: str, i: int) -> Example:
        number, second = divmod(i, 2)
        rng = np.random.default_rng((self.seed, 4, ROLES.index(role), number))
        kind = said.SENTENCES[number % len(said.SENTENCES)]
        sentence, first_is_true = said.sentence(kind, rng), bool(rng.random() < 0.5)
        wanted = first_is_true != bool(second)
        rng = np.random.default_rng((self.seed, 5, ROLES.index(role), i))
        pair = said.boards_for(sentence, wanted, rng)
        return Example(
            id=f"{role}-{number}-{second}",
            question=sentence.text,
            answer=said.TRUTH[int(wanted)],
            choices=said.TRUTH,
            images=tuple(draw_board(board, role, rng) for board in pair),
            categories=(kind, _known("sentence", kind)),
            group=f"{role}-{number}",
        )

    def summarise(self, grades: Sequence[float], examples: Sequence[Example]) -> dict[str, Any]:
        return {"consistency": consistency([grade == 1 for grade in grades], [e.group for e in examples])}


class BoardsRetrieval(ClosedTask):
    """See the module: boards by captions, and back. An example is a board with its captions (``references``).

    In training a board meets one of its captions and ``false_texts`` of other boards, and the head has to score its own
    highest; ``score`` says how often it does, and the loss. ``evaluate`` ranks all pairs: R@1, R@5, R@10.
    """

    name = "boards-retrieval"
    template = "a board and a caption -> a score of the pair"
    parser = "none: pairs are ranked by their score"
    answers = ("match",)

    def __init__(self, processor, sizes: dict[str, int] | None = None, seed: int = 0, false_texts: int = 15):
        if not isinstance(false_texts, int) or isinstance(false_texts, bool) or false_texts < 1:
            raise TaskError(f"{self.name}: false_texts is a whole number from 1 up, not {false_texts!r}")
        super().__init__(processor)
        self.seed, self.false_texts = seed, false_texts
        self._captions = lru_cache(maxsize=None)(self._draw_captions)
        self.set_splits(self._make, PICTURES, sizes)
        small = [role for role in ROLES if len(getattr(self, role)) <= false_texts]
        if small:
            raise TaskError(
                f"{self.name}: false_texts={false_texts} wants more boards than that in every role; {small[0]} has"
                f" {len(getattr(self, small[0]))}"
            )

    def _draw_captions(self, role: str, i: int) -> tuple[np.ndarray, tuple[str, ...]]:
        rng = np.random.default_rng((self.seed, 6, ROLES.index(role), i))
        board = rng.integers(10, size=(3, 3))
        return board, tuple(said.caption(kind, board, rng) for kind in ("two", "three"))

    def _make(self, role: str, i: int) -> Example:
        board, captions = self._captions(role, i)
        picture = draw_board(board, role, np.random.default_rng((self.seed, 7, ROLES.index(role), i)))
        return Example(f"{role}-{i}", "", "match", images=(picture,), references=captions, group=f"{role}-{i}")

    # ------------------------------------------------------------------ training: one caption among others
    def _texts(self, example: Example) -> list[str]:
        """A caption of the board, and captions of others that are not true of it; the same ones every time."""
        role, number = example.id.rsplit("-", 1)
        rng = np.random.default_rng((self.seed, 8, ROLES.index(role), int(number)))
        board, own = self._captions(role, int(number))
        texts = [own[int(rng.integers(len(own)))]]
        while len(texts) <= self.false_texts:
            _, captions = self._captions(role, int(rng.integers(len(getattr(self, role)))))
            text = captions[int(rng.integers(len(captions)))]
            if not said.describes(text, board):
                texts.append(text)
        return texts

    def collate(self, examples: Sequence[Example], answers: bool = True) -> BatchFeature:
        """With ``answers``: ``input_ids`` (B, 1 + false_texts, S), the board's own caption first, ``labels`` all 0.

        Without: ``input_ids`` (B, S), the first caption of each.
        """
        examples = self._openable(examples)
        if not answers:
            return self._inputs([e.references[0] for e in examples], examples)
        batch = self._inputs([text for e in examples for text in self._texts(e)], examples)
        for name in ("input_ids", "attention_mask"):
            batch[name] = batch[name].unflatten(0, (len(examples), 1 + self.false_texts))
        batch["labels"] = torch.zeros(len(examples), dtype=torch.long)
        return batch

    def score(
        self, model, split: str = "val", limit: int | None = None, batch_size: int = 64, workers: int = 0
    ) -> dict[str, Any]:
        """``accuracy``: how often the board's own caption scores highest of 1 + false_texts; ``loss``, ``count``."""
        examples, loss, right, count = self.split(split, limit), 0.0, 0, 0
        device = next(model.parameters()).device
        with evaluating(model):
            for opened, _, batch in _batches(self, examples, range(len(examples)), batch_size, True, workers):
                output = model(**{k: v.to(device) for k, v in batch.items()})
                loss += float(output.loss) * len(opened)
                right += int((output.logits[:, :1] > output.logits[:, 1:]).all(1).sum())
                count += len(opened)
        return {"loss": loss / count, "accuracy": right / count, "count": count}

    # ------------------------------------------------------------------ ranking
    def captioned(self, split: str) -> Sequence[Example]:
        """The boards of a role, each with its captions."""
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
        """R@1, R@5, R@10 of both directions, from the score of every board with every caption.

        As ``Flickr30K.retrieve`` with method "matching": ``limit`` boards (drawn by the task's seed; None: all),
        ``text_retrieval`` and ``image_retrieval``, ``chance``, ``accuracy`` (the mean of the six), ``columns``,
        ``count`` of pairs. The cost is boards x captions pairs.
        """
        if others:
            raise TaskError(
                f"{self.name}: there is no setting {sorted(others)[0]!r} in retrieval; it has limit, batch_size,"
                " captions_per_image, progress, predictions"
            )
        gallery = retrieval.draw(self, self.captioned(split), split, limit, captions_per_image, self.seed)
        return retrieval.retrieve(self, model, gallery, split, "matching", batch_size, progress, predictions)
