"""A hub copy in ScienceQA's columns holds what the owners' files hold, record by record."""

from __future__ import annotations

import json

import datasets
import pytest
from PIL import Image

import eas_kit as eas
from eas_kit.errors import DataError
from eas_kit.tasks.base import ROLES
from eas_kit.tasks.check import check_data
from eas_kit.tasks.scienceqa import ScienceQA


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def problem(number, split):
    subjects = ("natural science", "social science", "language science")
    return {
        "question": f"Which one is number {number}?",
        "choices": [f"this {number}", "that", "none"][: 2 + number % 2],
        "answer": number % 2,
        "hint": "Look closely." if number % 3 == 0 else "",
        "image": "image.png" if number % 2 else None,
        "task": "closed choice",
        "grade": f"grade{1 + number % 12}",
        "subject": subjects[number % 3],
        "topic": "t",
        "category": "c",
        "skill": "s",
        "lecture": "Numbers are counted.",
        "solution": f"It is {number}.",
        "split": split,
    }


def write_both(folder):
    """(owners' folder, hub copy) of 30 problems: half of them with a picture."""
    splits = {"train": range(20), "val": range(20, 25), "test": range(25, 30)}
    problems, pids = {}, {}
    features = {name: datasets.Value("string") for name in problem(0, "train") if name not in ("image", "split")}
    features |= {"choices": datasets.List(datasets.Value("string")), "answer": datasets.Value("int8")}
    features = datasets.Features(features | {"image": datasets.Image()})
    (folder / "copy").mkdir()
    for split, numbers in splits.items():
        pids[split], rows = [str(n) for n in numbers], []
        for number in numbers:
            record = problems[str(number)] = problem(number, split)
            row = {k: v for k, v in record.items() if k != "split"}
            if record["image"]:
                place = folder / "owner" / "images" / split / str(number) / "image.png"
                place.parent.mkdir(parents=True)
                Image.new("RGB", (24, 24), (8 * number, 20, 30)).save(place)
                row["image"] = {"bytes": place.read_bytes(), "path": None}
            rows.append(row)
        name = {"val": "validation"}.get(split, split)
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "copy" / f"{name}.parquet")
    (folder / "owner" / "problems.json").write_text(json.dumps(problems))
    (folder / "owner" / "pid_splits.json").write_text(json.dumps(pids))
    return folder / "owner", str(folder / "copy")


def test_scienceqa_copy_equals_the_owners_files(tmp_path):
    processor = eas.load_model("tiny")[1]
    owner, copy = write_both(tmp_path)
    one, two = ScienceQA(processor, owner), ScienceQA(processor, hub=copy)
    assert [len(getattr(one, role)) for role in ROLES] == [19, 1, 5, 5]
    for role in ROLES:
        for a, b in zip(getattr(one, role), getattr(two, role), strict=True):
            assert len(a.images) == len(b.images) == int(a.id) % 2
            for x, y in zip(a.images, b.images):
                assert x.tobytes() == y.tobytes() and x.getpixel((0, 0)) == (8 * int(a.id), 20, 30)
            shared = [(e.question, e.answer, e.choices, e.explanation, e.context, e.categories) for e in (a, b)]
            assert shared[0] == shared[1]
    assert [e.id for e in two.test] == [f"test-{row}" for row in range(5)]  # the copy has no ids
    assert one.collate(one.test)["pixel_values"].equal(two.collate(two.test)["pixel_values"])
    assert two.about()["data"] == f"hub copy {copy}" and one.about()["data"] == "owner's files"


def test_check_opens_the_pictures_of_every_split(tmp_path):
    owner, copy = write_both(tmp_path)
    (owner / "images" / "test" / "27" / "image.png").write_bytes(b"broken")
    for where in ({"hub": copy}, {"data_dir": owner}):
        found = check_data("scienceqa", open_pictures=None, **where)
        assert (found.pictures, found.opened) == (15, 15) and found.counts == {"train": 20, "val": 5, "test": 5}
        assert [p.record for p in found.problems] == (["27"] if "data_dir" in where else [])


def test_a_copy_is_loaded_once_for_all_splits(tmp_path, monkeypatch):
    _, copy = write_both(tmp_path)
    load, calls = datasets.load_dataset, []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: calls.append(name) or load(name))
    ScienceQA(None, hub=copy)
    assert calls == [copy]


def test_a_copy_whose_rows_have_no_picture_column(tmp_path):
    _, copy = write_both(tmp_path)
    table = datasets.load_dataset(copy)["train"].remove_columns("image")
    table.to_parquet(f"{copy}/train.parquet")
    for name in ("validation", "test"):
        (tmp_path / "copy" / f"{name}.parquet").unlink()
    with pytest.raises(DataError, match="scienceqa: split train of .*copy' has no column image; it has question, "):
        ScienceQA(None, hub=copy)
