"""The bundled model: its files, its loading, its recipe, and that pretraining resumes exactly."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from transformers import BertConfig

import eas_kit as eas
from eas_kit.errors import EASError, TaskError, TrainingError
from eas_kit.models import BUNDLED
from eas_kit.models.tiny.architecture import make_model, make_processor
from eas_kit.models.tiny.corpus import Corpus, labelled_patches, read_definitions
from eas_kit.models.tiny.pretrain import Recipe, learning_rate_factor, pretrain

FOLDER = BUNDLED["tiny"]


@pytest.fixture(scope="module")
def tiny():
    return eas.load_model("tiny")


def test_files_are_small_and_complete():
    assert (FOLDER / "model.safetensors").stat().st_size <= 16e6
    for name in ("config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja", "README.md"):
        assert (FOLDER / name).exists(), name
    assert (
        Recipe(
            **{
                k: tuple(v) if isinstance(v, list) else v
                for k, v in json.loads((FOLDER / "recipe.json").read_text())["recipe"].items()
            }
        )
        == Recipe()
    )


def test_it_is_a_stock_llava(tiny):
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model, processor = tiny
    assert type(model) is LlavaForConditionalGeneration and type(processor) is LlavaProcessor
    assert model.config.text_config.num_hidden_layers == 12 and model.dtype == torch.float32
    assert eas.load_model("tiny", torch_dtype=torch.bfloat16)[0].dtype == torch.bfloat16  # dtype's old name
    assert not model.training
    half, _ = eas.load_model("tiny", dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_same_path_for_any_folder(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = eas.load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path / "text")
    with pytest.raises(EASError, match=r"give device='cpu' or device_map='auto', not both"):
        eas.load_model(tmp_path, device="cpu", device_map="auto")
    with pytest.raises(EASError, match=r"is BertConfig, an encoder; wanted a decoder model"):
        eas.load_model(tmp_path / "text")
    with pytest.raises(EASError, match=r"no model .*nowhere.* not bundled \(tiny\)"):
        eas.load_model(tmp_path / "nowhere", local_files_only=True)


def test_scores_beside_the_weights_are_true(tiny):
    """The card's numbers, again, on a part of the test split."""
    model, processor = tiny
    told = json.loads((FOLDER / "scores.json").read_text())
    assert told["reading"]["columns"]["number"] >= 0.97
    reading = eas.load_task("reading", processor).score(model, "test", limit=240)
    assert reading["accuracy"] == pytest.approx(told["reading"]["accuracy"], abs=0.05)
    elements = eas.load_task("elements", processor).evaluate(model, "test", limit=150, method="options")
    zero_shot = told["elements zero-shot, options"]["accuracy"]
    assert told["chance on elements"] < zero_shot < 0.6
    assert elements["accuracy"] == pytest.approx(zero_shot, abs=0.12)


def test_chat_template_and_image_tokens(tiny):
    _, processor = tiny
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == "USER: <image>\nWhich?\nASSISTANT:"
    turns.append({"role": "assistant", "content": "That."})
    assert processor.apply_chat_template(turns).endswith("ASSISTANT: That.</s>")
    ids = processor.tokenizer("number 118")["input_ids"]
    assert processor.tokenizer.convert_ids_to_tokens(ids)[-3:] == ["1", "1", "8"]  # digits stay single


WORDS = '00001740 03 n 01 {word} 0 000 | a made-up sense of {word}; "an example"  \n'


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """Small files in WordNet's own format."""
    folder = tmp_path_factory.mktemp("wordnet")
    for part in ("noun", "verb", "adj", "adv"):
        lines = ["  1 a line of the licence\n"] + [WORDS.format(word=f"{part}_{i}(a)") for i in range(60)]
        (folder / f"data.{part}").write_text("".join(lines))
    return folder


def test_definitions_are_read_and_held_out(wordnet):
    train, held_out = read_definitions(wordnet)
    assert len(train) == 237 and len(held_out) == 3 and not set(train) & set(held_out)
    assert held_out[0] == 'noun 0: a made-up sense of noun_0(a); "an example"'
    with pytest.raises(TaskError, match="install Debian's package wordnet-base"):
        read_definitions(wordnet / "none")


def test_batches_depend_on_seed_and_step_alone(wordnet):
    definitions, _ = read_definitions(wordnet)
    processor = make_processor(definitions)
    one, two = Corpus(processor, definitions, seed=3), Corpus(processor, definitions, seed=3)
    for make in (lambda c, s: c.seeing_batch(s), lambda c, s: c.reading_batch(s, 5, 61)):
        a, b, other = make(one, 7), make(two, 7), make(one, 8)
        assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["input_ids"][:1], other["input_ids"][:1])
        images = int((a["input_ids"] == processor.image_token_id).sum())
        assert images == 9 * len(a["pixel_values"]), "pictures are never cut"
        assert (a["labels"][a["input_ids"] == processor.image_token_id] == -100).all()
    pixels, labels = labelled_patches(processor, 0, 5, seed=3)
    blank = pixels.unfold(2, 8, 8).unfold(3, 8, 8).amax((1, 4, 5)).flatten(1) < -0.99
    assert ((labels == 10) == blank).all()


def test_learning_rate_has_two_cycles():
    recipe = Recipe()
    rates = [learning_rate_factor(step, recipe) for step in range(recipe.steps + 1)]
    assert max(rates) == pytest.approx(1.0, abs=1e-3) and rates[0] == 1 / recipe.warmup_steps
    assert rates[recipe.reading_steps - 1] == pytest.approx(recipe.final_share, abs=1e-4)
    assert rates[recipe.reading_steps] == pytest.approx(recipe.second_share)
    assert rates[-1] == pytest.approx(recipe.final_share)


def test_pretraining_resumes_bit_for_bit(wordnet, tmp_path):
    recipe = Recipe(vision_steps=1, seeing_steps=1, reading_steps=3, steps=4, rows=2, row_length=48, warmup_steps=1)
    whole = pretrain(tmp_path / "whole", recipe, wordnet)

    class Cut(Exception):
        pass

    def cut(corpus, step, rows, length, mixture):
        if step == 2:
            raise Cut
        return original(corpus, step, rows, length, mixture)

    original = Corpus.reading_batch
    try:
        Corpus.reading_batch = cut
        with pytest.raises(Cut):
            pretrain(tmp_path / "cut", recipe, wordnet, checkpoint_every=1)
    finally:
        Corpus.reading_batch = original
    with pytest.raises(TrainingError, match="made with another recipe"):
        pretrain(tmp_path / "cut", replace(recipe, seed=1), wordnet, resume=True)
    again = pretrain(tmp_path / "cut", recipe, wordnet, resume=True)
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert json.loads((again / "recipe.json").read_text())["recipe"] == json.loads(json.dumps(asdict(recipe)))


def test_a_fresh_model_depends_on_its_seed(wordnet):
    processor = make_processor(read_definitions(wordnet)[0])
    one, two, other = (make_model(processor, seed) for seed in (1, 1, 2))
    first = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.state_dict()[first], two.state_dict()[first])
    assert not torch.equal(one.state_dict()[first], other.state_dict()[first])
