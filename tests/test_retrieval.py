"""Retrieval: recalls against ranks counted by hand, scores of pairs against single forwards, runs that stop."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captioned import TEST, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerProcessor,
    PreTrainedTokenizerFast,
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltProcessor,
)
from transformers.models.bridgetower.image_processing_pil_bridgetower import BridgeTowerImageProcessorPil
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

import eas_kit as eas
from eas_kit.errors import DataError, TaskError
from eas_kit.tasks import load_task, pictures


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
        said = [[int(word) for word in caption.split()[1:4:2]] for caption in text]
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


def lines_of(path) -> dict[str, list[float]]:
    """Scores by picture, as they stand in a file."""
    return {row["id"]: row["answer"] for row in map(json.loads, path.read_text().splitlines())}


def test_recall_is_that_counted_by_hand(folder):
    model = Matcher(table)
    result = load_task("flickr30k", Reader(), data_dir=folder).retrieve(model, images=None, batch_size=3)
    assert result["text_retrieval"] == pytest.approx(TEXT) and result["image_retrieval"] == pytest.approx(IMAGE)
    assert result["accuracy"] == pytest.approx((sum(TEXT.values()) + sum(IMAGE.values())) / 6)
    assert result["columns"] == pytest.approx(
        {f"TR@{k}": v for k, v in TEXT.items()} | {f"IR@{k}": v for k, v in IMAGE.items()}
    )
    # picture 0 has 2 of 8 captions: 1 - C(6, 5) / C(8, 5) = 50 / 56; the others 5 / 8 = 35 / 56
    assert result["chance"]["text_retrieval"] == pytest.approx({1: 1 / 7, 5: (50 + 6 * 35) / 56 / 7, 10: 1})
    assert result["chance"]["image_retrieval"] == pytest.approx({1: 1 / 7, 5: 5 / 7, 10: 1})
    assert (result["count"], model.pairs, result["method"], result["skipped"]) == (56, 56, "matching", 0)
    assert result["subset"]["images"] == result["subset"]["of"] == 7 and result["seconds"] > 0


def test_a_perfect_model_finds_all_and_a_constant_one_nothing(folder):
    task = load_task("flickr30k", Reader(), data_dir=folder)
    perfect = task.retrieve(Matcher(lambda i, j, o: -abs(i - o)), images=None)
    assert set(perfect["columns"].values()) == {1.0}
    constant = task.retrieve(Matcher(lambda i, j, o: 3), images=None)
    assert [constant["columns"][name] for name in ("TR@1", "IR@1", "TR@5", "IR@5")] == [0, 0, 0, 0]


def test_the_subset_is_drawn_by_seed_and_stated(folder, tmp_path):
    task = load_task("flickr30k", Reader(), data_dir=folder)
    model = Matcher(lambda i, j, o: i * j - o)

    def chosen(name, **settings):
        result = task.evaluate(model, "train", method="retrieval", predictions=tmp_path / f"{name}.jsonl", **settings)
        return result, list(lines_of(tmp_path / f"{name}.jsonl"))

    few, more = chosen("a", limit=4), chosen("b", limit=6)
    assert len(few[1]) == 4 and set(few[1]) < set(more[1]) and chosen("c", limit=4)[1] == few[1]
    assert few[0]["subset"] == {
        "images": 4, "of": 28, "captions": 12, "captions_per_image": "all", "seed": 0,
        "drawn": "pictures at random by seed, those of 10 are among those of 20; captions: the first of each picture",
    }  # fmt: skip
    one = task.retrieve(model, "train", images=4, captions_per_image=1, seed=5, scores=tmp_path / "d.jsonl")
    assert (one["subset"]["captions"], one["subset"]["seed"], one["count"]) == (4, 5, 16)
    assert list(lines_of(tmp_path / "d.jsonl")) != few[1]


def test_a_stopped_run_goes_on_and_a_file_is_scored_without_a_model(folder, tmp_path, opened):
    task, path = load_task("flickr30k", Reader(), data_dir=folder), tmp_path / "scores.jsonl"
    whole = task.retrieve(Matcher(table), images=None, scores=path)
    assert sorted(opened) == [f"p{i}.jpg" for i in TEST]  # once for all of its captions
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    with pytest.raises(DataError, match="line 4 is no valid JSON"):
        task.score_retrieval(path)
    path.write_text("".join(lines[:3]))
    with pytest.raises(DataError, match="4 of 7 pictures have no scores, as 'p3.jpg'; retrieve with the same settings"):
        task.score_retrieval(path)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    model = Matcher(table)
    again = task.retrieve(model, images=None, scores=path)
    assert model.pairs == 4 * 8 and path.read_text() == "".join(lines)
    scored = load_task("flickr30k", None, data_dir=folder).score_retrieval(path)
    assert scored.pop("scores") == str(path) and again.pop("seconds") > 0 and whole.pop("seconds") > 0
    assert again == whole == scored
    with pytest.raises(DataError, match="other settings: subset was .*'images': 7.* is .*'images': 5"):
        task.retrieve(model, images=5, scores=path)
    broken = json.loads(lines[0]) | {"answer": [1.0]}
    path.write_text(json.dumps(broken) + "\n" + "".join(lines[1:]))
    with pytest.raises(DataError, match="picture p0.jpg: wanted 8 scores, one a caption, got 1"):
        task.score_retrieval(path)
    task._captioned["test"] = task._captioned["val"] + task._captioned["test"]
    with pytest.raises(DataError, match="made with other pictures or captions than those of test here"):
        task.score_retrieval(path)
    path.with_suffix(".settings.json").write_text("{}")
    with pytest.raises(DataError, match="holds no scores of retrieval"):
        task.score_retrieval(path)
    path.with_suffix(".settings.json").unlink()
    with pytest.raises(DataError, match="there is no scores.settings.json beside it"):
        task.score_retrieval(path)


@pytest.mark.parametrize("first", ["", "It is "])
def test_yes_no_scores_are_those_of_prompts_alone(folder, tiny, opened, first):
    """The reference: a prompt, what both answers begin with, and the logits of what comes next, one by one."""
    model, processor = tiny
    task = load_task("flickr30k", processor, data_dir=folder)
    task.target_text = lambda e: (first + e.answer, "")
    path = folder / f"tiny{len(first)}.jsonl"
    result = task.retrieve(model.eval(), images=3, batch_size=2, scores=path)
    assert result["method"] == "yes_no" and len(opened) == 3
    rows = lines_of(path)
    captions = [e for e in task.captioned("test") if e.id in rows]
    wanted = []
    for picture in captions:
        for text in (c for e in captions for c in e.references):
            yes, no = (task.target_ids(task.pair(picture, text, right))[0] for right in (True, False))
            same = next(i for i in range(9) if yes[i] != no[i])
            assert (same > 0) == bool(first)
            inputs = task.collate([task.pair(picture, text, True)], answers=False)
            for key, new in (("input_ids", yes[:same]), ("attention_mask", [1] * same)):
                inputs[key] = torch.cat([inputs[key], torch.tensor([new], dtype=torch.long)], 1)
            with torch.inference_mode():
                log_p = model(**inputs).logits[0, -1].double().log_softmax(-1)
            wanted.append(float(log_p[yes[same]] - log_p[no[same]]))
    got = np.concatenate([rows[e.id] for e in captions])
    assert got == pytest.approx(np.array(wanted), abs=1e-4) and np.ptp(got) > 1e-2


def matchers():
    words = ["[PAD]", "[UNK]", "sentence", "of", *map(str, range(7))]
    vocabulary = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    made = Tokenizer(vocabulary)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    size = {"size": {"shortest_edge": 32}, "size_divisor": 16}
    part = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 14}
    torch.manual_seed(0)
    vilt = ViltConfig(**part, vocab_size=11, image_size=32, patch_size=16, max_position_embeddings=4)
    yield ViltForImageAndTextRetrieval(vilt), ViltProcessor(ViltImageProcessorPil(**size), tokenizer)
    bridge = BridgeTowerConfig(
        hidden_size=12, num_attention_heads=2, num_hidden_layers=2,
        text_config=part | {"vocab_size": 11, "max_position_embeddings": 19, "pad_token_id": 0},
        vision_config={"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 16, "image_size": 32},
    )  # fmt: skip
    pixels = BridgeTowerImageProcessorPil(**size, crop_size={"shortest_edge": 32})
    yield BridgeTowerForImageAndTextRetrieval(bridge), BridgeTowerProcessor(pixels, tokenizer)


@pytest.mark.parametrize("number", [0, 1], ids=["vilt, one logit, captions cut at 4 words", "bridgetower, two logits"])
def test_matching_heads(folder, tmp_path, opened, number):
    model, processor = list(matchers())[number]
    model.double()  # pictures come in float32
    task, path = load_task("flickr30k", processor, data_dir=folder), tmp_path / "s.jsonl"
    result = task.retrieve(model, images=3, batch_size=2, scores=path)
    assert len(opened) == 3 and result["method"] == "matching" and result["template"].startswith("the caption alone")
    rows = lines_of(path)
    shown = [e for e in task.captioned("test") if e.id in rows]
    captions = [c for e in shown for c in e.references]
    words = [caption.split()[: 4 if number == 0 else None] for caption in captions]
    for picture in shown:
        for said, score in zip(words, rows[picture.id], strict=True):
            inputs = processor(images=picture.images[0], text=" ".join(said), return_tensors="pt")
            inputs["pixel_values"] = inputs["pixel_values"].double()
            with torch.inference_mode():
                logits = model.eval()(**inputs).logits[0].tolist()
            assert score == pytest.approx(logits[0] if number == 0 else logits[1] - logits[0], abs=1e-5)


def test_pictures_that_cannot_be_opened_are_left_out_with_their_captions(tmp_path):
    (write(tmp_path) / "flickr30k-images" / "p6.jpg").write_bytes(b"no picture")
    task = load_task("flickr30k", Reader(), data_dir=tmp_path)
    with pytest.raises(DataError, match="record p6.jpg: the picture .*p6.jpg cannot be opened"):
        task.retrieve(Matcher(table), images=None)
    task = load_task("flickr30k", Reader(), data_dir=tmp_path, on_error="skip")
    result = task.retrieve(Matcher(table), images=None)
    # without picture and caption 6: ranks by row 1 5 4 3 1 1, by column 1 2 2 2 1 3 and 6
    assert (result["skipped"], result["count"]) == (1, 6 * 7)
    assert result["columns"] == pytest.approx(
        {"TR@1": 3 / 6, "TR@5": 1, "TR@10": 1, "IR@1": 2 / 7, "IR@5": 6 / 7, "IR@10": 1}
    )
    said, whole = tmp_path / "scores.jsonl", (tmp_path / "flickr30k-images" / "p5.jpg").read_bytes()
    assert task.retrieve(Matcher(table), images=None, scores=said)["skipped"] == 1
    (tmp_path / "flickr30k-images" / "p6.jpg").write_bytes(whole)
    again = Matcher(table)  # is asked of the mended picture alone
    assert task.retrieve(again, images=None, scores=said)["skipped"] == 0 and again.pairs == 8
    assert task.score_retrieval(said)["skipped"] == 0
    (tmp_path / "flickr30k-images" / "p6.jpg").write_bytes(b"no picture")
    for i in range(1, 6):
        (tmp_path / "flickr30k-images" / f"p{i}.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="less than two pictures can be opened; the first that cannot: .*p1.jpg"):
        task.retrieve(Matcher(table), images=None)


def test_wrong_settings_and_models(folder, tiny):
    task = load_task("flickr30k", Reader(), data_dir=folder, held_out={"search": 0})
    model = Matcher(table)
    for settings, message in (
        ({"images": 1}, "images is a whole number from 2 up, or None for all; not 1"),
        ({"captions_per_image": 0}, "captions_per_image is a whole number from 1 up, or None for all; not 0"),
        ({"method": "cosine"}, "the method of retrieval is one of yes_no, matching, not 'cosine'"),
        ({"batch_size": 0}, "batch_size is a whole number from 1 up, not 0"),
        ({"split": "search"}, "flickr30k has no examples for search; it has some for train, val, test"),
    ):
        with pytest.raises(TaskError, match=message):
            task.retrieve(model, **settings)
    with pytest.raises(TaskError, match="method is 'generate', 'options' or 'retrieval', not 'options2'"):
        task.evaluate(model, method="options2")
    with pytest.raises(TaskError, match="retrieval generates nothing; leave out generation={'top_k': 3}"):
        task.evaluate(model, method="retrieval", generation={"top_k": 3})
    with pytest.raises(TaskError, match="loaded without a processor"):
        load_task("flickr30k", None, data_dir=folder).retrieve(model)
    with pytest.raises(TaskError, match="score of picture p0.jpg with 'sentence 0 of 2 again again' is NaN; in half"):
        task.retrieve(Matcher(lambda i, j, o: float("nan")), images=None, captions_per_image=1)
    model.forward = lambda **inputs: {"loss": 1}
    with pytest.raises(TaskError, match="wanted logits or itm_score in the output of Matcher, it has loss; take"):
        task.retrieve(model)
    model.forward = lambda **inputs: SimpleNamespace(logits=torch.zeros(8, 5))
    with pytest.raises(
        TaskError, match=r"wanted logits of Matcher as \(B, 1\) or \(B, 2\) for B = 8 pairs, got \(8, 5\)"
    ):
        task.retrieve(model)
    task = load_task("flickr30k", tiny[1], data_dir=folder)
    task.target_text = lambda e: ("Yes or No", "")
    with pytest.raises(TaskError, match="writes Yes and No in the same way, .* cannot be told apart"):
        task.retrieve(tiny[0])
