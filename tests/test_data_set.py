"""What the real data sets share: four roles out of owners' splits, nothing in two of them, every fault counted."""

from __future__ import annotations

import json
import os
import pickle
import random
import time

import pytest
import torch
from PIL import Image

import eas_kit as eas
from eas_kit.errors import DataError, TaskError
from eas_kit.models.tiny.architecture import make_processor
from eas_kit.tasks.base import ROLES, Example
from eas_kit.tasks.data_set import Card, DataSetTask
from eas_kit.tasks.pictures import Pictures
from eas_kit.tasks.records import Problem, field, read_json
from eas_kit.tasks.splits import hold_out


class Shapes(DataSetTask):
    """Records {"id", "q", "a", "image"} in train.json, val.json, test.json; the picture is the group."""

    name = "shapes"
    card = Card("shapes", "https://example.org/shapes", "none", "example/shapes", {})
    max_new_tokens = 5

    def read_folder(self):
        found = {}
        for split in filter(lambda s: self.has(f"{s}.json"), ("train", "val", "test")):
            path, found[split] = self.file(f"{split}.json"), []
            for number, record in enumerate(read_json(path, list)):
                with self.reading(path, number):
                    place = field(record, "image", str, default="")
                    images = Pictures(self.picture(str(number), place)) if place else ()
                    name, texts = str(field(record, "id", (int, str))), (field(record, "q"), field(record, "a"))
                    found[split].append(Example(name, *texts, images=images, group=place))
        return found

    def read_hub(self):
        return {"train": self.hub_copy.rows("train", columns=("q",))}

    def question_text(self, example):
        return example.question

    def target_text(self, example):
        return example.answer, ""

    def parse(self, text, example):
        return text.strip() or None


def write(folder, pictures=(), **splits):
    """splits: (count of records, pictures they take turns on) or records."""
    for name in pictures:
        (folder / "images").mkdir(exist_ok=True)
        Image.new("RGB", (24, 24), (len(name), 20, 30)).save(folder / "images" / name)
    for split, records in splits.items():
        if isinstance(records, tuple):
            count, groups = records
            records = [{"id": f"{split}{i}", "q": f"what is {i}", "a": "gold"} for i in range(count)]
            for i, record in enumerate(records if groups else ()):
                record["image"] = f"{i % groups}.png"
        (folder / f"{split}.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def tiny():
    return eas.load_model("tiny")


def ids(examples):
    return [e.id for e in examples]


# ---------------------------------------------------------------------- holding out
def test_held_out_parts_are_whole_groups_and_reproducible(tmp_path):
    write(tmp_path, train=(1_000, 200), test=(7, 3))
    load = lambda **settings: Shapes(None, tmp_path, check_images=False, **settings)  # noqa: E731
    task = load(held_out={"search": 0.1, "val": 0.25})
    assert [len(getattr(task, role)) for role in ROLES] == [650, 100, 250, 7]  # groups of 5 fit exactly
    groups = {role: {e.group for e in getattr(task, role)} for role in ("train", "search", "val")}
    assert [len(g) for g in groups.values()] == [130, 20, 50] and len(set().union(*groups.values())) == 200
    for role in ("train", "search", "val"):
        numbers = [int(e.id[5:]) for e in getattr(task, role)]
        assert numbers == sorted(numbers)  # in file order
    same, other = load(held_out={"search": 0.1, "val": 0.25}), load(held_out={"search": 0.1, "val": 0.25}, seed=1)
    assert ids(same.search) == ids(task.search) != ids(other.search) and ids(same.val) == ids(task.val)
    assert task.sources == {
        "train": "train, what is left",
        "search": "held out of train (share 0.1, seed 0)",
        "val": "held out of train (share 0.25, seed 0)",
        "test": "test",
    }
    assert [len(getattr(load(), role)) for role in ROLES] == [900, 50, 50, 7]  # the default is 5 % each
    assert task.owner_counts == {"train": 1_000, "test": 7}
    none = load(held_out={"search": 0, "val": 0})
    assert len(none.train) == 1_000 and none.search == none.val == [] and none.sources["train"] == "train"
    with pytest.raises(TaskError, match="shapes has no examples for val; it has some for train, test"):
        none.split("val")


def test_an_owners_validation_split_is_not_held_out(tmp_path):
    task = Shapes(None, write(tmp_path, train=(40, 0), val=(3, 0)))
    assert [len(getattr(task, role)) for role in ROLES] == [38, 2, 3, 0] and task.sources["val"] == "val"
    assert len(Shapes(None, tmp_path, held_out={"val": 0}).val) == 3
    with pytest.raises(TaskError, match="shapes: val is the owners' split 'val', not held out of train; leave it out"):
        Shapes(None, tmp_path, held_out={"val": 0.1})


def test_hold_out_by_count():
    def make(sizes):
        return [Example(f"{g}-{i}", "", "", group=g) for g, size in sizes.items() for i in range(size)]

    examples = make({"a": 3, "b": 1, "c": 2})
    for wanted, least in ((0, 0), (1, 1), (3, 3), (99, 3)):  # one group always stays
        held, rest = hold_out(examples, wanted, random.Random(4))
        assert sorted(ids(held) + ids(rest)) == sorted(ids(examples)) and rest and len(held) >= least
        assert not {e.group for e in held} & {e.group for e in rest}
    assert hold_out(make({"a": 5}), 2, random.Random(0)) == ([], make({"a": 5}))
    single = [Example(str(i), "", "") for i in range(100)]
    assert len(hold_out(single, 7, random.Random(0))[0]) == 7  # without groups, by the example


def test_a_share_of_so_many_is_so_many(tmp_path):
    """0.07 x 100 is a little more than 7 in binary."""
    task = Shapes(None, write(tmp_path, train=(100, 0)), held_out={"search": 0.07, "val": 0.001})
    assert [len(getattr(task, role)) for role in ROLES] == [92, 7, 1, 0]


@pytest.mark.parametrize(
    "shares,message",
    [
        ({"test": 0.1}, "^shapes: held_out has shares for search and val; there is no test$"),
        ({"val": 0.5}, "^shapes: the share held out for val is from 0 to below 0.5, not 0.5$"),
        ({"val": -0.1}, "not -0.1$"),
        ({"val": float("nan")}, "not nan$"),
        ({"val": "0.1"}, "not '0.1'$"),
        ({"val": True}, "not True$"),
    ],
)
def test_bad_shares(tmp_path, shares, message):
    with pytest.raises(TaskError, match=message):
        Shapes(None, write(tmp_path, train=(9, 0)), held_out=shares)


def test_shares_that_leave_nothing_to_train_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Shapes, "can_hold_out", ("search", "val", "test"))
    with pytest.raises(TaskError, match="held out are search 0.4, val 0.4, test 0.4, which leaves nothing of train"):
        Shapes(None, write(tmp_path, train=(50, 0)), held_out=dict.fromkeys(("search", "val", "test"), 0.4))


# ---------------------------------------------------------------------- sizes and limit
def test_sizes_and_limits_are_drawn_by_seed_nested_and_in_file_order(tmp_path):
    write(tmp_path, train=(60, 0), test=(50, 0))
    load = lambda **settings: Shapes(None, tmp_path, **settings)  # noqa: E731
    whole = load()
    drawn = {n: ids(whole.split("test", n)) for n in (1, 10, 20, 50, 99)}
    assert [len(d) for d in drawn.values()] == [1, 10, 20, 50, 50] and drawn[50] == ids(whole.test)
    assert set(drawn[1]) < set(drawn[10]) < set(drawn[20]) and drawn[10] != ids(whole.test)[:10]
    assert all(d == sorted(d, key=lambda name: int(name[4:])) for d in drawn.values())
    assert ids(load(sizes={"test": 10}).test) == drawn[10] == ids(load().split("test", 10))
    assert ids(load(sizes={"test": 10}, seed=1).test) != drawn[10]
    assert load(sizes={"test": 10}).sources["test"] == "test, 10 of 50 (seed 0)"
    assert len(load(sizes={"test": 99, "val": 5}).val) == 3  # at most so many
    for sizes, message in {"dev": "there is no dev", "val": "of val is a whole number from 1 up, not True"}.items():
        with pytest.raises(TaskError, match=message):
            load(sizes={sizes: True})
    for limit in (0, -1, 2.0, True, "3"):
        with pytest.raises(TaskError, match=f"shapes: limit is a number of examples from 1 up, or None.*not {limit!r}"):
            whole.split("test", limit)
    with pytest.raises(TaskError, match="shapes has the splits train, search, val, test; there is no 'dev'"):
        whole.split("dev")


# ---------------------------------------------------------------------- faulty records
GOOD = {"id": 1, "q": "what", "a": "gold"}


@pytest.mark.parametrize(
    "record,problem",
    [
        ({"id": 1, "a": "x"}, Problem("train.json", "1", "there is no field 'q'")),
        (
            {"id": True, "q": "x", "a": "x"},
            Problem("train.json", "1", "field 'id' should be int or str, it is bool True"),
        ),
        ({"id": 3, "q": None, "a": "x"}, Problem("train.json", "1", "field 'q' should be str, it is NoneType None")),
        ("text", Problem("train.json", "1", "wanted an object with named fields, got str 'text'")),
        ({"id": 1, "q": "other", "a": "x"}, Problem("split train", "1", "this id occurs twice")),
        ({"id": 3, "q": "\ud83d half", "a": "x"}, "split train, record 3: a text holds half of a character"),
        ({**GOOD, "id": 9}, "split train, record 9: the same record is in split test as well"),
        ({"id": 3, "q": "x", "a": "x", "image": "no.png"}, "record 1: the picture .*images/no.png does not exist; are"),
        ({"id": 3, "q": "x", "a": "x", "image": "../b.png"}, "record 1: the picture '../b.png' lies outside of the"),
        ({"id": 3, "q": "x", "a": "x", "image": "\0"}, r"train.json, record 1: .*holds a NUL character"),
    ],
)
def test_a_faulty_record_is_raised_or_left_out_alone(tmp_path, record, problem):
    records = [GOOD, record, {"id": 2, "q": "what", "a": "tin", "image": r".\a.png"}]
    write(tmp_path, ["a.png"], train=records, test=[{**GOOD, "id": 9}])
    (tmp_path / "b.png").write_bytes(b"")
    message = str(problem).replace("(", r"\(")
    with pytest.raises(DataError, match=f"^shapes: .*{message}.*Mend it, or leave such records out and have them"):
        Shapes(None, tmp_path)
    task = Shapes(None, tmp_path, on_error="skip", held_out={"search": 0, "val": 0})
    assert ids(task.train) == ["1", "2"] and ids(task.test) == ["9"]
    assert len(task.skipped) == 1 and task.about()["skipped_on_loading"] == 1
    assert isinstance(problem, str) or task.skipped == [problem]


def test_the_same_id_for_another_record_is_no_leak(tmp_path):
    """Ids may count from 0 in every file."""
    write(tmp_path, train=[GOOD], val=[{**GOOD, "q": "another"}], test=[{**GOOD, "a": "another"}])
    assert [ids(getattr(Shapes(None, tmp_path), role)) for role in ROLES] == [["1"], [], ["1"], ["1"]]
    with pytest.raises(TaskError, match="^shapes: on_error is one of raise, skip, not 'warn'$"):
        Shapes(None, tmp_path, on_error="warn")


def test_pictures_that_cannot_be_opened_are_counted_once(tmp_path, tiny):
    model, processor = tiny
    write(tmp_path, ["0.png", "1.png"], train=(6, 2), test=(6, 2))
    (tmp_path / "images" / "1.png").write_bytes(b"broken")
    task = Shapes(processor, tmp_path, on_error="skip", held_out={"search": 0, "val": 0})
    assert task.skipped == [] and len(task.train) == 6
    assert len(task.collate(task.train)["labels"]) == 3
    assert [(p.file, p.record) for p in task.skipped] == [("pictures", f"train{i}") for i in (1, 3, 5)]
    assert task.skipped[0].problem.startswith(f"the picture {tmp_path}/images/1.png cannot be opened, it is truncated")
    for workers in (2, 0):  # what a worker process left out is told to this one
        result = task.evaluate(model, "test", batch_size=2, workers=workers)
        assert (result["count"], result["skipped"], result["skipped_on_loading"]) == (3, 3, 0)
        assert len(task.skipped) == 6
    strict = Shapes(processor, tmp_path, held_out={"search": 0, "val": 0})
    with pytest.raises(DataError, match="^shapes: record 1: the picture .* cannot be opened.*on_error='skip'"):
        strict.collate(strict.train)
    with pytest.raises(DataError, match="shapes: no example of this batch has pictures that can be opened; the first"):
        task.collate([task.train[1]])


# ---------------------------------------------------------------------- folders, processors, processes
def test_where_the_data_are(tmp_path):
    page = r"data/shapes\.md says which files, in which folders \(https://example.org/shapes\)"
    for settings in ({}, {"data_dir": tmp_path, "hub": True}):
        with pytest.raises(TaskError, match=f"^shapes: give either data_dir='the.*or hub=True for a hub copy; {page}$"):
            Shapes(None, **settings)
    with pytest.raises(DataError, match=f"shapes: data_dir .*gone does not exist; wanted a folder. {page}"):
        Shapes(None, tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="shapes: data_dir .*file is a file; wanted a folder"):
        Shapes(None, tmp_path / "file")
    with pytest.raises(DataError, match="shapes: image_dir .*gone is not a folder"):
        Shapes(None, write(tmp_path, train=[{**GOOD, "image": "a.png"}]), image_dir=tmp_path / "gone", on_error="skip")
    (tmp_path / "down" / "Shapes1.0").mkdir(parents=True)  # as an archive unpacks, and its pictures beside
    write(tmp_path / "down" / "Shapes1.0", ["a.png"], train=[{**GOOD, "image": "a.png"}])
    assert Shapes(None, tmp_path / "down").train[0].images[0].size == (24, 24)


def test_sizes_and_shares_are_by_role(tmp_path):
    write(tmp_path, train=(4, 0))
    with pytest.raises(TaskError, match=r"^shapes: sizes are by split, as \{'test': 200\}, not 200$"):
        Shapes(None, tmp_path, sizes=200)
    with pytest.raises(TaskError, match=r"^shapes: held_out is by role, as \{'search': 0.1\}, not 0.2$"):
        Shapes(None, tmp_path, held_out=0.2)


def test_a_folder_of_many_pictures_is_listed_once(tmp_path, monkeypatch):
    write(tmp_path, ["a.png"], train=[{**GOOD, "image": "a.png"}])
    (tmp_path / "down").mkdir()
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    task = Shapes(None, tmp_path)
    assert not task.has("none.json") and not task.has("none.jsonl") and task.has("train.json")
    assert task._further_down == [tmp_path / "down", tmp_path / "images"] and listed == [tmp_path]


def test_what_was_skipped_is_not_looked_at_without_need(tmp_path, monkeypatch):
    task = Shapes(None, write(tmp_path, train=(4, 0)))
    task.left_out([Problem("pictures", "a", "gone")])
    task.left_out([Problem("pictures", "a", "gone"), Problem("pictures", "b", "gone")])
    assert [p.record for p in task.skipped] == ["a", "b"]
    monkeypatch.setattr(Shapes, "skipped", property(lambda self: pytest.fail("looked at")))
    task.opened(task.train)  # as for every example of every batch


def test_a_hub_copy_that_cannot_be_loaded_says_so_at_once(tmp_path):
    began = time.perf_counter()
    with pytest.raises(DataError, match="shapes: the hub copy 'example/no-such-copy' cannot be loaded: .*Check"):
        Shapes(None, hub="example/no-such-copy")
    assert time.perf_counter() - began < 20
    (tmp_path / "copy").mkdir()
    with pytest.raises(DataError, match="shapes: the hub copy .*copy' cannot be loaded: .*or give data_dir. data/"):
        Shapes(None, hub=str(tmp_path / "copy"))


def test_a_model_of_text_takes_texts_alone(tmp_path, tiny):
    tokenizer = tiny[1].tokenizer
    write(tmp_path, ["0.png"], train=(4, 0), test=(2, 1))
    with pytest.raises(TaskError, match="shapes: example test0 has a picture, and this processor .* has no part for"):
        Shapes(tokenizer, tmp_path)
    (tmp_path / "test.json").unlink()
    assert len(Shapes(tokenizer, tmp_path, held_out={"search": 0, "val": 0}).train) == 4


def test_texts_and_pictures_share_a_batch(tmp_path, tiny):
    model, processor = tiny
    mixed = [{**GOOD, "id": i, **({"image": "0.png"} if i % 2 else {})} for i in range(4)]
    task = Shapes(processor, write(tmp_path, ["0.png"], test=mixed))
    batch = task.collate(task.test)
    assert batch["pixel_values"].shape == (2, 3, 24, 24)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == token).sum(1).tolist() == [0, 9, 0, 9]
    alone = [task.collate([e]) for e in task.test]
    with torch.no_grad():
        together = model(**batch).loss
        apart = [model(**b).loss for b in alone]
    torch.testing.assert_close(together, sum(apart) / 4)  # the answers are equally long


def test_worker_processes_give_the_very_same_result(tmp_path, tiny):
    model, processor = tiny
    task = Shapes(processor, write(tmp_path, ["0.png", "1.png"], test=(6, 2)))
    here, there = (task.evaluate(model, "test", batch_size=2, workers=n) for n in (0, 2))
    assert {**here, "seconds": 0} == {**there, "seconds": 0} and here["count"] == 6
    assert task.score(model, "test", batch_size=2) == task.score(model, "test", batch_size=2, workers=2)


def test_tasks_can_be_sent_to_other_processes(tmp_path):
    processor = make_processor(["what is gold"] * 9)
    task = Shapes(processor, write(tmp_path, ["0.png"], test=(2, 1)))
    again = pickle.loads(pickle.dumps(task))
    assert again.test[1].images[0].size == (24, 24) and ids(again.test) == ["test0", "test1"]
    assert torch.equal(again.collate(again.test)["input_ids"], task.collate(task.test)["input_ids"])
    bundled = eas.load_task("elements", processor)
    sent = pickle.loads(pickle.dumps(bundled))
    assert [e.question for e in sent.val[:3]] == [e.question for e in bundled.val[:3]] and len(sent.val) == 500
