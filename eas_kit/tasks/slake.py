"""Task ``slake``: Slake (Liu et al. 2021), questions on medical pictures, with open and with closed answers.

Reads the owners' ``train.json``, ``validate.json``, ``test.json`` and ``imgs/``, or the English half in LLaVA's form
(``train_llava_en.json``, ``testval_llava_en.json``; then val is held out of train, and test is both of the owners').
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eas_kit.errors import DataError, TaskError
from eas_kit.tasks.answers import find_name, short_answer
from eas_kit.tasks.base import Example
from eas_kit.tasks.conversations import ANSWER_TYPES, LLAVA, check_answer, grade, read_conversations
from eas_kit.tasks.data_set import Card, DataSetTask
from eas_kit.tasks.pictures import Pictures
from eas_kit.tasks.records import Problem, field, read_json

INSTRUCTION = "Answer the question using a single word or phrase."
LANGUAGES = ("en", "zh", "all")
_YES_NO = ("yes", "no")
_LLAVA = {
    "train": ("train_llava_en.json", "train_llava.json"),
    "test": ("testval_llava_en.json", "test_llava_en.json", "testval_llava.json", "test_llava.json"),
}


class Slake(DataSetTask):
    """See the module, and ``DataSetTask`` for data_dir, hub, sizes, seed, held_out, on_error.

    Columns: OPEN, the recall of the answer's words, and CLOSED, accuracy after normalisation; beside them the owners'
    ``content_type`` (Organ, Position ...). ``accuracy`` is the mean of all grades.

    A training record with an empty answer (copies are known where qid 1622 has one) teaches nothing: it is left out,
    and is in ``skipped``, whatever ``on_error`` says.

    Args:
        form: "owners" or "llava", where the folder has files of both; None: the one that is there.
        language: "en" as in all published results, "zh", or "all". (Files in LLaVA's form have one language.)
    """

    name = "slake"
    pictures = True
    template = f"question, {INSTRUCTION!r} -> answer"
    parser = "the first line, without 'The answer is' and the full stop; yes or no where that is the answer wanted"
    card = Card(
        title="Slake 1.0",
        page="https://www.med-vqa.com/slake",
        licence="CC BY 4.0",
        hub="BoKelvin/SLAKE",
        published={"train": 4_919, "val": 1_053, "test": 1_061},
    )
    image_dirs = ("imgs", "images", ".")

    def __init__(
        self,
        processor,
        data_dir=None,
        hub: bool | str = False,
        *,
        language: str = "en",
        form: str | None = None,
        **settings,
    ):
        if language not in LANGUAGES:
            raise TaskError(f"slake: language is one of {', '.join(LANGUAGES)}, not {language!r}")
        if form not in (None, "owners", "llava"):
            raise TaskError(f"slake: form is 'owners', 'llava', or None for what is there; not {form!r}")
        self.language, self._wanted_form = language, form
        super().__init__(processor, data_dir, hub, **settings)

    # ------------------------------------------------------------------ reading
    def read_folder(self) -> dict[str, list[Example]]:
        if self._in_llavas_form():
            self.form = LLAVA
            return {split: read_conversations(self, self.file(*names)) for split, names in _LLAVA.items()}
        files = {"train": ("train.json",), "val": ("validate.json", "validation.json"), "test": ("test.json",)}
        return {split: self._read_file(split, self.file(*names)) for split, names in files.items()}

    def published(self) -> dict[str, int]:
        if self.form == LLAVA:
            return {"train": 4_919, "test": 2_114}
        return dict(self.card.published) if self.language == "en" else {}

    def _in_llavas_form(self) -> bool:
        llava = any(map(self.has, _LLAVA["train"]))
        if self._wanted_form is None and llava and any(map(self.has, ("validate.json", "validation.json"))):
            raise TaskError(
                f"slake: {self.folder} has the owners' files and files in LLaVA's form, which has another test split;"
                " say which by form='owners' or form='llava'"
            )
        return self._wanted_form == "llava" or (llava and self._wanted_form is None)

    def _read_file(self, split: str, path: Path) -> list[Example]:
        found: list[Example] = []
        for number, record in enumerate(read_json(path, list)):
            with self.reading(path, record.get("qid", number) if isinstance(record, dict) else number):
                if self._wanted(record) and not self._unanswered(split, path.name, record):
                    name = field(record, "img_name")
                    images = Pictures(self.picture(str(record.get("qid", number)), name))
                    found.append(self._example(record, images))
        return found

    def _wanted(self, record: Any) -> bool:
        language = field(record, "q_lang")
        if language not in LANGUAGES[:-1]:
            raise DataError(f"the q_lang is one of {', '.join(LANGUAGES[:-1])}, not {language!r}")
        return self.language in ("all", language)

    def _unanswered(self, split: str, file: str, record: dict[str, Any]) -> bool:
        empty = split == "train" and not field(record, "answer").strip()
        if empty:
            self._intake.leave_out(
                split, Problem(file, str(record.get("qid")), "the answer is empty, nothing to learn from")
            )
        return empty

    def read_hub(self) -> dict[str, list[Example]]:
        """The hub copy has the pictures in an archive beside the table, or (other copies) in a column."""
        found: dict[str, list[Example]] = {}
        for split, names in {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}.items():
            rows = self.hub_copy.rows(*names, columns=("question", "answer", "q_lang", "qid", "answer_type"))
            embedded = "image" in rows.column_names
            seen = self.hub_copy.has_pictures(rows, "image") if embedded else []
            if not embedded and self.image_dir is None:
                self.image_dir = self.hub_copy.archive("imgs.zip") / "imgs"
            found[split] = []
            for row, record in self.hub_copy.records(rows):
                with self.reading(f"{self.hub}, split {split}", record.get("qid", row)):
                    if not self._wanted(record) or self._unanswered(split, f"{self.hub}, split {split}", record):
                        continue
                    who = str(record.get("qid", row))
                    if embedded:
                        if not seen[row]:
                            raise DataError("there is no picture in column 'image'")
                        images = self.hub_copy.picture(rows, row, "image", who)
                        if not (record.get("img_name") or record.get("img_id")):
                            record["img_name"] = images.sources[0].digest()
                    else:
                        images = Pictures(self.picture(who, field(record, "img_name")))
                    found[split].append(self._example(record, images))
        return found

    def _example(self, record: dict[str, Any], images: Pictures) -> Example:
        kind = field(record, "answer_type").strip().upper()
        if kind not in ANSWER_TYPES:
            raise DataError(f"the answer_type is one of {', '.join(ANSWER_TYPES)}, not {kind!r}")
        answer = field(record, "answer").strip()
        check_answer(answer, kind)
        content = field(record, "content_type", str, default="")
        return Example(
            id=str(field(record, "qid", (int, str))),
            question=f"{field(record, 'question')}\n{INSTRUCTION}",
            answer=answer,
            images=images,
            categories=(kind, content) if content else (kind,),
            group=str(record.get("img_name") or record.get("img_id")),
        )

    # ------------------------------------------------------------------ text
    def question_text(self, example: Example) -> str:
        return example.question

    def target_text(self, example: Example) -> tuple[str, str]:
        return example.answer, ""

    def parse(self, text: str, example: Example) -> str | None:
        if "CLOSED" in example.categories and example.answer.strip().lower() in _YES_NO:
            return find_name(text, _YES_NO)
        return short_answer(text)

    def grade(self, answer: str | None, example: Example) -> float:
        return grade(answer, example)
