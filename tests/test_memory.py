"""What is estimated before a model is loaded, against the tensors of the loaded one."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
import toys
from torch.profiler import ProfilerActivity, profile
from transformers import (
    CLIPVisionConfig,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import eas_kit as eas
from eas_kit.errors import ConfigError, EASError, UnsupportedModelError
from eas_kit.tracing import LiveBytes

ADAPTERS = eas.EASConfig(skip_rank=6, adapt_rank=4)
MASK = (0, 3)


def make_qwen(seed: int = 0, **changes) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    text = {
        "vocab_size": 101,
        "hidden_size": 24,
        "intermediate_size": 53,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]},
    } | changes
    vision = {"depth": 2, "hidden_size": 22, "intermediate_size": 29, "num_heads": 2, "out_hidden_size": 24}
    tied = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=96,
        video_token_id=95,
        vision_start_token_id=94,
        vision_end_token_id=93,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return toys._finish(Qwen2_5_VLForConditionalGeneration(tied), seed)


def make_mistral(seed: int = 0) -> MistralForCausalLM:
    torch.manual_seed(seed)
    config = MistralConfig(**toys.text_config().to_diff_dict() | {"sliding_window": 5, "model_type": "mistral"})
    return toys._finish(MistralForCausalLM(config), seed)


MAKERS = {"llama": toys.make_llama, "llava": toys.make_llava, "qwen": make_qwen, "mistral": make_mistral}


def held(*modules) -> int:
    """Bytes of all tensors of the modules."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def prompts(rows: int = 3, tokens: int = 13) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# -- exactly the tensors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_by_part(tmp_path, dtype):
    for kind, make in MAKERS.items():
        model = make()
        model.save_pretrained(tmp_path / kind)
        model = type(model).from_pretrained(tmp_path / kind, dtype=dtype)
        found = eas.estimate_memory(tmp_path / kind, dtype=dtype).weights  # of config.json alone
        decoder = model.get_decoder()
        outside = {
            "llama": (), "mistral": (),
            "llava": ("vision_tower", "multi_modal_projector"),
            "qwen": ("visual", "visual.merger"),
        }[kind]  # fmt: skip
        between = held(model.model.get_submodule(outside[1])) if outside else 0
        assert found["projector"] == between
        assert found["vision"] == (held(model.model.get_submodule(outside[0])) if outside else 0) - (
            between if kind == "qwen" else 0
        )
        assert found["language_layers"] == held(decoder.layers)
        assert found["embeddings"] == held(decoder.embed_tokens)
        assert found["head"] == (0 if kind == "qwen" else held(model.lm_head))  # Qwen's is tied
        assert found["other"] == held(decoder.norm, decoder.rotary_emb)
        assert sum(found.values()) == held(model)


def test_a_model_is_estimated_as_it_is():
    model = toys.make_llava().to(torch.bfloat16)
    assert model.config.dtype != torch.bfloat16 or model.dtype == torch.bfloat16
    estimate = eas.estimate_memory(model)
    assert estimate.dtype == torch.bfloat16
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(estimate.weights.values()) == pytest.approx(2 * parameters, rel=0.01)  # buffers stay wide
    assert eas.estimate_memory(model, dtype="float32").weights["head"] == 2 * estimate.weights["head"]
    assert not any(p.is_meta for p in model.parameters())
    net = eas.attach(model, ADAPTERS)
    net.mask = MASK
    own = eas.estimate_memory(net)
    assert own == eas.estimate_memory(model, eas=ADAPTERS, mask=MASK)
    assert own.settings["mask"] == MASK


def test_the_bundled_model_by_name():
    model, _ = eas.load_model("tiny")
    estimate = eas.estimate_memory("tiny")
    assert sum(estimate.weights.values()) == held(model)
    assert estimate.model == "tiny"


@pytest.mark.parametrize("kind", MAKERS)
def test_adapters_gradients_and_optimizer_states(kind):
    base = MAKERS[kind]().to(torch.bfloat16)
    estimate = eas.estimate_memory(base.config, dtype="bfloat16", eas=ADAPTERS, mask=MASK, training=True)
    net = eas.attach(base, ADAPTERS)
    net.mask = MASK
    for role in ("skip", "keep"):
        assert estimate.adapters[role] == held(*(roles[role] for roles in net.adapters.values()))
    assert estimate.adapters["active"] == held(*net.active_adapters().values())
    batch = prompts() | {"labels": prompts()["input_ids"].index_fill(1, torch.arange(7), -100)}
    net.train()
    net(**batch).loss.backward()
    optimizer = torch.optim.AdamW(net.trainable_parameters())
    optimizer.step()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert {g.dtype for g in gradients} == {torch.float32}
    assert estimate.training["gradients"] == sum(g.numel() * 4 for g in gradients) == estimate.adapters["active"]
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert estimate.training["optimizer"] == sum(m.numel() * m.element_size() for m in moments)


def test_full_tuning_trains_all_but_the_vision_tower():
    model = toys.make_llava()
    estimate = eas.estimate_memory(model.config, training=True)
    trained = sum(4 * p.numel() for name, p in model.named_parameters() if "vision_tower" not in name)
    assert estimate.training == {"gradients": trained, "optimizer": 2 * trained}
    assert estimate.adapters == estimate.merge == {}
    assert list(estimate.totals) == ["inference", "training"]
    # attentions left out stay so in the backward pass, where they are computed again
    fewer, again = (
        eas.estimate_memory(model.config, training=True, mask=MASK, gradient_checkpointing=on) for on in (False, True)
    )
    assert again.activations["training"] < fewer.activations["training"] < estimate.activations["training"]
    layers = [model.model.language_model.layers[number] for number in MASK]
    left_out = sum(held(layer.self_attn, layer.input_layernorm) for layer in layers)  # nobody reads that norm now
    assert fewer.training["gradients"] == again.training["gradients"] == trained - left_out


@pytest.mark.parametrize("kind", MAKERS)
def test_keys_and_values_after_generation(kind):
    model, inputs = MAKERS[kind](), prompts(rows=3, tokens=13)
    sizes = {}
    for name, config, mask in (("dense", None, ()), ("net", ADAPTERS, MASK), ("bare", None, MASK)):
        estimate = eas.estimate_memory(
            model.config, batch_size=3, prompt_tokens=13, new_tokens=7, eas=config, mask=mask, dtype="float32"
        )
        net = model
        if config is not None:
            net = eas.attach(model, config)
            net.mask = mask
        with eas.skipping(model, mha=mask if config is None else ()):
            out = net.generate(**inputs, max_new_tokens=7, return_dict_in_generate=True, do_sample=False)
        entries = out.past_key_values.layers
        kept = [e for i, e in enumerate(entries) if i not in mask]
        real = sum(4 * t.numel() for entry in kept for t in (entry.keys, entry.values))
        assert estimate.cache["keys_values"] == real
        routes = [r for entry in entries for r in getattr(entry, "routes", {}).values()]
        assert len(routes) == (5 if config is not None else 0)
        assert estimate.cache["prompt_state"] == sum(4 * t.numel() for r in routes for t in r if t is not None)
        sizes[name] = real
        if config is not None:
            eas.detach(net)
    assert sizes["net"] == sizes["bare"] == sizes["dense"] * 3 // 5
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = 4 if kind == "mistral" else 13 + 6  # a window of 5 keeps 4; the last new token is never read
    assert sizes["dense"] == 4 * 2 * 5 * 3 * text.num_key_value_heads * head * tokens


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("mask", [(), MASK])
@pytest.mark.parametrize("form", ["per_prompt", "low_rank"])
def test_what_a_merge_holds(kind, mask, form):
    rows, model = 1 if form == "per_prompt" else 3, MAKERS[kind]()
    estimate = eas.estimate_memory(model.config, eas=ADAPTERS, mask=mask, dtype="float32", batch_size=rows)
    net = eas.attach(model, ADAPTERS)
    net.mask = mask
    cache = net.prefill(**prompts(rows)).past_key_values
    routes = [t for entry in cache.layers for r in entry.routes.values() for t in r if t is not None]
    block = eas.merged(net, cache, form=form)
    known = [*net.parameters(), *net.buffers(), *routes]
    with LiveBytes(known) as memory:
        block.__enter__()
        kept = memory.live
    block.__exit__(None, None, None)
    assert kept == estimate.merge["copies" if form == "per_prompt" else "low_rank"]
    if form == "per_prompt":
        copies = [tensor for linear in net._folded.values() for tensor in linear.folded]
        with LiveBytes([*known, *copies]) as memory, eas.merged(net, cache):  # the next time they are there
            assert memory.live == 0
            assert memory.peak == estimate.merge["folding"]
        return
    d, sites = model.config.get_text_config().hidden_size, [6 if site in mask else 4 for site in range(5)]
    assert kept == sum(4 * (d * 2 * rank + rows * d) for rank in sites)  # both ups, and a bias a row


# -- activations, roughly ------------------------------------------------------------------------------------------


def measured_peak(call) -> int:
    """Most bytes held at once during `call`, of what it asked the allocator for, as torch's profiler saw it."""
    gc.collect()  # what an earlier measurement left in cycles (gradients) would count as freed in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = sorted((e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [toys.make_llama, toys.make_llava])
def test_activations_are_those_measured(make, attention):
    shape = {"hidden_size": 152, "intermediate_size": 307, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = make(**shape, head_dim=18, vocab_size=977)
    model.set_attn_implementation(attention)
    net = eas.attach(model, ADAPTERS)
    net.mask = MASK
    images = (True,) * 3 if make is toys.make_llava else None
    batch, given = toys.make_batch(((97, 3),) * 3, images), toys.make_prompts((97,) * 3, images)
    setting = {
        "batch_size": 3,
        "prompt_tokens": given["input_ids"].shape[1],
        "new_tokens": 3,
        "training": True,
        "attention": attention,
    }
    estimate = eas.estimate_memory(net, **setting)
    out = []
    prefill = measured_peak(lambda: out.append(net.prefill(**given)))
    entries = [e for i, e in enumerate(out[0].past_key_values.layers) if i not in MASK]
    prefill -= sum(t.nbytes for entry in entries for t in (entry.keys, entry.values))
    assert 0.9 < prefill / estimate.activations["prefill"] < 1.1
    net.train()

    def step():
        output = net(**batch)
        output.loss.backward()

    train = measured_peak(step)
    assert 0.9 < train / estimate.activations["training"] < 1.1
    net.zero_grad()
    net.gradient_checkpointing_enable()
    recomputed = measured_peak(step)
    sparing = eas.estimate_memory(net, **setting, gradient_checkpointing=True)
    assert 0.9 < recomputed / sparing.activations["training"] < 1.1
    assert recomputed < 0.75 * train  # and so the estimate without it would not have passed
    assert sparing.activations["prefill"] == estimate.activations["prefill"]


def test_live_bytes_count_shared_memory_once_and_known_memory_not():
    known = torch.zeros(7)
    with LiveBytes([known]) as memory:
        view = known.view(7, 1).t()
        assert memory.live == 0
        made = view + 1
        again = made[:3]
        assert memory.live == memory.peak == 4 * 7
        del made
        assert memory.live == 4 * 7  # the part still holds the whole
        del again
        assert (memory.live, memory.peak) == (0, 4 * 7)


# -- totals, texts, refusals ---------------------------------------------------------------------------------------


def test_totals_and_texts():
    estimate = eas.estimate_memory(
        toys.make_llava().config, eas=ADAPTERS, mask=MASK, training=True, prompt_tokens=23, new_tokens=3
    )
    part = estimate
    stay = sum(part.weights.values()) + part.adapters["skip"] + part.adapters["keep"]
    cache, prefill = sum(part.cache.values()), part.activations["prefill"]
    assert part.totals == {
        "inference": stay + cache + prefill,
        "inference_merged": stay + cache + part.merge["copies"] + max(prefill, part.merge["folding"]),
        "inference_low_rank": stay + cache + prefill + part.merge["low_rank"],
        "training": stay + sum(part.training.values()) + part.activations["training"],
    }
    text = str(estimate)
    assert text.startswith(
        "LlavaForConditionalGeneration in float32: batch 1, 23 prompt and 3 new tokens, 2 attentions"
    )
    assert "  language layers " in text
    # a small model in MiB, a large one in GiB: in both the largest total has digits
    large = replace(estimate, weights={"other": 7 * 2**30})
    for shown, size, unit in ((estimate, 2**20, "MiB"), (large, 2**30, "GiB")):
        lines = str(shown).splitlines()
        assert lines[0].endswith(f", {unit}") and f", {unit}</caption>" in shown._repr_html_()
        total = f"{shown.totals['training'] / size:.3f}"
        assert lines[-1].split()[-1] == total and f">{total}</td>" in shown._repr_html_() and float(total) > 0
    assert part._repr_html_().count("<tr>") == len(text.splitlines()) - 1


def test_what_cannot_be_merged_says_so():
    kinds = eas.EASConfig(skip_rank=6, adapt_rank=4, kinds=("mha", "ffn"))
    estimate = eas.estimate_memory(toys.text_config(), eas=kinds, mask=[1, 6])
    assert estimate.merge == {}
    assert "site 6 (layers.1.mlp) is a skipped feed-forward" in estimate.merge_problem
    assert "no per-prompt merge: cannot merge: site 6" in str(estimate)
    assert "no per-prompt merge: cannot merge: site 6" in estimate._repr_html_()
    assert list(estimate.totals) == ["inference"]
    shape = {"model_type": "mixtral", "hidden_size": 16, "intermediate_size": 48}  # multiples of 8, for its kernel
    experts = MixtralConfig(**toys.text_config().to_diff_dict() | shape, num_local_experts=3, num_experts_per_tok=1)
    estimate = eas.estimate_memory(experts, eas=ADAPTERS, mask=[1], dtype="bfloat16")
    assert "in a mixture of experts the router and every expert do" in estimate.merge_problem
    assert list(estimate.merge) == ["low_rank"]
    assert list(estimate.totals) == ["inference", "inference_low_rank"]
    with pytest.raises(UnsupportedModelError, match=r"MixtralModel does not run on the meta device in torch.float32"):
        eas.estimate_memory(experts, eas=ADAPTERS, mask=[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: wanted a whole number from 1 up, got 0"),
        ({"prompt_tokens": 2.5}, "prompt_tokens: wanted a whole number from 1 up, got 2.5"),
        ({"new_tokens": -1}, "new_tokens: wanted a whole number from 0 up, got -1"),
        ({"attention": "flash"}, r"attention: wanted one of \('sdpa', 'eager'\), got 'flash'"),
        ({"eas": {"skip_rank": 4}}, "eas: wanted an EASConfig or None, got a dict"),
        ({"dtype": "int8"}, "dtype: wanted a floating-point type such as 'bfloat16', got 'int8'"),
        ({"dtype": "half a float"}, "got 'half a float'"),
        ({"mask": [5]}, r"sites are numbered 0 to 4, so there is no \[5\]"),
        ({"mask": range(5)}, "skips all attentions; keep at least one"),
        ({"mask": [7], "eas": ADAPTERS}, r"there is no \[7\]"),
        ({"eas": eas.EASConfig(skip_rank=4, adapt_rank=0), "training": True}, "no adapter is at work under this mask"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ConfigError, match=message):
        eas.estimate_memory(toys.text_config(), **change)


def test_targets_that_are_no_language_model(tmp_path):
    with pytest.raises(EASError, match=r"neither a folder with a config.json nor one of \['tiny', .*'llama-7b', .*hub"):
        eas.estimate_memory("no/such-model")
    with pytest.raises(ConfigError, match=r"got a dict; .*AutoConfig.for_model"):
        eas.estimate_memory({"hidden_size": 8})
    with pytest.raises(EASError, match=r"CLIPVisionConfig.*which neither AutoModelForImageTextToText nor"):
        eas.estimate_memory(CLIPVisionConfig())
    quantised = toys.text_config()
    quantised.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ConfigError, match=r"the configuration is quantised.*delete config.quantization_config"):
        eas.estimate_memory(quantised)
    headless = LlamaModel(toys.text_config())
    assert eas.estimate_memory(headless).weights["head"] == 0
    with pytest.raises(ConfigError, match=r"training needs an output head, which LlamaModel has not"):
        eas.estimate_memory(headless, training=True)
    from transformers import OPTConfig

    with pytest.raises(UnsupportedModelError):
        eas.estimate_memory(OPTConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=2), eas=ADAPTERS)
