"""Task ``aid``: AID (Xia et al. 2017), the scene that an aerial picture shows, one of 30 classes.

Reads the owners' folders, one a class, and splits every class at random, by seed, into 20 % or 50 % for training and
the rest for test, as the data set's authors do; or files in LLaVA's form (``train20.json``, ``test20.json``).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from eas_kit.errors import DataError, TaskError
from eas_kit.tasks.answers import find_name
from eas_kit.tasks.base import Example
from eas_kit.tasks.conversations import LLAVA, read_conversations
from eas_kit.tasks.data_set import Card, DataSetTask
from eas_kit.tasks.pictures import PictureFile, Pictures
from eas_kit.tasks.records import field
from eas_kit.tasks.splits import sound

QUESTION = "What is the label for this image?\nAnswer the question using a single word."
_ENDS = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


class AID(DataSetTask):
    """See the module, and ``DataSetTask`` for data_dir, hub, sizes, seed, held_out, on_error.

    An answer is one of the classes, in small letters without blanks ("denseresidential"); ``accuracy`` is the share of
    right ones, and every class is a column.

    Args:
        train_share: 0.2 or 0.5, the part of every class that trains. Which pictures it is depends on ``seed``.
    """

    name = "aid"
    pictures = True
    template = f"{QUESTION!r} -> class"
    parser = "the one class that is named, letters only"
    card = Card(
        title="AID",
        page="https://captain-whu.github.io/AID/",
        licence="not stated by the owners; pictures from Google Earth",
        hub="blanchon/AID",
        published={"train": 2_000, "test": 8_000},
    )
    image_dirs = ("images", "AID", "data", ".")

    def __init__(self, processor, data_dir=None, hub: bool | str = False, *, train_share: float = 0.2, **settings):
        if train_share not in (0.2, 0.5):
            raise TaskError(f"aid: train_share is 0.2 or 0.5, as published, not {train_share!r}")
        self.train_share, self.classes = train_share, ()
        super().__init__(processor, data_dir, hub, **settings)

    # ------------------------------------------------------------------ reading
    def read_folder(self) -> dict[str, list[Example]]:
        percent = round(100 * self.train_share)
        names = {split: f"{split}{percent}.json" for split in ("train", "test")}
        if self.has(names["train"]):
            self.form = LLAVA
            found = {split: read_conversations(self, self.file(name)) for split, name in names.items()}
            classes = sorted({_letters(e.answer) for examples in found.values() for e in examples})
            return {split: [self._of_class(e, classes) for e in examples] for split, examples in found.items()}
        root = self._root()
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        pictures = []
        for folder in folders:
            for path in sorted(folder.iterdir()):
                if _is_picture(path):
                    place = f"{folder.name}/{path.name}"
                    pictures.append((folder.name, path.stem, PictureFile(str(root), place, place)))
        return self._split(pictures)

    def published(self) -> dict[str, int]:
        return {"train": round(10_000 * self.train_share), "test": round(10_000 * (1 - self.train_share))}

    def _root(self) -> Path:
        """The folder that has at least two folders with pictures in them."""
        for name in self.image_dirs:
            place = self.image_dir or self.folder / name
            if place.is_dir() and sum(_holds_pictures(p) for p in place.iterdir() if p.is_dir()) >= 2:
                return place
        raise DataError(
            f"aid: wanted folders of pictures, one a class (Airport/airport_1.jpg ...), or"
            f" train{round(100 * self.train_share)}.json, in {self.folder}; found neither. {self._where_to_get_it()}"
        )

    def read_hub(self) -> dict[str, list[Example]]:
        rows = self.hub_copy.rows("train", columns=("image", "label"))
        names = getattr(rows.features["label"], "names", None)
        pictures = []
        seen, stems = self.hub_copy.has_pictures(rows, "image"), self._stems(rows)
        for row, record in self.hub_copy.records(rows):
            with self.reading(f"{self.hub}, split train", f"row {row}"):
                label = record["label"]
                if names is not None and not (isinstance(label, int) and 0 <= label < len(names)):
                    raise DataError(f"the label {label!r} is outside of the {len(names)} classes")
                if not seen[row]:
                    raise DataError("there is no picture in column 'image'")
                image = self.hub_copy.picture(rows, row, "image", f"row {row}")
                pictures.append((names[label] if names else field(record, "label"), stems[row], image))
        return self._split(pictures)

    def _stems(self, rows: Any) -> list[str]:
        """The pictures' names, by which the parts are the same ones as from the owners' files; else their rows."""
        stems = [PurePath(path or "").stem for path in self.hub_copy.paths(rows, "image")]
        known = all(stems) and len(set(zip(stems, rows["label"]))) == len(stems)
        return stems if known else [f"{row:05d}" for row in range(len(stems))]

    def _split(self, pictures: Iterable[tuple[str, str, PictureFile | Pictures]]) -> dict[str, list[Example]]:
        """Every class by itself: its pictures by name, shuffled by seed and class; the first ones train."""
        by_class: dict[str, list[Example]] = {}
        for folder, stem, picture in pictures:
            images = picture if isinstance(picture, Pictures) else Pictures(picture)
            label = _letters(folder)
            example = Example(id=f"{folder}/{stem}", question=QUESTION, answer=label, images=images)
            by_class.setdefault(label, []).append(example)
        classes = sorted(by_class)
        found: dict[str, list[Example]] = {"train": [], "test": []}
        for label in classes:
            examples = sound(f"class {label}", sorted(by_class[label], key=lambda e: e.id), self._intake)
            order = random.Random(f"{self.seed} {label}").sample(range(len(examples)), len(examples))
            training = set(order[: round(self.train_share * len(order))])
            for number, example in enumerate(examples):
                found["train" if number in training else "test"].append(self._of_class(example, classes))
        return found

    def _of_class(self, example: Example, classes: Sequence[str]) -> Example:
        self.classes = tuple(classes)
        label = _letters(example.answer)
        return replace(example, answer=label, choices=self.classes, categories=(label,))

    # ------------------------------------------------------------------ text
    def question_text(self, example: Example) -> str:
        return example.question

    def target_text(self, example: Example) -> tuple[str, str]:
        return example.answer, ""

    def parse(self, text: str, example: Example) -> str | None:
        return find_name(text, self.classes)


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _holds_pictures(folder: Path) -> bool:
    return any(map(_is_picture, folder.iterdir()))


def _is_picture(path: Path) -> bool:
    """By its name; what begins with a full stop is put there by a system, not by the data set's owners."""
    return path.suffix.lower() in _ENDS and not path.name.startswith(".")
