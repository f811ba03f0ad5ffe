"""Conversations in LLaVA's form: every answer an example, its history before it, its pictures once."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

import eas_kit as eas
from eas_kit.errors import DataError, TaskError
from eas_kit.tasks.base import ROLES
from eas_kit.tasks.conversations import Conversations


@pytest.fixture(scope="module")
def processor():
    return eas.load_model("tiny")[1]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.new("RGB", (24, 24), (ord(name), 20, 30)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def record(*turns, **fields):
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)], **fields}


def load(folder, records, processor=None, name="test.json", **settings):
    text = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records)
    (folder / name).write_text(text)
    return Conversations(processor, folder, **settings)


def ids(examples):
    return [e.id for e in examples]


# ---------------------------------------------------------------------- turns and pictures
def test_every_answer_is_an_example_with_the_history_before_it(folder, processor):
    turns = ("<image>\nWhat is it?", " gold ", "Which number?", "79.", "And tin?", "50.")
    task = load(folder, [record(*turns, id="x", image="a.png"), record("Hi", "Ho", id="y")], processor)
    first, second, third, single = task.test
    assert ids(task.test) == ["x#0", "x#1", "x#2", "y"]
    assert (first.question, first.answer, first.history) == ("What is it?", "gold", ())
    assert (second.question, second.answer) == ("Which number?", "79.")
    assert second.history == (("<image>\nWhat is it?", "gold"),)
    assert third.history == (*second.history, ("Which number?", "79."))
    assert len({e.group for e in (first, second, third)}) == 1 and single.group != first.group
    assert single.images == () and len(third.images) == 1
    start = "USER: <image>\nWhat is it?\nASSISTANT:"
    assert task.prompt_text(first) == start
    assert task.prompt_text(second) == start + " gold</s>USER: Which number?\nASSISTANT:"
    batch = task.collate([second])
    prompt = batch["input_ids"][0][batch["labels"][0] == -100]
    target = batch["input_ids"][0][batch["labels"][0] != -100]
    said = processor.tokenizer.decode(prompt, skip_special_tokens=False)
    for text in ("What is it?", "gold", "Which number?"):
        assert said.count(text) == 1
    assert said.count("<image>") == 9 and batch["pixel_values"].shape[0] == 1  # one picture of 9 tokens
    assert processor.tokenizer.decode(target) == " 79.</s>"
    assert task.collate(task.test)["pixel_values"].shape[0] == 3  # the last example has none


@pytest.mark.parametrize(
    "text,images,prompt",
    [
        ("<image>\nWhat?", "a.png", "<image>\nWhat?"),
        ("What?\n<image>", "a.png", "What?<image>\n"),
        ("Is <image> gold?", "a.png", "Is<image>\ngold?"),
        ("What?", "a.png", "<image>\nWhat?"),
        ("<image><image>\nSame?", ["a.png", "b.png"], "<image>\n<image>\nSame?"),
        ("Is <image> like <image>?", ["a.png", "b.png"], "Is<image>\nlike<image>\n?"),
        ("<image> or <image>?", ["a.png", "b.png"], "<image>\nor<image>\n?"),
        ("Same?", ["a.png", "a.png"], "<image>\n<image>\nSame?"),
        ("What?", None, "What?"),
        ("What?", "", "What?"),
        ("What?", [], "What?"),
    ],
)
def test_pictures_stand_where_the_text_says(folder, processor, text, images, prompt):
    task = load(folder, [record(text, "yes", "Sure?", "no", id=1, image=images)], processor)
    one, two = task.test
    assert task.prompt_text(one) == f"USER: {prompt}\nASSISTANT:"
    assert task.prompt_text(two).startswith(f"USER: {prompt}\nASSISTANT:") and task.prompt_text(two).count("yes") == 1
    count = 1 if isinstance(images, str) and images else len(images or ())
    assert task.prompt_text(two).count("<image>") == len(two.images) == count
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (task.collate([two])["input_ids"] == token).sum() == 9 * count  # tokens of a picture


# ---------------------------------------------------------------------- faults
FAULTS = [
    (record("<image> <image> Same?", "yes", image="a.png"), "2 times <image> in the texts, and 1 pictures; wanted one"),
    (record("<image> What?", "yes"), "1 times <image> in the texts, and 0 pictures"),
    (record("What?", "yes", "<image> And?", "no", image="a.png"), "1 times <image> in the texts, and 1 pictures"),
    (record("What?", "<image>", image="a.png"), "1 times <image> in the texts"),
    (record("What?", "  "), "an answer is empty"),
    (
        record("What?", "yes", "Sure?"),
        r"the turns should be human, gpt, human, gpt ...; they are \['human', 'gpt', ",
    ),
    (record(), r"the turns should be human, gpt, human, gpt ...; they are \[\]"),
    (
        {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
        r"are \['gpt', 'human'\]",
    ),
    ({"conversations": [{"from": "system", "value": "a"}]}, "there is a turn of the system, which this task does not"),
    ({"conversations": [{"from": "cat", "value": "a"}]}, "a turn is from human or gpt, not from 'cat'"),
    ({"conversations": [{"value": "a"}]}, "there is no field 'from'"),
    ({"conversations": [{"from": "human", "value": None}]}, "field 'value' should be str, it is NoneType None"),
    ({"conversations": ["a", "b"]}, "wanted an object with named fields, got str 'a'"),
    ({"conversations": "a"}, "field 'conversations' should be list, it is str 'a'"),
    ({"image": "a.png"}, "there is no field 'conversations'"),
    (record("What?", "yes", image=3), "field 'image' should be str or list or NoneType, it is int 3"),
    (
        record("What?", "yes", image=["a.png", 3]),
        r"field 'image' should be a text or a list of texts, it is \['a",
    ),
    (record("What?", "yes", image="gone.png"), "the picture .*images/gone.png does not exist"),
    (record("What?", "yes", image="../a.png"), "the picture '../a.png' lies outside of the folder"),
    (record("What?", "yes", answer_type="half"), "the answer_type is one of OPEN, CLOSED, not 'HALF'"),
    (
        record("What?", "+-", answer_type="OPEN"),
        r"the answer '\+-' has no words, and answers to OPEN",
    ),
    (record("What?", "yes", id=1.5), "field 'id' should be int or str, it is float 1.5"),
    ("text", "wanted an object with named fields, got str 'text'"),
    (record("good", "first", id="g"), "the same record is in the file twice"),
]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_faulty_records_are_counted_and_nothing_else_is_lost(folder, form):
    good = [record("good", "first", id="g"), record("<image> good", "last", "", "and more", id="h", image="b.png")]
    records = [good[0], *(faulty for faulty, _ in FAULTS), good[1]]
    task = load(folder, records, name=f"test.{form}", on_error="skip")
    assert ids(task.test) == ["g", "h#0", "h#1"] and len(task.skipped) == len(FAULTS)
    for number, (problem, (faulty, message)) in enumerate(zip(task.skipped, FAULTS, strict=True), 1):
        own = faulty.get("id") == "g" if isinstance(faulty, dict) else False
        place = f"line {number + 1}" if form == "jsonl" else str(number)
        assert (problem.file, problem.record) == (f"test.{form}", "g" if own else place)
        if isinstance(faulty, dict):
            assert re.search(message, problem.problem)
        else:  # no object, which lines have to be
            assert problem.problem.endswith("got str 'text'")


@pytest.mark.parametrize("faulty,message", FAULTS[:-1])
def test_faulty_records_are_raised(folder, faulty, message):
    with pytest.raises(DataError, match=rf"^conversations: test.json, record 0: .*{message}.*on_error='skip'$"):
        load(folder, [faulty])


def test_ids(folder):
    """LLaVA's own files have several conversations under the id of their picture."""
    one, two = record("a", "b", id="p"), record("c", "d", "e", "f", id="p")
    task = load(folder, [one, two, record("g", "h"), record("i", "j", id=None), record("k", "l", id=0)])
    assert ids(task.test) == ["p", "p:1#0", "p:1#1", "2", "3", "0"]


# ---------------------------------------------------------------------- files and roles
def test_files_and_roles(folder):
    many = [record(f"question {i}", "yes", id=i) for i in range(40)]
    task = load(folder, many, name="train.json")  # one file with everything
    assert [len(getattr(task, role)) for role in ROLES] == [34, 2, 2, 2]
    assert len({e.id for role in ROLES for e in getattr(task, role)}) == 40
    assert task.sources["test"] == "held out of train (share 0.05, seed 0)"
    assert task.about()["data"] == "files in LLaVA's form"
    task = load(folder, many, name="train.json", held_out={"search": 0.25, "val": 0, "test": 0.1})
    assert [len(getattr(task, role)) for role in ROLES] == [26, 10, 0, 4]
    (folder / "dev.jsonl").write_text("\n".join(json.dumps(record("other", "no", id=i)) for i in range(3)) + "\n")
    task = load(folder, many, name="train.json")
    assert [len(getattr(task, role)) for role in ROLES] == [36, 2, 3, 2] and task.sources["val"] == "val"
    (folder / "mine.json").write_text(json.dumps(many[:10]))
    task = Conversations(None, folder, files={"test": "mine.json"})
    assert [len(getattr(task, role)) for role in ROLES] == [0, 0, 0, 10]
    with pytest.raises(DataError, match="split train, record 0: the same record is in split test as well"):
        Conversations(None, folder, files={"train": "train.json", "test": "mine.json"})
    both = Conversations(None, folder, files={"train": "train.json", "test": "mine.json"}, on_error="skip")
    assert len(both.skipped) == 10 and len(both.train) == 30 - 4 and len(both.test) == 10


def test_files_that_are_not_there(folder):
    with pytest.raises(DataError, match=r"conversations: wanted train.json in .*, which holds images/\. data/conv"):
        Conversations(None, folder)
    with pytest.raises(DataError, match="conversations: wanted my.json in "):
        Conversations(None, folder, files={"train": "my.json"})
    with pytest.raises(TaskError, match="conversations: files are by role, train, search, val, test; there is no dev"):
        Conversations(None, folder, files={"dev": "my.json"})
    with pytest.raises(TaskError, match="^conversations: give data_dir='the folder with the data'; data/conv"):
        Conversations(None)


def test_what_shares_a_picture_is_held_out_together(folder):
    """Groups hang together through a record of two pictures; turns of a text stay with their conversation."""
    records = [record(f"q{i}", "x", "again", "y", id=i) for i in range(30)]
    images = [["a.png"], ["b.png"], ["a.png", "./b.png"], ["c.png"], ["c.png", "d.png"], ["images/../d.png"], ["e.png"]]
    records += [record(f"p{i}", "x", id=f"p{i}", image=some) for i, some in enumerate(images)]
    task = load(folder, records, name="train.json", held_out={"search": 0.3, "val": 0.3}, check_images=False)
    role = {e.id: r for r in ROLES for e in getattr(task, r)}
    assert len(role) == 67 and set(role.values()) == set(ROLES)
    groups = {e.id: e.group for r in ROLES for e in getattr(task, r)}
    assert len({groups[f"p{i}"] for i in (0, 1, 2)}) == len({groups[f"p{i}"] for i in (3, 4, 5)}) == 1
    assert len(set(groups.values())) == 30 + 3
    assert all(role[f"{i}#0"] == role[f"{i}#1"] for i in range(30))
    assert role["p0"] == role["p1"] == role["p2"] and role["p3"] == role["p4"] == role["p5"]


# ---------------------------------------------------------------------- grading
def test_open_and_closed_are_graded_each_by_its_measure(folder):
    rows = [  # answer wanted, its type, what was written, grade by hand
        ("left lung, right lung", "OPEN", "The left lung", 2 / 4),
        ("X-ray", "open ", "x ray.", 1),
        ("Heart", "OPEN", "", 0),
        ("Yes", "CLOSED", "yes.", 1),
        ("no", "CLOSED", "No tumour", 0),
        ("two", None, "The answer is 2.", 1),
        ("the heart", None, "Heart\nand more", 1),
    ]
    records = [record("?", a, id=f"r{i}", **({"answer_type": t} if t else {})) for i, (a, t, _, _) in enumerate(rows)]
    task = load(folder, records)
    lines = [json.dumps({"id": f"r{i}", "text": text}) for i, (_, _, text, _) in enumerate(rows)]
    (folder / "said.jsonl").write_text("\n".join(lines))
    result = task.score_predictions(folder / "said.jsonl", "test")
    assert result["columns"] == {"OPEN": pytest.approx((0.5 + 1 + 0) / 3), "CLOSED": 0.5}
    assert result["column_counts"] == {"OPEN": 3, "CLOSED": 2}
    assert result["accuracy"] == pytest.approx(sum(grade for *_, grade in rows) / 7)
    assert result["unparsed"] == 1 and result["unparsed_examples"] == [{"id": "r2", "text": ""}]
