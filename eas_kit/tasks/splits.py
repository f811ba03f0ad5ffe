"""Splits that can be trusted: ids once, no record in two of them, and parts held out by whole groups."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from eas_kit.tasks.base import Example
from eas_kit.tasks.pictures import PictureFile, Pictures
from eas_kit.tasks.records import Intake, Problem


def sound(where: str, examples: Iterable[Example], intake: Intake) -> list[Example]:
    """Without those whose id was there before, or whose texts no tokenizer takes: the intake decides on these."""
    seen: set[str] = set()
    kept = []
    for example in examples:
        problem = "this id occurs twice" if example.id in seen else None
        text = "".join(_texts(example))
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError:
            problem = "a text holds half of a character (a lone surrogate), which cannot be written in UTF-8"
        if problem:
            intake.note(Problem(where, example.id.encode("utf-8", "backslashreplace").decode(), problem))
            continue
        seen.add(example.id)
        kept.append(example)
    return kept


def apart(found: Mapping[str, Sequence[Example]], intake: Intake) -> dict[str, list[Example]]:
    """Without records that are in a later split as well (train, val, test): what was trained on is no test.

    The same record is one with the same id, texts and pictures: ids may count from 0 in every file.
    """
    count = Counter(name for examples in found.values() for name in {e.id for e in examples})
    seen: dict[tuple[str, ...], str] = {}
    kept: dict[str, list[Example]] = {}
    for split in reversed(found):
        kept[split] = []
        for example in found[split]:
            other = split if count[example.id] == 1 else seen.setdefault(_fingerprint(example), split)
            if other == split:
                kept[split].append(example)
            else:
                intake.note(Problem(f"split {split}", example.id, f"the same record is in split {other} as well"))
    return {split: kept[split] for split in found}


def _texts(example: Example) -> tuple[str, ...]:
    own = (example.id, example.question, example.answer, example.explanation, example.context)
    return (*own, *example.choices, *(text for turn in example.history for text in turn))


def _fingerprint(example: Example) -> tuple[str, ...]:
    sources = example.images.sources if isinstance(example.images, Pictures) else ()
    return (*_texts(example), *(s.path if isinstance(s, PictureFile) else s.digest() for s in sources))


def hold_out(examples: Sequence[Example], wanted: int, rng: random.Random) -> tuple[list[Example], list[Example]]:
    """(held out, rest): whole groups drawn at random until ``wanted`` examples are reached; one group at least stays.

    An example without a group is a group of its own.
    """
    size: dict[str, int] = {}
    for example in examples:
        key = example.group or f"example {example.id}"
        size[key] = size.get(key, 0) + 1
    order = list(size)
    rng.shuffle(order)
    taken: set[str] = set()
    count = 0
    for key in order[:-1]:
        if count >= wanted:
            break
        taken.add(key)
        count += size[key]
    held = [e for e in examples if (e.group or f"example {e.id}") in taken]
    return held, [e for e in examples if (e.group or f"example {e.id}") not in taken]
