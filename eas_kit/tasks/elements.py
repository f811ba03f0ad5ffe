"""Task ``elements``: multiple-choice questions on the chemical elements, in ScienceQA's form.

The atomic number is handwritten in the picture (IMG), given in the text (TXT), or the question names the element
and nothing else is given (NO). Options are texts, not letters: a model of this size does not learn in tuning alone
to bind a letter to its option.
"""

from __future__ import annotations

import numpy as np

from eas_kit.errors import TaskError
from eas_kit.tasks.base import ROLES, Example, Task, said_answer
from eas_kit.tasks.digit_images import draw_number
from eas_kit.tasks.periodic_table import ATTRIBUTES, Element, elements, values
from eas_kit.tasks.statements import fact

SIZES = {"train": 20_000, "search": 500, "val": 500, "test": 1_000}
ORDERS = {
    "QCM-LEA": "Question / Context / Options (texts) -> solution. The answer is X. (QCM-LEA)",
    "QCM-ALE": "Question / Context / Options (texts) -> The answer is X. BECAUSE: solution (QCM-ALE)",
}
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


class Elements(Task):
    """See the module. Splits use disjoint digit scans; a question without picture may recur in another split.

    Args:
        disjoint_facts: also keep every element to one split, so that no fact of test was seen in train.
        order: "QCM-LEA", the solution first, or "QCM-ALE", the answer first.
    """

    name = "elements"
    pictures = True
    template = ORDERS["QCM-LEA"]
    parser = "the option in 'The answer is X.'"

    def __init__(
        self,
        processor,
        sizes: dict[str, int] | None = None,
        seed: int = 0,
        disjoint_facts: bool = False,
        order: str = "QCM-LEA",
    ):
        super().__init__(processor)
        if order not in ORDERS:
            raise TaskError(f"elements: order is one of {', '.join(ORDERS)}, not {order!r}")
        self.seed, self.order = seed, order
        self.template = ORDERS[order]
        self._pairs = self._deal_pairs(disjoint_facts)
        self.set_splits(self._make, SIZES, sizes)

    @staticmethod
    def _deal_pairs(disjoint: bool) -> dict[str, dict[str, list[Element]]]:
        """role -> attribute -> elements asked about: all that have it, or of 60 / 10 / 10 / 20 % of the elements."""
        order = np.random.default_rng(118).permutation(len(elements()))
        edges = (np.cumsum((0, 0.6, 0.1, 0.1, 0.2)) * len(order)).round().astype(int)
        dealt: dict[str, dict[str, list[Element]]] = {}
        for place, role in enumerate(ROLES):
            pool = [elements()[i] for i in (order[edges[place] : edges[place + 1]] if disjoint else order)]
            dealt[role] = {attribute: [e for e in pool if getattr(e, attribute)] for attribute in _ASK}
        return dealt

    def _make(self, role: str, i: int) -> Example:
        rng = np.random.default_rng((self.seed, ROLES.index(role), i))
        modality = MODALITIES[i % 3]
        # without a number the question names the element, so it cannot ask for the name
        attribute = str(rng.choice([a for a in _ASK if modality != "NO" or a != "name"]))
        pool = self._pairs[role][attribute]
        element = pool[int(rng.integers(len(pool)))]
        question, subject_column, grade = _ASK[attribute]
        value = getattr(element, attribute)
        images, context = (), "N/A"
        if modality == "NO":
            subject = element.name
        else:
            subject = "this"
            if modality == "IMG":
                images, context = (draw_number(int(element.number), role, rng),), "the picture shows its number."
            else:
                context = f"its number is {element.number}."
        wrong = [v for v in values(attribute) if v != value]
        options = [str(o) for o in rng.choice(wrong, size=min(3, len(wrong)), replace=False)]
        options.insert(int(rng.integers(len(options) + 1)), value)
        return Example(
            id=f"{role}-{i}",
            question=question.format(s=subject),
            context=context,
            choices=tuple(options),
            answer=value,
            explanation=_solution(element, attribute, modality),
            images=images,
            categories=(subject_column, modality, grade),
        )

    def question_text(self, example: Example) -> str:
        return f"Question: {example.question}\nContext: {example.context}\nOptions: {', '.join(example.choices)}"

    def target_text(self, example: Example) -> tuple[str, str]:
        answer = f" The answer is {example.answer}."
        if not example.explanation:
            return answer, ""
        if self.order == "QCM-LEA":
            return f" {example.explanation}{answer}", ""
        return answer, f" BECAUSE: {example.explanation}"

    def parse(self, text: str, example: Example) -> str | None:
        said = said_answer(text)
        return next((c for c in example.choices if c.lower() == said), None)


def _solution(element: Element, attribute: str, modality: str) -> str:
    """The steps from what is given to the answer, as statements that the bundled model knows from pretraining."""
    if modality == "NO":
        return "".join(fact(element, attribute, "name", 1))
    steps = [f"the number is {element.number}.", f"it is {element.name}."]
    if attribute != "name":
        steps.append("".join(fact(element, attribute, "it", 1)))
    return " ".join(steps)


assert set(_ASK) == set(ATTRIBUTES)
