"""ScienceQA's files as its owners lay them out, with records of a test's own."""

from __future__ import annotations

import json

from PIL import Image

from eas_kit.tasks import load_task

BASE = {
    "question": "Which one is a metal?",
    "choices": ["tin", "wood", "the air."],
    "answer": 0,
    "hint": "",
    "image": None,
    "task": "closed choice",
    "grade": "grade2",
    "subject": "natural science",
    "topic": "chemistry",
    "category": "elements",
    "skill": "metals",
    "lecture": "Metals shine.",
    "solution": "Tin shines.",
}


def write(folder, records, captions=None, splits=None):
    """Owners' files with ``records``, (split, id, changes of BASE); a picture of 5 x 3 pixels where one is named."""
    problems, found = {}, {"train": [], "val": [], "test": []}
    for split, pid, changes in records:
        problems[pid] = BASE | {"split": split} | changes
        found[split].append(pid)
        if problems[pid]["image"]:
            place = folder / "images" / split / pid / "image.png"
            place.parent.mkdir(parents=True)
            Image.new("RGB", (5, 3), (int(pid) % 256, 7, 11)).save(place)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits or found))
    if captions is not None:
        (folder / "captions.json").write_text(json.dumps({"captions": captions}))
    return folder


def load(folder, processor=None, **settings):
    return load_task("scienceqa", processor, data_dir=folder, **settings)
