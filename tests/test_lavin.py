"""LaVIN: its sequence and mask against a stock Llama that never sees the modality token, its features against loops,
its loading, and the bundled parts with adapters after one real optimiser step."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from PIL import Image
from torch import Tensor
from toys import snapshot, stir
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import eas_kit as eas
from eas_kit.errors import ConfigError, EASError, PromptError
from eas_kit.hub import make_card
from eas_kit.meta import meta_model
from eas_kit.models import load_processor
from eas_kit.models.lavin import LavinConfig, LavinForConditionalGeneration, LavinProcessor, chat_template

PAD, BOS, EOS, IMAGE, MODALITY = 0, 1, 2, 89, 90
VOCAB, WIDTH, VISION, BLOCKS, SIDE = 97, 34, 22, 5, 9
TAPS = 2  # of 5 blocks, every 2nd: after the 2nd and the 4th
G = 1e9


def make_config(**changes) -> LavinConfig:
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=53,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=14,
        max_position_embeddings=211,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=VISION,
        intermediate_size=29,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=3,
        initializer_factor=3.0,
    )
    values = {"image_token_id": IMAGE, "modality_token_id": MODALITY, "vision_step": 2, "projector_size": 13}
    return LavinConfig(**{"text_config": text, "vision_config": vision, "vision_rank": 6} | values | changes)


@pytest.fixture(scope="module")
def model() -> LavinForConditionalGeneration:
    torch.manual_seed(0)
    made = LavinForConditionalGeneration(make_config())
    made.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():  # gains off one, biases and the adapters' ups off zero
        if parameter.dim() == 1 or not parameter.any():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made.eval()


def make_batch(side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Rows of 11, 6 and 9 tokens, the first and the last with a picture."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, IMAGE, (n,), generator=generator).tolist() for n in (7, 4, 5)]
    rows = [[MODALITY, BOS, *([IMAGE] * TAPS if n != 1 else []), *row] for n, row in enumerate(rows)]
    longest = max(map(len, rows))

    def pad(row: list[int], filler: int) -> list[int]:
        gap = [filler] * (longest - len(row))
        return gap + row if side == "left" else row + gap

    return {
        "input_ids": torch.tensor([pad(row, PAD) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        "pixel_values": torch.randn(2, 3, SIDE, SIDE, generator=generator),
    }


def reference_image_tokens(model: LavinForConditionalGeneration, pixels: Tensor) -> Tensor:
    """(TAPS, WIDTH) of one picture (3, SIDE, SIDE): a stock tower without hooks, the adapters written out."""
    tower = CLIPVisionModel(model.config.vision_config).to(pixels.dtype)
    tower.load_state_dict(model.vision_tower.state_dict())
    x, classes = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0], []
    for number, (layer, pia) in enumerate(zip(tower.encoder.layers, model.vision_adapters, strict=True), 1):
        n = layer.layer_norm1(x)
        logits = [sum(float(r) * float(v) for r, v in zip(row, n.mean(0), strict=True)) for row in pia.router.weight]
        w = torch.softmax((torch.tensor(logits).to(n) + pia.router.bias) / 10, 0)
        up = [torch.block_diag(*u.weight.chunk(2)) for u in (pia.up_0, pia.up_1)]
        adapted = []
        for position in n:
            z = pia.down_pooled.weight @ position + pia.down_pooled.bias
            both = [w[k] * (up[k] @ z + (pia.up_0, pia.up_1)[k].bias) for k in (0, 1)]
            adapted.append(position + both[0] + both[1])
        x = x + layer.self_attn(torch.stack(adapted)[None], attention_mask=None)[0][0]
        x = x + layer.mlp(layer.layer_norm2(x))
        if number in (2, 4):
            classes.append(x[0])
    first, second = model.projector[0], model.projector[2]
    hidden = [first.weight @ c + first.bias for c in classes]
    return torch.stack([second.weight @ (h * torch.sigmoid(h)) + second.bias for h in hidden])


def reference_embeddings(model: LavinForConditionalGeneration, batch: dict[str, Tensor]) -> list[Tensor]:
    """Of each row without padding and without its modality token."""
    pictures, out = list(batch["pixel_values"]), []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[mask.bool()][1:]
        vectors = model.get_input_embeddings().weight[ids].clone()
        places = (ids == IMAGE).nonzero().flatten()
        if len(places):
            vectors[places] = reference_image_tokens(model, pictures.pop(0))
        out.append(vectors)
    return out


def stock_logits(model: LavinForConditionalGeneration, embeddings: Tensor) -> Tensor:
    return model.language_model(inputs_embeds=embeddings[None]).logits[0]


# ------------------------------------------------------------------------------------------------ the computation


@torch.no_grad()
def test_image_tokens_are_those_of_the_formula(model):
    model = copy.deepcopy(model).double()
    pixels = make_batch()["pixel_values"].double()
    seen = model.get_image_features(pixels)
    assert seen.shape == (2, TAPS, WIDTH)
    for one, picture in zip(seen, pixels, strict=True):
        torch.testing.assert_close(one, reference_image_tokens(model, picture), rtol=1e-6, atol=1e-6)
    patches = LavinForConditionalGeneration(make_config(vision_positions="patches", vision_step=BLOCKS)).eval().double()
    patches.load_state_dict(model.state_dict())
    every = patches.vision_tower(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(patches.get_image_features(pixels), model.projector(every))
    assert patches.config.image_seq_length == every.shape[1] == 9
    for pia in model.vision_adapters:
        pia.reset_parameters()  # control: adapters that are new return their input
    assert not torch.allclose(model.get_image_features(pixels), seen, rtol=0.01)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_nobody_sees_the_modality_token(model, side, attention):
    """What stands behind it is as in a Llama that never had it, and its own place as in a Llama that has it alone."""
    batch = make_batch(side)
    model.set_attn_implementation(attention)
    try:
        logits = model(**batch).logits
        alone = [stock_logits(model, model.modality.weight[kind][None]) for kind in (1, 0, 1)]
        for row, vectors in enumerate(reference_embeddings(model, batch)):
            seen = logits[row][batch["attention_mask"][row].bool()]
            torch.testing.assert_close(seen[1:], stock_logits(model, vectors), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(seen[:1], alone[row], rtol=1e-4, atol=1e-4)
    finally:
        model.set_attn_implementation("eager")


@pytest.mark.parametrize("way", ["dynamic", "static", "uncached", "own_static"])
@torch.no_grad()
def test_decoding_does_not_see_it_either(model, way):
    batch, new = make_batch("left"), 5
    options = {"static": {"cache_implementation": "static"}, "uncached": {"use_cache": False}}.get(way, {})
    if way == "own_static":
        longest = batch["input_ids"].shape[1] + new
        options = {"past_key_values": StaticCache(config=model.config.get_text_config(), max_cache_len=longest)}
    seen = model.generate(**batch, max_new_tokens=new, do_sample=False, **options)[:, -new:]
    for row, vectors in enumerate(reference_embeddings(model, batch)):
        for token in seen[row]:
            logits = stock_logits(model, vectors)[-1]
            logits[[IMAGE, MODALITY]] = -torch.inf
            assert int(logits.argmax()) == int(token)
            vectors = torch.cat([vectors, model.get_input_embeddings().weight[token][None]])


@torch.no_grad()
def test_it_is_read_in_the_mean_over_the_prompt_alone(model):
    batch = make_batch()
    dense = model(**batch).logits
    net = eas.attach(copy.deepcopy(model), eas.EASConfig(skip_rank=6, adapt_rank=4))
    stir(net.adapters)
    adapted = net(**batch).logits
    attended = batch["attention_mask"].bool()
    attended[:, 1:] &= attended[:, :-1]  # without each row's first, the modality token
    attended[0, 0] = False  # a row without padding begins at 0
    for vectors in (model.modality.weight, net.base.modality.weight):
        vectors[1] += 1
    try:
        assert torch.equal(model(**batch).logits[attended], dense[attended])
        changed = (net(**batch).logits - adapted).abs().amax(-1)
        assert (changed[0][attended[0]] > 1e-4).all()
        assert (changed[1] == 0).all()  # a row of text has the other vector
    finally:
        model.modality.weight[1] -= 1


def test_what_trains(model):
    """All three added parts learn from a batch with pictures; from text alone only the vector of text does."""
    net = eas.attach(copy.deepcopy(model), eas.EASConfig(skip_rank=6, adapt_rank=4, dropout=0.0))
    stir(net.adapters)
    net.mask = [1]
    batch = make_batch("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :5] = -100
    trained = set(net.trained_parts.tensors)
    assert {name.split(".")[0] for name in trained} == set(LavinForConditionalGeneration.eas_modules_to_save)
    net(**batch, labels=labels).loss.backward()
    named = dict(net.base.named_parameters())
    # the last block of the tower stands behind the last class token that is taken
    silent = {name for name in trained if named[name].grad is None or not named[name].grad.any()}
    assert silent == {name for name in trained if name.startswith(f"vision_adapters.{BLOCKS - 1}.")}
    net.zero_grad()
    text = {name: value[1:2] for name, value in batch.items() if name != "pixel_values"}
    net(**text, labels=labels[1:2]).loss.backward()
    assert net.base.modality.weight.grad[0].any()
    assert not net.base.modality.weight.grad[1].any()
    assert all(named[name].grad is None for name in trained if not name.startswith("modality"))


# ------------------------------------------------------------------------------------------------------- generate


@torch.no_grad()
def test_placeholders_are_never_written(model):
    loud = copy.deepcopy(model)
    batch = make_batch()
    head, likely = loud.get_output_embeddings().weight, model(**batch).logits[0, -1].argmax()
    head[[IMAGE, MODALITY]] = 2 * head[likely]
    logits = loud(**batch).logits[:, -1]
    assert any(int(row.argmax()) in (IMAGE, MODALITY) for row in logits)  # they are what it would like to say
    for options in ({}, {"num_beams": 3}, {"do_sample": True}):
        torch.manual_seed(0)
        seen = loud.generate(**batch, max_new_tokens=7, **options)[:, batch["input_ids"].shape[1] :]
        assert not ((seen == IMAGE) | (seen == MODALITY)).any()


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.3, "top_k": 11},
    ],
    ids=lambda options: next(iter(options)),
)
@torch.no_grad()
def test_generate_with_and_without_adapters(model, options):
    """A cache changes nothing, nor does a merge, nor what else is in the batch."""
    net = eas.attach(copy.deepcopy(model), eas.EASConfig(skip_rank=6, adapt_rank=4))
    stir(net.adapters)
    net.mask = [0]
    batch = make_batch()

    def run(inputs, **more):
        torch.manual_seed(0)
        return net.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False} | options | more)[:, -6:]

    cached = run(batch)
    assert torch.equal(run(batch, use_cache=False), cached)
    assert torch.equal(run(batch, merge="low_rank"), cached)
    if options.get("do_sample"):
        return
    plain = net.generate(**batch, max_new_tokens=6, do_sample=False)[:, -6:]
    assert not torch.equal(cached[:: len(cached) // 3], plain)  # the option does something
    alone = {name: value[2:] for name, value in batch.items() if name != "pixel_values"}
    alone = {name: value[:, 2:] for name, value in alone.items()} | {"pixel_values": batch["pixel_values"][1:]}
    assert torch.equal(run(alone), cached[-(len(cached) // 3) :])


@torch.no_grad()
def test_drafts_about_a_picture(model):
    """An assistant of the same class is given the picture: its drafts are taken."""
    row = {name: value[:1] for name, value in make_batch().items()}
    twin, lengths = copy.deepcopy(model), []
    twin.generation_config.num_assistant_tokens = 3
    twin.generation_config.num_assistant_tokens_schedule = "constant"
    twin.generation_config.assistant_confidence_threshold = 0.0
    expected = model.generate(**row, max_new_tokens=8, do_sample=False)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        seen = model.generate(**row, max_new_tokens=8, do_sample=False, assistant_model=twin)
        lookup = model.generate(**row, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    finally:
        handle.remove()
    assert torch.equal(seen, expected)
    assert torch.equal(lookup, expected)
    assert lengths[:2] == [row["input_ids"].shape[1] + 3, 4]
    blind = {name: value for name, value in row.items() if name != "pixel_values"}
    with pytest.raises(PromptError, match="0 pictures take 0 image tokens"):
        model.generate(**blind, max_new_tokens=2)


def test_compiled_decoding(model):
    """Static cache and torch.compile, as generate does it on a GPU: one graph, merged or not, for all prompts."""
    net = eas.attach(copy.deepcopy(model), eas.EASConfig(skip_rank=6, adapt_rank=4))
    stir(net.adapters)
    net.mask = [1]
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    for merge in (False, "low_rank"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        graphs = []
        for seed in (0, 1):
            options = {"max_new_tokens": 5, "do_sample": False, "merge": merge}
            expected = net.generate(**make_batch(seed=seed), **options)
            static = {"cache_implementation": "static", "compile_config": config}
            assert torch.equal(net.generate(**make_batch(seed=seed), **options, **static), expected)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs[0] >= 1
        assert graphs[0] == graphs[1]
        assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_inputs_that_cannot_be_right(model):
    batch = make_batch()
    late = batch | {"input_ids": batch["input_ids"].clone()}
    late["input_ids"][1, 5:7] = torch.tensor([BOS, MODALITY])
    with pytest.raises(PromptError, match=r"rows \[1\] of the batch do not begin with the modality token \(90\)"):
        model(**late)
    twice = batch | {"input_ids": batch["input_ids"].clone()}
    twice["input_ids"][:, -1] = MODALITY
    with pytest.raises(PromptError, match=r"rows \[0, 1, 2\].*once and nowhere else.*LavinProcessor"):
        model.generate(**twice)
    with pytest.raises(PromptError, match="1 pictures take 2 image tokens, 2 each, and input_ids hold 4"):
        model(**batch | {"pixel_values": batch["pixel_values"][:1]})
    for wrong in ({}, {"inputs_embeds": torch.zeros(1, 2, WIDTH), "pixel_values": batch["pixel_values"]}):
        with pytest.raises(PromptError, match="wanted input_ids, with pixel_values where there are pictures, or"):
            model(**wrong)
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        copy.deepcopy(model).set_attn_implementation("flash_attention_2")


@torch.no_grad()
def test_ready_embeddings(model):
    """The same answer where the caller has put the vectors together."""
    batch = make_batch()
    embeddings = model._embed(batch["input_ids"], batch["pixel_values"])
    rest = {"attention_mask": batch["attention_mask"]}
    assert torch.equal(model(inputs_embeds=embeddings, **rest).logits, model(**batch).logits)
    seen = model.generate(inputs_embeds=embeddings, **rest, max_new_tokens=4, do_sample=False)
    assert torch.equal(seen, model.generate(**batch, max_new_tokens=4, do_sample=False)[:, -4:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_step": 6}, "vision_step: wanted a whole number from 1 to 5, the blocks of the vision tower, got 6"),
        ({"vision_positions": "all"}, r"vision_positions: wanted one of \('class', 'patches'\), got 'all'"),
        ({"text_config": MistralConfig()}, "text_config: wanted a LlamaConfig, got a MistralConfig"),
        ({"vision_config": CLIPConfig()}, "vision_config: wanted a CLIPVisionConfig, got a CLIPConfig"),
        ({"projector_size": 0}, "projector_size: wanted a whole number from 1 up, got 0"),
        ({"vision_groups": 4}, "vision_groups: wanted a divisor of vision_rank 6 and of the tower's width 22, got 4"),
    ],
)
def test_sizes_that_do_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


# -------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A Llama whose tokenizer has neither placeholders nor padding, and a whole CLIP, as they come from the hub."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = copy.deepcopy(eas.load_model("tiny")[1].tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("<image>", "<pad>"):
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != name]
        state["model"]["vocab"][f"was {name}"] = state["model"]["vocab"].pop(name)
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    plain.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    config = make_config()
    text = LlamaConfig(**config.text_config.to_dict() | {"vocab_size": len(plain), "pad_token_id": None, "dtype": None})
    LlamaForCausalLM(text).save_pretrained(folder / "llama")
    vision = config.vision_config.to_dict()
    clip = CLIPConfig(vision_config=vision, text_config={"hidden_size": 14, "num_attention_heads": 2, "vocab_size": 11})
    CLIPModel(clip).save_pretrained(folder / "clip")
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=square, crop_size=square).save_pretrained(folder / "clip")
    return folder


def load(parts, **kwargs):
    return eas.load_model("lavin", llama=parts / "llama", clip=parts / "clip", **{"vision_rank": 6} | kwargs)


def test_load_lavin_from_its_parts(parts, capfd):
    random = torch.random.get_rng_state()
    model, processor = load(parts)
    assert "UNEXPECTED" not in capfd.readouterr().err  # of CLIP's text tower
    assert torch.equal(torch.random.get_rng_state(), random)
    assert isinstance(model, LavinForConditionalGeneration)
    assert isinstance(processor, LavinProcessor)
    assert not model.training
    llama = LlamaForCausalLM.from_pretrained(parts / "llama")
    clip = CLIPModel.from_pretrained(parts / "clip")
    size = llama.config.vocab_size
    for name, tensor in llama.state_dict().items():
        mine = model.language_model.state_dict()[name]
        assert torch.equal(mine[: len(tensor)], tensor), name
        if len(mine) != len(tensor):  # both placeholders and a token to pad with; none of them is likely
            assert mine.shape == (size + 3, WIDTH)
            torch.testing.assert_close(mine[size:], tensor.mean(0).expand(3, -1))
    for name, tensor in clip.vision_model.state_dict().items():
        assert torch.equal(model.vision_tower.state_dict()[name], tensor), name
    assert (model.config.image_token_id, model.config.modality_token_id) == (size, size + 1)
    assert processor.tokenizer.pad_token_id == model.config.text_config.pad_token_id == size + 2
    assert model.config.taps == (4,)  # LaVIN's own every 4th, of 5 blocks
    assert processor.image_seq_length == 1
    for pia in model.vision_adapters:
        assert not pia.up_0.weight.any()
        assert pia.down_pooled.weight.any()
    same, other = load(parts)[0], load(parts, seed=1)[0]
    for name in LavinForConditionalGeneration.eas_modules_to_save:
        old, again, different = (m.get_submodule(name).state_dict() for m in (model, same, other))
        assert all(torch.equal(old[key], again[key]) for key in old)
        assert any(not torch.equal(old[key], different[key]) for key in old)


def test_a_saved_lavin_is_a_model_like_any_other(parts, tmp_path, monkeypatch):
    model, processor = load(parts, vision_step=2)
    stir(model.vision_adapters)
    model.save_pretrained(tmp_path / "lavin")
    processor.save_pretrained(tmp_path / "lavin")
    monkeypatch.chdir(tmp_path)
    again, reader = eas.load_model("./lavin")  # not the name
    inputs = example_inputs(processor)
    read = example_inputs(reader)
    assert inputs.keys() == read.keys()
    assert all(torch.equal(inputs[key], read[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again.generation_config.suppress_tokens == [model.config.image_token_id, model.config.modality_token_id]
    assert again.config.taps == (2, 4)
    assert len(eas.describe(tmp_path / "lavin")) == 3
    for file in ("config.json", "model.safetensors"):  # a processor alone says its class itself
        assert isinstance(load_processor(tmp_path / "lavin"), LavinProcessor)
        (tmp_path / "lavin" / file).unlink()
    with pytest.raises(ConfigError, match=r"its folder, as a path \('./lavin'\)"):
        eas.load_model("lavin")


def example_inputs(processor):
    pictures = [Image.new("RGB", (SIDE + 4, SIDE), color) for color in ("red", "blue")]
    texts = ["Image: <image>\nWhat is it?", "Image: N/A\nhello", "Image: <image>\nAnd it?"]
    return processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")


def test_half_precision_keeps_what_trains_in_float32(parts, tmp_path):
    model, processor = load(parts, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for made in (model, eas.load_model(tmp_path)[0]):
        kinds = {name.split(".")[0]: parameter.dtype for name, parameter in made.named_parameters()}
        assert {kinds.pop(name) for name in LavinForConditionalGeneration.eas_modules_to_save} == {torch.float32}
        assert set(kinds.values()) == {torch.bfloat16}
        assert made.dtype == torch.bfloat16
        with torch.no_grad():
            assert made(**example_inputs(processor)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"llama": None}, r"wanted llama= and clip=.*got llama=None, clip="),
        ({"clip": None}, r"wanted llama= and clip=.*clip=None"),
        ({"llama": "mistral"}, r"llama='.*mistral'\): wanted a Llama \(LlamaForCausalLM\), that is MistralForCausalLM"),
        ({"llama": "clip"}, r"wanted a Llama \(LlamaForCausalLM\), that is CLIPModel"),
        ({"clip": "llama"}, r"clip='.*llama'\): wanted a CLIP, or its vision tower .*, that is LlamaForCausalLM"),
        ({"clip": "nowhere"}, "no model '.*nowhere'"),
        ({"clip": "large"}, r"its image processor makes pictures of .*'height': 12.* and its tower reads 9 x 9"),
        ({"clip": "blind"}, r"it has no image processor \(preprocessor_config.json\)"),
        ({"device_map": "auto"}, r"there is no device_map here; wanted some of llama, clip, seed, vision_step"),
        ({"vision_step": 6}, "vision_step: wanted a whole number from 1 to 5"),
        ({"seed": -1}, "seed: wanted a whole number from 0 up, got -1"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_parts_that_do_not_fit(parts, kwargs, message):
    if not (parts / "mistral").exists():
        shutil.copytree(parts / "llama", parts / "mistral")
        small = {"hidden_size": 14, "intermediate_size": 11, "num_hidden_layers": 1, "num_attention_heads": 1}
        MistralForCausalLM(MistralConfig(vocab_size=13, num_key_value_heads=1, **small)).save_pretrained(
            parts / "mistral"
        )
        for name in ("large", "blind"):
            shutil.copytree(parts / "clip", parts / name)
        square = {"height": 12, "width": 12}
        CLIPImageProcessorPil(size=square, crop_size=square).save_pretrained(parts / "large")
        (parts / "blind" / "preprocessor_config.json").unlink()
    found = {"llama": "llama", "clip": "clip"} | {key: kwargs[key] for key in ("llama", "clip") if key in kwargs}
    named = {key: None if value is None else str(parts / value) for key, value in found.items()}
    with pytest.raises(EASError, match=message):
        eas.load_model("lavin", **{"vision_rank": 6} | kwargs | named)


# ----------------------------------------------------------------------------------------------------- the processor


@pytest.fixture(scope="module")
def tiny():
    return eas.load_model("tiny-lavin")


def test_the_bundled_parts_stay_as_they_are(tiny):
    """The same Llama and tower as in the bundled LLaVA, in its attention, with new parts drawn from the seed."""
    llava, mine = eas.load_model("tiny")[0], tiny[0]
    for theirs, ours in (
        (llava.model.language_model, mine.get_decoder()),
        (llava.model.vision_tower, mine.vision_tower),
    ):
        state = ours.state_dict()
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(state[name][: len(tensor)], tensor), name
    assert mine.language_model.config._attn_implementation == "eager"
    assert mine.get_output_embeddings().weight is mine.get_input_embeddings().weight
    again, other = eas.load_model("tiny-lavin")[0], eas.load_model("tiny-lavin", seed=1, vision_rank=4)[0]
    assert torch.equal(again.projector[2].weight, mine.projector[2].weight)
    assert not torch.equal(other.projector[2].weight, mine.projector[2].weight)
    assert other.vision_adapters[0].rank == 4
    with pytest.raises(ConfigError, match=r"load_model\('tiny-lavin'\): there is no llama here; wanted some of seed"):
        eas.load_model("tiny-lavin", llama="somewhere")


def test_sequence(tiny):
    """[modality] <s> Image: and its tokens, or N/A; pictures and texts share a batch, on either side of the padding."""
    model, processor = tiny
    tokenizer = processor.tokenizer
    for side in ("left", "right"):
        texts = ["Image: <image>\nwhat?", "Image: N/A\nwhat is it then?"]
        picture = [Image.new("RGB", (24, 24))]
        batch = processor(text=texts, images=picture, padding=True, padding_side=side, return_tensors="pt")
        assert batch["pixel_values"].shape == (1, 3, 24, 24)
        for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], texts, strict=True):
            row = ids[mask.bool()].tolist()
            image = model.config.image_token_id
            known = tokenizer(text, add_special_tokens=False)["input_ids"]
            expected = [token for one in known for token in ([image] * 9 if one == image else [one])]
            assert row == [model.config.modality_token_id, tokenizer.bos_token_id, *expected]
            pads = ids[~mask.bool()].tolist()
            assert set(pads) <= {tokenizer.pad_token_id}
            assert mask.tolist() == (
                [0] * len(pads) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(pads)
            )
        assert f"<s>Image: {9 * '<image>'}\nwhat?" in tokenizer.decode(batch["input_ids"][0])
    written = processor(text="<s>Image: N/A\n", add_special_tokens=False)["input_ids"]
    assert written == processor(text=["Image: N/A\n"])["input_ids"]
    assert processor(text="hm", return_attention_mask=False)["input_ids"][0][0] == model.config.modality_token_id
    with pytest.raises(PromptError, match="a text holds '<modality>', which this processor puts in front"):
        processor(text="<modality><s>Image: N/A")


def test_chats(tiny):
    """One picture, none, several, and a chat of two turns; as text and as inputs."""
    processor = tiny[1]
    picture = Image.new("RGB", (24, 24), "white")

    def turn(text, pictures=0):
        return {
            "role": "user",
            "content": [*[{"type": "image", "image": picture}] * pictures, {"type": "text", "text": text}],
        }

    def written(*turns):
        return processor.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)

    assert written(turn("q", 1)) == "Image: <image>\nUSER: q\nASSISTANT:"
    assert written(turn("q")) == written({"role": "user", "content": "q"}) == "Image: N/A\nUSER: q\nASSISTANT:"
    assert written(turn("q", 2)) == "Image: <image>\nImage: <image>\nUSER: q\nASSISTANT:"
    answer = {"role": "assistant", "content": "a"}
    assert (
        written({"role": "system", "content": "be short"}, turn("q", 1), answer, turn("r"))
        == "be short\nImage: <image>\nUSER: q\nASSISTANT: a</s>USER: r\nASSISTANT:"
    )
    inputs = processor.apply_chat_template(
        [turn("q", 1)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = processor(text=written(turn("q", 1)), images=[picture], return_tensors="pt")
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)
    assert chat_template("USER: ", "ASSISTANT:") == processor.chat_template
    assert chat_template("Instruction: ", "Response:") != processor.chat_template
    assert "Image: <picture>" in chat_template("", "", "<picture>")


# ------------------------------------------------------------------------- the bundled parts, after one real step


@pytest.fixture(scope="module")
def tuned(tiny):
    """tiny-lavin with adapters and its own parts after one step of AdamW on pictures and texts."""
    base, processor = tiny
    task = eas.load_task("elements", processor, sizes={"train": 6, "search": 3, "val": 3, "test": 3})
    with torch.no_grad():
        base(**task.collate(task.val[:3]))  # transformers puts hooks of its own into the tower, once
    before = snapshot(base)
    net = eas.attach(base, eas.EASConfig(skip_rank=8, adapt_rank=4, dropout=0.0))
    net.mask = [2, 5]
    kept = {name: tensor.detach().clone() for name, tensor in net.trained_parts.tensors.items()}
    one_step(net, task)
    changed = {
        name.split(".")[0] for name, tensor in net.trained_parts.tensors.items() if not torch.equal(tensor, kept[name])
    }
    assert changed == set(LavinForConditionalGeneration.eas_modules_to_save)
    yield net, task
    eas.detach(net)
    assert snapshot(base) == before


def one_step(net, task) -> None:
    torch.manual_seed(0)
    net.train()
    optimizer = torch.optim.AdamW(net.trainable_parameters(), lr=0.05)
    net(**task.collate(task.train[:6])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    net.eval()


@pytest.mark.parametrize("mask", [(), (2, 5)], ids=["nothing_skipped", "two_skipped"])
@torch.no_grad()
def test_merges_of_the_tuned_model(tuned, mask):
    """LaVIN without skipping is a baseline of its own: its adapters fold as those of skipped sites do."""
    net, task = tuned
    net.mask = mask
    prompts = task.collate(task.test[:3], answers=False)
    one = task.collate(task.test[:1], answers=False)
    assert "pixel_values" in one
    proof = eas.check_merge(net, one)
    assert proof, str(proof)
    assert proof.folded > 0
    dense = net.base
    unmerged = net.generate(**prompts, max_new_tokens=7, do_sample=False)
    for form in (True, "low_rank"):
        assert torch.equal(net.generate(**prompts, merge=form, max_new_tokens=7, do_sample=False), unmerged)
    assert torch.equal(
        net.generate(**one, merge=True, max_new_tokens=7, do_sample=False),
        net.generate(**one, max_new_tokens=7, do_sample=False),
    )
    assert dense.vision_adapters[0].up_0.weight.any()  # trained, not new


def test_static_merge_and_its_export(tuned, tmp_path):
    net, task = tuned
    net.mask = [2, 5]
    static = eas.static_merge(net, task, score_on=None)
    prompts = task.collate(task.test[:3], answers=False)
    with static, torch.no_grad():
        expected = net.base(**prompts).logits
    static.export(tmp_path / "merged", processor=task.processor)
    alone, processor = eas.load_model(tmp_path / "merged", dtype="float32")
    assert isinstance(processor, LavinProcessor)
    with torch.no_grad():
        seen = alone(**prompts).logits
    kept = prompts["attention_mask"].bool()
    torch.testing.assert_close(seen[kept], expected[kept], rtol=1e-4, atol=1e-4)


def test_adapters_bring_what_lavin_trains(tuned, tmp_path):
    net, task = tuned
    net.mask = [2, 5]
    batch = task.collate(task.val[:3])
    net.save_pretrained(tmp_path / "adapters")
    again = eas.load(tmp_path / "adapters")  # its base by name: new parts, of which the trained ones take the place
    assert again.base.name_or_path == "tiny-lavin"
    assert again.base is not net.base
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, net(**batch).logits)
        fresh = eas.load_model("tiny-lavin")[0]
        assert not torch.allclose(fresh.modality.weight, again.base.modality.weight)
    card = (tmp_path / "adapters" / "README.md").read_text()
    assert "`tiny-lavin`, which comes with eas_kit" in card
    assert 'load_processor("tiny-lavin")' in card
    assert "huggingface.co/tiny-lavin" not in card
    assert "base=model" in make_card(
        net,
        json.loads((tmp_path / "adapters" / "adapter_config.json").read_text()) | {"base_model_name_or_path": "lavin"},
    )


def test_adapters_of_a_lavin_from_parts(parts, tmp_path):
    """The parts are no longer where they were, perhaps: they are said again, or the base is saved once."""
    net = eas.attach(load(parts)[0], eas.EASConfig(skip_rank=6, adapt_rank=4))
    stir(net.adapters)
    stir(net.base.projector)
    net.save_pretrained(tmp_path)
    inputs = example_inputs(load(parts)[1])
    with pytest.raises(ConfigError, match="wanted llama= and clip="):
        eas.load(tmp_path)
    again = eas.load(tmp_path, llama=parts / "llama", clip=parts / "clip", vision_rank=6)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, net(**inputs).logits)


def test_fit_and_search_run():
    base, processor = eas.load_model("tiny-lavin")
    task = eas.load_task("elements", processor, sizes={"train": 40, "search": 8, "val": 4, "test": 4})
    with torch.no_grad():
        base(**task.collate(task.val[:3]))
    before = snapshot(base)
    net = eas.attach(base, eas.EASConfig(skip_rank=8, adapt_rank=4, dropout=0.0))
    setting = {"batch_size": 4, "progress": False, "learning_rate": 1e-2}
    result = eas.search(
        net,
        task,
        eas.SearchConfig(
            num_skipped=4, warmup_steps=2, updates=2, train_steps_per_update=1, reward_batch_size=4, **setting
        ),
    )
    assert len(result.skipped) == 4
    net.mask = result.skipped
    first = task.score(net, "train", limit=12)["loss"]
    eas.fit(net, task, eas.TrainConfig(max_steps=10, mixed_precision="bf16", **setting))
    assert task.score(net, "train", limit=12)["loss"] < first - 0.3
    eas.detach(net)
    assert snapshot(base) == before


# ------------------------------------------------------------------------------------------- the paper's numbers


def test_shares_and_operations_of_the_real_size():
    """Table 2: 0.11 % for EAS12; 1714.8 and 1497.1 G at 262 tokens, LaVIN's own 3.8 M without skipping."""
    base = meta_model("lavin-7b", attn_implementation="eager")
    assert type(base) is LavinForConditionalGeneration
    assert base.config.taps == (4, 8, 12, 16, 20, 24)
    net = eas.attach(base, eas.EASConfig(skip_rank=32, adapt_rank=8))
    plain = eas.measure.parameters(net)
    assert plain["active"]["total"] == pytest.approx(3.8e6, rel=0.01)
    net.mask = range(12)
    found = eas.measure.parameters(net)
    assert 100 * found["active_share"] == pytest.approx(0.11, abs=0.01)
    adapters, projector = 24 * (8 * 1024 + 8 + 2 * (1024 * 4 + 1024) + 2 * 1025), 1024 * 128 + 128 + 128 * 4096 + 4096
    assert found["active"]["modules_to_save"] == adapters + projector + 2 * 4096
    dense, skipped = (eas.measure.flops(base, tokens=262, mask=mask)["total"] for mask in ((), range(12)))
    assert dense / G == pytest.approx(1714.8, rel=2e-4)
    assert skipped / G == pytest.approx(1497.1, rel=2e-4)
    ids = torch.empty(1, 262, dtype=torch.long, device="meta")
    picture = torch.empty(1, 3, 224, 224, dtype=base.dtype, device="meta")
    whole = eas.measure.flops(net, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture})
    assert whole["total"] - whole["adapter"] == skipped
    assert whole["adapter"] / G < 1
    tower = 24 * (257 * 12 * 1024**2 + 2 * 257**2 * 1024) + 256 * 3 * 14**2 * 1024  # blocks, patches
    assert whole["other"] == tower + 6 * (1024 * 128 + 128 * 4096) + 262 * 32003 * 4096  # projector, head


def test_memory_of_the_real_size():
    adapters = eas.EASConfig(skip_rank=32, adapt_rank=8)
    found = eas.estimate_memory("lavin-7b", prompt_tokens=5, new_tokens=1, eas=adapters, mask=[3], training=True)
    projector = 1024 * 128 + 128 + 128 * 4096 + 4096
    assert found.weights["projector"] == 2 * projector
    assert found.weights["language_layers"] == 32 * 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    trained = found.adapters["active"] + 2 * (projector + 24 * 20490 + 2 * 4096)  # in float32, in the model's float16
    assert found.training["gradients"] == trained
    assert len(eas.describe("tiny-lavin")) == 12
