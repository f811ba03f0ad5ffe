"""Task ``conversations``: one's own data in LLaVA's form, a list of ``{"id", "image", "conversations"}``.

Every answer of a conversation is an example; the turns before it are its prompt. (So that the adapters' mean over the
prompt is over the same positions in training as when the model answers.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from eas_kit.errors import DataError, TaskError
from eas_kit.tasks.answers import plain_words, short_answer
from eas_kit.tasks.base import IMAGE, ROLES, Example
from eas_kit.tasks.data_set import Card, DataSetTask
from eas_kit.tasks.metrics import exact_match, token_recall
from eas_kit.tasks.pictures import Pictures
from eas_kit.tasks.records import field, read_json, read_json_lines

ANSWER_TYPES = ("OPEN", "CLOSED")
LLAVA = "files in LLaVA's form"  # in results: Slake's test is another one there, and AID's draw is not ours
# how files are called that are not named by `files`
_USUAL = {"train": ("train",), "search": ("search",), "val": ("val", "validation", "dev"), "test": ("test",)}


class Conversations(DataSetTask):
    """See the module, and ``DataSetTask`` for data_dir, sizes, seed, held_out, on_error.

    A record with ``"answer_type": "OPEN"`` is graded by the share of the answer's words that are said, one with
    "CLOSED" or none by the same text after normalisation. Columns: OPEN and CLOSED.

    Records of one id and other content are told apart by their place in the file ("id:place": LLaVA's own files have
    several conversations on a picture under its id). Held out together are all conversations that share a picture, and
    the turns of a conversation.

    Args:
        files: by role, a file of data_dir (.json or .jsonl), e.g. ``{"train": "mine.json"}``; without it train.json,
            search.json, val.json and test.json, as far as they are there. What is not there is held out of train:
            also "test", unless its share in ``held_out`` is 0.
    """

    name = "conversations"
    template = "the conversation so far, as the model's chat template has it -> the next answer"
    parser = "the first line, without 'The answer is' and the full stop"
    card = Card("conversations of one's own", "https://github.com/haotian-liu/LLaVA", "yours", None, {})
    roles: ClassVar = dict(zip(ROLES, ROLES))
    can_hold_out = ("search", "val", "test")
    form = LLAVA
    image_dirs = ("images", "imgs", "image", ".")

    def __init__(self, processor, data_dir=None, *, files: Mapping[str, str | os.PathLike] | None = None, **settings):
        unknown = [role for role in files or {} if role not in ROLES]
        if unknown:
            raise TaskError(f"{self.name}: files are by role, {', '.join(ROLES)}; there is no {', '.join(unknown)}")
        self.files = dict(files or {})
        super().__init__(processor, data_dir, **settings)

    def read_folder(self) -> dict[str, list[Example]]:
        names = {role: (str(name),) for role, name in self.files.items()} or {
            role: tuple(f"{name}{end}" for name in some for end in (".json", ".jsonl")) for role, some in _USUAL.items()
        }
        if not self.files and not any(self.has(name) for some in names.values() for name in some):
            self.file("train.json")  # raises, saying what is there
        wanted = [role for role in names if self.files or any(map(self.has, names[role]))]
        return {role: read_conversations(self, self.file(*names[role])) for role in wanted}

    # ------------------------------------------------------------------ text
    def question_text(self, example: Example) -> str:
        return example.question

    def target_text(self, example: Example) -> tuple[str, str]:
        return example.answer, ""

    def parse(self, text: str, example: Example) -> str | None:
        return short_answer(text)

    def grade(self, answer: str | None, example: Example) -> float:
        return grade(answer, example)


def grade(answer: str | None, example: Example) -> float:
    """Recall of the words for an OPEN question, else 1 for the same text, normalised (LLaVA-Med's convention)."""
    if "OPEN" in example.categories:
        return token_recall(answer, example.answer)
    return float(exact_match(answer, example.answer))


def read_conversations(task: DataSetTask, path: Path) -> list[Example]:
    """Examples of a file in LLaVA's form, .json (a list) or .jsonl (an object a line)."""
    if path.suffix == ".jsonl":
        records: Any = ((n, f"line {n}", r) for n, r in read_json_lines(path, task._intake))
    else:
        records = ((n, str(n), r) for n, r in enumerate(read_json(path, list)))
    examples: list[Example] = []
    seen: dict[str, Any] = {}
    for number, place, record in records:
        own = record.get("id") if isinstance(record, dict) else None
        name = str(own) if isinstance(own, str | int) and not isinstance(own, bool) else place
        found: list[Example] = []
        with task.reading(path, name):
            field(record, "id", (int, str), default=None)
            if name in seen and seen[name] == record:
                raise DataError("the same record is in the file twice")
            if seen.setdefault(name, record) is not record:
                name = f"{name}:{number}"
            found = list(_turns(task, name, record))
        examples += found
    return _in_groups(examples)


def _in_groups(examples: Sequence[Example]) -> list[Example]:
    """The group of each is all that hangs together by pictures: (a, b) and (b, c) are one, by the name of one."""
    leader: dict[str, str] = {}

    def lead(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = leader.setdefault(leader[name], leader[name])
            name = leader[name]
        return name

    for example in examples:
        first, *others = example.group.split("\n")
        for other in others:
            leader[lead(other)] = lead(first)
    return [replace(example, group=lead(example.group.split("\n")[0])) for example in examples]


def _turns(task: DataSetTask, name: str, record: Any) -> Iterator[Example]:
    places = field(record, "image", (str, list, type(None)), default=None) or []
    places = [places] if isinstance(places, str) else places
    if not all(isinstance(p, str) for p in places):
        raise DataError(f"field 'image' should be a text or a list of texts, it is {places!r:.60}")
    images = Pictures(*(task.picture(name, place) for place in places)) if places else ()
    kind = field(record, "answer_type", str, default="").strip().upper()
    if kind and kind not in ANSWER_TYPES:
        raise DataError(f"the answer_type is one of {', '.join(ANSWER_TYPES)}, not {kind!r}")
    turns = [_turn(t) for t in field(record, "conversations", list)]
    if turns and turns[0][0] == "system":
        raise DataError("there is a turn of the system, which this task does not know; put its text into the question")
    if not turns or len(turns) % 2 or [who for who, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise DataError(f"the turns should be human, gpt, human, gpt ...; they are {[who for who, _ in turns]}")
    marks = [text.count(IMAGE) for _, text in turns]
    if sum(marks) and (marks[0] != len(places) or sum(marks[1:])):
        raise DataError(
            f"{sum(marks)} times {IMAGE} in the texts, and {len(places)} pictures; wanted one each, in the first turn"
        )
    # a conversation without a picture hangs together by itself: later turns hold the earlier ones
    group = "\n".join(os.path.normpath(p.replace("\\", "/")) for p in places) or f"conversation {name}"
    history: list[tuple[str, str]] = []
    for number in range(0, len(turns), 2):
        question, answer = turns[number][1], turns[number + 1][1].strip()
        check_answer(answer, kind)
        yield Example(
            id=name if len(turns) == 2 else f"{name}#{number // 2}",
            question=_without_outer_mark(question, len(places)) if number == 0 else question.strip(),
            answer=answer,
            images=images,
            categories=(kind,) if kind else (),
            group=group,
            history=tuple(history),
        )
        history.append((turns[number][1].strip(), answer))


def check_answer(answer: str, kind: str) -> None:
    """DataError for an answer that nothing could be graded by."""
    if not answer:
        raise DataError("an answer is empty")
    if kind == "OPEN" and not plain_words(answer):
        raise DataError(f"the answer {answer!r} has no words, and answers to OPEN questions are graded by their words")


def _turn(turn: Any) -> tuple[str, str]:
    who = field(turn, "from")
    known = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
    if who not in known:
        raise DataError(f"a turn is from human or gpt, not from {who!r}")
    return known[who], field(turn, "value")


def _without_outer_mark(text: str, pictures: int) -> str:
    """A question whose pictures all stand in front, without their marks: the chat template writes its own."""
    stripped = text.strip()
    for _ in range(pictures):
        if stripped.startswith(IMAGE):
            stripped = stripped.removeprefix(IMAGE).strip()
    return stripped if IMAGE not in stripped else text.strip()
