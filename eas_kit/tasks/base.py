"""What a task is: examples by data role, the template that turns them into tokens, and how answers are scored.

A new task says how an example reads (``question_text``, ``target_text``) and how an answer is found in generated
text (``parse``); collating, generation, scoring by teacher forcing and the report are here.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad
from transformers import BatchFeature

from eas_kit.errors import TaskError
from eas_kit.modes import eval_mode

ROLES = ("train", "search", "val", "test")
IGNORED = -100  # the label of positions that carry no loss


@dataclass(frozen=True)
class Example:
    """One question. ``images`` are PIL pictures; ``categories`` name the columns of the result table it counts in."""

    id: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    explanation: str = ""
    context: str = ""
    images: tuple[Any, ...] = ()
    categories: tuple[str, ...] = field(default=())


class Generated(Sequence):
    """A split whose examples are made when they are asked for, each from its own number, and kept."""

    def __init__(self, make: Callable[[int], Example], size: int):
        self._make, self._size = lru_cache(maxsize=None)(make), size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self._size))]
        if not -self._size <= i < self._size:
            raise IndexError(f"example {i} of a split with {self._size}")
        return self._make(i % self._size)


@contextmanager
def evaluating(model) -> Iterator[None]:
    """Dropout off and no gradients inside; the mode of every module comes back after."""
    with eval_mode(model), torch.inference_mode():
        yield


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
    """

    name = "task"
    template = ""
    parser = ""
    ends = True  # whether the target closes with the end-of-text token
    pictures = False  # whether the model has to read pictures
    train: Sequence[Example]
    search: Sequence[Example]
    val: Sequence[Example]
    test: Sequence[Example]

    def __init__(self, processor):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)  # of a model of text alone they are the same
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
                f"{self.name}: elements, digits and reading need a model that reads pictures, and this processor"
                f" ({kind}) has no part for them; for a model of text take definitions"
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
        unknown = [role for role in given or {} if role not in ROLES]
        if unknown:
            raise TaskError(f"{self.name}: sizes are by split, {', '.join(ROLES)}; there is no {', '.join(unknown)}")
        for role, size in {**sizes, **(given or {})}.items():
            if not isinstance(size, int) or size < 1:
                raise TaskError(f"{self.name}: the size of {role} is a whole number from 1 up, not {size!r}")
            setattr(self, role, Generated(partial(make, role), size))

    # ------------------------------------------------------------------ what a task defines
    def question_text(self, example: Example) -> str:
        """The user's turn, without image tokens."""
        raise NotImplementedError

    def target_text(self, example: Example) -> tuple[str, str]:
        """What the model should write: the part that is scored, and what follows it (explanation, or "")."""
        raise NotImplementedError

    def parse(self, text: str, example: Example) -> str | None:
        """The answer found in generated ``text``, or None where there is none."""
        raise NotImplementedError

    # ------------------------------------------------------------------ text to tensors
    def prompt_text(self, example: Example) -> str:
        """The whole prompt as text, by the processor's chat template, ending where the model's answer starts."""
        if getattr(self.processor, "chat_template", None) is None:
            raise TaskError(
                f"{self.name}: this {type(self.processor).__name__} has no chat template, so it is not known how its"
                " model wants a question; set its chat_template, take a model tuned for chat, or override prompt_text"
            )
        content: Any = self.question_text(example)  # templates of text alone know nothing of parts
        if self._reads_pictures:
            content = [*({"type": "image"} for _ in example.images), {"type": "text", "text": content}]
        turns = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def _prompts(self, examples: Sequence[Example]) -> BatchFeature:
        texts = [self.prompt_text(e) for e in examples]
        flat = [i for e in examples for i in e.images]
        bos = self.tokenizer.bos_token
        written = bool(bos) and texts[0].startswith(bos)  # the template wrote it: do not add a second one
        if flat and not self._reads_pictures:
            raise TaskError(f"{self.name}: examples with pictures need a processor that reads them")
        return self.processor(
            text=texts,
            **({"images": flat or None} if self._reads_pictures else {}),
            padding=True,
            padding_side="left",
            add_special_tokens=not written,
            return_tensors="pt",
        )

    def target_ids(self, example: Example) -> tuple[list[int], int]:
        """Token ids of the whole target, and how many of them are the scored part."""
        scored, rest = self.target_text(example)
        first = self.tokenizer(scored, add_special_tokens=False)["input_ids"]
        then = self.tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
        end = [self.tokenizer.eos_token_id] if self.ends else []
        return [*first, *then, *end], len(first)

    def collate(self, examples: Sequence[Example], answers: bool = True) -> BatchFeature:
        """Examples to one batch; pictures only of those that have some.

        With ``answers``: ``input_ids``, ``attention_mask``, ``labels`` (B, S), right padded, labels -100 on the prompt
        and on padding. Without: prompts alone, left padded, no labels, as ``generate`` wants them.
        """
        if len(examples) == 0:
            raise TaskError(f"{self.name}: a batch needs at least one example, got none")
        batch = self._prompts(examples)
        if not answers:
            return batch
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
    def split(self, role: str, limit: int | None = None) -> Sequence[Example]:
        """The first ``limit`` examples of a role; raises TaskError for a role that does not exist."""
        if role not in ROLES:
            raise TaskError(f"{self.name} has the splits {', '.join(ROLES)}; there is no {role!r}")
        if limit is not None and limit < 1:
            raise TaskError(f"{self.name}: limit is a number of examples from 1 up, or None for all; not {limit}")
        examples = getattr(self, role)
        return examples if limit is None else examples[:limit]

    def score(self, model, split: str = "val", limit: int | None = None, batch_size: int = 64) -> dict[str, Any]:
        """Loss and accuracy by teacher forcing: one forward a batch, nothing generated.

        ``loss`` is the mean over all target tokens, ``token_accuracy`` the share of them that are the most likely
        token. For ``accuracy`` an example counts as right where the most likely token is the
        target's at every position of the scored part: just then greedy generation writes that part.
        """
        examples = self.split(split, limit)
        device = next(model.parameters()).device
        total, tokens, right, hits = 0.0, 0, 0, 0
        with evaluating(model):
            for start in range(0, len(examples), batch_size):
                part = examples[start : start + batch_size]
                batch = self.collate(part).to(device)
                logits = model(**batch).logits[:, :-1].float()  # (B, S - 1, vocabulary)
                labels = batch["labels"][:, 1:]
                counted = labels != IGNORED
                total += cross_entropy(logits[counted], labels[counted], reduction="sum").item()
                tokens += int(counted.sum())
                hit = (logits.argmax(-1) == labels) | ~counted
                hits += int((hit & counted).sum())
                order = counted.cumsum(1)  # 1 at the first target token
                scored = torch.tensor([self.target_ids(e)[1] for e in part], device=device)
                right += int((hit | (order > scored[:, None])).all(1).sum())
        return {
            "loss": total / tokens,
            "accuracy": right / len(examples),
            "token_accuracy": hits / tokens,
            "count": len(examples),
        }

    def evaluate(
        self,
        model,
        split: str = "val",
        limit: int | None = None,
        batch_size: int = 64,
        method: str = "generate",
        progress: bool = False,
    ) -> dict[str, Any]:
        """Accuracy in all columns, with everything needed to read it.

        Args:
            method: "generate" writes greedily and parses the text; "options" takes the option that the model finds
                most likely a token (for examples with choices; no parsing, so it also serves an untuned model).

        Returns:
            ``accuracy``, ``loss``, ``count``, ``split``, ``template``, ``parser``, ``method``, ``unparsed``,
            ``seconds``, ``columns`` (accuracy by category) and ``column_counts``.
        """
        if method not in ("generate", "options"):
            raise TaskError(f"method is 'generate' or 'options', not {method!r}")
        examples = self.split(split, limit)
        began = time.perf_counter()
        answers: list[str | None] = [None] * len(examples)
        # the same room for every example, whatever batch it falls into: the longest target of the split and some more
        room = max(self.target_ids(e)[1] for e in examples) + 4
        # by length, so that a batch holds little padding
        order = sorted(range(len(examples)), key=lambda i: len(self.question_text(examples[i])))
        # every option is a row of its own
        at_once = batch_size if method == "generate" else batch_size // max(1, *(len(e.choices) for e in examples))
        at_once = max(1, at_once)
        starts = range(0, len(order), at_once)
        if progress:
            from tqdm.auto import tqdm

            starts = tqdm(starts, desc=f"{self.name} {split}", leave=False)
        with evaluating(model):
            for start in starts:
                numbers = order[start : start + at_once]
                batch = [examples[i] for i in numbers]
                found = self._generated(model, batch, room) if method == "generate" else self._by_option(model, batch)
                for i, answer in zip(numbers, found, strict=True):
                    answers[i] = answer
        right = [
            a is not None and a.strip().lower() == e.answer.lower() for a, e in zip(answers, examples, strict=True)
        ]
        columns: dict[str, list[bool]] = defaultdict(list)
        for ok, example in zip(right, examples, strict=True):
            for category in example.categories:
                columns[category].append(ok)
        scored = self.score(model, split, limit, batch_size)
        return {
            "accuracy": sum(right) / len(examples),
            "loss": scored["loss"],
            "count": len(examples),
            "split": split,
            "template": self.template,
            "parser": self.parser if method == "generate" else "most likely option per token",
            "method": method,
            "unparsed": sum(a is None for a in answers),
            "seconds": time.perf_counter() - began,
            "columns": {c: sum(v) / len(v) for c, v in sorted(columns.items())},
            "column_counts": {c: len(v) for c, v in sorted(columns.items())},
        }

    def answers(self, model, examples: Sequence[Example]) -> list[str | None]:
        """The model's own words on one batch of examples, greedily written and parsed."""
        with evaluating(model):
            return self._generated(model, examples, max(self.target_ids(e)[1] for e in examples) + 4)

    def _generated(self, model, examples: Sequence[Example], room: int) -> list[str | None]:
        device = next(model.parameters()).device
        inputs = self.collate(examples, answers=False).to(device)
        written = model.generate(
            **inputs, max_new_tokens=room, do_sample=False, num_beams=1, pad_token_id=self.tokenizer.pad_token_id
        )
        new = written[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [self.parse(text, example) for text, example in zip(texts, examples, strict=True)]

    def _by_option(self, model, examples: Sequence[Example]) -> list[str | None]:
        device = next(model.parameters()).device
        trial = [(i, c) for i, e in enumerate(examples) for c in e.choices]
        missing = [e.id for e in examples if not e.choices]
        if missing:
            raise TaskError(f"{self.name}: example {missing[0]} has no options; use method='generate'")
        variants = [replace(examples[i], answer=c, explanation="") for i, c in trial]
        batch = self.collate(variants).to(device)
        logits = model(**batch).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        counted = labels != IGNORED
        within = counted.cumsum(1)
        scored = torch.tensor([self.target_ids(v)[1] for v in variants], device=device)
        counted &= within <= scored[:, None]
        each = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED) * counted
        mean = (each.sum(1) / counted.sum(1)).tolist()
        best: list[tuple[float, str]] = [(float("inf"), "")] * len(examples)
        for (i, choice), value in zip(trial, mean, strict=True):
            best[i] = min(best[i], (value, choice))
        return [choice for _, choice in best]
