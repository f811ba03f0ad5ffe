"""Finding sites, refusing what does not fit, and swapping modules without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import LAYERS, WIDTH, make_llama, make_llava, snapshot, stir, text_config
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, Olmo2Config, Olmo2ForCausalLM

from eas_kit.config import EASConfig
from eas_kit.errors import ConfigError, UnsupportedModelError
from eas_kit.model import attach
from eas_kit.sites import describe, find_sites, gain_offset
from eas_kit.slots import skipping


def test_sites_of_a_llava_are_its_language_models():
    model = make_llava()
    sites = find_sites(model)
    assert [site.path for site in sites] == [f"model.language_model.layers.{i}.self_attn" for i in range(LAYERS)]
    assert [site.index for site in sites] == [site.layer for site in sites] == list(range(LAYERS))
    assert {site.hidden_size for site in sites} == {WIDTH}


def test_sites_are_numbered_kind_after_kind():
    model = make_llama()
    sites = find_sites(model, ("mha", "ffn"))
    assert [(s.index, s.kind, s.layer) for s in sites] == [
        (kind * LAYERS + layer, ("mha", "ffn")[kind], layer) for kind in (0, 1) for layer in range(LAYERS)
    ]
    assert find_sites(model, ("ffn",))[2].path == "model.layers.2.mlp"
    with pytest.raises(ConfigError, match="kinds: wanted some of"):
        find_sites(model, ("conv",))


def test_describe():
    model = make_llava()
    table = describe(model, ("mha", "ffn"))
    assert list(table.columns) == ["site", "path", "kind", "norm", "ffn", "params", "mergeable", "reason"]
    attention = model.model.language_model.layers[0].self_attn
    assert table.params[0] == sum(p.numel() for p in attention.parameters())
    assert table.mergeable.tolist() == [True] * LAYERS + [False] * LAYERS
    assert (table.norm[0], table.ffn[0]) == ("LlamaRMSNorm", "LlamaMLP")


def test_describe_sees_through_a_mask():
    model = make_llama()
    plain = describe(model)
    net = attach(model, EASConfig(skip_rank=6, adapt_rank=4))
    net.mask = [1, 3]
    assert describe(net).equals(plain)


def test_describe_says_why_a_layer_cannot_merge():
    class Quantised(nn.Linear):
        pass

    model = make_llama()
    mlp = model.model.layers[3].mlp
    mlp.up_proj = Quantised(WIDTH, 53, bias=False)
    table = describe(model)
    assert table.mergeable.tolist() == [True, True, True, False, True]
    assert table.reason[3].startswith("LlamaMLP.up_proj is a test_sites_and_slots.Quantised, not a plain nn.Linear")


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=12, n_head=2, vocab_size=17, n_positions=11)),
        Olmo2ForCausalLM(
            Olmo2Config(
                vocab_size=17,
                hidden_size=12,
                intermediate_size=14,
                num_hidden_layers=2,
                num_attention_heads=2,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=None,
            )
        ),
        nn.Linear(3, 5),
    ],
    ids=["gpt2", "norms only after", "no decoder"],
)
def test_models_that_do_not_fit_are_refused_by_name(model):
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel|Olmo2DecoderLayer|Linear"):
        find_sites(model)


def test_gain_offset_tells_the_norms_apart():
    llama = make_llama().model.layers[0].post_attention_layernorm
    assert gain_offset(llama) == 0.0
    gemma = GemmaForCausalLM(GemmaConfig(**gemma_sizes())).model.layers[0].post_attention_layernorm
    assert gain_offset(gemma) == 1.0
    assert gain_offset(nn.LayerNorm(7)) is None
    assert gain_offset(nn.LayerNorm(7, bias=False)) is None  # takes the mean away: more than a gain
    assert gain_offset(nn.RMSNorm(7)) == 0.0
    assert gain_offset(nn.Identity()) is None
    assert gain_offset(nn.RMSNorm(7, device="meta")) == 0.0  # needs no weights


def gemma_sizes() -> dict:
    return text_config().to_dict() | {"num_hidden_layers": 2, "model_type": "gemma"}


@pytest.mark.parametrize("make", [make_llama, make_llava])
def test_skipping_removes_and_restores(make, make_batch):
    model = make()
    batch = make_batch(images=None if make is make_llama else (True, False, True))
    dense = model(**batch, output_hidden_states=True)  # transformers puts hooks of its own here, once
    before = snapshot(model)
    with skipping(model, mha=[1], ffn=[1, 3]) as same:
        assert same is model
        seen = model(**batch, output_hidden_states=True)
        assert len(seen.hidden_states) == LAYERS + 1
        # layer 1 without attention and feed-forward passes its input on; layer 3 still adds its attention
        torch.testing.assert_close(seen.hidden_states[2], seen.hidden_states[1], rtol=0, atol=0)
        assert not torch.equal(seen.hidden_states[4], seen.hidden_states[3])
        assert sorted(model.state_dict()) == sorted(before["values"].tensors)
    assert snapshot(model) == before
    assert torch.equal(model(**batch).logits, dense.logits)
    assert not torch.equal(seen.logits, dense.logits)


def test_skipping_restores_after_an_exception():
    model = make_llama()
    before = snapshot(model)
    with pytest.raises(KeyError), skipping(model, mha=[0]):
        raise KeyError
    with (
        pytest.raises(ConfigError, match="skipping mha of layer 5: the model's layers are 0 to 4"),
        skipping(model, [2, 5]),
    ):
        pass
    with skipping(model, mha=[2]):
        inside = snapshot(model)
        with pytest.raises(ConfigError, match="is skipped already"), skipping(model, mha=[1, 2]):
            pass
        assert snapshot(model) == inside
    assert snapshot(model) == before


@pytest.mark.parametrize("mask", [[0], [4], [0, 1, 3, 4]])
def test_generate_while_skipping_needs_no_cache_of_the_skipped(mask, make_prompts):
    """The cache asks layer 0 for its length; with layer 0 skipped a naive swap reads 0 for ever."""
    model, prompts = make_llava(), make_prompts()
    with skipping(model, mha=mask):
        cached = model.generate(**prompts, max_new_tokens=7, do_sample=False)
        assert torch.equal(cached, model.generate(**prompts, max_new_tokens=7, do_sample=False, use_cache=False))


@pytest.mark.parametrize("mask", [(0,), (0, 2)])
def test_skipping_and_a_mask_know_of_each_other(mask, make_prompts):
    net, prompts = attach(make_llava(), EASConfig(skip_rank=6, adapt_rank=4)).eval(), make_prompts()
    stir(net.adapters)
    net.mask = [3]
    options = {"max_new_tokens": 5, "do_sample": False}
    before = net.generate(**prompts, **options)
    with skipping(net, mha=mask):
        with pytest.raises(ConfigError, match=r"cannot set net.mask inside a block of skipping.*self_attn of layer 0"):
            net.mask = [1]
        assert net.mask == (3,)
        cached = net.generate(**prompts, **options)
        assert torch.equal(cached, net.generate(**prompts, **options, use_cache=False))
    assert torch.equal(net.generate(**prompts, **options), before)


def test_modes_follow_a_module_that_is_swapped_out():
    model = make_llama()
    attention = model.model.layers[2].self_attn
    with skipping(model, mha=[2]):
        model.train()
    assert attention.training
    assert attention.q_proj.training


def test_casting_reaches_a_module_that_is_swapped_out():
    model = make_llama()
    with skipping(model, mha=[2]):
        model.to(torch.bfloat16)
    assert model.model.layers[2].self_attn.q_proj.weight.dtype == torch.bfloat16
