"""Task ``elements``: multiple-choice questions on the chemical elements, in ScienceQA's form.

The atomic number is handwritten in the picture (IMG), given in the text (TXT), or the question names the element
and nothing else is given (NO). Options are texts, not letters: a model of this size does not learn in tuning alone
to bind a letter to its option.
"""

from __future__ import annotations

import re

import numpy as np

from eas_kit.tasks.base import ROLES, Example, Generated, Task
from eas_kit.tasks.digit_images import draw_number
from eas_kit.tasks.periodic_table import ATTRIBUTES, Element, elements, values

SIZES = {"train": 20_000, "search": 500, "val": 500, "test": 1_000}
MODALITIES = ("IMG", "TXT", "NO")
# attribute -> (question, subject column and grade column as in ScienceQA's tables)
_ASK = {
    "name": ("Which element is {s}?", "LAN", "G1-6"),
    "symbol": ("Which symbol does {s} have?", "LAN", "G1-6"),
    "state": ("What state is {s} in at 25 degrees?", "NAT", "G1-6"),
    "category": ("What kind of element is {s}?", "NAT", "G7-12"),
    "period": ("Which period does {s} belong to?", "NAT", "G7-12"),
    "group": ("Which group does {s} belong to?", "NAT", "G7-12"),
    "block": ("Which block does {s} belong to?", "NAT", "G7-12"),
    "discovered": ("When was {s} discovered?", "SOC", "G1-6"),
}
_REASON = {
    "name": "the symbol of {n} is {y}.",
    "symbol": "the symbol of {n} is {v}.",
    "state": "{n} is a {v}.",
    "category": "{n} is of the kind {v}.",
    "period": "{n} is in period {v}.",
    "group": "{n} is in group {v}.",
    "block": "{n} is in block {v}.",
    "discovered": "{n} is known since the {v}.",
}


class Elements(Task):
    """See the module. Splits use disjoint digit scans and, with ``disjoint_facts``, disjoint (element, attribute) pairs."""

    name = "elements"
    template = "Question / Context / Options (texts) -> The answer is X. BECAUSE: solution (QCM-ALE)"
    parser = "the option in 'The answer is X.'"

    def __init__(self, processor, sizes: dict[str, int] | None = None, seed: int = 0, disjoint_facts: bool = True):
        super().__init__(processor)
        self.seed = seed
        self._pairs = self._deal_pairs(disjoint_facts)
        for role, size in {**SIZES, **(sizes or {})}.items():
            setattr(self, role, Generated(lambda i, role=role: self._make(role, i), size))

    @staticmethod
    def _deal_pairs(disjoint: bool) -> dict[str, dict[str, list[Element]]]:
        """role -> attribute -> elements asked about: of each attribute 60 / 10 / 10 / 20 % of the elements."""
        rng = np.random.default_rng(118)
        dealt: dict[str, dict[str, list[Element]]] = {role: {} for role in ROLES}
        for attribute in _ASK:
            known = [e for e in elements() if getattr(e, attribute)]
            order = rng.permutation(len(known))
            edges = (np.cumsum((0, 0.6, 0.1, 0.1, 0.2)) * len(known)).round().astype(int)
            for place, role in enumerate(ROLES):
                numbers = order[edges[place] : edges[place + 1]] if disjoint else order
                dealt[role][attribute] = [known[i] for i in numbers]
        return dealt

    def _make(self, role: str, i: int) -> Example:
        rng = np.random.default_rng((self.seed, ROLES.index(role), i))
        attribute = str(rng.choice(list(_ASK)))
        pool = self._pairs[role][attribute]
        element = pool[int(rng.integers(len(pool)))]
        modality = MODALITIES[i % 3]
        question, subject_column, grade = _ASK[attribute]
        value = getattr(element, attribute)
        images, context = (), "N/A"
        if modality == "NO":
            subject = f"the one with symbol {element.symbol}" if attribute == "name" else element.name
        else:
            subject = "this"
            if modality == "IMG":
                images, context = (draw_number(int(element.number), role, rng),), "the picture shows its number."
            else:
                context = f"its number is {element.number}."
        wrong = [v for v in values(attribute) if v != value]
        options = [str(o) for o in rng.choice(wrong, size=min(3, len(wrong)), replace=False)]
        options.insert(int(rng.integers(len(options) + 1)), value)
        reason = _REASON[attribute].format(n=element.name, v=value, y=element.symbol)
        return Example(
            id=f"{role}-{i}",
            question=question.format(s=subject),
            context=context,
            choices=tuple(options),
            answer=value,
            explanation=f"element {element.number} is {element.name}. {reason}",
            images=images,
            categories=(subject_column, modality, grade),
        )

    def question_text(self, example: Example) -> str:
        return f"Question: {example.question}\nContext: {example.context}\nOptions: {', '.join(example.choices)}"

    def target_text(self, example: Example) -> tuple[str, str]:
        rest = f" BECAUSE: {example.explanation}" if example.explanation else ""
        return f" The answer is {example.answer}.", rest

    def parse(self, text: str, example: Example) -> str | None:
        found = re.search(r"The answer is (.+?)(?:\.|$)", text)
        if not found:
            return None
        said = found[1].strip().lower()
        return next((c for c in example.choices if c.lower() == said), None)


assert set(_ASK) == set(ATTRIBUTES)
