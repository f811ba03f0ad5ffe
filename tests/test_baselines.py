"""Baselines with virtual tokens, LLaMA-Adapter and MAM: against text that says the same, against peft, by hand."""

from __future__ import annotations

import math

import pytest
import torch
import toys
from families import FAMILIES
from peft import PeftModel, PeftModelForCausalLM, PrefixTuningConfig, PromptTuningConfig
from test_conformance import Subject, generate
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

import eas_kit as eas
from eas_kit.arms import BASELINES
from eas_kit.baselines import bottlenecks, full_tuning, llama_adapter
from eas_kit.bottleneck import Parallel
from eas_kit.errors import ConfigError
from eas_kit.virtual_tokens import _keys_and_values, mam, prefix_tuning, prompt_tuning

V = 3
IDS = torch.tensor([[11, 23, 41]])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [toys.IMAGE]}
VIRTUAL = {"prompt": prompt_tuning, "prefix": prefix_tuning}
KINDS = [(name, make) for name in VIRTUAL for make in (toys.make_llama, toys.make_llava)]


def images(make, given=(True, False, True)):
    return None if make is toys.make_llama else given


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def stirred(model, size=0.3):
    """The same model with what it trains away from where it starts."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def saying(name, make):
    """Virtual tokens that are what the model makes of the text IDS, so that IDS in front of a text says the same."""
    tuned, share = VIRTUAL[name](make(), tokens=V)
    base, encoder = make(), tuned.prompt_encoder["default"]
    if name == "prompt":
        encoder.embedding.weight.data = base.get_input_embeddings()(IDS)[0].detach()
    else:
        kept = _keys_and_values(base.get_decoder(), IDS)  # (layers, 2, heads, V, D)
        encoder.load_prompt_embeddings(kept.permute(3, 0, 1, 2, 4).reshape(V, -1))
    return tuned.eval(), base, share


def behind_ids(batch):
    """The same rows with IDS in front of each, behind the padding if that is on the left."""
    out = {name: [] for name in batch if name != "pixel_values"}
    for row in range(len(batch["input_ids"])):
        first = int(batch["attention_mask"][row].argmax())
        for name, fill in (
            ("input_ids", IDS[0]),
            ("attention_mask", torch.ones(V)),
            ("labels", torch.full((V,), -100)),
        ):
            if name in out:
                values = batch[name][row]
                out[name].append(torch.cat([values[:first], fill.to(values), values[first:]]))
    return batch | {name: torch.stack(rows) for name, rows in out.items()}


# -- virtual tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "make"), KINDS)
class TestVirtualTokens:
    def test_loss_and_logits_are_those_of_the_text_they_stand_for(self, name, make):
        tuned, base, _ = saying(name, make)
        batch = toys.make_batch(images=images(make))
        with torch.no_grad():
            seen, expected = tuned(**batch), base(**behind_ids(batch))
            dense = base(**batch)
        keep = batch["attention_mask"].bool()
        torch.testing.assert_close(seen.logits[keep], expected.logits[:, V:][keep], atol=1e-4, rtol=0)
        torch.testing.assert_close(seen.loss, expected.loss, atol=1e-5, rtol=0)
        assert (seen.logits - dense.logits)[keep].abs().max() > 0.1  # control
        with torch.no_grad():
            few = tuned(**{k: v for k, v in batch.items() if k != "labels"}, logits_to_keep=2).logits
        torch.testing.assert_close(few, seen.logits[:, -2:], atol=1e-5, rtol=0)

    def test_generation_is_that_of_the_text_they_stand_for(self, name, make):
        tuned, base, _ = saying(name, make)
        prompts = toys.make_prompts(images=images(make))
        S = prompts["input_ids"].shape[1]
        cached = tuned.generate(**prompts, **GREEDY)
        assert torch.equal(cached[:, :S], prompts["input_ids"])
        assert torch.equal(cached[:, S:], base.generate(**behind_ids(prompts), **GREEDY)[:, S + V :])
        assert torch.equal(cached, tuned.generate(**prompts, **GREEDY, use_cache=False))
        for row in range(3):
            assert torch.equal(tuned.generate(**toys.row_of(prompts, row), **GREEDY)[0, -6:], cached[row, -6:])
        beams = tuned.generate(**prompts, **GREEDY, num_beams=3)
        assert torch.equal(beams, tuned.generate(**prompts, **GREEDY, num_beams=3, use_cache=False))
        assert not torch.equal(cached, base.generate(**prompts, **GREEDY))  # control

    def test_it_trains_and_nothing_else_does(self, name, make, toy_task):
        tuned, _ = VIRTUAL[name](make(), tokens=V)
        before = {key: p.detach().clone() for key, p in tuned.named_parameters()}
        task = toys.ToyTask(images=make is toys.make_llava)
        config = eas.TrainConfig(max_steps=1, batch_size=6, learning_rate=1e-2, progress=False)
        eas.fit(tuned, task, config)
        moved = {key for key, p in tuned.named_parameters() if not torch.equal(before[key], p)}
        assert moved == trained(tuned) == {"prompt_encoder.default.embedding.weight"}
        size = V * toys.WIDTH if name == "prompt" else V * toys.LAYERS * 2 * 14
        assert tuned.prompt_encoder["default"].embedding.weight.numel() == size
        assert saying(name, make)[2] == size / sum(p.numel() for p in tuned.parameters())
        assert task.evaluate(tuned, "val")["loss"] > 0

    def test_peft_saves_and_loads_it(self, name, make, tmp_path):
        tuned, _, _ = saying(name, make)
        tuned.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(make(), tmp_path)
        ours, theirs = (m.prompt_encoder["default"].embedding.weight for m in (tuned, again))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", VIRTUAL)
def test_unpadded_text_gives_what_peft_gives(name):
    tuned, _, _ = saying(name, toys.make_llama)
    kind = PromptTuningConfig if name == "prompt" else PrefixTuningConfig
    own = tuned.peft_config["default"]
    shape = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
    settings = kind(task_type="CAUSAL_LM", **{part: getattr(own, part) for part in shape})
    peft = PeftModelForCausalLM(toys.make_llama(), settings).eval()
    weight = tuned.prompt_encoder["default"].embedding.weight
    peft.prompt_encoder["default"].embedding.weight.data = weight.data.clone()
    prompts = toys.row_of(toys.make_prompts(images=None), 2)
    with torch.no_grad():
        seen, theirs = tuned(**prompts).logits, peft(**prompts).logits
    torch.testing.assert_close(seen, theirs[:, V:] if name == "prompt" else theirs, atol=1e-4, rtol=0)
    assert torch.equal(tuned.generate(**prompts, **GREEDY), peft.generate(**prompts, **GREEDY))


def test_a_prefix_can_come_from_an_mlp():
    tuned, _ = prefix_tuning(toys.make_llama(), tokens=V, projection=7)
    width = toys.LAYERS * 2 * 14
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == V * 14 + 14 * 7 + 7 + 7 * width + width
    prompts = toys.make_prompts(images=None)
    tuned.eval()
    assert torch.equal(tuned.generate(**prompts, **GREEDY), tuned.generate(**prompts, **GREEDY, use_cache=False))


@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt2", "prompt"), ("gpt2", "prefix"), ("qwen2_vl", "prompt"), ("qwen3_vl", "prefix"), ("llama4_text", "prompt")],
)
def test_other_families(family, name):
    """Learned positions; positions in three dimensions; pictures in several layers; a decoder inside of a decoder."""
    (row,) = [one for one in FAMILIES if one.name == family]
    subject, tuned = Subject(row), stirred(VIRTUAL[name](row.build(), tokens=V)[0]).eval()
    cached = generate(tuned, subject.prompts)
    assert torch.equal(cached, generate(tuned, subject.prompts, use_cache=False))
    for number, alone in enumerate(subject.alone):
        assert torch.equal(generate(tuned, alone)[0], cached[number])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_full_tuning_trains_a_projector_inside_of_the_vision_tower(family):
    (row,) = [one for one in FAMILIES if one.name == family]
    names = {name for name, _ in row.build().named_parameters()}
    tower = {name for name in names if "visual" in name}
    projector = {name for name in tower if ".merger." in name or ".deepstack_merger_list." in name}
    assert projector and projector < tower
    for wanted, projects in ((names - tower, False), (names - tower | projector, True)):
        tuned, _ = full_tuning(row.build(), projector=projects)
        assert {name for name, p in tuned.named_parameters() if p.requires_grad} == wanted


@pytest.mark.parametrize(
    ("family", "name", "says"),
    [
        ("lfm2", "prompt", "has layers that are no attentions"),
        ("lfm2", "prefix", "does not keep keys and values of one shape in every layer"),
        ("deepseek_v3", "prefix", "does not keep keys and values of one shape in every layer"),
        (
            "gpt_neox",
            "prefix",
            "peft takes the keys of GPTNeoXModel to be 1 heads of together 12, .* 3 of 36",
        ),
    ],
)
def test_decoders_that_do_not_fit(family, name, says):
    (row,) = [one for one in FAMILIES if one.name == family]
    with pytest.raises(ConfigError, match=says):
        VIRTUAL[name](row.build(), tokens=V)


@pytest.mark.parametrize(
    ("family", "name", "says"),
    [
        ("qwen3_vl", "prompt", "reads visual_pos_masks at every position, and virtual tokens have none; take"),
        ("gemma3", "prefix", "gets a mask that is made outside of it, to which no virtual tokens can be added"),
        (
            "mistral",
            "prefix",
            "has attentions that see 5 positions, and here are 14: in a row that is padded",
        ),
    ],
)
def test_inputs_that_do_not_fit(family, name, says):
    (row,) = [one for one in FAMILIES if one.name == family]
    subject, tuned = Subject(row), VIRTUAL[name](row.build(), tokens=V)[0].eval()
    with pytest.raises(ConfigError, match=says):
        generate(tuned, subject.prompts)
    if family == "mistral":  # one by one there is no padding
        assert torch.equal(generate(tuned, subject.alone[0]), generate(tuned, subject.alone[0], use_cache=False))


@pytest.mark.parametrize("name", VIRTUAL)
def test_what_virtual_tokens_cannot_do(name):
    tuned, _ = VIRTUAL[name](toys.make_llama(), tokens=V)
    with pytest.raises(ConfigError, match="virtual tokens need room that a static cache does not have"):
        tuned.eval().generate(**toys.make_prompts(images=None), **GREEDY, cache_implementation="static")
    tuned.get_base_model().gradient_checkpointing_enable()
    batch = toys.make_batch(images=None)
    if name == "prefix":
        with pytest.raises(ConfigError, match="lives in the KV cache, which gradient checkpointing drops"):
            tuned.train()(**batch)
    else:
        tuned.train()(**batch).loss.backward()
        assert tuned.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match=f"{name}_tuning: tokens: wanted a whole number from 1 up, got 0"):
        VIRTUAL[name](toys.make_llama(), tokens=0)


# -- MAM -----------------------------------------------------------------------------------------------------------


def test_mam_is_a_prefix_and_adapters_beside_the_feed_forwards():
    torch.manual_seed(1)
    prefix, _ = prefix_tuning(toys.make_llava(), tokens=V)
    torch.manual_seed(1)
    both, share = mam(toys.make_llava(), tokens=V, rank=5, scale=1.5)
    prompts, d, r = toys.make_prompts(), toys.WIDTH, 5
    with torch.no_grad():
        assert torch.equal(both.eval()(**prompts).logits, prefix.eval()(**prompts).logits)  # it starts as the prefix
    own = V * toys.LAYERS * 2 * 14 + toys.LAYERS * (d * r + r + r * d + d)
    assert share == own / sum(p.numel() for p in both.parameters())
    assert len(trained(both)) == 1 + 4 * toys.LAYERS
    stirred(both)
    seen = {}
    beside = both.get_base_model().model.language_model.layers[2].mlp
    assert isinstance(beside, Parallel)
    beside.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    cached = both.generate(**prompts, **GREEDY)
    assert torch.equal(cached, both.generate(**prompts, **GREEDY, use_cache=False))
    with torch.no_grad():
        x, adapter = seen["x"], beside.adapter
        hidden = (x @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
        expected = beside.module(x) + 1.5 * (hidden @ adapter.up.weight.T + adapter.up.bias)
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=0)


# -- LLaMA-Adapter -------------------------------------------------------------------------------------------------


def test_llama_adapter_by_hand():
    model, share = llama_adapter(toys.make_llava(), tokens=V, layers=2)
    batch, d = toys.make_batch(), toys.WIDTH
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, toys.make_llava()(**batch).logits)  # the gates start at zero
    assert share == 2 * (V * d + 1) / sum(p.numel() for p in model.parameters())
    assert {name.rsplit(".", 1)[-1] for name in trained(model)} == {"adaption_prompt", "adaption_gate"}
    layers = model.model.language_model.layers
    assert [hasattr(layer.self_attn, "adaption_gate") for layer in layers] == [False] * 3 + [True] * 2
    stirred(model)
    seen, adapted = {}, layers[4].self_attn

    def note(module, args, kwargs, out):
        seen.update(kwargs, out=out[0])

    adapted.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**batch, use_cache=False)
        plain, n = adapted.model, seen["hidden_states"]
        rest = {k: v for k, v in seen.items() if k not in ("out", "hidden_states")}
        expected = plain(n, **rest)[0]
        cos, sin = seen["position_embeddings"]
        B, S, _ = n.shape
        q = plain.q_proj(n).view(B, S, 2, 14)
        k, v = (proj(adapted.adaption_prompt)[0] for proj in (plain.k_proj, plain.v_proj))  # (V, 14): one head of keys
        heads = []
        for head in range(2):
            turned = q[:, :, head]
            half = torch.cat([-turned[..., 7:], turned[..., :7]], -1)
            scores = (turned * cos + half * sin) @ k.T / math.sqrt(14)
            heads.append(adapted.adaption_gate * scores.softmax(-1) @ v)
        expected = expected + plain.o_proj(torch.cat(heads, -1))
    torch.testing.assert_close(seen["out"], expected, atol=1e-4, rtol=0)


def test_llama_adapter_trains_and_generates():
    model, _ = llama_adapter(toys.make_llava(), tokens=V)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = eas.TrainConfig(max_steps=2, batch_size=6, learning_rate=1e-2, progress=False)
    eas.fit(model, toys.ToyTask(), config)  # in the first step the gates alone have a gradient
    assert {name for name, p in model.named_parameters() if not torch.equal(before[name], p)} == trained(model)
    prompts = toys.make_prompts()
    cached = stirred(model).eval().generate(**prompts, **GREEDY)
    assert torch.equal(cached, model.generate(**prompts, **GREEDY, use_cache=False))
    assert torch.equal(cached, model.generate(**prompts, **GREEDY, cache_implementation="static"))
    for row in range(3):
        assert torch.equal(model.generate(**toys.row_of(prompts, row), **GREEDY)[0, -6:], cached[row, -6:])


def test_llama_adapter_refuses_what_peft_has_not():
    sizes = {"vocab_size": 97, "hidden_size": 28, "intermediate_size": 53, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 14}
    wide = toys.make_llama(head_dim=22)
    other = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
    for model, says in (
        (wide, r"takes 2 heads to be as wide as the model together, here they are not \(38 wide, keys 22\)"),
        (
            other,
            "Unsupported model type for adaption prompt: 'qwen3'. peft's AdaptionPrompt knows llama, mistral and gpt2",
        ),
    ):
        before = toys.snapshot(model)
        with pytest.raises(ConfigError, match=says):
            llama_adapter(model)
        assert toys.snapshot(model) == before
    with pytest.raises(ConfigError, match="wanted 1 to 5 layers and 1 token or more, got 6 and 10"):
        llama_adapter(toys.make_llama(), layers=6)
    assert llama_adapter(MistralForCausalLM(MistralConfig(**sizes, **heads)))[1] > 0


def test_a_bottleneck_behind_experts_that_return_a_tuple():
    (row,) = [one for one in FAMILIES if one.name == "gpt_oss"]
    subject, (model, _) = Subject(row), bottlenecks(row.build(), rank=5)
    assert torch.equal(generate(model.eval(), subject.prompts), generate(row.build(), subject.prompts))
    cached = generate(stirred(model), subject.prompts)
    assert torch.equal(cached, generate(model, subject.prompts, use_cache=False))


# -- on the bundled model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elements():
    _, processor = eas.load_model("tiny")
    return eas.load_task("elements", processor, sizes={"train": 8, "search": 4, "val": 3, "test": 3})


@pytest.mark.parametrize("method", [name for name in BASELINES if name not in ("full", "lora")])
def test_the_bundled_model_is_tuned_and_scored_in_both_ways(method, elements):
    model, share = BASELINES[method](eas.load_model("tiny")[0])
    settings = {"max_steps": 2, "batch_size": 4, "learning_rate": 3e-3, "mixed_precision": "bf16", "progress": False}
    history = eas.fit(model, elements, eas.TrainConfig(**settings))
    assert 0 < share < 0.2
    assert history.losses[1] != history.losses[0]
    written = elements.evaluate(model, "val")
    assert written["count"] == 3
    assert math.isfinite(written["loss"])
    assert elements.evaluate(model, "val", method="options")["unparsed"] == 0
