"""Task ``vqav2``: VQAv2 (Goyal et al. 2017), open questions on photographs of COCO, answered by ten people each.

Reads the owners' questions and annotations, with the pictures of COCO beside them, or a hub copy. The owners' own
evaluation (github.com/GT-Vision-Lab/VQA) is ``metrics.vqa_accuracy``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eas_kit.errors import DataError, TaskError
from eas_kit.tasks.answers import short_answer
from eas_kit.tasks.base import Example
from eas_kit.tasks.data_set import Card, DataSetTask
from eas_kit.tasks.metrics import vqa_accuracy
from eas_kit.tasks.pictures import Pictures
from eas_kit.tasks.records import field, read_json_items

INSTRUCTION = "Answer the question using a single word or phrase."
ANSWER_TYPES = ("yes/no", "number", "other")
PEOPLE = 10  # the official formula leaves out one by one of so many
# test_split -> names of the same split in hub copies
TEST_SPLITS = {
    "val2014": ("validation", "val"),
    "test-dev2015": ("testdev", "test-dev", "test_dev"),
    "test2015": ("test",),
}
_PICTURES_OF = {"test-dev2015": "test2015"}
_COLUMNS = ("question_id", "image_id", "question", "image")
_ANSWERS = ("answers", "answer_type", "multiple_choice_answer")


class VQAv2(DataSetTask):
    """See the module, and ``DataSetTask`` for data_dir, hub, sizes, seed, held_out, on_error.

    Columns: "yes/no", "number" and "other", the official soft accuracy in each; ``accuracy`` is that of all questions,
    the official "overall" as a share. ``search`` and ``val`` are held out of train2014 by picture.

    Args:
        test_split: what ``test`` is. The answers to "val2014" are public; of "test-dev2015" and "test2015" they are
            not: ``evaluate`` then gives no accuracy, and ``official_predictions`` is for the owners' server.
        splits: what is read, of "train" and "test"; None: both. "test" alone saves the time and the memory of train.
    """

    name = "vqav2"
    pictures = True
    template = f"question, {INSTRUCTION!r} -> answer"
    parser = "the first line, without 'The answer is' and the full stop"
    max_new_tokens = 16
    roles: Mapping[str, str] = {"train": "train2014", "test": "val2014"}
    card = Card(
        title="VQAv2",
        page="https://visualqa.org/download.html",
        licence="CC BY 4.0; pictures of COCO, under the terms of Flickr",
        hub="lmms-lab/VQAv2",
        published={"train2014": 443_757, "val2014": 214_354, "test-dev2015": 107_394, "test2015": 447_793},
    )
    image_dirs = ("images", "Images/mscoco", "coco", "coco/images")

    def __init__(
        self,
        processor,
        data_dir=None,
        hub: bool | str = False,
        *,
        test_split: str = "val2014",
        splits: str | Sequence[str] | None = None,
        **settings,
    ):
        if test_split not in TEST_SPLITS:
            raise TaskError(f"vqav2: test_split is one of {', '.join(TEST_SPLITS)}, not {test_split!r}")
        self.roles = {"train": "train2014", "test": test_split}
        self.choose_splits(splits)
        super().__init__(processor, data_dir, hub, **settings)

    def published(self) -> Mapping[str, int]:
        return {split: self.card.published[split] for split in self.roles.values()}

    # ------------------------------------------------------------------ the owners' files
    def read_folder(self) -> dict[str, list[Example]]:
        return {split: list(self._read_split(split)) for split in self.roles.values()}

    def _read_split(self, split: str) -> Iterator[Example]:
        make = _Maker()
        try:
            questions_file = self.file(f"v2_OpenEnded_mscoco_{split}_questions.json")
            known = split not in ("test-dev2015", "test2015")
            answers_file = self.file(f"v2_mscoco_{split}_annotations.json") if known else None
        except DataError as error:
            raise DataError(f"{error}; splits= says which are read, of {', '.join(self.roles)}") from None
        of = _PICTURES_OF.get(split, split)
        root, seen = self.folder_of(of), {}

        def images(number: int) -> Pictures:
            if number not in seen:
                name = f"COCO_{of}_{number:012d}.jpg"
                # without a folder of the split they are all in one
                places = (name,) if root else (name, f"{of}/{name}")
                seen[number] = Pictures(self.picture(f"image {number}", *places, root=root))
            return seen[number]

        questions: dict[int, tuple[int, str] | None] = {}
        for place, record in enumerate(read_json_items(questions_file, "questions")):
            with self.reading(questions_file, _number(record, place)):
                number, asked = (
                    field(record, "question_id", int),
                    (field(record, "image_id", int), make.once(_text(record))),
                )
                if number in questions:
                    raise DataError("this question_id occurs twice")
                if answers_file is None:
                    yield make.example(number, *asked, images(asked[0]))
                questions[number] = asked if answers_file else None
        if answers_file is None:
            return
        for place, record in enumerate(read_json_items(answers_file, "annotations")):
            with self.reading(answers_file, _number(record, place)):
                number = field(record, "question_id", int)
                if number not in questions:
                    raise DataError(f"there is no question of this question_id in {questions_file.name}")
                asked, questions[number] = questions[number], None
                if asked is None:
                    raise DataError("this question_id occurs twice")
                if field(record, "image_id", int) != asked[0]:
                    raise DataError(f"is on image {record['image_id']}, and its question on image {asked[0]}")
                yield make.example(number, *asked, images(asked[0]), record)
        for number in (n for n, asked in questions.items() if asked is not None):
            with self.reading(questions_file, number):
                raise DataError(f"there is no annotation of this question_id in {answers_file.name}")

    # ------------------------------------------------------------------ hub copies
    def read_hub(self) -> dict[str, list[Example]]:
        """The usual copy has no train; then that role, and what is held out of it, are empty."""
        found: dict[str, list[Example]] = {}
        for split in self.roles.values():
            names = TEST_SPLITS.get(split, ("train",))
            if split == "train2014" and "test" in self.roles and self.hub_copy.split(*names) is None:
                continue
            known = split in ("train2014", "val2014")
            rows = self.hub_copy.rows(*names, columns=_COLUMNS + _ANSWERS * known)
            there, make, seen = self.hub_copy.has_pictures(rows, "image"), _Maker(), {}
            found[split] = []
            for row, record in self.hub_copy.records(rows):
                with self.reading(f"{self.hub}, split {self.hub_copy.split(*names)}", _number(record, row)):
                    image = field(record, "image_id", int)
                    if not there[row]:
                        raise DataError("there is no picture in the column 'image'")
                    if image not in seen:
                        seen[image] = self.hub_copy.picture(rows, row, "image", f"image {image}")
                    number, images = field(record, "question_id", int), seen[image]
                    found[split].append(
                        make.example(number, image, make.once(_text(record)), images, record if known else None)
                    )
        return found

    # ------------------------------------------------------------------ text
    def question_text(self, example: Example) -> str:
        return f"{example.question}\n{INSTRUCTION}"

    def target_text(self, example: Example) -> tuple[str, str]:
        return example.answer, ""

    def parse(self, text: str, example: Example) -> str | None:
        return short_answer(text)

    def grade(self, answer: str | None, example: Example) -> float:
        return vqa_accuracy(answer, example.references)

    def official_predictions(self, answers: Mapping[str, str | None]) -> list[dict[str, Any]]:
        """What the owners' evaluation and their server read: ``question_id`` and ``answer``, "" if unparsed.

        They want an answer to every question of the split, of test2015 too where test-dev2015 is what counts.
        """
        return [{"question_id": int(number), "answer": answer or ""} for number, answer in answers.items()]


class _Maker:
    """Examples that share what is the same in many of them: most answers are "yes", "no" or "2"."""

    def __init__(self):
        self.shared: dict[Any, Any] = {}

    def once(self, value: Any) -> Any:
        return self.shared.setdefault(value, value)

    def example(self, number: int, image: int, question: str, images: Pictures, record: dict | None = None) -> Example:
        """``record``: with the answers; None where they are not known."""
        answer, references, kind = "", (), ()
        if record is not None:
            answer, references, kind = self.answers(record)
        return Example(
            id=str(number),
            question=question,
            answer=answer,
            images=images,
            categories=kind,
            references=references,
            group=self.once(str(image)),
        )

    def answers(self, record: dict[str, Any]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """(the answer to be trained on, all ten, the type)."""
        kind = field(record, "answer_type")
        if kind not in ANSWER_TYPES:
            raise DataError(f"the answer_type is one of {', '.join(ANSWER_TYPES)}, not {kind!r}")
        references = tuple(self.once(field(answer, "answer")) for answer in field(record, "answers", list))
        if len(references) != PEOPLE:
            raise DataError(f"has {len(references)} answers; the official accuracy is defined for {PEOPLE}")
        answer = self.once(field(record, "multiple_choice_answer"))
        if not answer.strip():  # an empty answer would be one that is not known
            said = Counter(reference for reference in references if reference.strip()).most_common(1)
            if not said:
                raise DataError("all its answers are empty")
            answer = said[0][0]
        return answer, self.once(references), self.once((kind,))


def _number(record: Any, place: int) -> Any:
    """What an error calls the record."""
    return record.get("question_id", f"number {place}") if isinstance(record, dict) else f"number {place}"


def _text(record: dict[str, Any]) -> str:
    question = field(record, "question").strip()
    if not question:
        raise DataError("the question is empty")
    return question
