"""What a task is: examples by data role, the template that turns them into tokens, and how answers are scored.

A new task says how an example reads (``question_text``, ``target_text``) and how an answer is found in generated
text (``parse``); collating is here, generation and scores are in evaluation.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import BatchFeature

from eas_kit.errors import DataError, NothingOpenedError, TaskError
from eas_kit.tasks import evaluation
from eas_kit.tasks.evaluation import IGNORED
from eas_kit.tasks.pictures import PictureError
from eas_kit.tasks.records import Problem

ROLES = ("train", "search", "val", "test")
_ANCHOR = 64  # characters of a prompt before a target, so that a special token at its end is whole
IMAGE = "<image>"  # where a picture stands in the text of a question, as LLaVA's conversation files have it


@dataclass(frozen=True, slots=True)
class Example:
    """One question. ``images`` are PIL pictures, or open themselves as such when they are asked for.

    ``categories`` name the columns of the result table it counts in; ``references`` are all answers that people gave,
    where there are several (VQAv2); ``group`` names what belongs together and must not be torn apart between roles (a
    picture, a sentence); ``history`` are earlier turns of the conversation, (question, answer) each. An empty
    ``answer`` is one that is not known (a test set whose answers its owner keeps).
    """

    id: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    explanation: str = ""
    context: str = ""
    images: Sequence[Any] = ()
    categories: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    group: str = ""
    history: tuple[tuple[str, str], ...] = ()


class Generated(Sequence):
    """A split whose examples are made when they are asked for, each from its own number, and kept."""

    def __init__(self, make: Callable[[int], Example], size: int):
        self._make, self._size = lru_cache(maxsize=None)(make), size

    def __reduce__(self):  # a cache cannot be pickled, for worker processes
        return Generated, (self._make.__wrapped__, self._size)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self._size))]
        if not -self._size <= i < self._size:
            raise IndexError(f"example {i} of a split with {self._size}")
        return self._make(i % self._size)


def said_answer(text: str) -> str | None:
    """What stands between "The answer is" and the full stop, in lower case; None where there is no such thing."""
    found = re.search(r"The answer is (.+?)(?:\.|$)", text)
    return found[1].strip().lower() if found else None


class Task:
    """Base class. Sub-classes set ``name``, ``template``, ``parser`` and the four splits.

    Attributes:
        train, search, val, test: sequences of Example over disjoint data; ``train`` tunes adapters, ``search``
            gives the bandit its rewards, ``val`` chooses, ``test`` is touched once.
        template, parser: one line each, copied into every result.
        seed: of whatever the task draws at random.
    """

    name = "task"
    template = ""
    parser = ""
    ends = True  # whether the target closes with the end-of-text token
    pictures = False  # whether the model has to read pictures
    seed: int | None = None
    on_error = "raise"  # what becomes of examples whose pictures cannot be opened: "raise" or "skip"
    max_new_tokens: int | None = None  # room for a written answer; None: a little more than the longest answer needs
    train: Sequence[Example] = ()
    search: Sequence[Example] = ()
    val: Sequence[Example] = ()
    test: Sequence[Example] = ()

    def __init__(self, processor):
        """processor: of the model, or its tokenizer if it reads text alone; None where only answers are scored."""
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)  # of a model of text alone they are the same
        if processor is not None:
            self._check_processor()

    def _check_processor(self) -> None:
        kind = type(self.processor).__name__
        if not hasattr(self.tokenizer, "pad_token_id"):
            raise TaskError(
                f"{self.name}: wanted a processor or tokenizer, got a {kind}; load_model returns (model, processor):"
                " pass the second"
            )
        if self.pictures and not self._reads_pictures:
            raise TaskError(
                f"{self.name}: this task needs a model that reads pictures, and this processor ({kind}) has no part"
                " for them; for a model of text take definitions"
            )
        if self.tokenizer.pad_token_id is None:
            raise TaskError(
                f"{self.name}: the tokenizer ({type(self.tokenizer).__name__}) has no token to pad a batch with; set"
                " one, as in tokenizer.pad_token = tokenizer.eos_token"
            )

    @property
    def _reads_pictures(self) -> bool:
        return getattr(self.processor, "image_processor", None) is not None

    def set_splits(self, make: Callable[[str, int], Example], sizes: Mapping[str, int], given: Mapping | None) -> None:
        """The four splits, from `make(role, i)`: with the task's `sizes`, or those that are `given` by role."""
        self._check_sizes(given)
        for role, size in {**sizes, **(given or {})}.items():
            setattr(self, role, Generated(partial(make, role), size))

    def _check_sizes(self, sizes: Mapping[str, int] | None) -> None:
        if not isinstance(sizes or {}, Mapping):
            raise TaskError(f"{self.name}: sizes are by split, as {{'test': 200}}, not {sizes!r}")
        unknown = [role for role in sizes or {} if role not in ROLES]
        if unknown:
            raise TaskError(f"{self.name}: sizes are by split, {', '.join(ROLES)}; there is no {', '.join(unknown)}")
        for role, size in (sizes or {}).items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise TaskError(f"{self.name}: the size of {role} is a whole number from 1 up, not {size!r}")

    def split(self, role: str, limit: int | None = None) -> Sequence[Example]:
        """The first ``limit`` examples of a role; raises TaskError for a role that does not exist or is empty."""
        if role not in ROLES:
            raise TaskError(f"{self.name} has the splits {', '.join(ROLES)}; there is no {role!r}")
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise TaskError(f"{self.name}: limit is a number of examples from 1 up, or None for all; not {limit!r}")
        examples = getattr(self, role)
        if len(examples) == 0:
            full = [r for r in ROLES if len(getattr(self, r))]
            raise TaskError(f"{self.name} has no examples for {role}; it has some for {', '.join(full) or 'no split'}")
        return examples if limit is None else examples[:limit]

    # ------------------------------------------------------------------ what a task defines
    def question_text(self, example: Example) -> str:
        """The user's turn, without image tokens."""
        raise NotImplementedError(f"{type(self).__name__}.question_text(example): the text of the question")

    def target_text(self, example: Example) -> tuple[str, str]:
        """What the model should write: the part that is scored, and what follows it (explanation, or "")."""
        raise NotImplementedError(f"{type(self).__name__}.target_text(example): (scored part, what follows or '')")

    def parse(self, text: str, example: Example) -> str | None:
        """The answer found in generated ``text``, or None where there is none."""
        raise NotImplementedError(f"{type(self).__name__}.parse(text, example): the answer in a text, or None")

    # what it may define as well
    def grade(self, answer: str | None, example: Example) -> float:
        """How right a parsed answer is, from 0 to 1; here: the same text, whatever its case."""
        return float(answer is not None and answer.strip().lower() == example.answer.strip().lower())

    def candidates(self, example: Example) -> Sequence[str]:
        """The values that ``answer`` can take, for ``evaluate(method="options")``; here: the choices."""
        return example.choices

    def about(self) -> dict[str, Any]:
        """What every result says of the data and how they were read."""
        return {"task": self.name, "template": self.template, "seed": self.seed}

    # ------------------------------------------------------------------ text to tensors
    def prompt_text(self, example: Example) -> str:
        """The whole prompt as text, by the processor's chat template, ending where the model's answer starts."""
        turns = []
        for number, (question, answer) in enumerate(example.history):
            turns += [
                self._turn("user", question, example.images if number == 0 else ()),
                self._turn("assistant", answer),
            ]
        turns.append(self._turn("user", self.question_text(example), () if example.history else example.images))
        return self._chat(turns, add_generation_prompt=True)

    def _turn(self, role: str, text: str, images: Sequence[Any] = ()) -> dict[str, Any]:
        """One turn; pictures stand where the text has ``<image>``, else in front of it."""
        if not self._reads_pictures:
            return {"role": role, "content": text}  # templates of text alone know nothing of parts
        pieces = [piece.strip() for piece in text.split(IMAGE)] if len(images) and IMAGE in text else None
        if pieces is None:
            content = [*({"type": "image"} for _ in range(len(images))), {"type": "text", "text": text}]
        else:
            content = []
            for number, piece in enumerate(pieces):
                content += [{"type": "image"}] * (number > 0)
                content += [{"type": "text", "text": piece}] * bool(piece)
        return {"role": role, "content": content}

    def _need_processor(self) -> None:
        if self.processor is None:
            raise TaskError(
                f"{self.name} was loaded without a processor, to score answers only; load it with the model's"
            )

    def _chat(self, turns: list[dict[str, Any]], **settings) -> str:
        self._need_processor()
        if getattr(self.processor, "chat_template", None) is None:
            raise TaskError(
                f"{self.name}: this {type(self.processor).__name__} has no chat template, so it is not known how its"
                " model wants a question; set its chat_template, take a model tuned for chat, or override prompt_text"
            )
        return self.processor.apply_chat_template(turns, tokenize=False, **settings)

    @cached_property
    def lead(self) -> str:
        """What the chat template writes between the prompt's end and an answer: a blank, mostly, or nothing."""
        question, mark = self._turn("user", "?"), "?!?"
        prompt = self._chat([question], add_generation_prompt=True)
        whole = self._chat([question, self._turn("assistant", mark)])
        if whole.startswith(prompt) and mark in whole:
            between = whole[len(prompt) :].partition(mark)[0]
            if not between.strip():
                return between
        return "" if prompt[-1:].isspace() else " "

    def _prompts(self, examples: Sequence[Example]) -> BatchFeature:
        self._need_processor()
        texts = [self.prompt_text(e) for e in examples]
        images = [list(e.images) for e in examples]
        bos = self.tokenizer.bos_token
        written = bool(bos) and texts[0].startswith(bos)  # the template wrote it: do not add a second one
        if any(images) and not self._reads_pictures:
            raise TaskError(f"{self.name}: examples with pictures need a processor that reads them")
        self._check_marks(examples, texts)
        return self.processor(
            text=texts,
            # one list an example: some processors (Gemma 3) have to know whose picture it is
            **({"images": images if any(images) else None} if self._reads_pictures else {}),
            padding=True,
            padding_side="left",
            add_special_tokens=not written,
            return_tensors="pt",
        )

    def _check_marks(self, examples: Sequence[Example], texts: Sequence[str]) -> None:
        """A text that happens to hold the model's mark of a picture would be read as one more picture."""
        mark = getattr(self.processor, "image_token", None)
        if not mark:
            return
        for example, text in zip(examples, texts, strict=True):
            if text.count(mark) > len(example.images):
                raise DataError(
                    f"{self.name}: the text of example {example.id} holds {mark!r}, with which this model marks a"
                    f" picture, {text.count(mark)} times for {len(example.images)} pictures; take it out of the text"
                )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def target_ids(self, example: Example) -> tuple[list[int], int]:
        """Token ids of the whole target, and how many of them are the scored part.

        They are the ids that the target has behind its prompt, which is not always what a tokenizer makes of it alone
        (SentencePiece puts a blank of its own in front).
        """
        self._need_processor()
        scored, rest = self.target_text(example)
        if not example.answer.strip() or not scored.strip():
            raise TaskError(f"{self.name}: example {example.id} has no answer to be trained on or scored by")
        scored = self.lead + scored.lstrip(" ")
        anchor = self.prompt_text(example)[-_ANCHOR:]
        before, first, whole = (self._ids(anchor + text) for text in ("", scored, scored + rest))
        if first[: len(before)] != before or whole[: len(first)] != first:  # they grow together with what is before
            before, first = [], self._ids(scored)
            whole = [*first, *(self._ids(rest) if rest else [])]
        end = [self.tokenizer.eos_token_id] if self.ends else []
        return [*whole[len(before) :], *end], len(first) - len(before)

    def opened(self, examples: Sequence[Example]) -> tuple[list[Example], list[Problem]]:
        """The examples with their pictures in memory, and those left out since a picture could not be opened.

        Raises DataError at the first such, unless the task was loaded with on_error="skip".
        """
        found, problems = [], []
        for example in examples:
            try:
                found.append(replace(example, images=tuple(example.images)))
            except PictureError as error:
                if self.on_error != "skip":
                    raise DataError(
                        f"{self.name}: {error}. Mend it, or load the task with on_error='skip', which leaves such"
                        " examples out and counts them"
                    ) from None
                problems.append(Problem("pictures", example.id, error.problem))
        self.left_out(problems)
        return found, problems

    def left_out(self, problems: Sequence[Problem]) -> None:
        """Is told which examples were left out as their pictures were opened; worker processes tell it again."""

    def collate(self, examples: Sequence[Example], answers: bool = True) -> BatchFeature:
        """Examples to one batch; pictures only of those that have some.

        With ``answers``: ``input_ids``, ``attention_mask``, ``labels`` (B, S), right padded, labels -100 on the prompt
        and on padding. Without: prompts alone, left padded, no labels, as ``generate`` wants them. Examples whose
        pictures cannot be opened are an error, or left out (``on_error="skip"``), so that B can be smaller.
        """
        if len(examples) == 0:
            raise TaskError(f"{self.name}: a batch needs at least one example, got none")
        examples, problems = self.opened(examples)
        if not examples:
            raise NothingOpenedError(
                f"{self.name}: no example of this batch has pictures that can be opened; the first: {problems[0]}"
            )
        batch = self._prompts(examples)
        return self.with_answers(batch, examples) if answers else batch

    def with_answers(self, prompts: Mapping[str, Any], examples: Sequence[Example]) -> BatchFeature:
        """The batch with labels, from that of the same examples' prompts: pictures are not processed again."""
        batch = BatchFeature(dict(prompts))
        targets = [torch.tensor(self.target_ids(e)[0]) for e in examples]
        keep = batch["attention_mask"].bool()
        length = max(int(m.sum()) + len(t) for m, t in zip(keep, targets, strict=True))

        def join(rows: torch.Tensor, ends: list[torch.Tensor], fill: int) -> torch.Tensor:
            joined = [torch.cat([r[m], e.to(r.dtype)]) for r, m, e in zip(rows, keep, ends, strict=True)]
            return torch.stack([pad(r, (0, length - len(r)), value=fill) for r in joined])

        prompt_shape = batch["input_ids"].shape
        for key, value in list(batch.items()):
            if not isinstance(value, torch.Tensor) or value.shape != prompt_shape:
                continue  # pictures
            if key == "input_ids":
                batch[key] = join(value, targets, self.tokenizer.pad_token_id)
            elif key == "attention_mask":
                batch[key] = join(value, [torch.ones_like(t) for t in targets], 0)
            else:  # token types and the like: an answer is ordinary text
                batch[key] = join(value, [torch.zeros_like(t) for t in targets], 0)
        silent = torch.full(prompt_shape, IGNORED)
        batch["labels"] = join(silent, targets, IGNORED)
        return batch

    # ------------------------------------------------------------------ scores
    def score(
        self, model, split: str = "val", limit: int | None = None, batch_size: int = 64, workers: int = 0
    ) -> dict[str, Any]:
        """Loss and accuracy by teacher forcing: one forward a batch, nothing generated.

        ``loss`` is the mean over all target tokens, ``token_accuracy`` the share of them that are the most likely
        token. For ``accuracy`` an example counts as right where the most likely token is the
        target's at every position of the scored part: just then greedy generation writes that part.
        """
        return evaluation.score(self, model, split, limit, batch_size, workers)

    def evaluate(
        self,
        model,
        split: str = "val",
        limit: int | None = None,
        batch_size: int = 64,
        method: str = "generate",
        progress: bool = False,
        predictions: str | os.PathLike | None = None,
        workers: int = 0,
        with_loss: bool = True,
        generation: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Accuracy in all columns, with everything needed to read it.

        Args:
            method: "generate" writes greedily and parses the text; "options" takes the option that the model finds
                most likely a token (for examples with choices; no parsing, so it also serves an untuned model).
            predictions: a file (.jsonl) that gets a line an example as soon as it is answered. If it is there already,
                made with the same settings, what it holds is not computed again; pictures that could not be opened
                are tried again.
            workers: processes that open pictures and make batches ahead of the model; 0 does so in between.
            with_loss: also the loss of the wanted answers, one more forward a batch.
            generation: for ``model.generate``, beside greedy decoding, e.g. ``{"merge": "low_rank"}``.

        Returns:
            ``accuracy`` (None where the split's answers are not known), ``loss``, ``count``, ``split``, ``template``,
            ``parser``, ``method``, ``seed``, ``unparsed`` (how many), ``unparsed_examples`` (the first of their texts),
            ``skipped`` (examples left out for their pictures), ``seconds``, ``columns`` (accuracy by category) and
            ``column_counts``; for real data also where they come from.

        Raises:
            TaskError: for settings that make no sense, a split that is empty, or two examples with one id.
            DataError: for a picture that cannot be opened (but see ``on_error``), or a predictions file that was made
                with other settings, by another model, or is broken.
        """
        settings = evaluation.Settings(method, batch_size, workers, with_loss, progress, dict(generation or {}))
        return evaluation.evaluate(self, model, split, limit, settings, predictions)

    def score_predictions(
        self, predictions: str | os.PathLike, split: str = "val", limit: int | None = None
    ) -> dict[str, Any]:
        """The result of ``evaluate`` from its predictions file, without a model; texts are parsed anew.

        Any file of lines ``{"id": ..., "text": ...}`` (or with "answer", already parsed) will do.

        Raises:
            DataError: for a line that is broken, an id that the split does not have, or one that is missing.
        """
        return evaluation.score_predictions(self, predictions, split, limit)

    def summarise(self, grades: Sequence[float], examples: Sequence[Example]) -> dict[str, Any]:
        """More numbers for the result, from the grades of all examples; here: none."""
        return {}

    def answers(self, model, examples: Sequence[Example]) -> list[str | None]:
        """The model's own words on one batch of examples, greedily written and parsed; None where nothing was found.

        With on_error="skip" also where a picture cannot be opened.
        """
        return evaluation.answers(self, model, examples)

    def to_hf(self, split: str | None = None):
        """The examples of a split, or of all, as a ``datasets.Dataset``; pictures stay files until they are read.

        Columns: role, id, question, answer, choices, explanation, context, categories, references, group, prompt
        (``question_text``), target (``target_text``), images (a list of ``datasets.Image``).
        """
        from eas_kit.tasks.bridges import to_hf

        return to_hf(self, ROLES if split is None else (split,))
