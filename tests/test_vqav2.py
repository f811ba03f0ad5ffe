"""Task vqav2: owners' files and hub copies in their own form, roles, the official accuracy, faults by name."""

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

# question_id -> (image_id, question, type, ten answers); the majority is the owners' multiple_choice_answer
VAL = {
    42000: (42, "Is it day?", "yes/no", ["yes"] * 10),
    42001: (42, "How many dogs?", "number", ["2"] * 3 + ["3"] * 7),
    7000: (7, "What colour is the car?", "other", ["red"] + ["dark red"] * 9),
    7001: (7, "What sits there?", "other", ["cat"] * 10),
}
TRAIN = {
    1000 * image + i: (image, f"Is it number {i}?", "yes/no", ["no"] * 10) for image in range(1, 21) for i in range(3)
}
SAID = {42000: "Yes.", 42001: "The answer is two.", 7000: "red\nas it seems", 7001: " "}


def write(folder: Path, split: str, records: dict, change=lambda questions, annotations: None, flat: bool = False):
    """The files of a split in the owners' form, pictures in its own folder or all in one."""
    questions = [{"image_id": i, "question": q, "question_id": n} for n, (i, q, _, _) in records.items()]
    annotations = [
        {
            "question_type": "what",
            "multiple_choice_answer": max(said, key=said.count),
            "answers": [
                {"answer": a, "answer_confidence": "maybe", "answer_id": k + 1} for k, a in enumerate(said)
            ],
            "image_id": image,
            "answer_type": kind,
            "question_id": number,
        }
        for number, (image, _, kind, said) in records.items()
    ]  # fmt: skip
    change(questions, annotations)
    head = {"info": {"year": 2017}, "task_type": "Open-Ended", "license": {}, "data_subtype": split}
    write_json(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", head | {"questions": questions})
    if split in ("train2014", "val2014"):
        name = folder / f"v2_mscoco_{split}_annotations.json"
        write_json(name, head | {"annotations": annotations, "data_type": "mscoco"})
    of = "test2015" if split == "test-dev2015" else split
    place = folder if flat else folder / of
    place.mkdir(exist_ok=True)
    for image in {i for i, *_ in records.values()}:
        Image.new("RGB", (5 + image % 2, 7), (image, 0, 0)).save(place / f"COCO_{of}_{image:012d}.jpg")
    return folder


def write_json(path: Path, found) -> None:
    path.write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def tiny():
    return eas.load_model("tiny")


@pytest.fixture
def folder(tmp_path):
    return write(write(tmp_path, "train2014", TRAIN), "val2014", VAL)


def predictions(path: Path, said: dict) -> Path:
    path.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in said.items()))
    return path


def test_an_example_is_the_owners_record(folder):
    task = load_task("vqav2", None, data_dir=folder)
    assert [e.id for e in task.test] == ["42000", "42001", "7000", "7001"]
    example = task.test[2]
    assert (example.question, example.answer, example.group) == ("What colour is the car?", "dark red", "7")
    assert example.references == ("red", *["dark red"] * 9) and example.categories == ("other",)
    assert example.images[0].size == (6, 7) and task.test[0].images is task.test[1].images
    assert task.question_text(example) == (
        "What colour is the car?\nAnswer the question using a single word or phrase."
    )
    assert task.sources["test"] == "val2014" and task.published()["val2014"] == 214_354


def test_roles_share_no_picture(folder):
    task = load_task("vqav2", None, data_dir=folder, held_out={"search": 0.2, "val": 0.1}, seed=3)
    images = {role: {e.group for e in getattr(task, role)} for role in ("train", "search", "val")}
    assert [len(images[role]) for role in ("train", "search", "val")] == [14, 4, 2]
    assert len(set.union(*images.values())) == 20 and len(task.train) == 42


def test_official_accuracy_by_hand(folder):
    task = load_task("vqav2", None, data_dir=folder, splits="test")
    result = task.score_predictions(predictions(folder / "p.jsonl", SAID), "test")
    # two: 3 of 10 said so, 3 x 2/3 + 7 x 1 of 10; red: 1 of 10, 9 x 1/3 of 10; a blank is unparsed
    assert result["columns"] == pytest.approx({"yes/no": 1, "number": 0.9, "other": 0.15})
    assert result["accuracy"] == pytest.approx((1 + 0.9 + 0.3 + 0) / 4) and result["unparsed"] == 1
    perfect = predictions(folder / "all.jsonl", {e.id: e.answer for e in task.test})
    assert task.score_predictions(perfect, "test")["accuracy"] == 1
    answers = {"42000": "yes", "42001": None}
    assert task.official_predictions(answers) == [
        {"question_id": 42000, "answer": "yes"},
        {"question_id": 42001, "answer": ""},
    ]


def test_a_constant_answerer(folder, tiny):
    task = load_task("vqav2", tiny[1], data_dir=folder, splits="test")
    result = task.evaluate(toys.Says(tiny[1].tokenizer, "yes"), "test", with_loss=False, batch_size=3)
    assert result["columns"] == {"yes/no": 1, "number": 0, "other": 0} and result["accuracy"] == 0.25


def test_the_bundled_model_reads_a_batch(folder, tiny):
    model, processor = tiny
    task = load_task("vqav2", processor, data_dir=folder)
    batch = task.collate(task.test)
    assert len(batch["pixel_values"]) == 4 and batch["labels"].shape == batch["input_ids"].shape
    with torch.inference_mode():
        assert torch.isfinite(model(**batch).loss)
    assert processor.tokenizer.decode([i for i in batch["labels"][0] if i >= 0][:-1]).strip() == "yes"


@pytest.mark.parametrize("split", ["test-dev2015", "test2015"])
def test_a_test_split_without_answers(tmp_path, tiny, split):
    write(tmp_path, split, VAL)
    task = load_task("vqav2", tiny[1], data_dir=tmp_path, splits=["test"], test_split=split)
    assert [e.answer for e in task.test] == [""] * 4 and "test2015/COCO_test2015_000000000042.jpg" in str(
        task.test[0].images
    )
    assert (task.train, task.search, task.val) == ([], [], [])
    out = tmp_path / "p.jsonl"
    result = task.evaluate(toys.Says(tiny[1].tokenizer, "no"), "test", predictions=out)
    assert (result["accuracy"], result["columns"], result["count"], result["loss"]) == (None, {}, 4, None)
    assert task.export_predictions(out, tmp_path / "server.json") == 4
    assert json.loads((tmp_path / "server.json").read_text())[3] == {"question_id": 7001, "answer": "no"}


@pytest.mark.parametrize("place", ["images", "Images/mscoco", "coco/images"])
def test_usual_places_of_pictures(tmp_path, place):
    write(tmp_path, "val2014", VAL)
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / "val2014").rename(tmp_path / place / "val2014")
    (tmp_path / "Questions").mkdir()
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    (tmp_path / name).rename(tmp_path / "Questions" / name)
    task = load_task("vqav2", None, data_dir=tmp_path, splits="test")
    assert task.test[0].images[0].size == (5, 7)


def test_flat_pictures_and_pictures_on_another_disk(tmp_path):
    for name in ("flat", "owners", "disk"):
        (tmp_path / name).mkdir()
    task = load_task("vqav2", None, data_dir=write(tmp_path / "flat", "val2014", VAL, flat=True), splits="test")
    assert task.test[0].images[0].size == (5, 7)
    write(tmp_path / "owners", "val2014", VAL)
    (tmp_path / "owners" / "val2014").rename(tmp_path / "disk" / "val2014")
    given = load_task("vqav2", None, data_dir=tmp_path / "owners", splits="test", image_dir=tmp_path / "disk")
    assert given.test[0].images[0].size == (5, 7)
    (tmp_path / "owners" / "val2014").symlink_to(tmp_path / "disk" / "val2014")
    linked = load_task("vqav2", None, data_dir=tmp_path / "owners", splits="test")
    assert linked.test[0].images[0].size == (5, 7)


def set_to(where, number, **values):
    return lambda questions, annotations: (annotations if where else questions)[number].update(values)


FAULTS = {
    "no annotation": (lambda q, a: a.pop(), "val2014_questions.json, record 7001: there is no annotation", 3),
    "no question": (lambda q, a: q.pop(0), "annotations.json, record 42000: there is no question of this", 3),
    "question twice": (lambda q, a: q.append(q[0]), "questions.json, record 42000: this question_id occurs twice", 4),
    "annotated twice": (lambda q, a: a.append(a[1]), "annotations.json, record 42001: this question_id occurs", 4),
    "nine answers": (lambda q, a: a[0]["answers"].pop(), "record 42000: has 9 answers; the official accuracy is", 3),
    "kind": (set_to(1, 1, answer_type="what"), "record 42001: the answer_type is one of yes/no, number, other", 3),
    "other image": (set_to(1, 1, image_id=7), "record 42001: is on image 7, and its question on image 42", 3),
    "id": (set_to(0, 2, question_id="7000"), "record 7000: field 'question_id' should be int, it is str '7000'", 3),
    "text": (set_to(0, 2, question=None), "record 7000: field 'question' should be str, it is NoneType None", 3),
    "blank": (set_to(0, 2, question=" "), "record 7000: the question is empty", 3),
    "answer": (set_to(1, 2, answers=[7] * 10), "record 7000: wanted an object with named fields, got int 7", 3),
    "no answer": (
        set_to(1, 2, answers=[{"answer": ""}] * 10, multiple_choice_answer=""), "all its answers are empty", 3,
    ),
    "record": (lambda q, a: a.insert(0, 5), "annotations.json, record number 0: wanted an object with named", 4),
    "picture": (set_to(0, 3, image_id=8), "record 7001: is on image 7, and its question on image 8", 3),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_or_left_out(tmp_path, fault):
    change, message, left = FAULTS[fault]
    write(tmp_path, "val2014", VAL, change)
    with pytest.raises(DataError) as error:
        load_task("vqav2", None, data_dir=tmp_path, splits="test")
    assert message in str(error.value) and "on_error='skip'" in str(error.value)
    task = load_task("vqav2", None, data_dir=tmp_path, splits="test", on_error="skip")
    assert len(task.test) == left and any(message in str(problem) for problem in task.skipped)


def test_an_empty_majority_gives_way_to_the_next(tmp_path):
    blank = {1: (42, "What?", "other", [""] * 6 + ["a"] * 1 + ["sky"] * 3)}
    task = load_task("vqav2", None, data_dir=write(tmp_path, "val2014", blank), splits="test")
    assert task.test[0].answer == "sky" and task.test[0].references.count("") == 6


def test_missing_files_and_wrong_settings(folder):
    (folder / "val2014" / "COCO_val2014_000000000007.jpg").unlink()
    with pytest.raises(DataError, match="record 7000: the picture .*val2014/COCO_val2014_000000000007.jpg does not"):
        load_task("vqav2", None, data_dir=folder)
    assert len(load_task("vqav2", None, data_dir=folder, check_images=False).test) == 4
    (folder / "v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(DataError, match="wanted v2_mscoco_train2014_annotations.json in .*; splits= says which"):
        load_task("vqav2", None, data_dir=folder)
    with pytest.raises(TaskError, match="test_split is one of val2014, test-dev2015, test2015, not 'test'"):
        load_task("vqav2", None, data_dir=folder, test_split="test")
    with pytest.raises(TaskError, match="splits names what is read, of train, test; got val"):
        load_task("vqav2", None, data_dir=folder, splits=("val", "test"))
    with pytest.raises(TaskError, match="of train, test; got none"):
        load_task("vqav2", None, data_dir=folder, splits=())


# ---------------------------------------------------------------------- hub copies
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of parquet files in the columns of the usual copy; with train if asked for."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    one = {"answer": datasets.Value("string"), "answer_id": datasets.Value("int64")}
    texts = dict.fromkeys(("question_type", "multiple_choice_answer", "answer_type", "question"), "string")
    kinds = texts | dict.fromkeys(("image_id", "question_id"), "int64")
    features = datasets.Features(
        {name: datasets.Value(kind) for name, kind in kinds.items()}
        | {"answers": [one], "image": datasets.Image()}
    )  # fmt: skip

    def make(**splits):
        for split, (records, known) in splits.items():
            rows = [
                {
                    "question_id": n, "image_id": i, "question": q, "question_type": None,
                    "answer_type": kind if known else None,
                    "multiple_choice_answer": max(said, key=said.count) if known else None,
                    "answers": [{"answer": a, "answer_id": k} for k, a in enumerate(said)] if known else None,
                    "image": Image.new("RGB", (5 + i % 2, 7)) if i != 99 else None,
                }
                for n, (i, q, kind, said) in records.items()
            ]  # fmt: skip
            place = tmp_path / "copy" / "data" / f"{split}-00000-of-00001.parquet"
            place.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows, features=features).to_parquet(place)
        return str(tmp_path / "copy")

    return make


def test_hub_copies(hub, tiny):
    copy = hub(validation=(VAL, True), testdev=(VAL, False))
    task = load_task("vqav2", tiny[1], hub=copy)
    assert task.test[2].references == ("red", *["dark red"] * 9) and task.test[2].images[0].size == (6, 7)
    assert task.train == task.search == task.val == [] and task.sources == {"test": "val2014"}
    assert len(task.collate(task.test)["pixel_values"]) == 4
    dev = load_task("vqav2", None, hub=copy, test_split="test-dev2015")
    assert [e.answer for e in dev.test] == [""] * 4 and dev.test[0].id == "42000"
    with pytest.raises(DataError, match="has no split train, but "):
        load_task("vqav2", None, hub=copy, splits="train")


def test_hub_copy_with_train_and_with_an_empty_picture(hub):
    copy = hub(train=(TRAIN, True), validation=(VAL | {5: (99, "Where?", "other", ["sky"] * 10)}, True))
    with pytest.raises(DataError, match="split validation, record 5: there is no picture in the column 'image'"):
        load_task("vqav2", None, hub=copy)
    task = load_task("vqav2", None, hub=copy, on_error="skip")
    assert [len(getattr(task, role)) for role in ("train", "search", "val", "test")] == [54, 3, 3, 4]


def test_a_folder_further_up_has_its_pictures_too(tmp_path):
    (tmp_path / "download").mkdir()
    write(tmp_path / "download", "val2014", VAL)
    task = load_task("vqav2", None, data_dir=tmp_path, splits="test")
    assert task.test[0].images.sources[0].path == str(tmp_path / "download/val2014/COCO_val2014_000000000042.jpg")
    (tmp_path / "val2014").mkdir()  # data_dir's own comes before one beside the files
    task = load_task("vqav2", None, data_dir=tmp_path, splits="test", check_images=False)
    assert task.test[0].images.sources[0].path == str(tmp_path / "val2014/COCO_val2014_000000000042.jpg")
