"""Batches of examples with no, one and two pictures, made by transformers' own processors of several families."""

from __future__ import annotations

import importlib

import pytest
from PIL import Image
from tokenizers import Tokenizer
from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLProcessor,
)

from eas_kit.errors import DataError
from eas_kit.models.tiny.architecture import make_processor
from eas_kit.tasks.base import Example, Task

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ 'PICTURE' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer(**named):
    bundled = make_processor(["user assistant: what is it? the answer is gold"] * 9).tokenizer
    ordinary = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    own = Tokenizer.from_str(bundled.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=own, **ordinary, extra_special_tokens=named)


def pictures(family, **settings):
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    name = f"{family.replace('_', '')}imageprocessorpil"
    return next(v for k, v in vars(module).items() if k.lower() == name)(**settings)


def square(side):
    return {"height": side, "width": side}


def llava():
    return make_processor(["user assistant: what is it? the answer is gold"] * 9)


def gemma3():
    words = tokenizer(image_token="<image_soft_token>", boi_token="<boi>", eoi_token="<eoi>")
    chat = CHAT.replace("PICTURE", "<boi>")
    return Gemma3Processor(pictures("gemma3", size=square(24)), words, chat_template=chat, image_seq_length=4)


def idefics3():
    words = tokenizer(
        image_token="<image>", around="<fake_token_around_image>", end="<end_of_utterance>", whole="<global-img>"
    )
    sizes = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}}
    chat = CHAT.replace("PICTURE", "<image>")
    return Idefics3Processor(pictures("idefics3", **sizes), words, chat_template=chat, image_seq_len=4)


def llava_next():
    sizes = {"size": {"shortest_edge": 24}, "crop_size": square(24), "image_grid_pinpoints": [[24, 48], [48, 24]]}
    return LlavaNextProcessor(
        pictures("llava_next", **sizes),
        tokenizer(image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=CHAT.replace("PICTURE", "<image>\n"),
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def qwen2_vl():
    pytest.importorskip("torchvision", reason="Qwen2VLProcessor has a part for videos, which needs torchvision")
    from transformers import Qwen2VLVideoProcessor

    marks = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    words = tokenizer(**marks, start="<|vision_start|>", end="<|vision_end|>")
    sizes = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    chat = CHAT.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>")
    return Qwen2VLProcessor(pictures("qwen2_vl", **sizes), words, Qwen2VLVideoProcessor(), chat_template=chat)


class Asked(Task):
    name = "asked"

    def question_text(self, example):
        return example.question

    def target_text(self, example):
        return example.answer, ""


RED, GREEN, BLUE = (Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue"))
EXAMPLES = [
    Example("none", "what is it?", "gold"),
    Example("one", "what is it?", "gold", images=(RED,)),
    Example("two", "what is", "the answer", images=(GREEN, BLUE)),
]
# processor -> tokens of one picture of 30 x 20
TOKENS = {llava: 9, gemma3: 4, idefics3: 5 * 4, llava_next: None, qwen2_vl: None}


@pytest.mark.parametrize("make", TOKENS, ids=lambda f: f.__name__)
def test_no_one_and_two_pictures_in_every_order(make):
    processor = make()
    task = Asked(processor)
    token = processor.tokenizer.image_token_id
    alone = [task.collate([e]) for e in EXAMPLES]
    one = int((alone[1]["input_ids"] == token).sum())
    assert one > 0 and TOKENS[make] in (None, one)
    for order in ([0], [1], [2], [0, 1], [1, 0], [2, 0], [1, 2], [0, 1, 2], [2, 1, 0], [0, 0]):
        batch = task.collate([EXAMPLES[i] for i in order])
        assert (batch["input_ids"] == token).sum(1).tolist() == [i * one for i in order]
        prompts = task.collate([EXAMPLES[i] for i in order], answers=False)
        for row, i in enumerate(order):  # each row is as the example alone, and its pictures are its own
            kept = batch["attention_mask"][row].bool()
            for key in ("input_ids", "labels", *({"token_type_ids", "mm_token_type_ids"} & set(batch))):
                assert batch[key][row][kept].tolist() == alone[i][key][0].tolist(), (key, order)
            mask = prompts["attention_mask"][row].bool()
            asked = alone[i]["input_ids"][0][alone[i]["labels"][0] == -100]
            assert prompts["input_ids"][row][mask].equal(asked)
        if sum(order) == 0:
            assert "pixel_values" not in batch
            continue
        values = batch["pixel_values"]
        if make is idefics3:  # (examples, pictures' parts ...), filled up with zeros
            parts = [v[: i * values.shape[1] // max(order)] for v, i in zip(values, order, strict=True)]
            assert sum(int(v.count_nonzero()) for v in parts) == int(values.count_nonzero())
        else:
            parts = values.split([i * len(alone[1]["pixel_values"]) for i in order])
        for part, i in zip(parts, order, strict=True):
            if i:
                assert part.equal(alone[i]["pixel_values"][0] if make is idefics3 else alone[i]["pixel_values"])


def test_a_text_with_the_mark_of_a_picture_is_refused():
    task = Asked(llava())
    with pytest.raises(DataError, match="asked: the text of example x holds '<image>', with which this model marks a"):
        task.collate([EXAMPLES[0], Example("x", "what is <image>?", "gold")])
