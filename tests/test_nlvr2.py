"""Task nlvr2: owners' files and hub copies in their own form, sets kept together, accuracy and consistency."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import toys
from PIL import Image

import eas_kit as eas
from eas_kit.errors import DataError, TaskError
from eas_kit.tasks import load_task
from eas_kit.tasks.nlvr2 import sentence_of

# set-pair-sentence -> label
TEST = {"0-0-0": "True", "0-1-0": "False", "0-0-1": "True", "1-0-0": "False", "1-1-0": "True", "1-2-0": "False"}
TRAIN = {f"{s}-{pair}-{k}": str(pair == k) for s in range(10) for pair in range(2) for k in range(2)}
PLACES = {
    "direct": ("images/train/{d}", "{s}"),
    "images": ("images/train/{d}", "images/{s}"),
    "top": ("train/{d}", "{s}"),
    "no folders": ("train", "{s}"),
    "flat": (".", "."),
    "flat images": ("images", "images"),
    "nlvr2": ("nlvr2/images/train/{d}", "nlvr2/{s}"),
}


def write(folder: Path, places=PLACES["direct"], data: str = "data", change=lambda records: None) -> Path:
    """All three splits, as the owners publish them; the left picture is red, the right one blue."""
    (folder / data).mkdir(parents=True, exist_ok=True)
    for split, labels in {"train": TRAIN, "dev": {"3-0-0": "True"}, "test1": TEST}.items():
        records = []
        for name, label in labels.items():
            s, pair, k = name.split("-")
            records.append({
                "sentence": f"There are {k} dogs.", "left_url": "x", "right_url": "y", "label": label,
                "identifier": f"{split}-{name}", "writer": "7", "validation": {"1": label}, "synset": "dog",
            } | ({"directory": int(s) % 3} if split == "train" else {}))  # fmt: skip
            place = folder / places[split != "train"].format(d=int(s) % 3, s=split)
            place.mkdir(parents=True, exist_ok=True)
            for side, colour in enumerate(((200, 0, int(s)), (0, 0, 200))):
                with open(place / f"{split}-{s}-{pair}-img{side}.png", "wb") as file:
                    Image.new("RGB", (5, 7 + side), colour).save(file, "JPEG" if side else "PNG")  # not all are PNG
        if split == "test1":
            change(records)
        text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
        (folder / data / f"{split}.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny():
    return eas.load_model("tiny")


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path)


def official(csv: str, labels: dict[str, str]) -> tuple[float, float]:
    """(accuracy, consistency) as the owners' description of their script has it, in plain loops."""
    said = dict(line.split(",") for line in csv.splitlines())
    right = {i: said[i].lower() == label.lower() for i, label in labels.items()}
    keys = {i: (i.split("-")[1], i.split("-")[3]) for i in labels}
    sentences = set(keys.values())
    good = sum(all(right[i] for i in labels if keys[i] == key) for key in sentences)
    return sum(right.values()) / len(right), good / len(sentences)


@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("check", [True, False])
def test_every_layout(tmp_path, layout, check):
    write(tmp_path, PLACES[layout], "nlvr2/data" if layout == "nlvr2" else "data")
    task = load_task("nlvr2", None, data_dir=tmp_path, check_images=check)
    for examples in (task.train, task.search, task.val, task.test):
        left, right = examples[0].images
        assert left.getpixel((0, 0))[0] == 200 and right.getpixel((2, 2))[2] > 190 and right.size == (5, 8)
    assert task.test[0].images is task.test[2].images


def test_folders_on_another_disk(tmp_path):
    write(tmp_path / "disk")
    data = tmp_path / "disk" / "data"
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("images", "dev", "test1"):
        (linked / name).symlink_to(tmp_path / "disk" / name)
    (data).rename(linked / "data")
    assert load_task("nlvr2", None, data_dir=linked).train[0].images[0].size == (5, 7)
    given = load_task("nlvr2", None, data_dir=linked / "data", image_dir=tmp_path / "disk")
    assert given.test[0].images[0].size == (5, 7)


def test_an_example_is_the_owners_record(folder):
    task = load_task("nlvr2", None, data_dir=folder)
    example = task.test[2]
    assert (example.id, example.question, example.answer) == ("test1-0-0-1", "There are 1 dogs.", "True")
    assert (example.choices, example.group) == (("True", "False"), "test1-0")
    assert task.question_text(example) == (
        "The first picture is the left one, the second picture is the right one. Is this sentence true of them?\n"
        "There are 1 dogs.\nAnswer True or False."
    )
    assert task.sources == {
        "train": "train, what is left",
        "val": "dev",
        "test": "test1",
        "search": "held out of train (share 0.05, seed 0)",
    }
    assert sentence_of("dev-850-0-1") == sentence_of("dev-850-3-1") != sentence_of("dev-850-0-0")


def test_a_set_is_in_one_role(folder):
    task = load_task("nlvr2", None, data_dir=folder, held_out={"search": 0.25})
    sets = [{e.group for e in examples} for examples in (task.train, task.search)]
    assert [len(task.train), len(task.search)] == [28, 12] and [len(s) for s in sets] == [7, 3]
    assert not sets[0] & sets[1]


PARSED = {
    "True": "True",
    "false.": "False",
    "The answer is True.": "True",
    "It is not true": None,
    "True or False": None,
    "yes": None,
}


@pytest.mark.parametrize("text", PARSED)
def test_parse(folder, text):
    task = load_task("nlvr2", None, data_dir=folder, splits="test")
    assert task.parse(text, task.test[0]) == PARSED[text]


def test_accuracy_and_consistency(folder):
    task = load_task("nlvr2", None, data_dir=folder, splits="test")
    assert (task.train, task.search, task.val) == ([], [], [])
    labels = {e.id: e.answer for e in task.test}

    def result(said):
        path = folder / "p.jsonl"
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in said.items()))
        found = task.score_predictions(path, "test")
        task.export_predictions(path, folder / "p.csv")
        both = found["accuracy"], found["consistency"]
        assert both == pytest.approx(official((folder / "p.csv").read_text(), labels))
        return both

    assert result(labels) == (1, 1)
    # always true: 3 of 6; of the sentences 0-0 (pairs right, wrong), 0-1 (right), 1-0 (wrong, right, wrong) one
    assert result(dict.fromkeys(labels, "True")) == (0.5, pytest.approx(1 / 3))
    assert result(labels | {"test1-1-1-0": "who knows"}) == (pytest.approx(5 / 6), pytest.approx(2 / 3))
    csv = task.official_predictions({"test1-0-0-0": "True", "test1-0-1-0": None})
    assert csv == "test1-0-0-0,True\ntest1-0-1-0,\n"


def test_the_bundled_model_reads_two_pictures_an_example(folder, tiny):
    model, processor = tiny
    task = load_task("nlvr2", processor, data_dir=folder)
    batch = task.collate(task.test)
    assert len(batch["pixel_values"]) == 12 and batch["labels"].shape == batch["input_ids"].shape
    with torch.inference_mode():
        assert torch.isfinite(model(**batch).loss)
    result = task.evaluate(toys.Says(processor.tokenizer, "False"), "test", with_loss=False)
    # 3 of 6 again, and no sentence is false of all its pairs
    assert (result["accuracy"], result["consistency"], result["unparsed"]) == (0.5, 0, 0)
    options = task.evaluate(model, "test", method="options", with_loss=False)
    assert options["unparsed"] == 0 and 0 <= options["consistency"] <= options["accuracy"]


def set_to(number, **values):
    return lambda records: records[number].update(values)


FAULTS = {
    "identifier": (set_to(1, identifier="test1-0-1"), "record test1-0-1: an identifier is split-set-pair-sentence, as"),
    "no identifier": (lambda r: r[1].pop("identifier"), "test1.json, record line 2: there is no field 'identifier'"),
    "outside": (set_to(1, identifier="../x-0-1-0"), "an identifier is split-set-pair-sentence, as in dev-850-0-1, not"),
    "label": (set_to(1, label="true"), "record test1-0-1-0: the label is one of True, False, not 'true'"),
    "bool": (set_to(1, label=True), "record test1-0-1-0: field 'label' should be str, it is bool True"),
    "sentence": (set_to(1, sentence=" "), "record test1-0-1-0: the sentence is empty"),
    "picture": (set_to(1, identifier="test1-9-1-0"), "record test1-9-1-0: the picture"),
    "directory": (set_to(1, directory=[1]), "record test1-0-1-0: field 'directory' should be int or str, it is list"),
    "json": (lambda r: r.__setitem__(1, '{"a": '), "test1.json, record line 2: no valid JSON: Expecting value at col"),
    "list": (lambda r: r.__setitem__(1, "[1]"), "test1.json, record line 2: wanted an object, got list [1]"),
    "twice": (lambda r: r.__setitem__(1, r[0]), "split test1, record test1-0-0-0: this id occurs twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_or_left_out(tmp_path, fault):
    change, message = FAULTS[fault]
    write(tmp_path, change=change)
    with pytest.raises(DataError) as error:
        load_task("nlvr2", None, data_dir=tmp_path)
    assert message in str(error.value) and "on_error='skip'" in str(error.value)
    task = load_task("nlvr2", None, data_dir=tmp_path, on_error="skip")
    assert len(task.test) == 5 and len(task.skipped) == 1 and message in str(task.skipped[0])


def test_missing_files_and_wrong_settings(folder):
    (folder / "data" / "train.json").unlink()
    with pytest.raises(DataError, match=r"wanted train.json or nlvr2/data/train.json in .*; splits= says which"):
        load_task("nlvr2", None, data_dir=folder)
    assert len(load_task("nlvr2", None, data_dir=folder, splits=("val", "test")).val) == 1
    with pytest.raises(TaskError, match="splits names what is read, of train, val, test; got dev"):
        load_task("nlvr2", None, data_dir=folder, splits="dev")
    with pytest.raises(TaskError, match="held_out has shares for search; there is no val"):
        load_task("nlvr2", None, data_dir=folder, splits="train", held_out={"val": 0.1})


# ---------------------------------------------------------------------- hub copies
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of parquet files: names of the columns for sentence, label, pictures; then labels by split."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(columns, empty=None, **splits):
        kinds = dict.fromkeys(("identifier", *columns[:2]), datasets.Value("string"))
        features = datasets.Features(kinds | dict.fromkeys(columns[2:], datasets.Image()))
        for split, labels in splits.items():
            rows = []
            for i, label in labels.items():
                left, right = Image.new("RGB", (5, 7)), Image.new("RGB", (5, 8))
                cells = (f"x-{i}", f"A dog of {split}.", label, left, None if i == empty else right)
                rows.append(dict(zip(("identifier", *columns), cells, strict=True)))
            place = tmp_path / "copy" / "data" / f"{split}-00000-of-00001.parquet"
            place.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows, features=features).to_parquet(place)
        return str(tmp_path / "copy")

    return make


def test_hub_copy_with_train(hub, tiny):
    copy = hub(("sentence", "label", "image0", "image1"), train=TRAIN, validation=TEST)
    task = load_task("nlvr2", tiny[1], hub=copy)
    assert [len(getattr(task, role)) for role in ("train", "search", "val", "test")] == [36, 4, 6, 0]
    assert [p.size for p in task.val[0].images] == [(5, 7), (5, 8)] and task.val[0].id == "x-0-0-0"
    assert task.published() == {"train": 86_373, "validation": 6_982}
    assert len(task.collate(task.val)["pixel_values"]) == 12


def test_hub_copy_of_the_balanced_parts(hub):
    copy = hub(("question", "answer", "left_image", "right_image"), empty="1-2-0", balanced_test_public=TEST)
    with pytest.raises(DataError, match="split balanced_test_public, record x-1-2-0: one of its two pictures is empty"):
        load_task("nlvr2", None, hub=copy)
    task = load_task("nlvr2", None, hub=copy, on_error="skip")
    assert len(task.test) == 5 and task.sources == {"test": "balanced_test_public"} and task.published() == {}
    with pytest.raises(DataError, match="has no split train, but balanced_test_public"):
        load_task("nlvr2", None, hub=copy, splits="train")


def test_hub_copy_with_other_columns(hub):
    copy = hub(("text", "label", "image0", "image1"), test=TEST)
    with pytest.raises(DataError, match="has no column sentence; it has identifier, text"):
        load_task("nlvr2", None, hub=copy)
