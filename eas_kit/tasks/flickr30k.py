"""Task ``flickr30k``: Flickr30K (Young et al. 2014) in Karpathy's split, finding pictures by captions and back.

Reads Karpathy's ``dataset_flickr30k.json`` and ``flickr30k-images/``, or a hub copy made from them. Two things are made
of it: yes/no questions, on which a model is tuned and which are scored as those of any other task; and retrieval, where
every picture is scored with every caption (retrieval.py). The owners have no file of results.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

from eas_kit.errors import DataError, TaskError
from eas_kit.tasks import retrieval
from eas_kit.tasks.answers import find_name, plain_words
from eas_kit.tasks.base import ROLES, Example
from eas_kit.tasks.data_set import Card, DataSetTask
from eas_kit.tasks.pictures import Pictures
from eas_kit.tasks.records import field, read_json

ANSWERS = ("Yes", "No")
_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_MORE = (
    "a role wants two pictures or more, with captions that differ",
    "hold out a larger share of train, as held_out={'search': 0.2}, or none: 0",
)
_IMAGE = ("image",)
_CAPTIONS = ("caption", "original_alt_text", "captions")  # columns of hub copies


class Flickr30K(DataSetTask):
    """See the module, and ``DataSetTask`` for data_dir, hub, sizes, seed, held_out, on_error.

    Examples are yes/no questions, two for each caption: on its own picture (Yes, column "matching") and on another one
    of the same role (No, column "mismatching"). So neither the caption alone nor (where all pictures have the same
    number of captions) the picture alone tells anything, and chance is 0.5. They are made when pictures have been dealt
    to roles, so that no picture and no caption of it is in two. The other picture is drawn by ``seed`` and has no
    caption of the same words; it can still happen to fit the sentence.

    ``sizes`` and ``limit`` are numbers of questions; the two of a caption are drawn together. Retrieval is over the
    pictures of a role, whatever the sizes.
    """

    name = "flickr30k"
    pictures = True
    template = "Does this sentence describe the picture? caption, Answer yes or no. -> Yes or No"
    parser = "yes or no, where just one of them is said"
    card = Card(
        title="Flickr30K (Karpathy's split)",
        page="https://shannon.cs.illinois.edu/DenotationGraph/",
        licence="non-commercial research and education; pictures under Flickr's terms",
        hub="umaru97/flickr30k_train_val_test",
        published={"train": 29_000, "val": 1_014, "test": 1_000},  # pictures
    )
    image_dirs = ("flickr30k-images", "flickr30k_images/flickr30k_images", "flickr30k_images", "images", ".")

    # ------------------------------------------------------------------ reading: pictures with their captions
    def read_folder(self) -> dict[str, list[Example]]:
        path = self.file("dataset_flickr30k.json")
        found: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
        seen: dict[str, str] = {}
        for number, record in enumerate(field(read_json(path, dict), "images", list, default=[])):
            with self.reading(path, record.get("filename", number) if isinstance(record, dict) else number):
                name, split = field(record, "filename"), _split(field(record, "split"))
                _check_new(name, split, seen)
                captions = _captions([field(s, "raw") for s in field(record, "sentences", list)], "sentences")
                found[split].append(_picture(name, Pictures(self.picture(name, name)), captions))
        if not seen:
            raise DataError(f"flickr30k: {path} names no pictures; wanted Karpathy's file. {self._where_to_get_it()}")
        return found

    def read_hub(self) -> dict[str, list[Example]]:
        """A split of the copy for each of Karpathy's, or one split "test" of all with his in a column ``split``."""
        tables = {"test": self.hub_copy.rows("test", columns=_IMAGE)}
        apart = "split" not in tables["test"].column_names or set(tables["test"]["split"]) <= {"test"}
        if apart:
            tables |= {
                "train": self.hub_copy.rows("train", columns=_IMAGE),
                "val": self.hub_copy.rows("val", "validation", columns=_IMAGE),
            }
        found: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
        seen: dict[str, str] = {}
        for table, rows in tables.items():
            column = next((c for c in _CAPTIONS if c in rows.column_names), None)
            if column is None:
                raise DataError(
                    f"flickr30k: split {table} of {self.hub!r} has no column {' or '.join(_CAPTIONS)}; it has"
                    f" {', '.join(rows.column_names)}"
                )
            seeing = self.hub_copy.has_pictures(rows, "image")
            for row, record in self.hub_copy.records(rows):
                name = str(record.get("filename") or f"{table}-{row}")
                with self.reading(f"{self.hub}, split {table}", name):
                    split = _split(field(record, "split", str, default=table))
                    if apart and split != table:
                        raise DataError(f"is in split {table} of the copy and in {split!r} by its column 'split'")
                    if not seeing[row]:
                        raise DataError("has no picture")
                    _check_new(name, split, seen)
                    captions = _captions(field(record, column, list), column)
                    found[split].append(_picture(name, self.hub_copy.picture(rows, row, "image", name), captions))
        return found

    # ------------------------------------------------------------------ from pictures to questions
    def _deal(self, found: dict[str, list[Example]]) -> None:
        super()._deal(found)  # pictures, so that what belongs to one stays together
        self._captioned = {role: getattr(self, role) for role in ROLES}
        for role, pictures in self._captioned.items():
            setattr(self, role, self._questions(role, pictures))

    def _questions(self, role: str, pictures: Sequence[Example]) -> list[Example]:
        """Pictures stand in a circle, in an order drawn by seed: caption j is also asked with the one j + 1 further on.

        So every picture gets as many captions of others as it has own ones, if all have the same number, none alike.
        """
        order = random.Random(f"{self.seed} pairs {role}").sample(range(len(pictures)), len(pictures))
        words = [[_words(caption) for caption in e.references] for e in pictures]
        place = {picture: at for at, picture in enumerate(order)}
        found = []
        for i, picture in enumerate(pictures):
            for j, caption in enumerate(picture.references):
                following = (order[(place[i] + 1 + (j + step) % len(order)) % len(order)] for step in range(len(order)))
                other = next((o for o in following if words[i][j] not in words[o]), None)
                if other is None:
                    raise DataError(
                        f"flickr30k: none of the {len(pictures)} pictures of {role} can be asked with {caption!r} as"
                        f" one that it does not describe; {_MORE[role == 'search']}"
                    )
                name = f"{picture.id}#{j}"
                found.append(self.pair(picture, caption, True, name))
                found.append(self.pair(pictures[other], caption, False, name))
        return found

    def pair(self, picture: Example, caption: str, matching: bool, name: str = "") -> Example:
        """The question whether ``caption`` (called ``name``) describes ``picture``, with its answer."""
        return Example(
            id=f"{name} on {picture.id}",
            question=caption,
            answer=ANSWERS[not matching],
            choices=ANSWERS,
            images=picture.images,
            categories=("matching" if matching else "mismatching",),
            group=picture.id,
        )

    def _drawn(self, role: str, examples: Sequence[Example], size: int) -> list[Example]:
        """The two questions of a caption together; of an odd ``size``, one loses its second."""
        count = len(examples) // 2
        order = random.Random(f"{self.seed} {role} {count}").sample(range(count), count)
        numbers = [n for couple in order for n in (2 * couple, 2 * couple + 1)][:size]
        return [examples[n] for n in sorted(numbers)]

    # ------------------------------------------------------------------ text
    def question_text(self, example: Example) -> str:
        return f"Does this sentence describe the picture? {example.question}\nAnswer yes or no."

    def target_text(self, example: Example) -> tuple[str, str]:
        return example.answer, ""

    def parse(self, text: str, example: Example) -> str | None:
        return find_name(text, ANSWERS)

    # ------------------------------------------------------------------ scores
    def evaluate(
        self,
        model,
        split: str = "val",
        limit: int | None = None,
        batch_size: int = 64,
        method: str = "generate",
        progress: bool = False,
        predictions: str | os.PathLike | None = None,
        workers: int = 0,
        with_loss: bool = True,
        generation: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As ``Task.evaluate`` for the yes/no questions; "retrieval" calls ``retrieve`` with ``limit`` pictures.

        Then ``predictions`` is its file of scores, and ``accuracy`` the mean of the six recalls; ``workers`` and
        ``with_loss`` do nothing.
        """
        if method not in ("generate", "options", "retrieval"):
            raise TaskError(f"flickr30k: method is 'generate', 'options' or 'retrieval', not {method!r}")
        if method != "retrieval":
            return super().evaluate(
                model, split, limit, batch_size, method, progress, predictions, workers, with_loss, generation
            )
        if generation:
            raise TaskError(f"flickr30k: retrieval generates nothing; leave out generation={dict(generation)!r}")
        return self.retrieve(model, split, limit, batch_size=batch_size, progress=progress, scores=predictions)

    def captioned(self, split: str) -> Sequence[Example]:
        """The pictures of a role; ``references`` are the captions. Raises TaskError as ``Task.split``."""
        self.split(split)
        return self._captioned[split]

    def retrieve(
        self,
        model,
        split: str = "test",
        images: int | None = 100,
        captions_per_image: int | None = None,
        method: str | None = None,
        batch_size: int = 64,
        seed: int | None = None,
        progress: bool = False,
        scores: str | os.PathLike | None = None,
    ) -> dict[str, Any]:
        """R@1, R@5 and R@10 of text and of image retrieval, from the score of every picture with every caption.

        The cost is images x captions pairs, each read by the model: 100 pictures with all of their 500 captions are
        50,000 (782 forwards of 64 pairs or more), all 1,000 of test with their 5,000, which is what papers report,
        5 million (about 78,500). Numbers of a subset are higher than those of the whole: fewer items to confuse.

        Args:
            images: so many pictures, drawn by seed; None, or more than there are: all of the split.
            captions_per_image: the first so many captions of each; None: all.
            method: "yes_no" for a model that writes: log p(Yes) - log p(No) as answer to the task's question.
                "matching" for a model with a matching head, called as ``model(**processor(images=..., text=...))``
                (ViLT, BridgeTower, BLIP; METER): its logit, or of two the second less the first. None: "yes_no" where
                the processor has a chat template.
            batch_size: pairs in a forward.
            seed: of the drawn pictures; None: the task's.
            scores: a file (.jsonl) that gets a line a picture, its scores (``answer``) with all captions, as soon as
                they are there. If it is there already, made with the same settings, it is gone on with.

        Returns:
            ``text_retrieval`` and ``image_retrieval``, {1, 5, 10} to shares; ``chance``, the same of a random order;
            ``accuracy``, the mean of the six, and ``columns``, the six as TR@1 ... IR@10; ``subset`` (how many of how
            many, seed, how drawn), ``count`` of pairs, ``skipped`` pictures, ``split``, ``method``, ``template``,
            ``seconds``, and where the data come from.

        Raises:
            TaskError: for settings that make no sense, a model whose output holds no such score, a score that is NaN.
            DataError: for a picture that cannot be opened (unless on_error="skip"), or a file of other settings.
        """
        if method is None:
            method = "matching" if getattr(self.processor, "chat_template", None) is None else "yes_no"
        seed = self.seed if seed is None else seed
        gallery = retrieval.draw(self, self.captioned(split), split, images, captions_per_image, seed)
        return retrieval.retrieve(self, model, gallery, split, method, batch_size, progress, scores)

    def score_retrieval(self, scores: str | os.PathLike) -> dict[str, Any]:
        """The result of ``retrieve`` from its file of scores (and the settings beside it), without a model.

        Raises:
            DataError: for a file that is not whole, or made from other data.
        """
        return retrieval.score_file(self, scores)


def _words(caption: str) -> str:
    return " ".join(plain_words(caption))


def _picture(name: str, images: Pictures, captions: tuple[str, ...]) -> Example:
    return Example(id=name, question="", answer="", images=images, references=captions, group=name)


def _split(name: str) -> str:
    if name not in _SPLITS:
        raise DataError(f"the split is one of train, val, test, not {name!r}")
    return _SPLITS[name]


def _check_new(name: str, split: str, seen: dict[str, str]) -> None:
    if name in seen:
        raise DataError(f"this file name occurs twice, first in {seen[name]}")
    seen[name] = split


def _captions(texts: list[Any], where: str) -> tuple[str, ...]:
    if not texts:
        raise DataError(f"field {where!r} is empty; wanted at least one caption")
    wrong = next((t for t in texts if not isinstance(t, str) or not t.strip()), None)
    if wrong is not None or None in texts:
        raise DataError(f"field {where!r} should hold texts, it has {wrong!r}")
    return tuple(t.strip() for t in texts)
