"""A task of one's own: as a class, as "module:Class", wrong ones; and tasks as tables of the datasets library."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image
from scienceqa_files import load, write
from scribe import TEXTS, agree

from eas_kit.cli import main
from eas_kit.errors import TaskError
from eas_kit.models.tiny.architecture import make_model, make_processor
from eas_kit.tasks import Example, Task, load_task, pictures
from eas_kit.tasks.elements import Elements

OWN = '''
from eas_kit.tasks import Example, Task


class Capitals(Task):
    """Two questions, the same in every role."""

    name = "capitals"
    template = "Question -> Answer."
    parser = "the first word"

    def __init__(self, processor, shout=False):
        super().__init__(processor)
        self.shout = shout
        examples = [Example("it", "Capital of Italy?", "Rome", ("Rome", "Bern")), Example("ch", "Switzerland?", "Bern")]
        self.train = self.search = self.val = self.test = examples

    def question_text(self, example):
        return example.question.upper() if self.shout else example.question

    def target_text(self, example):
        return f"{example.answer}.", ""

    def parse(self, text, example):
        return text.split(".")[0].strip() or None


def function(processor):
    return Capitals(processor)
'''


@pytest.fixture(scope="module")
def processor():
    return make_processor(TEXTS)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_capitals.py").write_text(OWN)
    yield "own_capitals"
    sys.modules.pop("own_capitals", None)


def test_by_module_and_class(module, processor, tmp_path):
    task = load_task("own_capitals:Capitals", processor, shout=True)
    assert task.question_text(task.val[0]) == "CAPITAL OF ITALY?" and task.shout
    model = make_model(processor, seed=3).eval()
    result = task.evaluate(model, "test", predictions=tmp_path / "said.jsonl")
    assert (result["task"], result["count"], result["seed"]) == ("capitals", 2, None)
    assert task.score(model)["loss"] == pytest.approx(result["loss"], rel=1e-5)
    again = load_task(type(task), processor, shout=True)  # the class itself
    agree(again.evaluate(model, "test"), result)
    assert again.score_predictions(tmp_path / "said.jsonl", "test")["accuracy"] == result["accuracy"]
    with pytest.raises(TaskError, match="capitals: example ch has no options; use method='generate'"):
        task.evaluate(model, "test", method="options")
    bare = load_task("own_capitals:Capitals", None)
    assert bare.score_predictions(tmp_path / "said.jsonl", "test")["accuracy"] == result["accuracy"]
    for ask in (bare.score, bare.evaluate):
        with pytest.raises(TaskError, match="capitals was loaded without a processor, to score answers only; load it"):
            ask(model)


def test_grades_are_of_texts_whatever_their_case(module):
    task = load_task("own_capitals:Capitals", None)
    assert [task.grade(a, task.val[0]) for a in ("rome", " Rome ", "Bern", None)] == [1, 1, 0, 0]
    assert task.candidates(task.val[0]) == ("Rome", "Bern")


@pytest.mark.parametrize(
    "name,message",
    [
        ("own_capitals", "there is no task 'own_capitals'; choose one of aid, .*, or give your own as 'module:Class'"),
        ("own_capitals:Towns", "task 'own_capitals:Towns': module own_capitals has no class Towns$"),
        ("own_capitals:function", "task 'own_capitals:function': module own_capitals has no class function$"),
        (
            "own_capital:Capitals",
            "No module named 'own_capital'; is own_capital.py in the working folder or on the path",
        ),
        ("own_capitals.py:Capitals", "task 'own_capitals.py:Capitals': No module named 'own_capitals.py'; 'own_capita"),
        (
            "own_capitals:",
            "task 'own_capitals:': wanted 'module:Class', as in 'my_task:MyTask' for the class of my_task.py",
        ),
        (":Capitals", "task ':Capitals': wanted 'module:Class'"),
    ],
)
def test_names_that_are_none(module, name, message):
    with pytest.raises(TaskError, match=message):
        load_task(name, None)


def test_what_goes_wrong_inside_is_not_renamed(module, tmp_path):
    (tmp_path / "own_broken.py").write_text("import there_is_no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="No module named 'there_is_no_such_module'"):
        load_task("own_broken:Task", None)
    (tmp_path / "own_wrong.py").write_text("import math\nmath.there_is_no_such_thing\n")
    with pytest.raises(AttributeError, match="there_is_no_such_thing"):
        load_task("own_wrong:Task", None)

    class Inner:
        def __init__(self):
            pass

    class Outer(Task):
        def __init__(self, processor, size=1):
            Inner(colour=size)

    with pytest.raises(TypeError, match=r"Inner.__init__\(\) got an unexpected keyword argument 'colour'"):
        load_task(Outer, None, size=2)


def test_settings_that_a_task_does_not_have(module):
    with pytest.raises(TaskError, match="own_capitals:Capitals: there is no setting 'size'; it has shout$"):
        load_task("own_capitals:Capitals", None, size=1)
    with pytest.raises(
        TaskError, match="Elements: there is no setting 'szies'; it has disjoint_facts, order, seed, sizes$"
    ):
        load_task(Elements, None, szies={})

    class Bare(Task):
        pass

    with pytest.raises(TaskError, match="Bare: there is no setting 'seed'; it has none$"):
        load_task(Bare, None, seed=1)


def test_what_a_task_has_to_define(processor):
    class Bare(Task):
        name = "bare"
        test = (Example("1", "Where?", "here"),)

    task = load_task(Bare, processor)
    model = make_model(processor, seed=3)
    with pytest.raises(NotImplementedError, match=r"Bare.target_text\(example\): \(scored part, what follows or ''\)"):
        task.evaluate(model, "test")
    with pytest.raises(TaskError, match="bare has no examples for val; it has some for test"):
        task.evaluate(model)


def test_own_tasks_are_no_data_sets_to_check(module, capsys):
    assert main(["data", "check", "own_capitals:Capitals", "."]) == 2
    assert "own_capitals:Capitals: there is no setting 'data_dir'; it has shout" in capsys.readouterr().err


# ---------------------------------------------------------------------- as tables
COLUMNS = {
    "role", "id", "question", "answer", "explanation", "context", "group", "prompt", "target", "choices", "categories",
    "references", "images",
}  # fmt: skip


def test_a_table_of_owners_files(tmp_path, monkeypatch):
    import datasets

    folder = write(
        tmp_path, [("test", "7", {"image": "image.png", "hint": "Look."}), ("test", "8", {}), ("val", "9", {})]
    )
    task = load(folder)
    opened = []
    monkeypatch.setattr(pictures, "open_picture", opened.append)
    monkeypatch.setattr(Image, "open", lambda *_: opened.append(1))
    table = task.to_hf("test")
    assert not opened
    monkeypatch.undo()
    assert set(table.column_names) == COLUMNS
    assert table.features["images"] == datasets.List(datasets.Image())
    row = table[0]
    [picture] = row.pop("images")
    assert picture.size == (5, 3) and picture.convert("RGB").tobytes() == task.test[0].images[0].tobytes()
    assert row == {
        "role": "test",
        "id": "7",
        "question": "Which one is a metal?",
        "answer": "A",
        "explanation": "Metals shine. Tin shines.",
        "context": "Look.",
        "group": "",
        "prompt": "Question: Which one is a metal?\nContext: Look.\nOptions: (A) tin (B) wood (C) the air.",
        "target": "The answer is A. BECAUSE: Metals shine. Tin shines.",
        "choices": ["tin", "wood", "the air."],
        "categories": ["NAT", "TXT", "IMG", "G1-6"],
        "references": [],
    }
    assert table[1]["images"] == []
    raw = table.cast_column("images", datasets.List(datasets.Image(decode=False)))[0]["images"]
    assert raw == [{"path": str(folder / "images/test/7/image.png"), "bytes": None}]  # a file still
    assert [(r["role"], r["id"]) for r in task.to_hf()] == [("val", "9"), ("test", "7"), ("test", "8")]
    with pytest.raises(TaskError, match="scienceqa has no examples for train; it has some for val, test"):
        task.to_hf("train")
    with pytest.raises(TaskError, match="there is no 'dev'"):
        task.to_hf("dev")


def test_a_table_of_drawn_pictures(processor):
    task = load_task("elements", processor, sizes={"train": 3, "search": 1, "val": 2, "test": 4})
    table = task.to_hf()
    assert table["role"][:] == ["train"] * 3 + ["search"] + ["val"] * 2 + ["test"] * 4
    for row, example in zip(table, [*task.train, *task.search, *task.val, *task.test], strict=True):
        assert row["id"] == example.id and len(row["images"]) == len(example.images)
        assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(row["images"], example.images))
    assert any(row["images"] for row in table)


def test_a_table_of_a_copys_rows_and_of_unknown_answers(tmp_path, monkeypatch):
    import datasets
    from scienceqa_files import BASE

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    picture = Image.new("RGB", (5, 3), (2, 7, 11))
    for split in ("train", "validation", "test"):
        rows = datasets.Dataset.from_list([BASE | {"image": picture}, BASE])
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    task = load_task("scienceqa", None, hub=str(tmp_path / "data"), held_out={"search": 0})
    table = task.to_hf("test")
    assert table["id"][:] == ["test-0", "test-1"] and table[1]["images"] == []
    assert table[0]["images"][0].convert("RGB").tobytes() == picture.tobytes()

    class Secret(Task):
        test = (Example("1", "Where?", ""),)

        def question_text(self, example):
            return example.question

    assert load_task(Secret, None).to_hf("test")[0]["target"] == ""
