"""Whole layers as sites, the bottleneck at a site, and the parts of PIA: what the paper's tables compare EAS with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES
from test_conformance import Subject, generate
from test_pia import randomise
from test_prompt import CLOSE, make_net
from torch.nn import functional as F
from toys import IMAGE, LAYERS, WIDTH, make_batch, make_llama, make_llava, make_prompts, row_of, snapshot, stir
from transformers import DynamicCache

import eas_kit as eas
from eas_kit.bottleneck import Bottleneck
from eas_kit.errors import ConfigError, MergeError, PromptError
from eas_kit.pia import PIA

DAS = {"kinds": ("layer",), "adapter": "bottleneck"}
LAYER_MASKS = [(0,), (LAYERS - 1,), (0, 2, 3)]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}  # an image written has no pixels


# -- PIA part by part ----------------------------------------------------------------------------------------------


def by_loops(pia: PIA, n: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """One position after the other, in float64; nothing shared with the library."""
    p = {name: value.detach().double().numpy() for name, value in pia.state_dict().items()}
    rows, columns = pia.hidden_size // pia.groups, pia.rank // pia.groups
    y = np.empty_like(n)
    for b in range(len(n)):
        last = max(t for t in range(n.shape[1]) if prompt[b, t])
        for t in range(n.shape[1]):
            seen = [n[b, i] for i in range(n.shape[1]) if prompt[b, i] or last < i <= t]
            m = n[b, t] if pia.parts == "base" else np.mean(seen, axis=0)
            logits = (p["router.weight"] @ m + p["router.bias"]) / pia.temperature
            w = np.exp(logits) / np.exp(logits).sum()
            name = "down_token" if pia.paths == 2 else "down_pooled"
            z = p[f"{name}.weight"] @ n[b, t] + p[f"{name}.bias"]
            if pia.paths == 2 and pia.parts == "exchange":
                z = pia.path_factor * (z + p["down_pooled.weight"] @ m + p["down_pooled.bias"])
            out = np.zeros_like(m)
            for path in (0, 1):
                for g in range(pia.groups):
                    block = p[f"up_{path}.weight"][g * rows : (g + 1) * rows]
                    out[g * rows : (g + 1) * rows] += w[path] * (block @ z[g * columns : (g + 1) * columns])
                out += w[path] * p[f"up_{path}.bias"]
            y[b, t] = n[b, t] + pia.scale * out
    return y


PROMPTS = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("parts", ["base", "exchange"])
@pytest.mark.parametrize("paths", [1, 2])
def test_parts_equal_plain_loops(parts, paths):
    pia = PIA(14, 10, 2, scale=0.7, temperature=3.0, paths=paths, parts=parts, path_factor=0.8)
    pia = randomise(pia.double().eval())
    n = torch.randn(3, 5, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = by_loops(pia, n.numpy(), PROMPTS.numpy())
    before = PROMPTS.int().argmax(1)[:, None] > torch.arange(5)  # read by nobody
    found = pia(n, PROMPTS).detach().numpy()
    np.testing.assert_allclose(found[~before], expected[~before], rtol=0, atol=1e-12)
    frozen = PIA(14, 10, 2, scale=0.7, temperature=3.0, paths=paths, path_factor=0.8).double().eval()
    frozen.load_state_dict(pia.state_dict(), strict=False)
    assert np.abs(frozen(n, PROMPTS).detach().numpy() - found)[~before].max() > 1e-2  # control


def test_a_running_mean_goes_on_where_it_was():
    pia = randomise(PIA(14, 10, 2, parts="exchange").double().eval())
    n = torch.randn(3, 5, 14, dtype=torch.float64)
    prompt = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    whole = pia(n, prompt)
    route, state = pia.running(n[:, :3], prompt[:, :3])
    pieces = [n[:, :3] + pia.delta(n[:, :3], route)]
    for t in (3, 4):
        route, state = pia.running(n[:, t : t + 1], None, state)
        pieces.append(n[:, t : t + 1] + pia.delta(n[:, t : t + 1], route))
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert state.count.flatten().tolist() == [4, 5, 3]


def test_base_has_no_pooled_path_and_the_factor_is_an_option():
    assert not any("pooled" in name for name, _ in PIA(14, 4, parts="base").named_parameters())
    assert any("pooled" in name for name, _ in PIA(14, 4, parts="base", paths=1).named_parameters())  # A, at a kept one
    half, whole = randomise(PIA(14, 4)).eval(), randomise(PIA(14, 4, path_factor=1.0)).eval()
    n, bias = torch.randn(2, 3, 14), half.scale
    prompt = torch.ones(2, 3, dtype=torch.bool)
    zero = half.delta(n, half.route(half.mean(n, prompt)))
    for pia in (half, whole):
        pia.up_0.bias.data.zero_()
        pia.up_1.bias.data.zero_()
    assert bias == 1.0
    torch.testing.assert_close(2 * (half(n, prompt) - n), whole(n, prompt) - n)
    M, b = whole.fold(whole.mean(n, prompt))
    torch.testing.assert_close(torch.einsum("bij,bsj->bsi", M, n) + b[:, None], whole(n, prompt))
    assert zero.shape == n.shape
    with pytest.raises(ValueError, match="parts: wanted one of"):
        PIA(14, 4, parts="all")
    with pytest.raises(ValueError, match="only parts=\"frozen\" is an affine map that can be folded.*'base'"):
        PIA(14, 4, parts="base").fold(n.mean(1))


@pytest.mark.parametrize("parts", ["base", "exchange"])
@pytest.mark.parametrize("mask", [(), (0, 2)])
class TestPartsInAModel:
    def test_cached_uncached_single_and_beams(self, parts, mask):
        net, prompts = make_net(mask, parts=parts), make_prompts()
        cached = net.generate(**prompts, **GREEDY)
        assert torch.equal(cached, net.generate(**prompts, **GREEDY, use_cache=False))
        assert torch.equal(cached, net.generate(**prompts, **GREEDY, cache_implementation="static"))
        for row in range(3):
            alone = net.generate(**row_of(prompts, row), **GREEDY)
            assert torch.equal(alone[0, -6:], cached[row, -6:])
        beams = net.generate(**prompts, **GREEDY, num_beams=3)
        assert torch.equal(beams, net.generate(**prompts, **GREEDY, num_beams=3, use_cache=False))

    def test_steps_read_what_the_whole_sequence_does(self, parts, mask):
        net = make_net(mask, parts=parts)
        batch = make_batch(lengths=((7, 4), (7, 4)), images=(True, True))
        with torch.no_grad():
            whole = net(**batch).logits
            prompt = {k: v[:, :-4] if k != "pixel_values" else v for k, v in batch.items() if k != "labels"}
            out = net(**prompt, use_cache=True)
            steps = [out.logits]
            for t in range(4):
                ids = batch["input_ids"][:, t - 4 : t - 3 or None]
                out = net(input_ids=ids, past_key_values=out.past_key_values)
                steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)

    def test_no_answer_token_leaks_back(self, parts, mask):
        net, batch = make_net(mask, parts=parts), make_batch()
        changed = {key: value.clone() for key, value in batch.items()}
        places = [int((row != -100).nonzero()[-1]) for row in batch["labels"]]
        for row, place in enumerate(places):
            changed["input_ids"][row, place] = changed["labels"][row, place] = 3
        with torch.no_grad():
            before, after = net(**batch).logits, net(**changed).logits
        for row, place in enumerate(places):
            torch.testing.assert_close(before[row, :place], after[row, :place], rtol=0, atol=0)
            assert not torch.allclose(before[row, place], after[row, place])

    def test_trains_and_is_not_merged(self, parts, mask, toy_task):
        net = eas.attach(make_llava(), eas.EASConfig(skip_rank=6, adapt_rank=4, parts=parts))
        net.mask = mask
        before = {name: p.detach().clone() for name, p in net.adapters.named_parameters()}
        settings = {"max_steps": 2, "batch_size": 6, "learning_rate": 1e-2, "progress": False}
        eas.fit(net, toy_task, eas.TrainConfig(**settings, gradient_checkpointing=True))
        moved = [name for name, p in net.adapters.named_parameters() if not torch.equal(before[name], p)]
        assert {name.rsplit(".", 2)[0] for name in moved} == set(net.active_adapters())
        prompts = make_prompts()
        says = rf"EASConfig\(parts='{parts}'\).*attach with adapter=\"pia\" and parts"
        for merge in (True, "low_rank", "per_prompt"):
            with pytest.raises(MergeError, match=says):
                net.generate(**row_of(prompts, 0), merge=merge)
        with pytest.raises(MergeError, match="no affine map"):
            eas.static_merge(net, toy_task, score_on=None)


def test_a_running_mean_cannot_be_taken_back():
    net, prompts = make_net((0, 2), parts="exchange"), make_prompts()
    with pytest.raises(PromptError, match="no assisted decoding, no prompt lookup, no cache.crop"):
        net.generate(**row_of(prompts, 0), max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3)
    base = make_net((0, 2), parts="base")  # control: nothing is kept, so nothing is in the way
    plain = base.generate(**row_of(prompts, 0), **GREEDY)
    assert torch.equal(plain, base.generate(**row_of(prompts, 0), **GREEDY, prompt_lookup_num_tokens=3))


def test_the_pool_of_training():
    prompt, sequence = make_net((0, 2)), make_net((0, 2), pool="sequence")
    batch = make_batch()
    with torch.no_grad():
        assert torch.equal(prompt(**batch).logits, sequence(**batch).logits)  # in eval mode it is the prompt
        for net in (prompt, sequence):
            net.train()
            for pia in net.active_adapters().values():
                pia.drop.p = 0.0
        whole = prompt(**batch, prompt_mask=batch["attention_mask"].bool()).logits
        assert torch.equal(sequence(**batch).logits, whole)
        assert not torch.allclose(prompt(**batch).logits, whole)
    with pytest.raises(ConfigError, match="pool=\"sequence\" is about the frozen mean of a prompt, which parts='base'"):
        eas.EASConfig(pool="sequence", parts="base")
    for name, wrong in (("pool", "all"), ("parts", "z"), ("adapter", "lora"), ("path_factor", None)):
        with pytest.raises(ConfigError, match=f"EASConfig.{name}: wanted"):
            eas.EASConfig(**{name: wrong})


# -- whole layers --------------------------------------------------------------------------------------------------


def by_hand(net, batch) -> torch.Tensor:
    """Logits of a Llama with layers skipped, on the detached base's own parts, layer after layer."""
    mask, adapters, config = set(net.mask), net.adapters, net.config
    base = eas.detach(net)
    model, keep = base.model, batch["attention_mask"].bool()
    prompt = keep & ((batch["labels"] != -100).cumsum(1) == 0)
    x = model.embed_tokens(batch["input_ids"])
    S = x.shape[1]
    rotary = model.rotary_emb(x, position_ids=torch.arange(S)[None])
    allowed = torch.ones(S, S, dtype=torch.bool).tril() & keep[:, None, None, :]
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for i, layer in enumerate(model.layers):
        n = layer.input_layernorm(x)
        if i in mask:
            adapter = adapters[str(i)]["skip"]
            if config.adapter == "bottleneck":
                hidden = n @ adapter.down.weight.T + adapter.down.bias
                x = x + config.scale * (hidden * torch.sigmoid(hidden) @ adapter.up.weight.T + adapter.up.bias)
            else:
                x = x + adapter(n, prompt) - n
            continue
        if config.adapt_rank:
            n = adapters[str(i)]["keep"](n, prompt)
        x = x + layer.self_attn(n, position_embeddings=rotary, attention_mask=bias)[0]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return base.lm_head(model.norm(x))


@pytest.mark.parametrize("mask", LAYER_MASKS)
@pytest.mark.parametrize("config", [DAS, DAS | {"adapt_rank": 0, "scale": 0.7}, {"kinds": ("layer",)}])
class TestLayers:
    def test_forward_is_the_formula(self, mask, config):
        net, batch = make_net(mask, model=make_llama(), **config), make_batch(images=None)
        with torch.no_grad():
            seen = net(**batch, output_hidden_states=True)
            dense = make_llama()(**batch).logits
            expected = by_hand(net, batch)
        keep = batch["attention_mask"].bool()
        torch.testing.assert_close(seen.logits[keep], expected[keep], **CLOSE)
        assert len(seen.hidden_states) == LAYERS + 1
        assert (seen.logits - dense)[keep].abs().max() > 0.1

    def test_generate(self, mask, config):
        net, prompts = make_net(mask, **config), make_prompts()
        cached = net.generate(**prompts, **GREEDY)
        assert torch.equal(cached, net.generate(**prompts, **GREEDY, use_cache=False))
        assert torch.equal(cached, net.generate(**prompts, **GREEDY, cache_implementation="static"))
        for row in range(3):
            assert torch.equal(net.generate(**row_of(prompts, row), **GREEDY)[0, -6:], cached[row, -6:])
        beams = net.generate(**prompts, **GREEDY, num_beams=3)
        assert torch.equal(beams, net.generate(**prompts, **GREEDY, num_beams=3, use_cache=False))
        cache = DynamicCache(config=net.base.config.get_text_config())
        with torch.no_grad():
            net(**prompts, past_key_values=cache)
        held = [i for i, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]
        assert held == [i for i in range(LAYERS) if i not in mask]

    def test_detach_save_and_load(self, mask, config, tmp_path):
        model, batch = make_llava(), make_batch()
        with torch.no_grad():
            model(**batch, output_hidden_states=True)
        before = snapshot(model)
        net = make_net(mask, model=model, **config)
        with torch.no_grad():
            seen = net(**batch).logits
        net.save_pretrained(tmp_path / "net")
        eas.detach(net)
        assert snapshot(model) == before
        again = eas.load(tmp_path / "net", base=make_llava())
        assert (again.mask, again.config) == (mask, net.config)
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, seen)

    def test_merge_is_refused_by_name(self, mask, config):
        net, prompts = make_net(mask, **config), row_of(make_prompts(), 0)
        says = (
            "adapter='bottleneck'"
            if "adapter" in config
            else rf"site {mask[0]} \(.*layers.{mask[0]}\) is a skipped layer"
        )
        for merge in (True, "low_rank"):
            with pytest.raises(MergeError, match=says):
                net.generate(**prompts, merge=merge)


def test_new_layer_adapters_pass_the_stream_on():
    model, batch = make_llava(), make_batch()
    with torch.no_grad(), eas.skipping(model, mha=[0, 2], ffn=[0, 2]):
        removed = model(**batch).logits
    for config in (DAS, {"kinds": ("layer",)}):
        net = eas.attach(model, eas.EASConfig(**config))
        with torch.no_grad():
            dense = net(**batch).logits
            net.mask = (0, 2)
            assert torch.equal(net(**batch).logits, removed)
        assert not torch.allclose(dense, removed)
        eas.detach(net)


def test_sites_of_kind_layer():
    model = make_llava()
    table = eas.describe(model, ("layer",))
    assert table.kind.tolist() == ["layer"] * LAYERS
    assert table.path[3] == "model.language_model.layers.3"
    assert table.params[3] == sum(p.numel() for p in model.model.language_model.layers[3].parameters())
    assert not table.mergeable.any()
    assert set(table.reason) == {"a skipped layer leaves no linear to fold its adapter into"}
    net = make_net((1,), model=model, **DAS)
    assert eas.describe(net, ("layer",)).equals(table)
    with pytest.raises(ConfigError, match=r"skips all 5 layers; keep at least one"):
        net.mask = range(LAYERS)
    with pytest.raises(ConfigError, match=r"kinds: wanted \('layer',\) alone"):
        eas.EASConfig(kinds=("mha", "layer"))


def test_costs_of_skipped_layers():
    prompts = row_of(make_prompts(images=None), 1)
    net, dense = make_net((), model=make_llama(), **DAS | {"adapt_rank": 0}), eas.measure.flops(make_llama(), prompts)
    assert eas.measure.flops(net, prompts) == dense
    net.mask = (0, 3)
    found, S, r = eas.measure.flops(net, prompts), prompts["input_ids"].shape[1], 6
    assert found["adapter"] == 2 * S * 2 * WIDTH * r
    for part in ("attention_projections", "attention_scores", "ffn"):
        assert found[part] * LAYERS == dense[part] * (LAYERS - 2)
    by_config = eas.measure.flops(make_llama(), tokens=S, mask=(0, 3), kind="layer")
    assert by_config["total"] == found["total"] - found["adapter"]
    assert eas.measure.parameters(net)["active"] == {"skip": 2 * (2 * WIDTH * r + r + WIDTH), "total": 1000}
    with pytest.raises(ConfigError, match="flops: kind: wanted one of"):
        eas.measure.flops(make_llama(), kind="layers")
    times = eas.measure.time_parts(net, prompts, new_tokens=2, repeats=1)
    assert times["share"]["decode"]["adapters"] > 0


def test_search_and_tuning_of_layers(toy_task, tmp_path):
    net = eas.attach(make_llava(), eas.EASConfig(**DAS, skip_rank=6, adapt_rank=0))
    shared = {"batch_size": 4, "progress": False, "learning_rate": 1e-2}
    search = eas.SearchConfig(num_skipped=2, warmup_steps=2, updates=2, train_steps_per_update=1, **shared)
    result = eas.search(net, toy_task, search)
    assert (len(result.skipped), result.kinds, net.mask) == (2, ("layer",), result.skipped)
    result.save_mask(tmp_path / "mask.json")
    assert eas.load_mask(tmp_path / "mask.json", site_kinds=[site.kind for site in net.sites]) == net.mask
    before = {name: p.detach().clone() for name, p in net.adapters.named_parameters()}
    eas.fit(net, toy_task, eas.TrainConfig(max_steps=2, gradient_checkpointing=True, **shared))
    moved = {name.split(".")[0] for name, p in net.adapters.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {str(site) for site in net.mask}
    with pytest.raises(ConfigError, match="num_skipped must be between 1 and 4"):
        eas.search(net, toy_task, eas.SearchConfig(num_skipped=5, **shared))
    net.mask = ()
    with pytest.raises(eas.EASError, match="adapt_rank 0 no adapter is at work"):
        eas.fit(net, toy_task)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "jamba", "gptj", "gpt_neox"])
def test_layers_of_other_families(name):
    """Norms behind the parts; experts that return a tuple; other layers in between; attention beside feed-forward."""
    (family,) = [one for one in FAMILIES if one.name == name]
    subject, model = Subject(family), family.build()
    mask = (0, 2) if family.sites > 2 else (0,)
    with torch.no_grad(), eas.skipping(model, mha=mask, ffn=mask):
        removed = model(**subject.prompts).logits
    net = eas.attach(model, eas.EASConfig(kinds=("layer",), skip_rank=6, adapt_rank=4))
    net.mask = mask
    with torch.no_grad():
        torch.testing.assert_close(net(**subject.prompts).logits, removed)
    stir(net.adapters)
    cached = generate(net, subject.prompts)
    assert torch.equal(cached, generate(net, subject.prompts, use_cache=False))
    for number, alone in enumerate(subject.alone):
        assert torch.equal(generate(net, alone)[0], cached[number])


def test_a_card_says_merge_only_where_that_works(tmp_path):
    for config, merges in ((DAS, False), ({"parts": "base"}, False), ({}, True)):
        make_net((1,), **config).save_pretrained(tmp_path)
        assert ("merge=True" in (tmp_path / "README.md").read_text()) == merges


def test_a_bottleneck_at_an_attention_site_reads_no_prompt(make_batch):
    """No labels are needed in training, and a cache may hold anything before."""
    net = make_net((0, 2), adapter="bottleneck").train()
    batch = make_batch()
    del batch["labels"]
    assert net(**batch).logits.isfinite().all()
    net.eval()
    prompts = row_of(make_prompts(images=None), 2)
    with torch.no_grad():
        whole = net(**prompts).logits
        cache = net(input_ids=prompts["input_ids"][:, :4], use_cache=True).past_key_values
        rest = net(input_ids=prompts["input_ids"][:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 4:], **CLOSE)


def test_bottleneck_by_hand():
    torch.manual_seed(0)
    adapter, x = Bottleneck(7, 3, scale=2.0, activation=F.relu), torch.randn(2, 5, 7)
    assert torch.equal(adapter(x), x)
    adapter.up.weight.data.normal_()
    adapter.up.bias.data.normal_()
    hidden = (x @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    torch.testing.assert_close(adapter(x), x + 2.0 * (hidden @ adapter.up.weight.T + adapter.up.bias))
    half = Bottleneck(7, 3, dropout=0.5)
    half.up.weight.data.normal_()
    assert not torch.equal(half(x), half(x))
