"""AID: every class split by itself, the same way from folders, LLaVA's form and hub copies."""

from __future__ import annotations

import json
import shutil

import datasets
import pytest
from PIL import Image

import eas_kit as eas
from eas_kit.errors import DataError, TaskError
from eas_kit.tasks.aid import AID, QUESTION
from eas_kit.tasks.base import ROLES

COUNTS = {"Airport": 20, "BareLand": 30, "DenseResidential": 10}
NONE_HELD = {"search": 0, "val": 0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder, counts=COUNTS):
    """Folders as the owners pack them: CamelCase, files in small letters with a number."""
    for c, (label, count) in enumerate(counts.items()):
        (folder / label).mkdir(parents=True)
        for i in range(1, count + 1):
            Image.new("RGB", (24, 24), (40 * c, i, 9)).save(folder / label / f"{label.lower()}_{i}.png")
    return folder


def ids(examples):
    return [e.id for e in examples]


def by_class(examples):
    return {label: sum(e.answer == label for e in examples) for label in ("airport", "bareland", "denseresidential")}


# ---------------------------------------------------------------------- folders
@pytest.mark.parametrize("share,training", [(0.2, [4, 6, 2]), (0.5, [10, 15, 5])])
def test_every_class_is_split_by_its_share(tmp_path, share, training):
    write(tmp_path)
    task = AID(None, tmp_path, train_share=share, held_out=NONE_HELD)
    counts = list(COUNTS.values())
    assert list(by_class(task.train).values()) == training
    assert list(by_class(task.test).values()) == [n - t for n, t in zip(counts, training)]
    assert len(set(ids(task.train)) | set(ids(task.test))) == 60 == len(task.train) + len(task.test)
    same, other = (AID(None, tmp_path, train_share=share, held_out=NONE_HELD, seed=seed) for seed in (0, 1))
    assert ids(same.train) == ids(task.train) != ids(other.train)
    held = AID(None, tmp_path, train_share=share, held_out={"search": 0.25, "val": 0.25})
    parts = [set(ids(getattr(held, role))) for role in ROLES]
    assert len(set().union(*parts)) == sum(map(len, parts)) == 60 and ids(held.test) == ids(task.test)
    assert [len(parts[1]), len(parts[2])] == [round(len(task.train) / 4)] * 2
    assert task.published() == {"train": 10_000 * share, "test": 10_000 * (1 - share)}


def test_what_an_example_holds(tmp_path):
    model, processor = eas.load_model("tiny")
    task = AID(processor, write(tmp_path), train_share=0.5)
    example = next(e for e in task.test if e.answer == "bareland")
    assert example.id.startswith("BareLand/bareland_") and example.question == task.question_text(example) == QUESTION
    assert example.choices == task.candidates(example) == ("airport", "bareland", "denseresidential")
    assert example.categories == ("bareland",) and task.target_text(example) == ("bareland", "")
    number = int(example.id.rpartition("_")[2])
    assert example.images[0].getpixel((3, 3)) == (40, number, 9)
    result = task.evaluate(model, "test", limit=6, method="options", batch_size=6)
    assert result["count"] == 6 and set(result["column_counts"]) <= set(example.choices)
    with pytest.raises(TaskError, match="aid: this task needs a model that reads pictures"):
        AID(processor.tokenizer, tmp_path)
    with pytest.raises(TaskError, match="^aid: train_share is 0.2 or 0.5, as published, not 0.3$"):
        AID(processor, tmp_path, train_share=0.3)


def test_folders_further_down_and_what_does_not_belong(tmp_path):
    plain = AID(None, write(tmp_path / "plain"), held_out=NONE_HELD)
    messy = write(tmp_path / "messy" / "AID")
    (messy / "Airport" / "._airport_1.png").write_bytes(b"of macOS")
    (messy / "Airport" / "Thumbs.db").write_bytes(b"of Windows")
    (messy / ".hidden").mkdir()
    (messy / ".hidden" / "a.png").write_bytes(b"")
    (messy / "notes.txt").write_text("")
    (messy / "empty").mkdir()
    task = AID(None, tmp_path / "messy", held_out=NONE_HELD)
    assert ids(task.train) == ids(plain.train) and ids(task.test) == ids(plain.test) and task.skipped == []
    assert ids(AID(None, tmp_path, image_dir=messy, held_out=NONE_HELD).test) == ids(plain.test)
    (tmp_path / "one" / "Airport").mkdir(parents=True)
    shutil.copy(messy / "Airport" / "airport_1.png", tmp_path / "one" / "Airport")
    with pytest.raises(DataError, match=r"aid: wanted folders of pictures, one a class .*, or train20.json, in .*one"):
        AID(None, tmp_path / "one")
    with pytest.raises(DataError, match="or train50.json, in .*one; found neither. data/aid.md says which files"):
        AID(None, tmp_path / "one", train_share=0.5)


def test_two_pictures_of_one_name(tmp_path):
    write(tmp_path)
    shutil.copy(tmp_path / "Airport" / "airport_1.png", tmp_path / "Airport" / "airport_1.jpg")
    with pytest.raises(DataError, match="^aid: class airport, record Airport/airport_1: this id occurs twice"):
        AID(None, tmp_path)
    task = AID(None, tmp_path, on_error="skip", held_out=NONE_HELD)
    assert len(task.skipped) == 1 and len(task.train) + len(task.test) == 60


def test_broken_pictures_are_left_out_when_they_are_opened(tmp_path):
    processor = eas.load_model("tiny")[1]
    write(tmp_path)
    task = AID(processor, tmp_path, on_error="skip", held_out=NONE_HELD)
    broken = task.test[0].id
    (tmp_path / f"{broken}.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / f"{task.test[1].id}.png").unlink()
    assert len(task.collate(task.test[:5])["labels"]) == 3
    problems = [f"the picture {tmp_path}/{e.id}.png" for e in task.test[:2]]
    assert [p.record for p in task.skipped] == ids(task.test[:2])
    assert all(p.problem.startswith(start) for p, start in zip(task.skipped, problems, strict=True))
    assert task.skipped[1].problem.endswith("does not exist")


# ---------------------------------------------------------------------- LLaVA's form
def test_files_in_llavas_form(tmp_path):
    write(tmp_path / "images")

    def turned(place, answer):
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
        return {"id": place, "image": place, "conversations": turns}

    train = [turned(f"Airport/airport_{i}.png", "airport") for i in range(1, 5)]
    test = [turned(f"BareLand/bareland_{i}.png", "Bare Land") for i in range(1, 4)]
    (tmp_path / "train20.json").write_text(json.dumps(train))
    (tmp_path / "test20.json").write_text(json.dumps(test))
    task = AID(None, tmp_path, held_out={"search": 0, "val": 0.25})
    assert [len(getattr(task, role)) for role in ROLES] == [3, 0, 1, 3]
    assert {e.answer for e in task.test} == {"bareland"} and task.classes == ("airport", "bareland")
    assert task.test[0].question == QUESTION and task.test[0].categories == ("bareland",)
    (tmp_path / "test20.json").write_text(json.dumps([*test, train[2]]))
    with pytest.raises(DataError, match="split train, record Airport/airport_3.png: the same record is in split test"):
        AID(None, tmp_path)
    with pytest.raises(DataError, match="aid: wanted folders of pictures"):  # train50.json is not there
        AID(None, tmp_path, train_share=0.5, image_dir=tmp_path / "images" / "Airport")


# ---------------------------------------------------------------------- hub copies
def copy_of(owner, folder, names=True, label=None):
    rows, labels = [], sorted(COUNTS)
    for path in sorted(owner.glob("*/*.png"), reverse=True):  # a copy's rows can be in any order
        image = {"bytes": path.read_bytes(), "path": path.name if names else None}
        rows.append({"image": image, "label": labels.index(path.parent.name)})
    rows += [{"image": None, "label": 0}] * (label == "no picture")
    kind = datasets.ClassLabel(names=labels)
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    if label == "text":
        features["label"] = datasets.Value("string")
        rows = [row | {"label": labels[row["label"]]} for row in rows]
    if label == "null":
        rows[3]["label"] = None
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize("label", [None, "text"])
def test_a_hub_copy_is_split_as_the_folders(tmp_path, label):
    owner = write(tmp_path / "owner")
    one = AID(None, owner, train_share=0.5, seed=3)
    two = AID(None, hub=copy_of(owner, tmp_path / "copy", label=label), train_share=0.5, seed=3)
    for role in ROLES:
        left, right = getattr(one, role), getattr(two, role)
        assert ids(left) == ids(right) and len(left) > 0
        for a, b in zip(left, right, strict=True):
            assert (a.answer, a.choices, a.categories) == (b.answer, b.choices, b.categories)
            assert a.images[0].tobytes() == b.images[0].tobytes()


def test_a_hub_copy_that_is_a_folder_of_pictures(tmp_path):
    """The kind of the copy that hub=True reads: data/<Class>/*.png, read by the library's own imagefolder."""
    owner = write(tmp_path / "copy" / "data").parents[0]
    one, two = AID(None, owner / "data"), AID(None, hub=str(owner))
    assert [ids(getattr(one, role)) for role in ROLES] == [ids(getattr(two, role)) for role in ROLES]
    assert one.test[5].images[0].tobytes() == two.test[5].images[0].tobytes()


def test_a_hub_copy_without_names_and_with_faults(tmp_path):
    owner = write(tmp_path / "owner")
    task = AID(None, hub=copy_of(owner, tmp_path / "nameless", names=False), held_out=NONE_HELD)
    assert list(by_class(task.train).values()) == [4, 6, 2] and task.test[0].id.rpartition("/")[2].isdigit()
    for label, message in {
        "no picture": "copy, split train, record row 60: there is no picture in column 'image'",
        "null": "copy, split train, record row 3: the label None is outside of the 3 classes",
    }.items():
        copy = copy_of(owner, tmp_path / label / "copy", label=label)
        with pytest.raises(DataError, match=f"^aid: {message}.*on_error='skip'$"):
            AID(None, hub=copy)
        assert len(AID(None, hub=copy, on_error="skip").skipped) == 1
    table = datasets.Dataset.from_list([{"image": "a", "label": 1}])
    table.to_parquet(tmp_path / "texts" / "train.parquet")
    with pytest.raises(DataError, match="aid: column 'image' of .*texts' holds no pictures, but Value"):
        AID(None, hub=str(tmp_path / "texts"))
    table.remove_columns("label").to_parquet(tmp_path / "unlabelled" / "train.parquet")
    with pytest.raises(DataError, match="aid: split train of .*unlabelled' has no column label; it has image"):
        AID(None, hub=str(tmp_path / "unlabelled"))
    table.to_parquet(tmp_path / "tests" / "test.parquet")
    with pytest.raises(DataError, match="aid: the copy .*tests' has no split train, but test"):
        AID(None, hub=str(tmp_path / "tests"))


# ---------------------------------------------------------------------- answers
@pytest.mark.parametrize(
    "text,answer",
    [
        ("bareland", "bareland"),
        ("Bare Land.", "bareland"),
        ("The answer is BareLand.", "bareland"),
        ("bare-land", "bareland"),
        ("This is an airport\n", "airport"),
        ("dense residential", "denseresidential"),
        ("residential", None),
        ("an airport or bare land", None),
        ("airports", None),
        ("", None),
    ],
)
def test_parse(tmp_path, text, answer):
    task = AID(None, write(tmp_path, dict.fromkeys(COUNTS, 5)))
    assert task.parse(text, task.test[0]) == answer


def test_scores_of_a_predictions_file(tmp_path):
    task = AID(None, write(tmp_path), train_share=0.5)
    said = {"airport": "Airport.", "bareland": "an airport", "denseresidential": "I cannot tell"}
    lines = [json.dumps({"id": e.id, "text": said[e.answer]}) for e in task.test]
    (tmp_path / "said.jsonl").write_text("\n".join(lines))
    result = task.score_predictions(tmp_path / "said.jsonl", "test")
    assert result["accuracy"] == 10 / 30 and result["unparsed"] == 5
    assert result["columns"] == {"airport": 1, "bareland": 0, "denseresidential": 0}
