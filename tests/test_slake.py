"""Slake: owners' files, LLaVA's form and hub copies give the same examples; grades by hand."""

from __future__ import annotations

import io
import json
import shutil

import datasets
import pytest
from PIL import Image

import eas_kit as eas
from eas_kit.errors import DataError, TaskError
from eas_kit.tasks.base import ROLES
from eas_kit.tasks.check import check_data
from eas_kit.tasks.slake import INSTRUCTION, Slake


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_CACHE", "EXTRACTED_DATASETS_PATH", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache")


def record(qid, question="Is it gold?", answer="Yes", kind="CLOSED", picture=0, **fields):
    own = {"qid": qid, "question": question, "answer": answer, "answer_type": kind, "q_lang": "en"}
    place = {"img_id": picture, "img_name": f"xmlab{picture}/source.jpg", "location": "Lung", "modality": "CT"}
    return own | place | {"content_type": "Organ", "base_type": "vqa", "triple": ["vhead", "_", "_"]} | fields


def records(split):
    first = {"train": 0, "validate": 10_000, "test": 20_000}[split]
    some = [
        record(first, picture=first),
        record(first + 1, "Which organ?", "Left lung, heart", "OPEN", first),
        record(first + 2, "Which plane?", "Axial", "OPEN ", first + 1, content_type="Plane"),  # a blank, as in theirs
        record(first + 3, "Bigger, lung or heart?", "Lung", "CLOSED", first + 1, content_type="Size"),
        record(first + 4, "哪个器官?", "左肺", "OPEN", first + 1, q_lang="zh"),
    ]
    return some + [record(first + 5 + i, picture=first + 5 + i) for i in range(20)] * (split == "train")


def write(folder, **changed):
    """The folder as its owners pack it; `changed`: records by file."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "validate", "test"):
        some = changed.get(split) or records(split)
        (folder / f"{split}.json").write_text(json.dumps(some, ensure_ascii=False), encoding="utf-8")
        for one in some:
            place = folder / "imgs" / one["img_name"]
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 24), (one["qid"] % 251, 20, 30)).save(place)
    return folder


def ids(examples):
    return [int(e.id) for e in examples]


def same(one, two):
    """Record by record, pictures too."""
    for role in ROLES:
        left, right = getattr(one, role), getattr(two, role)
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            texts = [(e.id, e.question, e.answer, e.categories, e.choices, e.history) for e in (a, b)]
            assert texts[0] == texts[1] and a.images[0].tobytes() == b.images[0].tobytes()


# ---------------------------------------------------------------------- reading
def test_owners_files(tmp_path):
    processor = eas.load_model("tiny")[1]
    task = Slake(processor, write(tmp_path))
    assert [len(getattr(task, role)) for role in ROLES] == [22, 2, 4, 4]  # both of a picture
    assert task.owner_counts == {"train": 24, "val": 4, "test": 4}
    assert task.sources["val"] == "val" and task.sources["search"] == "held out of train (share 0.05, seed 0)"
    closed, opened, plane, size = task.test
    assert (closed.id, closed.answer, closed.categories) == ("20000", "Yes", ("CLOSED", "Organ"))
    assert opened.question == f"Which organ?\n{INSTRUCTION}" and opened.categories == ("OPEN", "Organ")
    assert plane.categories == ("OPEN", "Plane") and size.categories == ("CLOSED", "Size")
    assert closed.group == opened.group == "xmlab20000/source.jpg" != plane.group
    assert task.collate(task.test)["pixel_values"].shape == (4, 3, 24, 24)
    with pytest.raises(TaskError, match="slake: this task needs a model that reads pictures"):
        Slake(processor.tokenizer, tmp_path)
    (tmp_path / "validate.json").rename(tmp_path / "validation.json")  # as in the hub copy
    same(task, Slake(processor, tmp_path))
    nested = tmp_path / "unpacked"
    nested.mkdir()
    shutil.move(tmp_path / "imgs", nested / "Slake1.0" / "imgs")
    for name in ("train", "validation", "test"):
        shutil.move(tmp_path / f"{name}.json", nested / "Slake1.0" / f"{name}.json")
    assert ids(Slake(processor, nested).test) == ids(task.test)


def test_languages(tmp_path):
    write(tmp_path)
    assert ids(Slake(None, tmp_path, language="zh").test) == [20_004]
    assert ids(Slake(None, tmp_path, language="all").test) == [20_000, 20_001, 20_002, 20_003, 20_004]
    with pytest.raises(TaskError, match="^slake: language is one of en, zh, all, not 'de'$"):
        Slake(None, tmp_path, language="de")


@pytest.mark.parametrize(
    "faulty,message",
    [
        (record(7, answer_type="HALF"), "the answer_type is one of OPEN, CLOSED, not 'HALF'"),
        (record(7, answer=None), "field 'answer' should be str, it is NoneType None"),
        (record(7, answer=True), "field 'answer' should be str, it is bool True"),
        (record(7, answer="?", kind="OPEN"), r"the answer '\?' has no words"),
        (record(7, q_lang="de"), "the q_lang is one of en, zh, not 'de'"),
        (record(7, img_name="xmlab7/gone.jpg"), "the picture .*imgs/xmlab7/gone.jpg does not exist"),
        (record(7, img_name="../../x.jpg"), "the picture '../../x.jpg' lies outside of the folder"),
        ({k: v for k, v in record(7).items() if k != "question"}, "there is no field 'question'"),
        (record(True), "field 'qid' should be int or str, it is bool True"),
        (record(1), "this id occurs twice"),
    ],
)
def test_faulty_records(tmp_path, faulty, message):
    write(tmp_path)
    good = records("train")
    (tmp_path / "train.json").write_text(json.dumps([*good[:3], faulty, *good[3:]]))
    with pytest.raises(DataError, match=f"^slake: .*record .*{message}.*on_error='skip'$"):
        Slake(None, tmp_path)
    task = Slake(None, tmp_path, on_error="skip")
    assert task.owner_counts == {"train": 24, "val": 4, "test": 4} and len(task.skipped) == 1


def test_the_one_empty_answer_of_the_owners_does_not_stop_loading(tmp_path):
    write(tmp_path, train=[*records("train"), record(1622, answer="")])
    task = Slake(None, tmp_path)
    assert task.owner_counts["train"] == 24
    assert str(task.skipped[0]) == "train.json, record 1622: the answer is empty, nothing to learn from"
    found = check_data("slake", str(tmp_path))
    assert not found.problems and found.as_published == {"train": 1}
    assert "train              24    4,919   DIFFERENT   and 1 left out, published so" in found.text()
    found.wanted = {"train": 25, "val": 4, "test": 4}
    assert found.ok
    write(tmp_path, test=[*records("test"), record(1623, answer=" ")])
    with pytest.raises(DataError, match="slake: test.json, record 1623: an answer is empty. Mend it"):
        Slake(None, tmp_path)


def test_the_same_question_in_two_splits(tmp_path):
    write(tmp_path, test=[*records("test"), records("train")[3]])
    with pytest.raises(DataError, match="slake: split train, record 3: the same record is in split test as well"):
        Slake(None, tmp_path)


def test_files_in_llavas_form(tmp_path):
    write(tmp_path)
    plain = Slake(None, tmp_path)

    def turned(one):
        said = [("human", f"<image>\n{one['question']}\n{INSTRUCTION}"), ("gpt", one["answer"])]
        turns = [{"from": who, "value": text} for who, text in said]
        own = {"id": str(one["qid"]), "image": one["img_name"], "answer_type": one["answer_type"]}
        return own | {"conversations": turns}

    english = {s: [turned(r) for r in records(s) if r["q_lang"] == "en"] for s in ("train", "validate", "test")}
    (tmp_path / "train_llava_en.json").write_text(json.dumps(english["train"]))
    (tmp_path / "testval_llava_en.json").write_text(json.dumps(english["test"] + english["validate"]))
    with pytest.raises(TaskError, match="slake: .* has the owners' files and files in LLaVA's form, .* form='llava'"):
        Slake(None, tmp_path)
    with pytest.raises(TaskError, match="slake: form is 'owners', 'llava', or None for what is there; not 'x'"):
        Slake(None, tmp_path, form="x")
    assert Slake(None, tmp_path, form="owners").test == plain.test
    task = Slake(None, tmp_path, held_out={"search": 0.2, "val": 0.2}, form="llava")
    assert task.published() == {"train": 4_919, "test": 2_114}
    assert (task.about()["data"], plain.about()["data"]) == ("files in LLaVA's form", "owner's files")
    assert [len(getattr(task, role)) for role in ROLES][3] == 8 and 4 <= len(task.val) <= 6
    groups = [{e.group for e in getattr(task, role)} for role in ("train", "search", "val")]
    assert len(set().union(*groups)) == sum(map(len, groups)) == 22  # no picture in two roles
    wanted = {e.id: (e.question, e.answer, e.categories[0]) for e in plain.test}
    assert {e.id: (e.question, e.answer, *e.categories) for e in task.test[:4]} == wanted


# ---------------------------------------------------------------------- hub copies
def test_a_hub_copy_with_an_archive_beside_it(tmp_path):
    owner = write(tmp_path / "owner")
    copy = tmp_path / "copy"
    copy.mkdir()
    for there, here in (("train", "train"), ("validation", "validate"), ("test", "test")):
        shutil.copy(owner / f"{here}.json", copy / f"{there}.json")
    shutil.make_archive(str(copy / "imgs"), "zip", owner, "imgs")
    task = Slake(None, hub=str(copy))
    same(Slake(None, owner), task)
    assert task.about()["data"] == f"hub copy {copy}" and task.skipped == []
    (copy / "imgs.zip").unlink()
    with pytest.raises(DataError, match="slake: imgs.zip of .*copy' cannot be loaded: .*; give image_dir"):
        Slake(None, hub=str(copy))
    same(Slake(None, hub=str(copy), image_dir=owner / "imgs"), task)


def test_a_hub_copy_with_the_pictures_inside(tmp_path):
    owner = write(tmp_path / "owner")
    kept = ("qid", "question", "answer", "answer_type", "q_lang", "content_type")
    for there, here in (("train", "train"), ("validation", "validate"), ("test", "test")):
        rows = []
        for one in records(here):
            data = (owner / "imgs" / one["img_name"]).read_bytes()
            rows.append({k: one[k] for k in kept} | {"image": {"bytes": data, "path": None}})
        if here == "train":
            rows.append(rows[0] | {"qid": 77, "image": None})
        features = datasets.Dataset.from_list(rows).features | {"image": datasets.Image()}
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        table.to_parquet(tmp_path / "copy" / f"{there}-00000-of-00001.parquet")
    with pytest.raises(DataError, match="slake: copy, split train, record 77: there is no picture in column 'image'"):
        Slake(None, hub=str(tmp_path / "copy"))
    task = Slake(None, hub=str(tmp_path / "copy"), on_error="skip", held_out={"search": 0})
    assert [p.record for p in task.skipped] == ["77"]
    same(Slake(None, owner, held_out={"search": 0}), task)
    one, two, three, *_ = task.train
    assert one.group == two.group != three.group  # by the picture itself, where it has no name
    assert Image.open(io.BytesIO(task.train[0].images.sources[0].read().getvalue())).size == (24, 24)


# ---------------------------------------------------------------------- grades
def test_grades_of_a_predictions_file(tmp_path):
    task = Slake(None, write(tmp_path))
    said = {20_000: "No, it is not.", 20_001: "The left lung", 20_002: "axial plane.", 20_003: "Heart"}
    (tmp_path / "said.jsonl").write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in said.items()))
    result = task.score_predictions(tmp_path / "said.jsonl", "test")
    # OPEN: 2 of the 3 words left lung heart, then 1 of 1; CLOSED: neither
    assert result["columns"] == pytest.approx({"OPEN": 5 / 6, "CLOSED": 0, "Organ": 1 / 3, "Plane": 1, "Size": 0})
    assert result["column_counts"] == {"CLOSED": 2, "OPEN": 2, "Organ": 2, "Plane": 1, "Size": 1}
    assert result["accuracy"] == pytest.approx((2 / 3 + 1) / 4) and result["unparsed"] == 0
    yes, _, _, size = task.test
    assert [task.parse(t, yes) for t in ("Yes.", "no", "I do not know", "yes or no")] == ["yes", "no", None, None]
    assert task.grade(task.parse("The answer is the lung.", size), size) == 1
