"""Plain statements about elements and boards: the wording that the bundled model reads in pretraining.

The questions of the tasks ``elements`` and ``digits`` are worded otherwise on purpose (see there), so that tuning
has something to do. The task ``reading`` tests these statements on held-out digit scans.
"""

from __future__ import annotations

import numpy as np

from eas_kit.tasks.periodic_table import Element, values

# attribute -> ways to state it; {s} is the subject ("gold", "element 79", "it"), {p} its possessive, {v} the value
_WORDINGS = {
    "name": ("{s} is {v}.", "the name of {s} is {v}.", "{p} name is {v}."),
    "symbol": ("the symbol of {s} is {v}.", "{s} has the symbol {v}.", "{p} symbol is {v}."),
    "number": ("{s} has number {v}.", "the number of {s} is {v}.", "{p} number is {v}."),
    "period": ("{s} is in period {v}.", "the period of {s} is {v}.", "{p} period is {v}."),
    "group": ("{s} is in group {v}.", "the group of {s} is {v}.", "{p} group is {v}."),
    "block": ("{s} is in block {v}.", "the block of {s} is {v}.", "{p} block is {v}."),
    "category": ("{s} is of the kind {v}.", "the kind of {s} is {v}.", "{p} kind is {v}."),
    "state": ("{s} is a {v} at room temperature.", "the state of {s} is {v}.", "{p} state is {v}."),
    "discovered": (
        "{s} is known since the {v}.",
        "the discovery of {s} was in the {v}.",
        "{p} discovery was in the {v}.",
    ),
}
KNOWN = tuple(_WORDINGS)


def known(element: Element) -> list[str]:
    """The attributes that the table knows of ``element``."""
    return [a for a in KNOWN if getattr(element, a)]


def fact(element: Element, attribute: str, subject: str, wording: int) -> tuple[str, str]:
    """A statement cut before and after its value: ``("the symbol of gold is", " Au.")``.

    ``subject``: "name" (gold), "number" (element 79) or "it".
    """
    name = {"name": element.name, "number": f"element {element.number}", "it": "it"}[subject]
    possessive = "its" if subject == "it" else f"{name}'s"
    ways = _WORDINGS[attribute]
    text = ways[wording % len(ways)]
    if subject == "it" and "of {s}" in text:
        text = ways[-1]  # "its symbol is", not "the symbol of it is"
    before, after = text.split("{v}")
    fill = {"s": name, "p": possessive}
    return before.format(**fill).rstrip(), f" {getattr(element, attribute)}{after.format(**fill)}"


def fact_line(element: Element, rng: np.random.Generator) -> str:
    """A line of text facts about one element, in random wording and order."""
    attributes = [str(a) for a in rng.permutation(known(element))]
    kind = rng.random()
    if kind < 0.3:  # one fact, found by name or by number
        subject = "name" if rng.random() < 0.5 else "number"
        attributes = [a for a in attributes if a != ("name" if subject == "name" else "number")]
        return "".join(fact(element, attributes[0], subject, int(rng.integers(3))))
    if kind < 0.5:  # a choice, without question words
        attribute = attributes[0]
        pool = [v for v in values(attribute) if v != getattr(element, attribute)] if attribute != "number" else None
        if pool is None:
            pool = [str(n) for n in range(1, 119) if str(n) != element.number]
        options = [str(o) for o in rng.choice(pool, size=min(3, len(pool)), replace=False)]
        options.insert(int(rng.integers(len(options) + 1)), getattr(element, attribute))
        subject = element.name if attribute != "name" and rng.random() < 0.5 else f"element {element.number}"
        if attribute == "number":
            subject = element.name
        return f"{attribute} of {subject}, one of {' / '.join(options)}: {getattr(element, attribute)}."
    # a chain: who it is, then what it is like
    by_name = rng.random() < 0.5
    start = fact(element, "number" if by_name else "name", "name" if by_name else "number", int(rng.integers(2)))
    rest = [a for a in attributes if a not in ("number", "name")][: int(rng.integers(1, 5))]
    return " ".join(["".join(start), *("".join(fact(element, a, "it", int(rng.integers(3)))) for a in rest)])


def number_lines(element: Element, rng: np.random.Generator) -> str:
    """Statements about a picture that shows the element's number."""
    parts = []
    if rng.random() < 0.6:
        parts.append(f"the number is {element.number}.")
    if rng.random() < 0.5:
        parts.append(f"it is {element.name}.")
    attributes = [a for a in known(element) if a not in ("number", "name")]
    for attribute in rng.permutation(attributes)[: int(rng.integers(1, 4))]:
        parts.append("".join(fact(element, str(attribute), "it", int(rng.integers(3)))))
    return " ".join(parts)


_COUNT = ("zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines")


def board_statement(board: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """A statement about a (3, 3) board, cut before its value; ``kind`` as in BOARD_KINDS."""
    row, column = int(rng.integers(3)), int(rng.integers(3))
    if kind == "all":
        return "all rows:", " " + " / ".join(" ".join(map(str, r)) for r in board) + "."
    if kind == "row":
        return f"row {row + 1} is", " " + " ".join(map(str, board[row])) + "."
    if kind == "column":
        return f"column {column + 1} is", " " + " ".join(map(str, board[:, column])) + "."
    if kind == "cell":
        return f"row {row + 1}, column {column + 1} is", f" {board[row, column]}."
    if kind == "largest":
        return f"the largest of row {row + 1} is", f" {board[row].max()}."
    if kind == "sum":
        return f"the sum of row {row + 1} is", f" {board[row].sum()}."
    if kind == "count":
        digit = int(rng.choice(board.ravel())) if rng.random() < 0.7 else int(rng.integers(10))
        return f"the number of {_COUNT[digit]} is", f" {int((board == digit).sum())}."
    if kind == "parity":
        return f"row {row + 1}, column {column + 1} is", f" {'even' if board[row, column] % 2 == 0 else 'odd'}."
    raise ValueError(f"no board statement {kind!r}")


BOARD_KINDS = ("all", "row", "column", "cell", "largest", "sum", "count", "parity")


def board_lines(board: np.ndarray, rng: np.random.Generator) -> str:
    """A few statements about one board."""
    kinds = rng.choice(BOARD_KINDS, size=int(rng.integers(1, 4)), p=(0.3, 0.15, 0.1, 0.15, 0.075, 0.075, 0.075, 0.075))
    return " ".join("".join(board_statement(board, str(k), rng)) for k in kinds)
