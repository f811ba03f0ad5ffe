"""Scores of a model: against brute force, and the same for any batches and workers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scribe import TEXTS, Scribe, agree, seven_of_ten
from toys import stir

import eas_kit as eas
from eas_kit.errors import TaskError
from eas_kit.models.tiny.architecture import make_model, make_processor
from eas_kit.tasks import load_task
from eas_kit.tasks.evaluation import _Batches
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


def test_the_result(task, scribe):
    result = task.evaluate(scribe, SPLIT)
    assert scribe.prompts == result["count"] == COUNT
    assert result["accuracy"] == 0.7 and result["unparsed"] == 2 and result["skipped"] == 0
    bad = [task.test[4].id, task.test[9].id]
    assert sorted(e["id"] for e in result["unparsed_examples"]) == sorted(bad, key=str)
    assert all(e["text"] == "hm" for e in result["unparsed_examples"])
    assert (result["split"], result["seed"], result["method"]) == (SPLIT, 0, "generate")
    assert "QCM-ALE" in result["template"] and "first statement of an option" in result["parser"]
    assert (result["task"], result["data"], result["skipped_on_loading"]) == ("scienceqa", "owner's files", 0)
    assert result["sources"]["test"] == "test" and result["sources"]["val"] == "val"
    assert result["seconds"] >= 0
    wrong = {task.test[i].id for i in (2, 4, 9)}
    for name, count in result["column_counts"].items():
        there = [e for e in task.test if name in e.categories]
        assert count == len(there)
        assert result["columns"][name] == pytest.approx(sum(e.id not in wrong for e in there) / count)


@torch.no_grad()
def test_losses_against_brute_force(task, model):
    total, count, hits, right = 0.0, 0, 0, 0
    for example in task.test:
        batch = task.collate([example])
        log = model(**batch).logits[0].double().log_softmax(-1)
        target, scored = task.target_ids(example)
        start = batch["input_ids"].shape[1] - len(target)
        assert batch["input_ids"][0, start:].tolist() == target
        found = [int(log[start - 1 + i].argmax()) == token for i, token in enumerate(target)]
        total -= sum(log[start - 1 + i, token].item() for i, token in enumerate(target))
        count, hits, right = count + len(target), hits + sum(found), right + all(found[:scored])
    score = task.score(model, SPLIT, batch_size=4)
    assert score == {
        "loss": pytest.approx(total / count, rel=1e-5),
        "accuracy": right / COUNT,
        "token_accuracy": hits / count,
        "count": COUNT,
    }
    assert task.evaluate(model, SPLIT, batch_size=4)["loss"] == pytest.approx(total / count, rel=1e-5)
    assert task.evaluate(model, SPLIT, with_loss=False)["loss"] is None


@torch.no_grad()
def test_options_against_brute_force(task, model):
    wanted = {}
    for example in task.test:
        prompt = task.collate([example], answers=False)
        losses = {}
        for letter in task.candidates(example):
            answer = task.tokenizer(f" The answer is {letter}.", add_special_tokens=False, return_tensors="pt")
            ids = torch.cat([prompt["input_ids"], answer["input_ids"]], 1)
            pixels = {"pixel_values": prompt["pixel_values"]} if "pixel_values" in prompt else {}
            log = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits[0].double().log_softmax(-1)
            start = prompt["input_ids"].shape[1]
            steps = [log[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])]
            assert len(steps) >= 3
            losses[letter] = -sum(steps) / len(steps)
        wanted[example.id] = min(losses, key=losses.get)
    right = sum(wanted[e.id] == e.answer for e in task.test) / COUNT
    for size in (7, 64):
        result = task.evaluate(model, SPLIT, batch_size=size, method="options")
        assert result["accuracy"] == right and result["unparsed"] == 0
        assert result["parser"] == "most likely option per token"
    assert task.evaluate(model, SPLIT, method="options")["loss"] == pytest.approx(task.score(model, SPLIT)["loss"])


def test_any_batches_and_workers_give_the_same(task, model, scribe):
    for one in (model, scribe):
        first = task.evaluate(one, SPLIT, batch_size=64)
        for size, workers in ((1, 0), (3, 0), (3, 2)):
            agree(first, task.evaluate(one, SPLIT, batch_size=size, workers=workers))
    first = task.score(model, SPLIT, batch_size=64)
    for size, workers in ((1, 0), (3, 2)):
        agree(first, task.score(model, SPLIT, batch_size=size, workers=workers))
    with pytest.raises(TaskError, match="batch_size is a whole number from 1 up, not 0"):
        task.score(model, SPLIT, batch_size=0)
    with pytest.raises(TaskError, match="workers is a whole number from 0 up, not -1"):
        task.evaluate(model, SPLIT, workers=-1)


def test_limit(task, scribe):
    result = task.evaluate(scribe, SPLIT, limit=4)
    assert result["count"] == scribe.prompts == 4
    assert sum(result["column_counts"].get(grade, 0) for grade in ("G1-6", "G7-12")) == 4


def test_pictures_and_prompts_are_prepared_once(task, model, monkeypatch):
    made = []
    prompts = type(task)._prompts
    monkeypatch.setattr(type(task), "_prompts", lambda self, e: made.append(len(e)) or prompts(self, e))
    task.evaluate(model, SPLIT, batch_size=4)
    assert made == [4, 4, 2]


def test_room_for_an_answer_is_that_of_the_longest(task, model, monkeypatch):
    asked = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **settings: asked.append(settings) or generate(**settings))
    task.evaluate(model, SPLIT, batch_size=3, with_loss=False, generation={"min_new_tokens": 2})
    longest = max(task.target_ids(e)[1] for e in task.test)
    assert {(a["max_new_tokens"], a["do_sample"], a["min_new_tokens"]) for a in asked} == {(longest + 4, False, 2)}
    monkeypatch.setattr(task, "max_new_tokens", 3)
    assert len(task.answers(model, task.test[:2])) == 2 and asked[-1]["max_new_tokens"] == 3


def test_answers_that_are_not_known(task, model, monkeypatch):
    unknown = [replace(e, answer="", explanation="") if i % 2 else e for i, e in enumerate(task.test)]
    monkeypatch.setattr(task, "test", unknown)
    result = task.evaluate(model, SPLIT)
    assert result["accuracy"] is None and result["loss"] is None and result["count"] == COUNT
    assert result["columns"] == result["column_counts"] == {}
    with pytest.raises(TaskError, match=r"example 4\d has no answer to be trained on or scored by"):
        task.score(model, SPLIT)


def test_ids_that_occur_twice(task, model, monkeypatch):
    monkeypatch.setattr(task, "test", [*task.test[:3], task.test[1]])
    with pytest.raises(TaskError, match=f"two examples of test have the id '{task.test[1].id}'; give each its own"):
        task.evaluate(model, SPLIT)
    monkeypatch.setattr(task, "test", [replace(task.test[0], id=7)])
    with pytest.raises(TaskError, match="scienceqa: an example's id is a text, not 7; files keep answers by it"):
        task.evaluate(model, SPLIT)


def test_merged_inside_generate(task, processor, monkeypatch):
    net = eas.attach(make_model(processor, seed=3).eval(), eas.EASConfig(skip_rank=4, adapt_rank=2))
    net.mask = [1, 4]
    stir(net)
    asked, generate = [], net.generate
    monkeypatch.setattr(net, "generate", lambda **given: asked.append(given.get("merge")) or generate(**given))
    plain = task.evaluate(net, SPLIT, limit=6, batch_size=3)
    merged = task.evaluate(net, SPLIT, limit=6, batch_size=3, generation={"merge": "low_rank"})
    agree(plain, merged)
    assert asked == [None, None, "low_rank", "low_rank"]


def test_pictures_travel_once(task):
    """From a worker come tensors and numbers; the opened pictures only where the batch is not made there."""
    for answers in (True, False):
        found, problems, batch = _Batches(task, task.test, [[2, 0, 1]], answers)[0]
        assert (found, problems) == ([2, 0, 1], []) and len(batch["input_ids"]) == 3
        assert ("labels" in batch) == answers
    found, problems, batch = _Batches(task, task.test, [[2, 0, 1]], None)[0]
    assert [e.id for e in found] == [task.test[n].id for n in (2, 0, 1)] and batch == {}
    assert all(type(e.images) is tuple for e in found) and any(e.images for e in found)
