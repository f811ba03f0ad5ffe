"""A folder in ScienceQA's form without ScienceQA in it: to try loaders, notebooks and commands on, offline.

The questions are those of the task ``elements`` (handwritten numbers, chemical elements), in the owners' files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from eas_kit.errors import TaskError
from eas_kit.tasks.base import Example
from eas_kit.tasks.elements import Elements

_SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
_GRADES = {"G1-6": "grade4", "G7-12": "grade9"}
_SHARES = {"val": 0.2, "test": 0.2}  # as ScienceQA's own


def write_scienceqa(folder: str | os.PathLike, records: int = 200, seed: int = 0) -> Path:
    """Writes ``problems.json``, ``pid_splits.json`` and ``images/`` with so many records, and returns the folder.

    60 / 20 / 20 % train / val / test; handwriting is disjoint between them, facts are not. A third of the questions
    each has a picture, a hint, or neither.

    Raises:
        TaskError: for less than 10 records, or a folder that has a problems.json already.
    """
    if records < 10:
        raise TaskError(f"write_scienceqa: wanted 10 records or more, for three splits, got {records}")
    folder = Path(folder)
    if (folder / "problems.json").exists():
        raise TaskError(f"write_scienceqa: {folder} has a problems.json already; give another folder")
    val, test = round(_SHARES["val"] * records), round(_SHARES["test"] * records)
    sizes = {"train": records - val - test, "val": val, "test": test}
    made = Elements(None, sizes, seed)
    problems: dict[str, dict[str, Any]] = {}
    splits: dict[str, list[str]] = {}
    for split in sizes:
        splits[split] = []
        for example in made.split(split):
            pid = str(len(problems) + 1)
            problems[pid] = _record(example, split)
            splits[split].append(pid)
            if example.images:
                place = folder / "images" / split / pid / "image.png"
                place.parent.mkdir(parents=True, exist_ok=True)  # of a run that was stopped
                example.images[0].save(place)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pid_splits.json").write_text(json.dumps(splits), encoding="utf-8")
    (folder / "problems.json").write_text(json.dumps(problems, indent=1), encoding="utf-8")
    return folder


def _record(example: Example, split: str) -> dict[str, Any]:
    subject, _, grade = example.categories
    return {
        "question": example.question,
        "choices": list(example.choices),
        "answer": example.choices.index(example.answer),
        "hint": example.context if "TXT" in example.categories else "",
        "image": "image.png" if example.images else None,
        "task": "closed choice",
        "grade": _GRADES[grade],
        "subject": _SUBJECTS[subject],
        "topic": "chemistry",
        "category": "elements",
        "skill": "facts about elements",
        "lecture": "",
        "solution": example.explanation,
        "split": split,
    }
