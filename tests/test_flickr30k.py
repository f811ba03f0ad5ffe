"""Task flickr30k: questions dealt by picture, hub copies, and faults by record."""

from __future__ import annotations

from collections import Counter

import datasets
import pytest
from captioned import JSON, records, write

import eas_kit as eas
from eas_kit.errors import DataError
from eas_kit.tasks import load_task
from eas_kit.tasks.base import ROLES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("flickr"))


@pytest.fixture(scope="module")
def tiny():
    return eas.load_model("tiny")


def test_no_picture_and_no_caption_is_in_two_roles(folder):
    task = load_task("flickr30k", None, data_dir=folder, held_out={"search": 0.2})
    for part in (lambda e: e.group, lambda e: e.question, lambda e: e.images.sources[0].name):
        sets = [{part(e) for e in getattr(task, role)} for role in ROLES]
        assert sum(map(len, sets)) == len(set().union(*sets))
    assert [len({e.group for e in getattr(task, role)}) for role in ROLES] == [24, 6, 3, 7]
    assert [len(getattr(task, role)) for role in ROLES] == [144, 36, 18, 16]
    assert task.owner_counts == {"train": 30, "val": 3, "test": 7}
    assert sum(task.published().values()) == 31_014


def test_every_caption_and_every_picture_is_asked_as_often_with_yes_as_with_no(folder):
    task = load_task("flickr30k", None, data_dir=folder, held_out={"search": 0.2})
    for by, times in ((lambda e: e.question, 1), (lambda e: e.group, 3)):
        assert set(Counter((by(e), e.answer) for e in task.train).values()) == {times}
        assert len({(by(e), e.answer) for e in task.train}) == 2 * len({by(e) for e in task.train})
    for example in task.train:
        belongs = f"p{example.question.split()[3]}.jpg" == example.group
        assert (example.answer, example.categories) == (("Yes", ("matching",)) if belongs else ("No", ("mismatching",)))
    others = {
        i: {e.group for e in task.train if e.answer == "No" and f" of {i} " in e.question + " "} for i in range(40)
    }
    assert sorted(map(len, others.values())) == [0] * 16 + [3] * 24  # each caption with another picture
    assert task.train[0].id.endswith(f"#0 on {task.train[0].group}") and len({e.id for e in task.train}) == 144
    other = load_task("flickr30k", None, data_dir=folder, held_out={"search": 0.2}, seed=1)
    assert {e.id for e in other.test if e.answer == "Yes"} == {e.id for e in task.test if e.answer == "Yes"}
    assert {e.id for e in other.test} != {e.id for e in task.test}


def test_a_caption_that_two_pictures_share_is_not_asked_as_wrong(tmp_path):
    images = records()
    for record in images:
        if record["filename"] != "p9.jpg" and record["split"] == "val":
            record["sentences"] = [{"raw": " Two dogs. " if record["imgid"] == 7 else "two dogs"}]
    task = load_task("flickr30k", None, data_dir=write(tmp_path, images), held_out={"search": 0})
    assert [e.group for e in task.val if e.question.lower().startswith("two") and e.answer == "No"] == ["p9.jpg"] * 2
    assert "Two dogs." in {e.question for e in task.val} and len(task.search) == 0


def test_a_part_holds_both_questions_of_a_caption(folder):
    task = load_task("flickr30k", None, data_dir=folder, sizes={"train": 20}, held_out={"search": 0.2})
    assert Counter(e.answer for e in task.train) == {"Yes": 10, "No": 10}
    assert len({e.question for e in task.train}) == 10
    assert task.sources["train"].endswith("20 of 144 (seed 0)")
    few, more = ({e.id for e in task.split("val", n)} for n in (3, 6))
    assert len(few) == 3 and few < more


def test_questions_are_read_answered_and_scored_by_the_tiny_model(folder, tiny):
    model, processor = tiny
    task = load_task("flickr30k", processor, data_dir=folder, held_out={"search": 0.2})
    asked = task.test[0]
    assert task.question_text(asked) == "Does this sentence describe the picture? sentence 0 of 0\nAnswer yes or no."
    batch = task.collate(task.test[:3])
    assert batch["pixel_values"].shape == (3, 3, 24, 24)
    answer = batch["input_ids"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(answer, skip_special_tokens=True).strip() == "Yes"
    assert [task.parse(text, asked) for text in ("yes.", "No, it", "yes or no", "a dog")] == ["Yes", "No", None, None]
    assert task.score(model, "test")["count"] == 16
    result = task.evaluate(model, "test", method="options")
    assert result["accuracy"] == pytest.approx(sum(result["columns"].values()) / 2)
    assert result["column_counts"] == {"matching": 8, "mismatching": 8}
    assert task.evaluate(model, "test", 4)["count"] == 4


# ---------------------------------------------------------------------- the hub
def table_of(images: list[dict], column: str, folder, **more) -> datasets.Dataset:
    rows = {
        "image": [{"bytes": (folder / "flickr30k-images" / r["filename"]).read_bytes(), "path": None} for r in images],
        column: [[s["raw"] for s in r["sentences"]] for r in images],
        "filename": [r["filename"] for r in images],
    } | {name: [r[name] for r in images] for name in more.get("also", ())}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "copy").mkdir()
    return tmp_path / "copy"


@pytest.mark.parametrize("form", ["three splits", "one split and a column"])
def test_hub_copies(folder, hub, form):
    if form == "three splits":
        for split in ("train", "val", "test"):
            part = [r for r in records() if r["split"] == split]
            table_of(part, "original_alt_text", folder).to_parquet(hub / f"{split}-00000-of-00001.parquet")
    else:
        table_of(records(), "caption", folder, also=["split"]).to_parquet(hub / "test-00000-of-00001.parquet")
    copy, own = load_task("flickr30k", None, hub=str(hub)), load_task("flickr30k", None, data_dir=folder)
    for role in ROLES:
        assert [(e.id, e.question, e.answer) for e in getattr(copy, role)] == [
            (e.id, e.question, e.answer) for e in getattr(own, role)
        ]
    assert copy.test[-2].images[0].getpixel((0, 0)) == (6, 0, 0)


def test_faulty_hub_copies(folder, hub):
    part = [r for r in records() if r["split"] == "test"]
    for images, column, message in (
        (records(), "text", "split test of .* has no column caption or original_alt_text or captions; it has image, t"),
        (part, "caption", f"{hub}' has no split train, but test"),
    ):
        table_of(images, column, folder, also=["split"]).to_parquet(hub / "test.parquet")
        with pytest.raises(DataError, match=message):
            load_task("flickr30k", None, hub=str(hub))
    for split in ("train", "val"):
        table_of(part, "caption", folder, also=["split"]).to_parquet(hub / f"{split}.parquet")
    with pytest.raises(
        DataError, match="split train, record p0.jpg: is in split train of the copy and in 'test' by its"
    ):
        load_task("flickr30k", None, hub=str(hub))


# ---------------------------------------------------------------------- faults
FAULTS = [
    ({"sentences": []}, "field 'sentences' is empty; wanted at least one caption"),
    ({"sentences": None}, "field 'sentences' should be list, it is NoneType None"),
    ({"sentences": [{"raw": 7}]}, "field 'raw' should be str, it is int 7"),
    ({"sentences": [{"raw": " "}]}, "field 'sentences' should hold texts, it has ' '"),
    ({"filename": "p0.jpg"}, "this file name occurs twice, first in test"),
    ({"split": "restval"}, "the split is one of train, val, test, not 'restval'"),
    ({"filename": "gone.jpg"}, r"gone.jpg does not exist; are all pictures unpacked, or do they lie elsewhere"),
    ({"filename": "../p0.jpg"}, "the picture '../p0.jpg' lies outside of the folder of pictures"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_faulty_records_are_named_or_left_out(tmp_path, change, message):
    images = records()
    images[-1] |= change
    write(tmp_path, images)
    name = images[-1]["filename"]
    with pytest.raises(DataError, match=f"flickr30k: {JSON}, record {name}: .*{message}"):
        load_task("flickr30k", None, data_dir=tmp_path)
    task = load_task("flickr30k", None, data_dir=tmp_path, on_error="skip")
    assert [p.record for p in task.skipped] == [name] and task.owner_counts["test"] == 6


def test_other_folders_and_files(tmp_path):
    task = load_task("flickr30k", None, data_dir=write(tmp_path / "a", place="flickr30k_images/flickr30k_images"))
    assert task.test[0].images[0].getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(DataError, match="names no pictures; wanted Karpathy's file. data/flickr30k.md says"):
        load_task("flickr30k", None, data_dir=write(tmp_path / "b", []))
    few = [r for r in records() if r["split"] != "train"] + records()[:10]
    with pytest.raises(DataError, match="none of the 1 pictures of search can be asked .* as held_out={'search': 0.2}"):
        load_task("flickr30k", None, data_dir=write(tmp_path / "c", few))
    few = [r for r in records() if r["imgid"] != 8 and r["imgid"] != 9]
    with pytest.raises(DataError, match="none of the 1 pictures of val .* a role wants two pictures or more"):
        load_task("flickr30k", None, data_dir=write(tmp_path / "d", few))
