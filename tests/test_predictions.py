"""Predictions files: resumed after a stop, refused where they do not fit, scored without a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from scribe import TEXTS, Scribe, agree, lines, seven_of_ten

import eas_kit as eas
from eas_kit.errors import DataError
from eas_kit.models.tiny.architecture import make_model, make_processor
from eas_kit.tasks import load_task
from eas_kit.tasks.made_up import write_scienceqa

SPLIT, COUNT = "test", 10


@pytest.fixture(scope="module")
def processor():
    return make_processor(TEXTS)


@pytest.fixture(scope="module")
def model(processor):
    return make_model(processor, seed=3).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scienceqa(tmp_path_factory.mktemp("made_up") / "data", records=5 * COUNT)


@pytest.fixture(scope="module")
def task(folder, processor):
    return load_task("scienceqa", processor, data_dir=folder)


@pytest.fixture
def scribe(model, task):
    return Scribe(model, task, seven_of_ten(task))


def test_a_stopped_run_goes_on_where_it_was(task, model, scribe, tmp_path):
    path = tmp_path / "new" / "said.jsonl"
    whole = task.evaluate(scribe, SPLIT, batch_size=3)
    stopped = Scribe(model, task, scribe.texts, fail_after=2)
    with pytest.raises(KeyboardInterrupt):
        task.evaluate(stopped, SPLIT, batch_size=3, predictions=path)
    rows = lines(path)
    assert len(rows) == 6 and set(rows[0]) == {"id", "text", "answer", "loss", "tokens", "problem"}
    assert all(row["text"] == scribe.texts[row["id"]] for row in rows)
    again = Scribe(model, task, scribe.texts)
    agree(whole, task.evaluate(again, SPLIT, batch_size=3, predictions=path))
    assert (again.calls, again.prompts) == (2, 4)
    assert len({row["id"] for row in lines(path)}) == len(lines(path)) == COUNT
    agree(whole, task.evaluate(again, SPLIT, predictions=path))
    assert again.calls == 2


def test_a_torn_line_is_computed_again(task, model, scribe, tmp_path):
    path = tmp_path / "said.jsonl"
    whole = task.evaluate(scribe, SPLIT, predictions=path)
    text = path.read_bytes()
    for cut in (len(text) - 1, len(text) - 20, text.index(b"\n") + 5, 5):
        path.write_bytes(text[:cut])
        again = Scribe(model, task, scribe.texts)
        agree(whole, task.evaluate(again, SPLIT, predictions=path))
        assert again.prompts == COUNT - text[:cut].count(b"\n") and len(lines(path)) == COUNT


KILLED = """
import os, signal, sys
from eas_kit.models.tiny.architecture import make_model, make_processor
from eas_kit.tasks import load_task
from scribe import TEXTS
folder, path = sys.argv[1:]
processor = make_processor(TEXTS)
model = make_model(processor, seed=3).eval()
generate, calls = model.generate, []
def dying(**settings):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(**settings)
model.generate = dying
load_task("scienceqa", processor, data_dir=folder).evaluate(model, "test", batch_size=2, predictions=path)
"""


def test_a_killed_process_leaves_its_whole_batches(task, model, folder, tmp_path, monkeypatch):
    path = tmp_path / "said.jsonl"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, folder, path], env=env, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert len(lines(path)) == 4
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **settings: calls.append(1) or generate(**settings))
    resumed = task.evaluate(model, SPLIT, batch_size=2, predictions=path)
    assert len(calls) == 3
    monkeypatch.undo()
    agree(task.evaluate(model, SPLIT, batch_size=2), resumed)


# ---------------------------------------------------------------------- what does not fit
def test_other_settings_are_refused_by_name(task, folder, processor, model, tmp_path):
    path = tmp_path / "said.jsonl"
    net = eas.attach(make_model(processor, seed=3).eval(), eas.EASConfig(skip_rank=4, adapt_rank=2))
    net.mask = [1]
    first = task.evaluate(net, SPLIT, predictions=path, with_loss=False)
    before = path.read_bytes()

    def refused(message, task=task, model=net, split=SPLIT, with_loss=False, **settings):
        with pytest.raises(DataError, match=message) as caught:
            task.evaluate(model, split, predictions=path, with_loss=with_loss, **settings)
        assert str(caught.value).endswith("Give another file, or delete it")
        assert path.read_bytes() == before

    refused("said.jsonl was made with other settings: split was 'test', is 'val'", split="val")
    refused("other settings: method was 'generate', is 'options'; max_new_tokens was ", method="options")
    refused("other settings: with_loss was False, is True. Give", with_loss=True)
    refused(r"other settings: generation was {}, is {'min_new_tokens': 2}. Give", generation={"min_new_tokens": 2})
    refused(r"model was 'EASModel', is 'LlavaFor.*mask was \[1\], is None; weights was", model=model)
    other = load_task("scienceqa", processor, data_dir=folder, prompt_format="QCM-A")
    refused(r"template was '.*QCM-ALE\)', is '.*QCM-A\)'. Give", task=other)
    refused(
        "other settings: seed was 0, is 1; sources", task=load_task("scienceqa", processor, data_dir=folder, seed=1)
    )
    net.mask = [2]
    refused(r"other settings: mask was \[1\], is \[2\]")
    net.mask = [1]
    agree(first, task.evaluate(net, SPLIT, predictions=path, with_loss=False))
    with torch.no_grad():
        next(p for p in net.parameters() if p.requires_grad).add_(1e-3)
    refused(r"other settings: weights was '\w{16}', is '\w{16}'. Give")


def test_a_part_leaves_the_room_that_the_whole_split_wants(folder, processor, model, tmp_path):
    path = tmp_path / "said.jsonl"
    task = load_task("scienceqa", processor, data_dir=folder, answer_with="text")
    lengths = {e.id: task.target_ids(e)[1] for e in task.split(SPLIT)}
    longest = max(lengths.values())
    part = max(n for n in range(1, COUNT) if max(lengths[e.id] for e in task.split(SPLIT, n)) < longest)
    task.evaluate(model, SPLIT, limit=part, predictions=path, with_loss=False)
    assert json.loads(path.with_suffix(".settings.json").read_text())["max_new_tokens"] == longest + 4
    assert task.evaluate(model, SPLIT, predictions=path, with_loss=False)["count"] == COUNT == len(lines(path))


def test_answers_inside_of_a_block_are_those_of_another_model(task, model, processor, tmp_path):
    path = tmp_path / "said.jsonl"
    task.evaluate(model, SPLIT, limit=1, predictions=path, with_loss=False)
    with (
        eas.skipping(model, mha=(1,)),
        pytest.raises(DataError, match=r"skipping was None, is \['.*layers.1.self_attn'\]"),
    ):
        task.evaluate(model, SPLIT, limit=1, predictions=path, with_loss=False)
    assert task.evaluate(model, SPLIT, limit=1, predictions=path, with_loss=False)["count"] == 1
    net = eas.attach(make_model(processor, seed=3).eval(), eas.EASConfig(skip_rank=4, adapt_rank=2))
    net.mask, other = [1], tmp_path / "net.jsonl"
    task.evaluate(net, SPLIT, limit=1, predictions=other, with_loss=False)
    static = eas.static_merge(net, task, split=SPLIT, num_examples=1, score_on=None)
    with static, pytest.raises(DataError, match="other settings: merged was None, is True. Give"):
        task.evaluate(net, SPLIT, limit=1, predictions=other, with_loss=False)


def test_the_same_weights_in_another_precision_are_another_model(task, processor, tmp_path):
    model = make_model(processor, seed=3).eval().bfloat16()
    task.evaluate(model, SPLIT, limit=1, predictions=tmp_path / "said.jsonl", with_loss=False)
    with pytest.raises(DataError, match="other settings: weights was"):
        task.evaluate(model.float(), SPLIT, limit=1, predictions=tmp_path / "said.jsonl", with_loss=False)


def test_files_that_cannot_be_gone_on_with(task, scribe, tmp_path):
    path = tmp_path / "said.jsonl"
    with pytest.raises(DataError, match=r"predictions are written to a file .jsonl, not .*said.json$"):
        task.evaluate(scribe, SPLIT, predictions=tmp_path / "said.json")
    path.write_text('{"id": "1", "text": "A"}\n')
    with pytest.raises(DataError, match="said.jsonl exists without said.settings.json, so it is not known how it was"):
        task.evaluate(scribe, SPLIT, predictions=path)
    path.unlink()
    task.evaluate(scribe, SPLIT, predictions=path)
    path.write_text(path.read_text() + '{"id": "Z", "text": "A"}\n')
    with pytest.raises(DataError, match=r"said.jsonl holds an answer to 'Z', which is not in split test; give another"):
        task.evaluate(scribe, SPLIT, predictions=path)
    (tmp_path / "said.settings.json").write_text('{"task": "sci')
    with pytest.raises(DataError, match=r"said.settings.json is broken \(.*\); give another file, or delete it and "):
        task.evaluate(scribe, SPLIT, predictions=path)
    assert scribe.prompts == COUNT


def test_a_file_of_the_whole_split_serves_a_part_of_it(task, scribe, tmp_path):
    path = tmp_path / "said.jsonl"
    task.evaluate(scribe, SPLIT, predictions=path, with_loss=False)
    calls = scribe.calls
    part = task.evaluate(scribe, SPLIT, limit=4, predictions=path, with_loss=False)
    assert part["count"] == 4 and scribe.calls == calls
    assert part["accuracy"] == task.score_predictions(path, SPLIT, limit=4)["accuracy"]


# ---------------------------------------------------------------------- without a model
def test_scored_without_a_model(task, folder, model, scribe, tmp_path):
    path = tmp_path / "said.jsonl"
    result = task.evaluate(scribe, SPLIT, predictions=path)
    bare = load_task("scienceqa", None, data_dir=folder)
    scored = bare.score_predictions(path, SPLIT)
    assert scored.pop("predictions") == str(path)
    in_order = [{"id": task.test[i].id, "text": "hm"} for i in (4, 9)]
    assert scored["unparsed_examples"] == in_order
    agree(scored, {**result, "unparsed_examples": in_order} | {"seconds": 0}, rel=1e-12)
    path = tmp_path / "options.jsonl"
    result = task.evaluate(model, SPLIT, predictions=path, method="options")
    scored = bare.score_predictions(path, SPLIT)
    assert [scored[k] for k in ("accuracy", "columns", "loss")] == [result[k] for k in ("accuracy", "columns", "loss")]
    assert (scored["method"], scored["parser"]) == ("answers as given", "none: answers as given")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_of_others(task, scribe, tmp_path):
    texts = [{"id": i, "text": text} for i, text in scribe.texts.items()]
    result = task.score_predictions(write(tmp_path / "texts.jsonl", texts[::-1]), SPLIT)
    assert (result["accuracy"], result["unparsed"], result["method"], result["loss"]) == (0.7, 2, "generate", None)
    parsed = {e.id: task.parse(scribe.texts[e.id], e) for e in task.test}
    letters = [{"id": int(i), "answer": letter} for i, letter in parsed.items()]
    letters[0]["answer"] = letters[0]["answer"].lower()
    result = task.score_predictions(write(tmp_path / "letters.jsonl", letters), SPLIT)
    assert (result["accuracy"], result["unparsed"], result["method"]) == (0.7, 2, "answers as given")
    assert result["unparsed_examples"][0] == {"id": task.test[4].id, "text": None}


@pytest.mark.parametrize(
    "row,message",
    [
        ('{"id": "1", "te', r"said.jsonl, line 11 is no valid JSON: Unterminated string .* at column 13"),
        ('{"id": "41"}', r'line 11: wanted {"id": ..., "text": ...} or with "answer", got {"id": "41"}'),
        ("[1]", r'line 11: wanted {"id": ..., "text": ...} or with "answer", got \[1\]'),
        ('{"id": "41", "text": "B"}', r"said.jsonl, line 11: '41' was answered before"),
        (
            '{"id": "Z", "text": "B"}',
            r"does not fit split test of 10 examples: id 'Z' is not in it. Is it of another spl",
        ),
        ('{"id": "99", "answer": 1}', r"line 11: 'answer' should be a text or null, it is 1"),
        ('{"id": "99", "text": ["A"]}', r"line 11: 'text' should be a text or null, it is \['A'\]"),
        ('{"id": "99", "text": "A", "loss": "x"}', r"line 11: 'loss' should be a number or null, it is 'x'"),
    ],
)
def test_lines_that_are_none(task, scribe, tmp_path, row, message):
    assert next(iter(scribe.texts)) == "41"
    path = write(tmp_path / "said.jsonl", [{"id": i, "text": text} for i, text in scribe.texts.items()])
    path.write_text(path.read_text() + row)
    with pytest.raises(DataError, match=message):
        task.score_predictions(path, SPLIT)


def test_answers_that_are_missing(task, scribe, tmp_path):
    rows = [{"id": i, "text": text} for i, text in scribe.texts.items()]
    path = write(tmp_path / "said.jsonl", rows[:8])
    message = r"of 10 examples: 2 ids are missing, as '49'. .* stopped\? \(A run over a part.* sizes=\{'test': N\}\)$"
    with pytest.raises(DataError, match=message):
        task.score_predictions(path, SPLIT)
    with pytest.raises(DataError, match=message):
        task.export_predictions(path, tmp_path / "out.json", SPLIT)
    write(path, [*rows[:9], {"id": rows[9]["id"], "answer": [0.5, 1.5]}])
    with pytest.raises(DataError, match=r"the answer to '\d+' should be a text or null, it is \[0.5, 1.5\]$"):
        task.score_predictions(path, SPLIT)
    with pytest.raises(DataError, match=r"cannot be read: Is a directory; wanted a predictions file$"):
        task.score_predictions(tmp_path, SPLIT)
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows))  # as on Windows
    assert task.score_predictions(path, SPLIT)["count"] == COUNT
    with pytest.raises(DataError, match=r"there is no predictions file .*none.jsonl"):
        task.score_predictions(tmp_path / "none.jsonl", SPLIT)
    (tmp_path / "bytes.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(DataError, match=r"bytes.jsonl is not text in UTF-8: invalid start byte at byte 8"):
        task.score_predictions(tmp_path / "bytes.jsonl", SPLIT)


# ---------------------------------------------------------------------- pictures that cannot be opened
def test_truncated_pictures_are_counted(folder, processor, model, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "data")
    task = load_task("scienceqa", processor, data_dir=broken, on_error="skip")
    seen = [e for e in task.test if e.images]
    picture = broken / "images" / "test" / seen[1].id / "image.png"
    picture.write_bytes(picture.read_bytes()[:60])
    path = tmp_path / "said.jsonl"
    scribe = Scribe(model, task, seven_of_ten(task))
    result = task.evaluate(scribe, SPLIT, batch_size=1, predictions=path)
    assert (result["count"], result["skipped"], scribe.prompts) == (COUNT - 1, 1, COUNT - 1)
    [line] = [row for row in lines(path) if row["id"] == seen[1].id]
    assert (line["text"], line["answer"], line["loss"]) == (None, None, None)
    assert line["problem"].startswith(f"the picture {picture} cannot be opened, it is truncated or no picture: ")
    scored = task.score_predictions(path, SPLIT)
    keys = ("accuracy", "loss", "columns", "column_counts", "count", "skipped", "unparsed")
    assert [scored[k] for k in keys] == [result[k] for k in keys]
    again = task.evaluate(scribe, SPLIT, batch_size=4, workers=1, predictions=path)
    assert [again[k] for k in keys] == [result[k] for k in keys] and scribe.prompts == COUNT - 1
    assert task.score(model, SPLIT)["count"] == COUNT - 1
    assert task.answers(model, seen[:2])[1] is None and len(task.answers(model, seen[:2])) == 2
    assert task.answers(model, seen[1:2]) == [None]
    short = picture.read_bytes()
    shutil.copy(folder / "images" / "test" / seen[1].id / "image.png", picture)
    mended = task.evaluate(scribe, SPLIT, predictions=path)
    assert (mended["count"], mended["skipped"], scribe.prompts) == (COUNT, 0, COUNT)
    assert task.score_predictions(path, SPLIT)["accuracy"] == mended["accuracy"] == 0.7
    picture.write_bytes(short)
    task.test = seen[1:2]
    for ask in (task.evaluate, task.score):
        with pytest.raises(DataError, match="no example of test has pictures that can be opened; the first: the"):
            ask(model, SPLIT)
    strict = load_task("scienceqa", processor, data_dir=broken)
    for workers in (0, 1):
        with pytest.raises(DataError) as caught:
            strict.evaluate(model, SPLIT, workers=workers)
        assert str(caught.value).startswith(f"scienceqa: record {seen[1].id}: the picture {picture} cannot be opened")
        assert str(caught.value).endswith(
            "load the task with on_error='skip', which leaves such examples out and counts them"
        )
