"""ScienceQA from the owners' files: columns, prompts, parsing, faulty records, the official results."""

from __future__ import annotations

import json

import datasets
import pytest
from PIL import Image
from scienceqa_files import BASE, load, write

from eas_kit.errors import DataError, TaskError
from eas_kit.models.tiny.architecture import make_processor
from eas_kit.tasks import load_task, pictures


@pytest.fixture(scope="module")
def processor():
    return make_processor(["USER: \nQuestion: Context: N/A Options: (A) ASSISTANT: The answer is A. BECAUSE:"] * 50)


# subject, grade, hint, picture, what was written; the wanted answer is B of three
TABLE = [
    ("natural science", 1, "h", True, "The answer is B."),
    ("natural science", 6, "h", False, "The answer is A."),
    ("natural science", 7, "", True, "(B)"),
    ("natural science", 12, "", False, "B. wood"),
    ("social science", 2, "", True, "The answer is C. BECAUSE: B is wrong"),
    ("social science", 8, "h", False, "wood"),
    ("social science", 9, "h", True, "I do not know"),
    ("social science", 3, "", False, "Wood shines. The answer is B."),
    ("language science", 4, "", False, "b"),
    ("language science", 10, "", False, "The answer is D."),
    ("language science", 5, "h", False, "The answer is B. BECAUSE: Metals shine."),
    ("language science", 11, "", True, "The answer is wood."),
    ("language science", 6, "", True, "A"),
]
ANSWERED = [
    ({"subject": s, "grade": f"grade{g}", "hint": h, "image": "image.png" if p else None, "answer": 1}, said)
    for s, g, h, p, said in TABLE
]


def test_columns_are_those_of_the_papers_table(tmp_path):
    records = [
        (
            "test",
            str(i),
            {"subject": s, "grade": f"grade{g}", "hint": h, "image": "image.png" if p else None, "answer": 1},
        )
        for i, (s, g, h, p, _) in enumerate(TABLE)
    ]
    task = load(write(tmp_path, records))
    lines = [json.dumps({"id": str(i), "text": said}) for i, (_, said) in enumerate(ANSWERED)]
    (tmp_path / "said.jsonl").write_text("\n".join(lines))
    result = task.score_predictions(tmp_path / "said.jsonl", "test")
    assert result["columns"] == {
        "NAT": 3 / 4, "SOC": 2 / 4, "LAN": 3 / 5, "TXT": 3 / 5, "IMG": 3 / 6, "NO": 3 / 4,
        "G1-6": 4 / 7, "G7-12": 4 / 6,
    }  # fmt: skip
    assert result["column_counts"] == {
        "NAT": 4, "SOC": 4, "LAN": 5, "TXT": 5, "IMG": 6, "NO": 4, "G1-6": 7, "G7-12": 6,
    }  # fmt: skip
    assert result["accuracy"] == 8 / 13 and result["count"] == 13 and result["loss"] is None
    assert result["unparsed"] == 2  # no statement, and a letter beyond the options
    assert result["unparsed_examples"] == [
        {"id": "6", "text": "I do not know"},
        {"id": "9", "text": "The answer is D."},
    ]
    assert task.export_predictions(tmp_path / "said.jsonl", tmp_path / "official.json") == 13
    wanted = [1, 0, 1, 1, 2, 1, -1, 1, 1, -1, 1, 1, 0]
    official = json.loads((tmp_path / "official.json").read_text())
    assert official == {"results": {str(i): answer for i, answer in enumerate(wanted)}}


PROMPT = "Question: Which one is a metal?\nContext: {}\nOptions: (A) tin (B) wood (C) the air."
ALE = "QCM-ALE"


@pytest.mark.parametrize(
    "settings,changes,context,target",
    [
        ({}, {}, "N/A", ("The answer is A.", " BECAUSE: Metals shine. Tin shines.")),
        ({}, {"hint": "Look."}, "Look.", ("The answer is A.", " BECAUSE: Metals shine. Tin shines.")),
        ({}, {"lecture": ""}, "N/A", ("The answer is A.", " BECAUSE: Tin shines.")),
        ({}, {"lecture": "", "solution": ""}, "N/A", ("The answer is A.", "")),
        ({"prompt_format": "QCM-LEA"}, {}, "N/A", ("Metals shine. Tin shines. The answer is A.", "")),
        ({"prompt_format": "QCM-LEA"}, {"lecture": "", "solution": ""}, "N/A", ("The answer is A.", "")),
        ({"prompt_format": "QCM-A"}, {"answer": 2}, "N/A", ("The answer is C.", "")),
        ({"prompt_format": "QCM-A", "answer_with": "text"}, {"answer": 2}, "N/A", ("The answer is the air.", "")),
        ({"answer_with": "text"}, {}, "N/A", ("The answer is tin.", " BECAUSE: Metals shine. Tin shines.")),
        ({"prompt_format": "QCM-A", "captions": True}, {"hint": "Look."}, "Look. A tin can.", ("The answer is A.", "")),
        ({"prompt_format": "QCM-A", "captions": True}, {}, "A tin can.", ("The answer is A.", "")),
    ],
)
def test_prompts_and_targets(tmp_path, settings, changes, context, target):
    task = load(write(tmp_path, [("test", "7", changes), ("val", "8", {})], {"7": "A tin can."}), **settings)
    example = task.test[0]
    assert task.question_text(example) == PROMPT.format(context)
    assert task.target_text(example) == target
    assert task.question_text(task.val[0]) == PROMPT.format("N/A")  # without a caption
    assert task.parse("".join(target), example) == "ABC"[changes.get("answer", 0)]
    assert list(task.candidates(example)) == ["A", "B", "C"]
    assert settings.get("prompt_format", ALE) in task.template
    assert ("captions" in task.template) == settings.get("captions", False)
    assert ("<the option's text>" in task.template) == ("answer_with" in settings)


def test_a_caption_is_no_hint(tmp_path):
    folder = write(tmp_path, [("test", "7", {"image": "image.png"})], {"7": "A tin can."})
    assert load(folder, captions=True).test[0].categories == ("NAT", "IMG", "G1-6")
    write_captions = folder / "captions.json"
    write_captions.write_text(json.dumps({"captions": {"7": 5}}))
    with pytest.raises(DataError, match="problems.json, record 7: .*'7' should be str, it is int 5"):
        load(folder, captions=True)


def test_formats_that_there_are_not(tmp_path):
    folder = write(tmp_path, [("test", "7", {})])
    with pytest.raises(TaskError, match="prompt_format is one of QCM-ALE, QCM-LEA, QCM-A, not 'QCA'"):
        load(folder, prompt_format="QCA")
    with pytest.raises(TaskError, match="answer_with is one of letter, text, not 'word'"):
        load(folder, answer_with="word")
    with pytest.raises(TaskError, match="hub copy has no captions; give data_dir, or captions=False"):
        load_task("scienceqa", None, hub=True, captions=True)
    with pytest.raises(DataError, match=r"wanted captions.json in .*, which holds pid_splits.json, problems.json\."):
        load(folder, captions=True)


@pytest.mark.parametrize(
    "text,letter",
    [
        ("The answer is A.", "A"), ("the answer is (b)", "B"), ("Answer: C", "C"), ("C.", "C"), ("b) wood", "B"),
        ("The answer is tin.", "A"), ("the air", "C"), ("Wood is no metal. The answer is A. BECAUSE: B", "A"),
        ("The answer is D.", None), ("The answer is gold.", None), ("", None), ("A or B", None), ("metal", None),
    ],
)  # fmt: skip
def test_parse(tmp_path, text, letter):
    task = load(write(tmp_path, [("test", "7", {})]))
    assert task.parse(text, task.test[0]) == letter


def test_options_of_equal_text_are_told_apart_by_letters_alone(tmp_path):
    task = load(write(tmp_path, [("test", "7", {"choices": ["tin", "tin"], "answer": 1})]))
    example = task.test[0]
    assert [task.parse(t, example) for t in ("The answer is B.", "A", "The answer is tin.")] == ["B", "A", None]


FAULTS = {
    "answer": ({"answer": 3}, "the answer 3 is outside of its 3 options, which are numbered from 0"),
    "negative": ({"answer": -1}, "the answer -1 is outside of its 3 options, which are numbered from 0"),
    "text": ({"answer": "0"}, "field 'answer' should be int, it is str '0'"),
    "one option": ({"choices": ["tin"]}, "field 'choices' should have 2 to 10 texts, it is ['tin']"),
    "numbers": ({"choices": [1, 2]}, "field 'choices' should have 2 to 10 texts, it is [1, 2]"),
    "subject": (
        {"subject": "art"},
        "the subject is one of natural science, social science, language science, not 'art'",
    ),
    "grade": ({"grade": "grade13"}, "the grade is one of grade1 to grade12, not 'grade13'"),
    "split": ({"split": "val"}, "is in split test by pid_splits.json and in 'val' by its own field 'split'"),
    "question": ({"question": None}, "field 'question' should be str, it is NoneType None"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_records_are_named_or_left_out(tmp_path, name):
    changes, message = FAULTS[name]
    folder = write(tmp_path, [("test", "7", {}), ("test", "8", changes), ("test", "9", {})])
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"scienceqa: problems.json, record 8: {message}. Mend it, or leave such records out and have them counted:"
        " on_error='skip'"
    )
    task = load(folder, on_error="skip")
    assert [e.id for e in task.test] == ["7", "9"]
    assert [(p.file, p.record, p.problem) for p in task.skipped] == [("problems.json", "8", message)]


@pytest.mark.parametrize("gone", ["question", "choices", "answer"])
def test_missing_fields(tmp_path, gone):
    folder = write(tmp_path, [("test", "7", {}), ("test", "8", {})])
    problems = json.loads((folder / "problems.json").read_text())
    del problems["8"][gone]
    (folder / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(DataError, match=f"problems.json, record 8: there is no field '{gone}'"):
        load(folder)
    assert [e.id for e in load(folder, on_error="skip").test] == ["7"]


@pytest.mark.parametrize(
    "splits,message,left",
    [
        ({"test": ["7", "8", "7"]}, "split test, record 7: this id occurs twice", ["7", "8"]),
        ({"train": ["8"], "test": ["7", "8"]}, "record 8: is in split train and in split test", ["7"]),
        ({"test": ["7", "5"]}, "record 5: split test of pid_splits.json names it, and it is not there", ["7"]),
    ],
)
def test_ids_of_the_splits(tmp_path, splits, message, left):
    folder = write(tmp_path, [("test", "7", {}), ("test", "8", {})], splits=splits)
    problems = json.loads((folder / "problems.json").read_text())
    for record in problems.values():
        del record["split"]  # some copies have none, so that this alone does not tell
    (folder / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(DataError) as caught:
        load(folder)
    assert message in str(caught.value)
    task = load(folder, on_error="skip")
    assert [e.id for e in task.test] == left and len(task.skipped) == 1


def test_pictures_that_are_not_there(tmp_path):
    folder = write(tmp_path, [("test", "7", {"image": "image.png"}), ("test", "8", {})])
    assert load(folder).test[0].images[0].getpixel((0, 0)) == (7, 7, 11)
    (folder / "images/test/7/image.png").unlink()
    with pytest.raises(DataError, match=r"record 7: the picture .*images/test/7/image.png or .* does not exist"):
        load(folder)
    assert [e.id for e in load(folder, on_error="skip").test] == ["8"]
    assert len(load(folder, check_images=False).test) == 2


def test_loading_opens_no_picture(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a picture was opened")

    records = [("train", str(i), {"image": "image.png" if i == 0 else None}) for i in range(3000)]
    folder = write(tmp_path, records)
    problems = json.loads((folder / "problems.json").read_text())
    for record in problems.values():
        record["image"] = "image.png"
    (folder / "problems.json").write_text(json.dumps(problems))
    monkeypatch.setattr(pictures, "open_picture", refuse)
    monkeypatch.setattr(Image, "open", refuse)
    task = load(folder, check_images=False)
    assert len(task.train) + len(task.search) == 3000
    assert all(len(e.images) == 1 for e in task.train)
    with pytest.raises(AssertionError, match="a picture was opened"):
        task.train[0].images[0]


def test_scores_without_a_processor(tmp_path, processor):
    task = load(write(tmp_path, [("test", "7", {})]))
    with pytest.raises(TaskError, match="loaded without a processor, to score answers only; load it with the model's"):
        task.collate(task.test)
    with pytest.raises(TaskError, match="loaded without a processor, to score answers only; load it with the model's"):
        task.target_ids(task.test[0])
    assert load(tmp_path, processor).collate(load(tmp_path, processor).test)["input_ids"].shape[0] == 1


def test_official_results_want_letters(tmp_path):
    task = load(write(tmp_path, [("test", "7", {})]))
    for answer in ("a", "AB", "", "tin"):
        with pytest.raises(DataError, match=f"the answer to 7 is a letter, A to J, not {answer!r}; give what .*"):
            task.official_predictions({"7": answer})


def test_a_copy_has_no_official_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "validation", "test"):
        rows = datasets.Dataset.from_list([BASE | {"image": Image.new("RGB", (5, 3), (2, 7, 11))}, BASE])
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    task = load_task("scienceqa", None, hub=str(tmp_path / "data"), held_out={"search": 0})
    assert [(e.id, e.categories) for e in task.test] == [
        ("test-0", ("NAT", "IMG", "G1-6")),
        ("test-1", ("NAT", "NO", "G1-6")),
    ]
    with pytest.raises(TaskError, match="the hub copy lacks the ids that its owners' evaluation wants; give data_dir"):
        task.official_predictions({"test-0": "A", "test-1": None})


@pytest.mark.parametrize("data_dir", ["data", "data/scienceqa"])
def test_the_layout_of_the_owners_download(tmp_path, data_dir):
    (tmp_path / "data" / "scienceqa").mkdir(parents=True)
    write(tmp_path / "data" / "scienceqa", [("test", "7", {"image": "image.png"})])
    (tmp_path / "data" / "captions.json").write_text(json.dumps({"captions": {"7": "A tin can."}}))
    task = load(tmp_path / data_dir, captions=True)
    assert task.test[0].context == "A tin can." and task.test[0].images[0].size == (5, 3)
