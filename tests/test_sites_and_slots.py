"""Finding sites, refusing what does not fit, and swapping modules without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import LAYERS, WIDTH, make_llama, make_llava, snapshot, stir, text_config
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from eas_kit.config import EASConfig
from eas_kit.errors import ConfigError, UnsupportedModelError
from eas_kit.families import ATTENTION_READERS, FFN_READERS, gain_offset, readers
from eas_kit.model import attach
from eas_kit.sites import describe, find_sites
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


SMALL = {"vocab_size": 17, "hidden_size": 12, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: Olmo2ForCausalLM(Olmo2Config(**SMALL, intermediate_size=14, num_attention_heads=2)),
            "Olmo2DecoderLayer: wanted norm - attention - norm - feed-forward.*norms only after their parts.*add a row",
        ),
        (
            lambda: MambaForCausalLM(MambaConfig(**SMALL)),
            "MambaBlock: wanted .*it has norm, mixer.*something else than softmax attention",
        ),
        (  # its attention adds the residual stream itself: the names of Falcon's parts, another sum
            lambda: BloomForCausalLM(BloomConfig(vocab_size=17, hidden_size=12, n_layer=2, n_head=2)),
            "BloomBlock has post_attention_layernorm beside a norm, an attention and a feed-forward",
        ),
        (lambda: nn.Linear(3, 5), "Linear: wanted a decoder with a list of layers or h, found none"),
    ],
    ids=["norms only after", "no attention", "one part too many", "no decoder"],
)
def test_models_that_do_not_fit_are_refused_by_name(model, message):
    for look in (find_sites, describe):
        with pytest.raises(UnsupportedModelError, match=message):
            look(model())


def test_sites_of_a_net_whose_norms_have_no_weight():
    model = OlmoForCausalLM(OlmoConfig(**SMALL, intermediate_size=14, num_attention_heads=2))
    assert find_sites(attach(model, EASConfig(skip_rank=6, adapt_rank=4))) == find_sites(model)


def test_layers_that_share_keys_and_values_have_no_sites(monkeypatch):
    monkeypatch.setattr(LlamaConfig, "kv_sharing_modes", [None, None, "store", "reuse", None], raising=False)
    table = describe(make_llama())
    assert table.site.tolist()[:3] == [0, 1, 2]
    assert table.path.tolist() == [f"model.layers.{i}.self_attn" for i in (0, 1, 4)] + [
        "model.layers.2",
        "model.layers.3",
    ]
    assert "keys and values of this layer are shared with other layers ('store')" in table.reason[3]


def test_layers_without_attention_are_left_out():
    """LFM2: short convolutions and attentions. Sites are the attentions; the others are listed with the reason."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = ["conv", "full_attention", "conv", "full_attention", "full_attention"]
    model = Lfm2ForCausalLM(Lfm2Config(**SMALL | sizes | {"num_hidden_layers": 5}, layer_types=kinds)).eval()
    assert [(site.index, site.layer) for site in find_sites(model)] == [(0, 1), (1, 3), (2, 4)]
    table = describe(model)
    assert table.site.isna().tolist() == [False] * 3 + [True] * 2
    assert table.mergeable.tolist() == [True] * 3 + [False] * 2
    assert table.reason[3].startswith("no site: Lfm2DecoderLayer: wanted norm - attention - norm - feed-forward")
    net = attach(model, EASConfig(skip_rank=6, adapt_rank=4))
    with pytest.raises(ConfigError, match="skips all 3 attentions; keep at least one"):
        net.mask = [0, 1, 2]
    net.mask = [0, 2]
    assert [type(layer.self_attn).__name__ for layer in model.model.layers if hasattr(layer, "self_attn")] == [
        "SkippedAttention",
        "Lfm2Attention",
        "SkippedAttention",
    ]


def test_a_part_that_nobody_named_is_not_merged():
    """Or a reader of the input would be left without the adapter: the gates of some attentions, an expert."""
    layer = make_llama().model.layers[0]
    assert readers(layer.self_attn, ATTENTION_READERS) == ("q_proj", "k_proj", "v_proj")
    layer.self_attn.gate_proj = nn.Linear(WIDTH, 7)
    with pytest.raises(UnsupportedModelError, match='LlamaAttention has gate_proj, of which.*merge="low_rank"'):
        readers(layer.self_attn, ATTENTION_READERS)
    layer.mlp.shared = nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedModelError, match="LlamaMLP has shared, of which"):
        readers(layer.mlp, FFN_READERS)
    with pytest.raises(UnsupportedModelError, match="Identity has no linears"):
        readers(nn.Identity(), FFN_READERS)


class Misleading(nn.Module):
    """Named like Llama's layer, put together otherwise."""

    def __init__(self, layer, how):
        super().__init__()
        for name, part in layer.named_children():
            setattr(self, name, part)
        self.how = how

    def forward(self, hidden_states, **kwargs):
        if self.how == "norms behind":
            x = hidden_states + self.input_layernorm(self.self_attn(hidden_states, **kwargs)[0])
            return x + self.post_attention_layernorm(self.mlp(x))
        n = self.input_layernorm(hidden_states)
        if self.how == "three outputs":
            added, _, _ = self.self_attn(n, **kwargs)
        else:
            added, _ = self.self_attn(n, **kwargs)
        if self.how == "residual behind the norm":
            hidden_states = n
        x = hidden_states + added
        read = x if self.how == "second norm unused" else self.post_attention_layernorm(x)
        return x + self.mlp(read)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("norms behind", "the attention did not read the norm before it"),
        ("residual behind the norm", "what left the layer was not what had entered it"),
        ("second norm unused", "the feed-forward did not read the norm before it"),
        ("three outputs", "not enough values to unpack"),
    ],
)
def test_names_alone_do_not_make_a_site(how, says):
    model = make_llama()
    model.model.layers[2] = Misleading(model.model.layers[2], how)
    before = snapshot(model)
    table = describe(model)
    assert table.path.tolist()[-1] == "model.layers.2"
    assert table.site.isna().tolist() == [False] * (LAYERS - 1) + [True]
    assert "Misleading has parts with names that eas_kit knows" in table.reason[4]
    assert says in table.reason[4]
    assert snapshot(model) == before
    model.model.layers[2] = Misleading(make_llama().model.layers[2], "as it should be")
    assert len(find_sites(model)) == LAYERS


def test_a_feed_forward_that_returns_a_tuple():
    """gpt-oss's: skipped, it must return one too, or the rows of a batch are taken for its parts."""
    sizes = {key: value for key, value in text_config().to_dict().items() if key != "model_type"}
    torch.manual_seed(0)
    config = GptOssConfig(
        **sizes | {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 16, "hidden_size": 32}
    )
    model = GptOssForCausalLM(config).eval()
    assert {site.returns_tuple for site in find_sites(model)} == {True}
    assert {site.returns_tuple for site in find_sites(make_llama())} == {False}
    net = attach(model, EASConfig(skip_rank=6, adapt_rank=4, kinds=("mha", "ffn"))).eval()
    stir(net.adapters)
    net.mask = [1, LAYERS + 2]
    ids = torch.tensor([[5, 6, 7, 8], [15, 16, 17, 18]])
    with torch.no_grad():
        together = net(input_ids=ids).logits
        for row in range(2):
            torch.testing.assert_close(net(input_ids=ids[row : row + 1]).logits[0], together[row])
        net.mask = ()
        with skipping(net, ffn=[0, 3]):
            assert net(input_ids=ids).logits.shape == together.shape


def test_gain_offset_tells_the_norms_apart():
    llama = make_llama().model.layers[0].post_attention_layernorm
    assert gain_offset(llama, WIDTH) == 0.0
    gemma = GemmaForCausalLM(GemmaConfig(**gemma_sizes())).model.layers[0].post_attention_layernorm
    assert gain_offset(gemma, WIDTH) == 1.0
    for width in (7, 12):
        assert gain_offset(nn.LayerNorm(width), width) == 0.0
        assert gain_offset(nn.LayerNorm(width, bias=False), width) == 0.0
        assert gain_offset(nn.LayerNorm(width, elementwise_affine=False), width) == 0.0
        assert gain_offset(nn.RMSNorm(width), width) == 0.0
        assert gain_offset(nn.RMSNorm(width, device="meta"), width) == 0.0  # needs no weights
        assert gain_offset(nn.Identity(), width) is None  # normalises nothing
        assert gain_offset(nn.Linear(width, width), width) is None
        assert gain_offset(nn.BatchNorm1d(width), width) is None
        assert gain_offset(Squashed(width), width) is None


class Squashed(nn.Module):
    """A norm that is more than a gain and a bias."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return self.weight * torch.tanh(x) + self.bias


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
        pytest.raises(ConfigError, match="skipping mha 5: the model's are 0 to 4"),
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
