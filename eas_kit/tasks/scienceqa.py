"""Task ``scienceqa``: ScienceQA (Lu et al. 2022), multiple choice with picture, with hint, with both or with neither.

Reads the owners' ``problems.json``, ``pid_splits.json`` and ``images/<split>/<id>/image.png``, or the hub copy. Prompt
formats as its authors name them: what comes in, Q question, C context (hint, caption), M options; then what goes out,
A answer, L lecture, E explanation ("solution").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eas_kit.errors import DataError, TaskError
from eas_kit.tasks.answers import find_option
from eas_kit.tasks.base import Example
from eas_kit.tasks.data_set import Card, DataSetTask
from eas_kit.tasks.pictures import Pictures
from eas_kit.tasks.records import field, read_json

FORMATS = {
    "QCM-ALE": "Question / Context / Options (A) ... (B) ... -> The answer is A. BECAUSE: lecture solution (QCM-ALE)",
    "QCM-LEA": "Question / Context / Options (A) ... (B) ... -> lecture solution The answer is A. (QCM-LEA)",
    "QCM-A": "Question / Context / Options (A) ... (B) ... -> The answer is A. (QCM-A)",
}
LETTERS = "ABCDEFGHIJ"
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_GRADES = {f"grade{n}": "G1-6" if n <= 6 else "G7-12" for n in range(1, 13)}
# answer_with -> how the answer is written in the target
ANSWERS = ("letter", "text")


class ScienceQA(DataSetTask):
    """See the module, and ``DataSetTask`` for data_dir, hub, sizes, seed, held_out, on_error.

    Columns are those of the paper's Table 1: NAT SOC LAN by subject; TXT with a hint, IMG with a picture (both, where
    there are both), NO with neither; G1-6 and G7-12 by grade; ``accuracy`` is Avg.

    Args:
        prompt_format: "QCM-ALE", "QCM-LEA" or "QCM-A".
        answer_with: "letter", as all published results, or "text": the option's words, for models too small to bind
            letters to options. Both are understood in an answer, whichever is trained.
        captions: whether the context also has the picture's caption, from the owners' ``captions.json``.
    """

    name = "scienceqa"
    parser = "the first statement of an option: 'The answer is A.', '(A)', 'A.', or its words; eas_kit.tasks.answers"
    card = Card(
        title="ScienceQA",
        page="https://scienceqa.github.io",
        licence="CC BY-NC-SA 4.0",
        hub="derek-thomas/ScienceQA",
        published={"train": 12_726, "val": 4_241, "test": 4_241},
    )
    image_dirs = ("images", "scienceqa/images", ".")

    def __init__(
        self,
        processor,
        data_dir=None,
        hub: bool | str = False,
        *,
        prompt_format: str = "QCM-ALE",
        answer_with: str = "letter",
        captions: bool = False,
        **settings,
    ):
        if prompt_format not in FORMATS:
            raise TaskError(f"scienceqa: prompt_format is one of {', '.join(FORMATS)}, not {prompt_format!r}")
        if answer_with not in ANSWERS:
            raise TaskError(f"scienceqa: answer_with is one of {', '.join(ANSWERS)}, not {answer_with!r}")
        if captions and hub:
            raise TaskError("scienceqa: the hub copy has no captions; give data_dir, or captions=False")
        self.prompt_format, self.answer_with, self.captions = prompt_format, answer_with, captions
        self.template = FORMATS[prompt_format] + (", with captions" if captions else "")
        if answer_with == "text":
            self.template = self.template.replace("answer is A", "answer is <the option's text>")
        super().__init__(processor, data_dir, hub, **settings)

    # ------------------------------------------------------------------ reading
    def read_folder(self) -> dict[str, list[Example]]:
        problems_file, splits_file = self.file("problems.json"), self.file("pid_splits.json")
        problems, splits = read_json(problems_file, dict), read_json(splits_file, dict)
        captions = read_json(self._captions_file(), dict) if self.captions else {}
        captions = field(captions, "captions", dict, default={})
        found: dict[str, list[Example]] = {}
        first: dict[str, str] = {}  # id -> the first split that names it
        for split in ("train", "val", "test"):
            found[split] = []
            for pid in field(splits, split, list, default=[]):
                with self.reading(problems_file, pid):
                    if first.setdefault(str(pid), split) != split:
                        raise DataError(f"is in split {first[str(pid)]} and in split {split} of {splits_file.name}")
                    if str(pid) not in problems:
                        raise DataError(f"split {split} of {splits_file.name} names it, and it is not there")
                    found[split].append(self._from_file(str(pid), problems[str(pid)], split, captions))
        return found

    def _captions_file(self) -> Path:
        """Owners keep it beside the folder that holds the problems."""
        beside = self.folder.parent / "captions.json"
        return beside if beside.is_file() and not self.has("captions.json") else self.file("captions.json")

    def _from_file(self, pid: str, record: dict[str, Any], split: str, captions: Mapping[str, str]) -> Example:
        """An example of the owners' files; its split is that of pid_splits.json, and has to be the record's own."""
        own = field(record, "split", str, default=split)
        if own != split:
            raise DataError(f"is in split {split} by pid_splits.json and in {own!r} by its own field 'split'")
        name, images = field(record, "image", (str, type(None)), default=None), ()
        if name:
            places = (f"{split}/{pid}/{name}", f"{pid}/{name}")
            images = Pictures(self.picture(pid, *places))
        return self._example(pid, record, images, field(captions, pid, str, default=""))

    def read_hub(self) -> dict[str, list[Example]]:
        found: dict[str, list[Example]] = {}
        for split, names in {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}.items():
            rows = self.hub_copy.rows(*names, columns=("image", "question", "choices", "answer"))
            seen = self.hub_copy.has_pictures(rows, "image")
            found[split] = []
            for row, record in self.hub_copy.records(rows):
                name = f"{split}-{row}"  # the copy has no ids
                with self.reading(f"{self.hub}, split {split}", f"row {row}"):
                    images = self.hub_copy.picture(rows, row, "image", name) if seen[row] else ()
                    found[split].append(self._example(name, record, images, ""))
        return found

    def _example(self, pid: str, record: dict[str, Any], images: Sequence[Any], caption: str) -> Example:
        choices = field(record, "choices", list)
        if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(c, str) for c in choices):
            raise DataError(f"field 'choices' should have 2 to {len(LETTERS)} texts, it is {choices!r:.80}")
        answer = field(record, "answer", int)
        if not 0 <= answer < len(choices):
            raise DataError(f"the answer {answer} is outside of its {len(choices)} options, which are numbered from 0")
        hint = field(record, "hint", str, default="")
        lecture, solution = field(record, "lecture", str, default=""), field(record, "solution", str, default="")
        return Example(
            id=pid,
            question=field(record, "question"),
            answer=LETTERS[answer],
            choices=tuple(choices),
            explanation=f"{lecture} {solution}".strip(),
            context=f"{hint} {caption}".strip(),
            images=images,
            categories=_columns(record, hint, images),
        )

    # ------------------------------------------------------------------ text
    def question_text(self, example: Example) -> str:
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, example.choices))
        return f"Question: {example.question}\nContext: {example.context or 'N/A'}\nOptions: {options}"

    def target_text(self, example: Example) -> tuple[str, str]:
        said = example.answer
        if self.answer_with == "text":
            said = example.choices[LETTERS.index(said)].removesuffix(".")
        answer, why = f"The answer is {said}.", example.explanation
        if self.prompt_format == "QCM-A" or not why:
            return answer, ""
        if self.prompt_format == "QCM-LEA":
            return f"{why} {answer}", ""
        return answer, f" BECAUSE: {why}"

    def parse(self, text: str, example: Example) -> str | None:
        found = find_option(text, example.choices)
        return None if found is None else LETTERS[found]

    def candidates(self, example: Example) -> Sequence[str]:
        return LETTERS[: len(example.choices)]

    def official_predictions(self, answers: Mapping[str, str | None]) -> dict[str, Any]:
        """What the owners' evaluation reads: ``{"results": {id: index of the option}}``; -1, never right, if unparsed.

        (Their own runs draw an option at random there.)
        """
        if self.hub:
            raise TaskError(f"{self.name}: the hub copy lacks the ids that its owners' evaluation wants; give data_dir")
        wrong = next((pid for pid, a in answers.items() if a is not None and (len(a) != 1 or a not in LETTERS)), None)
        if wrong is not None:
            raise DataError(
                f"{self.name}: the answer to {wrong} is a letter, A to {LETTERS[-1]}, not {answers[wrong]!r}; give"
                ' what a model wrote as "text", and it is parsed'
            )
        return {"results": {pid: -1 if a is None else LETTERS.index(a) for pid, a in answers.items()}}


def _columns(record: dict[str, Any], hint: str, images: Sequence[Any]) -> tuple[str, ...]:
    subject, grade = field(record, "subject", str, default=None), field(record, "grade", str, default=None)
    if subject not in _SUBJECTS:
        raise DataError(f"the subject is one of {', '.join(_SUBJECTS)}, not {subject!r}")
    if grade not in _GRADES:
        raise DataError(f"the grade is one of grade1 to grade12, not {grade!r}")
    modality = ["TXT"] * bool(hint) + ["IMG"] * bool(len(images)) or ["NO"]
    return _SUBJECTS[subject], *modality, _GRADES[grade]
