"""eas-kit data: exit codes and outputs; what a check finds; made-up folders."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil

import datasets
import pytest
from PIL import Image
from scienceqa_files import BASE

from eas_kit.cli import main
from eas_kit.tasks import data_sets, load_task
from eas_kit.tasks.check import check_data
from eas_kit.tasks.digit_images import _scans, scan_indices
from eas_kit.tasks.made_up import write_scienceqa


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scienceqa(tmp_path_factory.mktemp("made_up") / "data", records=33)


def run(capsys, *command):
    """(exit code, output, errors)"""
    code = main(["data", *map(str, command)])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def said(folder, path, pids=None):
    """A file that answers the first option to all questions of test."""
    pids = json.loads((folder / "pid_splits.json").read_text())["test"] if pids is None else pids
    path.write_text("".join(json.dumps({"id": pid, "text": "The answer is A."}) + "\n" for pid in pids))
    return path


# ---------------------------------------------------------------------- made-up folders
def test_a_made_up_folder(folder):
    splits = json.loads((folder / "pid_splits.json").read_text())
    problems = json.loads((folder / "problems.json").read_text())
    assert {split: len(pids) for split, pids in splits.items()} == {"train": 19, "val": 7, "test": 7}
    assert [pid for pids in splits.values() for pid in pids] == [str(n) for n in range(1, 34)] == list(problems)
    assert all(record.keys() == {*BASE, "split"} for record in problems.values())
    kinds = [(bool(r["image"]), bool(r["hint"])) for r in problems.values() if r["split"] == "train"]
    assert {kind: kinds.count(kind) for kind in kinds} == {(True, False): 7, (False, True): 6, (False, False): 6}
    pictures = sorted(str(p.relative_to(folder)) for p in folder.glob("images/**/*.png"))
    wanted = [f"images/{r['split']}/{pid}/image.png" for pid, r in problems.items() if r["image"]]
    assert pictures == sorted(wanted)
    task = load_task("scienceqa", None, data_dir=folder)
    assert [len(task.train) + len(task.search), len(task.val), len(task.test)] == [19, 7, 7]
    for example in task.test:
        record = problems[example.id]
        assert (example.question, example.choices) == (record["question"], tuple(record["choices"]))
        assert example.answer == "ABCD"[record["answer"]] and task.parse(example.answer, example) == example.answer


def cells(path):
    """The 8 x 8 cells of a picture that are not black."""
    pixels = Image.open(path).convert("L")
    found = [pixels.crop((c, r, c + 8, r + 8)).tobytes() for r in (0, 8, 16) for c in (0, 8, 16)]
    return {cell for cell in found if any(cell)}


def test_handwriting_is_disjoint(folder):
    scans = _scans()[0]
    seen = {split: set() for split in ("train", "val", "test")}
    for split, found in seen.items():
        own = {scans[i].tobytes() for per in scan_indices(split) for i in per}
        for path in folder.glob(f"images/{split}/*/image.png"):
            found |= cells(path)
        assert found and found <= own
    assert not (seen["train"] & seen["val"] | seen["train"] & seen["test"] | seen["val"] & seen["test"])


def digests(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_made_by_seed(folder, tmp_path, capsys):
    assert run(capsys, "make", "scienceqa", tmp_path / "a", "--records", 33) == (0, f"{tmp_path / 'a'}\n", "")
    assert digests(tmp_path / "a") == digests(folder)
    assert run(capsys, "make", "scienceqa", tmp_path / "b", "--records", 33, "--seed", 1)[0] == 0
    assert digests(tmp_path / "b") != digests(folder)
    code, out, err = run(capsys, "make", "scienceqa", tmp_path / "a")
    assert (code, out) == (2, "")
    assert err == f"eas-kit: write_scienceqa: {tmp_path / 'a'} has a problems.json already; give another folder\n"
    (tmp_path / "a" / "problems.json").unlink()  # as a stopped run leaves it
    assert run(capsys, "make", "scienceqa", tmp_path / "a", "--records", 33)[0] == 0
    assert digests(tmp_path / "a") == digests(folder)
    err = run(capsys, "make", "scienceqa", tmp_path / "c", "--records", 9)[2]
    assert err == "eas-kit: write_scienceqa: wanted 10 records or more, for three splits, got 9\n"
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "make", "scienceqa", tmp_path / "file")
    assert code == 2 and err == f"eas-kit: {tmp_path / 'file'} cannot be written: Not a directory\n"


@pytest.mark.parametrize("records", [10, 11, 13, 17, 3000])
def test_as_many_records_as_asked_for(tmp_path, monkeypatch, records):
    monkeypatch.setattr(Image.Image, "save", lambda *_: None)
    splits = json.loads((write_scienceqa(tmp_path, records) / "pid_splits.json").read_text())
    assert sum(map(len, splits.values())) == records
    assert len(splits["val"]) == len(splits["test"]) == round(records / 5)


# ---------------------------------------------------------------------- check
def test_check_says_what_is_there(folder, capsys):
    code, out, err = run(capsys, "check", "scienceqa", folder)
    assert (code, err) == (1, "")
    assert out.startswith(f"ScienceQA: {folder}\n\nowner's splits (good records; published)\n")
    for line in (
        "  train              19   12,726   DIFFERENT",
        "  val                 7    4,241   DIFFERENT",
        "  test                7    4,241   DIFFERENT",
        "  search              1   held out of train (share 0.05, seed 0)",
        "  train              18   train, what is left",
    ):
        assert f"{line}\n" in out
    count = len(list(folder.glob("images/**/*.png")))
    assert f"pictures      {count}, of which {count} were opened\n" in out
    assert re.search(r"columns       G1-6 \d+, G7-12 \d+, IMG 13, ", out)
    assert out.endswith("\nNOT as published\n") and "problems" not in out
    out = run(capsys, "check", "scienceqa", folder, "--open", "3", "-p", "sizes", "{test: 2}")[1]
    assert "of which 3 were opened" in out and "  test                2   test, 2 of 7 (seed 0)\n" in out
    assert "  test                7    4,241   DIFFERENT" in out


def test_check_is_content_with_what_is_published(folder, capsys, monkeypatch):
    task = type(load_task("scienceqa", None, data_dir=folder))
    monkeypatch.setattr(task, "published", lambda self: {"train": 19, "val": 7, "test": 7})
    code, out, _ = run(capsys, "check", "scienceqa", folder, "--open", "all")
    assert code == 0 and "DIFFERENT" not in out and out.endswith("\nok\n")


def test_check_finds_what_is_broken(folder, tmp_path, capsys):
    broken = shutil.copytree(folder, tmp_path / "data")
    gone, short = sorted(broken.glob("images/test/*/image.png"))[:2]
    gone.unlink()
    short.write_bytes(short.read_bytes()[:70])
    code, out, err = run(capsys, "check", "scienceqa", broken, "--open", "all")
    assert (code, err) == (1, "")
    assert "\n2 problems\n" in out and out.endswith("\nNOT ok\n")
    assert f"  problems.json, record {gone.parent.name}: the picture {gone} or " in out
    assert f"  pictures, record {short.parent.name}: the picture {short} cannot be opened, it is truncated or no" in out
    assert "  test                6    4,241   DIFFERENT" in out
    assert "\n1 problem\n" in run(capsys, "check", "scienceqa", broken, "--open", "0")[1]
    shutil.rmtree(broken / "images")
    code, out, _ = run(capsys, "check", "scienceqa", broken)
    assert code == 1 and "\n13 problems\n" in out and out.count("record") == 11 and "  ... and 3 more" in out


def test_check_opens_the_pictures_of_every_split_of_a_copy(tmp_path, monkeypatch, capsys):
    """Rows of different splits have the same numbers."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    whole = io.BytesIO()
    Image.new("RGB", (5, 3), (2, 7, 11)).save(whole, "png")
    for split in ("train", "validation", "test"):
        data = whole.getvalue()[: 45 if split == "test" else None]
        rows = datasets.Dataset.from_list([BASE | {"image": {"path": None, "bytes": data}}])
        rows = rows.cast_column("image", datasets.Image())
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    found = check_data("scienceqa", hub=str(tmp_path / "data"), held_out={"search": 0})
    assert (found.counts, found.pictures, found.opened) == ({"train": 1, "val": 1, "test": 1}, 3, 3)
    [problem] = found.problems
    assert str(problem).startswith("pictures, record test-0: the picture in column 'image' of row 0 cannot be opened")
    copy = f"hub:{tmp_path / 'data'}"
    code, out, _ = run(capsys, "check", "scienceqa", copy, "--open", "0", "-p", "held_out", "{search: 0}")
    assert code == 1 and "pictures      3, of which 0 were opened" in out and "NOT as published" in out
    (tmp_path / "answers.jsonl").write_text('{"id": "test-0", "text": "The answer is B."}\n')
    code, out, _ = run(capsys, "score", "scienceqa", copy, tmp_path / "answers.jsonl")
    assert code == 0 and json.loads(out)["accuracy"] == float(BASE["answer"] == 1)


@pytest.mark.parametrize(
    "command,message",
    [
        ("check scienceqa FOLDER -p hub x", "-p hub: this is no setting here"),
        ("check scienceqa FOLDER/none", "scienceqa: data_dir FOLDER/none does not exist; wanted a folder. data/"),
        ("check scienceqa FOLDER/problems.json", "data_dir FOLDER/problems.json is a file; wanted a folder"),
        ("check scienceqa FOLDER/images", "wanted problems.json in FOLDER/images, which holds test/, train/, val/"),
        ("check scienceqa FOLDER --open -1", "--open is a number of pictures or 'all', not '-1'"),
        ("check scienceqa FOLDER -p colour 1", "scienceqa: there is no setting 'colour'; it has answer_with, captions"),
        ("check scienceqa FOLDER -p on_error raise", "scienceqa: a check goes through all records, so on_error cannot"),
        ("check scienceqa FOLDER -p data_dir x", "-p data_dir: this is no setting here; see eas-kit data check --help"),
        ("check scienceqa FOLDER -p sizes {a", "-p sizes: '{a' is no valid YAML: "),
        (
            "check elements FOLDER",
            "elements: there is no setting 'data_dir'; it has disjoint_facts, order, seed, sizes",
        ),
        ("check chess FOLDER", "there is no task 'chess'; choose one of aid, "),
        ("score scienceqa FOLDER FOLDER/no.jsonl", "there is no predictions file FOLDER/no.jsonl"),
        ("score scienceqa FOLDER SAID --split dev", "scienceqa has the splits train, search, val, test; there is no"),
        ("score scienceqa FOLDER SAID --split val", "SAID does not fit split val of 7 examples: id '27' is not in it"),
        (
            "score scienceqa FOLDER SAID -p check_images 1",
            "-p check_images: this is no setting here; see",
        ),
        ("export scienceqa FOLDER SAID --out FOLDER/a/b", "FOLDER/a/b cannot be written: No such file or directory"),
    ],
)
def test_commands_that_make_no_sense(folder, tmp_path, capsys, command, message):
    places = {"FOLDER": str(folder), "SAID": str(said(folder, tmp_path / "said.jsonl"))}

    def filled(text):
        return re.sub("FOLDER|SAID", lambda found: places[found[0]], text)

    code, out, err = run(capsys, *map(filled, command.split()))
    assert (code, out) == (2, "")
    assert err.startswith("eas-kit: ") and filled(message) in err and "Traceback" not in err


# ---------------------------------------------------------------------- score, export, list
def test_score_and_export(folder, tmp_path, capsys):
    path = said(folder, tmp_path / "said.jsonl")
    task = load_task("scienceqa", None, data_dir=folder)
    code, out, err = run(capsys, "score", "scienceqa", folder, path)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result == task.score_predictions(path, "test")
    assert result["accuracy"] == sum(e.answer == "A" for e in task.test) / 7 and result["count"] == 7
    code, out, err = run(capsys, "export", "scienceqa", folder, path, "--out", tmp_path / "results.json")
    assert (code, out, err) == (0, f"{tmp_path / 'results.json'}: 7 answers\n", "")
    assert json.loads((tmp_path / "results.json").read_text()) == {"results": {e.id: 0 for e in task.test}}
    path = said(folder, tmp_path / "val.jsonl", [e.id for e in task.val])
    out = run(capsys, "score", "scienceqa", folder, path, "--split", "val", "-p", "prompt_format", "QCM-A")[1]
    assert json.loads(out)["split"] == "val" and "QCM-A)" in json.loads(out)["template"]


def test_scores_need_no_pictures(folder, tmp_path, capsys):
    bare = shutil.copytree(folder, tmp_path / "data", ignore=shutil.ignore_patterns("images"))
    assert run(capsys, "score", "scienceqa", bare, said(folder, tmp_path / "said.jsonl"))[0] == 0


def test_list(capsys):
    code, out, err = run(capsys, "list")
    assert (code, err) == (0, "")
    assert "scienceqa     ScienceQA                     train 12,726, val 4,241, test 4,241\n" in out
    assert f"{'':<14}https://scienceqa.github.io; CC BY-NC-SA 4.0; hub copy: derek-thomas/ScienceQA\n" in out
    names = [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]
    assert names == list(data_sets()) and "elements" not in names
    assert all(line == line.rstrip() for line in out.splitlines())
    with pytest.raises(SystemExit) as caught:
        main(["data"])
    assert caught.value.code == 2
