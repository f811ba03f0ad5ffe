"""Task flickr30k: questions dealt by picture, and retrieval against ranks counted by hand."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BridgeTowerConfig, BridgeTowerForImageAndTextRetrieval, BridgeTowerProcessor
from transformers import PreTrainedTokenizerFast, ViltConfig, ViltForImageAndTextRetrieval, ViltProcessor
from transformers.models.bridgetower.image_processing_pil_bridgetower import BridgeTowerImageProcessorPil
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

import eas_kit as eas
from eas_kit.errors import DataError, TaskError
from eas_kit.tasks import load_task, pictures
from eas_kit.tasks.base import ROLES

TEST, VAL, TRAIN = range(7), range(7, 10), range(10, 40)
JSON = "dataset_flickr30k.json"


def records() -> list[dict]:
    """Seven test pictures with a caption each and the first with two, three for val and 30 for train with three."""
    found = []
    for i in (*TRAIN, *VAL, *TEST):
        split = "test" if i in TEST else "val" if i in VAL else "train"
        raw = [f"sentence {j} of {i}" for j in range(3 if i > 6 else 2 if i == 0 else 1)]
        sentences = [{"raw": text, "tokens": text.split(), "imgid": i, "sentid": j} for j, text in enumerate(raw)]
        found.append({"filename": f"p{i}.jpg", "split": split, "imgid": i, "sentences": sentences})
    return found


def write(folder, images: list | None = None, place: str = "flickr30k-images"):
    """Picture i is red, of the strength i."""
    (folder / place).mkdir(parents=True)
    for i in (*TEST, *VAL, *TRAIN):
        Image.new("RGB", (5, 3), (i, 0, 0)).save(folder / place / f"p{i}.jpg", format="PNG")
    (folder / JSON).write_text(json.dumps({"dataset": "flickr30k", "images": records() if images is None else images}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("flickr"))


@pytest.fixture(scope="module")
def tiny():
    return eas.load_model("tiny")


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of all pictures that are opened."""
    names, right = [], pictures.open_picture
    monkeypatch.setattr(pictures, "open_picture", lambda source: names.append(source.record) or right(source))
    return names


class Reader:
    """In place of a processor: the number of the picture, and the two of the caption."""

    tokenizer, image_processor = SimpleNamespace(pad_token_id=0), object()

    def __call__(self, images, text, padding, return_tensors):
        said = [[int(word) for word in caption.split()[1::2]] for caption in text]
        return {"picture": torch.tensor([im.getpixel((0, 0))[0] for im in images]), "caption": torch.tensor(said)}


class Matcher(torch.nn.Module):
    """A model whose score of picture i with caption j of picture o is a function of i, j, o."""

    def __init__(self, function):
        super().__init__()
        self.weight, self.function, self.pairs = torch.nn.Parameter(torch.ones(1)), function, 0

    def forward(self, picture, caption):
        self.pairs += len(picture)
        rows = [self.function(int(i), int(j), int(o)) for i, (j, o) in zip(picture, caption)]
        return SimpleNamespace(logits=torch.tensor(rows, dtype=torch.float32)[:, None])


OWN = [90, 15, 25, 35, 90, 53, 59]


def table(i: int, j: int, o: int) -> float:
    """Second caption: everybody's but its own. First: 10 o + i for others, and so at home that ranks are known."""
    if j == 1:
        return -5 if i == o else -1
    return OWN[i] if i == o else 10 * o + i


# by row, for pictures 0 to 6, the own caption's rank is 1 6 5 4 1 2 1; by column, the own picture's, behind its equals,
# is 1 3 3 3 1 4 7, and 7 for the second caption of 0
TEXT = {1: 3 / 7, 5: 6 / 7, 10: 1.0}
IMAGE = {1: 2 / 8, 5: 6 / 8, 10: 1.0}


# ---------------------------------------------------------------------- roles and questions
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
        belongs = f"p{example.question.split()[-1]}.jpg" == example.group
        assert (example.answer, example.categories) == (("Yes", ("matching",)) if belongs else ("No", ("mismatching",)))
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
    assert result["accuracy"] == 0.5 or 0 < result["accuracy"] < 1
    assert result["column_counts"] == {"matching": 8, "mismatching": 8}
    assert task.evaluate(model, "test", 4)["count"] == 4
