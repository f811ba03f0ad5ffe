"""Task ``nlvr2``: NLVR2 (Suhr et al. 2019), whether a sentence is true of two photographs.

Reads the owners' ``train.json``, ``dev.json``, ``test1.json`` (JSON lines) with the pictures beside them, or a hub
copy. An identifier is split-set-pair-sentence: of eight pictures, a set, four pairs are made, and each of two sentences
is judged of all four. So train is split by sets, and a sentence is understood if it is judged rightly of every pair.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eas_kit.errors import DataError
from eas_kit.tasks.answers import find_name
from eas_kit.tasks.base import Example
from eas_kit.tasks.data_set import Card, DataSetTask
from eas_kit.tasks.metrics import consistency
from eas_kit.tasks.pictures import Pictures
from eas_kit.tasks.records import field, read_json_lines

LABELS = ("True", "False")
_IDENTIFIER = re.compile(r"(\w+-\d+)-(\d+)-(\d+)")
# owner's split -> names in hub copies; the last are parts that one copy has instead of the whole
_HUB_SPLITS = {
    "train": ("train",),
    "dev": ("validation", "dev", "val", "balanced_dev"),
    "test1": ("test", "test1", "test_public", "balanced_test_public"),
}
# columns of hub copies: sentence, label, left picture, right picture
_COLUMNS = (("sentence", "label", "image0", "image1"), ("question", "answer", "left_image", "right_image"))


class NLVR2(DataSetTask):
    """See the module, and ``DataSetTask`` for data_dir, hub, sizes, seed, held_out, on_error.

    The result also has ``consistency``, the share of sentences that are judged rightly of all their pairs, as the
    owners' eval/metrics.py computes it. With ``limit`` or ``sizes`` it only sees the pairs that were drawn.
    ``search`` is held out of train by sets.

    Args:
        splits: what is read, of "train", "val" (dev.json) and "test" (test1.json); None: all three. The pictures of
            train are most of the download.
    """

    name = "nlvr2"
    pictures = True
    template = "two pictures, 'The first picture is the left one, ...', sentence -> True or False"
    parser = "True or False, whichever alone is named"
    roles: Mapping[str, str] = {"train": "train", "val": "dev", "test": "test1"}
    card = Card(
        title="NLVR2",
        page="https://lil.nlp.cornell.edu/nlvr/",
        licence="CC BY 4.0; pictures for research alone, their owners' terms",
        hub="pingzhili/nlvr2",
        published={"train": 86_373, "dev": 6_982, "test1": 6_967},
    )
    image_dirs = (".", "nlvr2", "data", "nlvr2/data")

    def __init__(
        self,
        processor,
        data_dir=None,
        hub: bool | str = False,
        *,
        splits: str | Sequence[str] | None = None,
        **settings,
    ):
        self.choose_splits(splits)
        if "val" not in self.roles:
            self.can_hold_out = ("search",)
        super().__init__(processor, data_dir, hub, **settings)

    def published(self) -> Mapping[str, int]:
        whole = {role: split for role, split in self.roles.items() if not split.startswith("balanced")}
        return {split: self.card.published[NLVR2.roles[role]] for role, split in whole.items()}

    # ------------------------------------------------------------------ the owners' files
    def read_folder(self) -> dict[str, list[Example]]:
        return {split: self._read_split(split) for split in self.roles.values()}

    def _read_split(self, split: str) -> list[Example]:
        try:
            file = self.file(f"{split}.json", f"nlvr2/data/{split}.json")
        except DataError as error:
            raise DataError(f"{error}; splits= says which are read, of {', '.join(self.roles)}") from None
        pictures = self._finder(split)
        found: list[Example] = []
        for line, record in read_json_lines(file, self._intake):
            with self.reading(file, record.get("identifier", f"line {line}")):
                pair = _IDENTIFIER.fullmatch(_identifier(record))
                directory = field(record, "directory", (int, str), default="")
                found.append(_example(record, "sentence", "label", pictures(f"{pair[1]}-{pair[2]}", str(directory))))
        return found

    def _finder(self, split: str) -> Callable[[str, str], Pictures]:
        """(split-set-pair, folder in train) -> both pictures. They are in a folder of the split, or all in one."""
        root = self.folder_of(f"images/{split}", split) or self.folder_of("images") or self.image_root
        folders: dict[str, bool] = {}
        seen: dict[str, Pictures] = {}

        def find(pair: str, directory: str) -> Pictures:
            if pair not in seen:
                if directory not in folders:
                    folders[directory] = directory not in ("", ".", "..") and (root / directory).is_dir()
                start = f"{directory}/{pair}" if folders[directory] else pair
                places = (f"{start}-img0.png", f"{start}-img1.png")
                seen[pair] = Pictures(*(self.picture(f"pair {pair}", place, root=root) for place in places))
            return seen[pair]

        return find

    # ------------------------------------------------------------------ hub copies
    def read_hub(self) -> dict[str, list[Example]]:
        """A split that the copy does not have leaves its role empty; ``sources`` names those that were read."""
        found: dict[str, list[Example]] = {}
        there = {role: self.hub_copy.split(*_HUB_SPLITS[split]) for role, split in self.roles.items()}
        if not any(there.values()):
            self.hub_copy.rows(*(name for split in self.roles.values() for name in _HUB_SPLITS[split]))  # raises
        self.roles = {role: split for role, split in there.items() if split is not None}
        for split in self.roles.values():
            rows = self.hub_copy.rows(split)
            columns = next((some for some in _COLUMNS if set(some) <= set(rows.column_names)), _COLUMNS[0])
            rows = self.hub_copy.rows(split, columns=("identifier", *columns))
            sentence, label, *sides = columns
            whole = [
                all(both) for both in zip(*(self.hub_copy.has_pictures(rows, side) for side in sides), strict=True)
            ]
            found[split] = []
            for row, record in self.hub_copy.records(rows):
                with self.reading(f"{self.hub}, split {split}", record["identifier"] or f"row {row}"):
                    if not whole[row]:
                        raise DataError("one of its two pictures is empty")
                    who = f"pair {_identifier(record)}"
                    both = (self.hub_copy.picture(rows, row, side, who) for side in sides)
                    images = Pictures(*(source for pictures in both for source in pictures.sources))
                    found[split].append(_example(record, sentence, label, images))
        return found

    # ------------------------------------------------------------------ text
    def question_text(self, example: Example) -> str:
        return (
            "The first picture is the left one, the second picture is the right one. Is this sentence true of them?\n"
            f"{example.question}\nAnswer True or False."
        )

    def target_text(self, example: Example) -> tuple[str, str]:
        return example.answer, ""

    def parse(self, text: str, example: Example) -> str | None:
        return find_name(text, LABELS)

    def summarise(self, grades: Sequence[float], examples: Sequence[Example]) -> dict[str, Any]:
        return {"consistency": consistency([grade == 1 for grade in grades], [sentence_of(e.id) for e in examples])}

    def official_predictions(self, answers: Mapping[str, str | None]) -> str:
        """What the owners' eval/metrics.py reads: a line ``identifier,prediction`` each.

        Where nothing was parsed nothing stands behind the comma; they count that as wrong.
        """
        return "".join(f"{identifier},{answer or ''}\n" for identifier, answer in answers.items())


def sentence_of(identifier: str) -> str:
    """What the pairs of one sentence share: split, set and sentence. "dev-850-0-1" -> "dev-850--1"."""
    found = _IDENTIFIER.fullmatch(identifier)
    return f"{found[1]}--{found[3]}"


def _identifier(record: dict[str, Any]) -> str:
    found = field(record, "identifier")
    if not _IDENTIFIER.fullmatch(found):
        raise DataError(f"an identifier is split-set-pair-sentence, as in dev-850-0-1, not {found!r}")
    return found


def _example(record: dict[str, Any], sentence: str, label: str, images: Pictures) -> Example:
    identifier, answer, text = _identifier(record), field(record, label), field(record, sentence).strip()
    if answer not in LABELS:
        raise DataError(f"the {label} is one of {', '.join(LABELS)}, not {answer!r}")
    if not text:
        raise DataError(f"the {sentence} is empty")
    return Example(
        id=identifier,
        question=text,
        answer=answer,
        choices=LABELS,
        images=images,
        group=_IDENTIFIER.fullmatch(identifier)[1],
    )
