"""Task ``definitions``: plain language modelling on dictionary definitions that the bundled model never read.

Text only: the word is the prompt, its definition the target. What counts is the loss; an exact match is all but
impossible, so ``accuracy`` here is the share of target tokens that are the most likely one.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from eas_kit.errors import TaskError
from eas_kit.tasks.base import ROLES, Example, Task

# 1,000 of the definitions of WordNet 3.0 held out from pretraining; licence at the head of the file
_FILE = Path(__file__).parent / "definitions.txt"
_SHARES = {"train": 400, "search": 150, "val": 150, "test": 300}


class Definitions(Task):
    """See the module. The roles take consecutive parts of the file."""

    name = "definitions"
    template = "word: definition"
    lead = " "  # the prompt is no chat
    parser = "none: share of target tokens that are the most likely one"

    def __init__(self, processor, sizes: dict[str, int] | None = None):
        super().__init__(processor)
        lines = [line for line in _FILE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        ends = list(accumulate(_SHARES.values()))
        self._lines = {role: lines[end - _SHARES[role] : end] for role, end in zip(ROLES, ends, strict=True)}
        self.set_splits(self._make, _SHARES, sizes)
        too_many = [role for role in ROLES if len(getattr(self, role)) > _SHARES[role]]
        if too_many:
            raise TaskError(f"{self.name}: there are {_SHARES} definitions; ask for no more in {', '.join(too_many)}")

    def _make(self, role: str, i: int) -> Example:
        word, gloss = self._lines[role][i].split(": ", 1)
        return Example(id=f"{role}-{i}", question=f"{word}:", answer=gloss, categories=("TXT",))

    def prompt_text(self, example: Example) -> str:
        return example.question

    def question_text(self, example: Example) -> str:
        return example.question

    def target_text(self, example: Example) -> tuple[str, str]:
        return f" {example.answer}", ""

    def parse(self, text: str, example: Example) -> str | None:
        return text.strip() or None

    def score(self, model, split: str = "val", limit: int | None = None, batch_size: int = 64) -> dict[str, Any]:
        scores = super().score(model, split, limit, batch_size)
        return {**scores, "accuracy": scores["token_accuracy"]}

    def evaluate(
        self, model, split: str = "val", limit: int | None = None, batch_size: int = 64, **_
    ) -> dict[str, Any]:
        """As ``score``, in the form of every task's report; nothing is generated."""
        return {
            **self.score(model, split, limit, batch_size),
            "split": split,
            "template": self.template,
            "parser": self.parser,
            "method": "teacher forcing",
            "unparsed": 0,
            "columns": {},
            "column_counts": {},
        }
