"""tiny-meter: its files, its loading with each head, its recipe, and that pretraining resumes exactly."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import eas_kit as eas
from eas_kit.errors import ConfigError, EASError, TrainingError
from eas_kit.models import load_processor
from eas_kit.models.meter import Meter
from eas_kit.models.meter_loading import HEADS_FILE, TINY
from eas_kit.models.tiny_meter.architecture import LABELS, make_processor
from eas_kit.models.tiny_meter.card import write_card
from eas_kit.models.tiny_meter.corpus import IGNORED, Corpus
from eas_kit.models.tiny_meter.pretrain import Recipe, pretrain
from eas_kit.tasks import board_texts as said

NAMES = {"vqa": "boards-vqa", "nlvr2": "boards-nlvr2", "retrieval": "boards-retrieval"}


def test_files_are_small_and_complete():
    for name in (
        "config.json",
        "model.safetensors",
        HEADS_FILE,
        "tokenizer.json",
        "processor_config.json",
        "README.md",
    ):
        assert (TINY / name).exists(), name
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 3e6
    facts = json.loads((TINY / "recipe.json").read_text())
    told = {key: tuple(value) if isinstance(value, list) else value for key, value in facts["recipe"].items()}
    assert Recipe(**told) == Recipe()
    assert facts["cpu_minutes"] < 10


@pytest.mark.parametrize("head", NAMES)
def test_it_loads_with_the_head_of_a_task(head, tmp_path):
    model, processor = eas.load_model("tiny-meter", task=head)
    assert type(model) is Meter and not model.training and model.dtype == torch.float32
    assert [model.config.id2label[i] for i in range(model.config.num_labels)] == list(LABELS[head])
    assert type(load_processor("tiny-meter")) is type(processor)
    task = eas.load_task(NAMES[head], processor, sizes={"val": 16, "train": 16, "search": 16, "test": 16})
    batch = task.collate(task.val[:3])
    net = eas.attach(model, eas.EASConfig(skip_rank=4, adapt_rank=0))
    net.mask = [0, 23]
    net.save_pretrained(tmp_path)
    again = eas.load(tmp_path)  # the head's name is in the folder
    assert again.base.config.task == head
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, net.eval()(**batch).logits)
    assert "`tiny-meter`, which comes with eas_kit" in (tmp_path / "README.md").read_text()


def test_scores_beside_the_weights_are_true():
    told = json.loads((TINY / "scores.json").read_text())
    for head, name in NAMES.items():
        model, processor = eas.load_model("tiny-meter", task=head)
        task = eas.load_task(name, processor)
        if head == "retrieval":
            found = task.evaluate(model, "test", limit=20)
            assert found["columns"]["TR@1"] >= told[name]["columns"]["TR@1"] - 0.07  # of fewer boards, which is easier
            assert told[name]["columns"]["TR@1"] > 0.6 and told[name]["columns"]["IR@1"] > 0.6  # any order: 0.02
            continue
        found = task.evaluate(model, "test", limit=240)
        assert found["accuracy"] == pytest.approx(told[name]["accuracy"], abs=0.07)
        columns = told[name]["columns"]
        assert columns["known"] > columns["new"] + 0.1
        assert columns["known"] > 0.85 and found["columns"]["known"] > 0.8
        if head == "vqa":
            assert columns["cell"] > 0.9 and found["columns"]["cell"] > 0.85  # chance is 0.1


def test_the_arms_of_the_tuning_are_all_there():
    told = json.loads((TINY / "scores.json").read_text())
    for name in NAMES.values():
        rows = [row for row in told["tuned"] if row["task"] == name]
        arms = {("head", 0), ("lora", 0)} | {(by, k) for by in ("random", "bandit") for k in (4, 8, 12)}
        assert {(row["by"], row["k"]) for row in rows} == arms
        assert all(len(row["mask"]) == row["k"] for row in rows)
        trained = {row["by"]: row["trained"] for row in rows if row["k"] in (0, 8)}
        assert trained["head"] < trained["lora"] == pytest.approx(trained["random"], rel=0.1)
        if name != "boards-retrieval":  # which the untuned model does as well as can be
            untuned, arms = told[name], [row for row in rows if row["k"] in (4, 8)]
            assert all(row["accuracy"] > untuned["accuracy"] + 0.02 for row in arms)
            assert all(row["columns"]["new"] > untuned["columns"]["new"] + 0.1 for row in arms)


def test_what_load_model_refuses(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"load_model\('tiny-meter'\): there is no setting 'checkpoint'; wanted some"):
        eas.load_model("tiny-meter", checkpoint="x")
    with pytest.raises(ConfigError, match="task: wanted one of .* got 'captions'"):
        eas.load_model("tiny-meter", task="captions")
    monkeypatch.setattr("eas_kit.models.meter_loading.TINY", tmp_path)
    with pytest.raises(EASError, match="the weights of the bundled model 'tiny-meter' .*reinstall"):
        eas.load_model("tiny-meter")


def test_batches_depend_on_seed_and_step_alone():
    processor = make_processor()
    one, two, other = Corpus(processor, 3), Corpus(processor, 3), Corpus(processor, 4)
    counts = {"words": 2, "vqa": 3, "nlvr2": 5, "retrieval": 7}
    rows, again, changed = one.batch(7, counts), two.batch(7, counts), other.batch(7, counts)
    assert torch.equal(rows.pixel_values, again.pixel_values) and torch.equal(rows.input_ids, again.input_ids)
    assert not torch.equal(rows.pixel_values, changed.pixel_values)
    assert {name: (part.start, part.stop) for name, part in rows.parts.items()} == {
        "words": (0, 2), "vqa": (2, 5), "nlvr2": (5, 15), "retrieval": (15, 22),
    }  # fmt: skip
    assert rows.image_type.flatten().tolist() == [1] * 10 + [2] * 5 + [1] * 7
    assert torch.equal(rows.input_ids[5:10], rows.input_ids[10:15])  # one sentence, two pictures


def test_digits_of_captions_are_masked_and_replaced():
    processor = make_processor()
    corpus, words = Corpus(processor, 3), processor.tokenizer
    rows = corpus.batch(0, {"words": 50})
    board = corpus.batch(0, {"words": 50}).labels["words"]
    assert ((board != IGNORED).sum(1) == 4).all()
    counted = {"masked": 0, 0: 0, 1: 0, 2: 0}
    for ids, true, order in zip(rows.input_ids.tolist(), board.tolist(), rows.order.tolist(), strict=True):
        for token, digit, told in zip(words.convert_ids_to_tokens(ids), true, order, strict=True):
            if digit == IGNORED or token == "<mask>":
                assert told == IGNORED and (digit != IGNORED) == (token == "<mask>")
                counted["masked"] += digit != IGNORED
                continue
            assert told == (0 if int(token) < digit else 1 if int(token) == digit else 2)
            counted[told] += 1
    assert min(counted.values()) > 15
    ids, mask, places, digits = corpus.placed_words(0, 17)
    said_there = places != IGNORED
    assert (said_there.sum(1) == 4).all() and torch.equal(said_there, digits != IGNORED) and mask.all()
    spelt = ["<mask>" if digit == 10 else str(digit) for digit in digits[said_there].tolist()]
    assert words.convert_ids_to_tokens(ids[said_there].tolist()) == spelt and {"<mask>", "7"} <= set(spelt)


def test_retrieval_pretraining_is_balanced_and_true():
    corpus, rng = Corpus(make_processor(), 0), np.random.default_rng(0)
    made = [corpus._retrieval(rng) for _ in range(200)]
    assert all(said.describes(text, boards[0]) == bool(label) for text, boards, label in made)
    assert 70 < sum(label for *_, label in made) < 130


def test_pretraining_resumes_bit_for_bit(tmp_path, monkeypatch):
    small = {"reading": (2, 0, 1, 0, 1), "seeing": (2, 1, 1, 0, 1), "mixture": (1, 1, 2, 2, 2)}
    recipe = Recipe(tower_steps=1, reading_steps=1, seeing_steps=2, steps=4, warmup_steps=1, **small)
    whole = pretrain(tmp_path / "whole", recipe)

    class Cut(Exception):
        pass

    original = Corpus.batch

    def cut(self, step, counts):
        if step == 2:
            raise Cut
        return original(self, step, counts)

    monkeypatch.setattr(Corpus, "batch", cut)
    with pytest.raises(Cut):
        pretrain(tmp_path / "cut", recipe, checkpoint_every=1)
    monkeypatch.undo()
    with pytest.raises(TrainingError, match="made with another recipe"):
        pretrain(tmp_path / "cut", replace(recipe, seed=1), resume=True)
    again = pretrain(tmp_path / "cut", recipe, resume=True)
    for name in ("model.safetensors", HEADS_FILE):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    assert json.loads((again / "recipe.json").read_text())["recipe"] == json.loads(json.dumps(asdict(recipe)))
    other = pretrain(tmp_path / "other", replace(recipe, seed=1))
    assert (whole / HEADS_FILE).read_bytes() != (other / HEADS_FILE).read_bytes()


def test_the_card_says_what_the_scores_say(tmp_path):
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    minutes = json.loads((TINY / "recipe.json").read_text())["cpu_minutes"]
    write_card(tmp_path, json.loads((TINY / "scores.json").read_text()), minutes)
    assert (tmp_path / "README.md").read_text() == (TINY / "README.md").read_text()
