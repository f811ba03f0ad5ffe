"""Counts against the paper's tables and against counting by hand; clocks and memory."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import toys
from transformers import LlamaConfig

import eas_kit as eas
from eas_kit import baselines, measure, roofline, timing
from eas_kit.errors import ConfigError

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
G = 1e9


@pytest.fixture
def net():
    torch.manual_seed(0)
    return eas.attach(toys.make_llava(), eas.EASConfig(skip_rank=6, adapt_rank=4))


# -- multiply-accumulates ------------------------------------------------------------------------------------------


def test_flops_of_llama_7b_are_the_papers():
    config = LlamaConfig(**LLAMA_7B)
    dense = measure.flops(config, tokens=262)
    assert dense["total"] / G == pytest.approx(1714.8, abs=0.15)  # Table 2, LLaMA-LoRA
    merged = measure.flops(config, tokens=262, mask=range(20, 32))
    assert merged["total"] / G == pytest.approx(1497.1, abs=0.15)  # Table 2, LaVIN-EAS12
    assert merged["ffn"] == dense["ffn"]


def test_flops_of_one_attention_of_llava_7b():
    config = LlamaConfig(**LLAMA_7B)
    difference = measure.flops(config, 691, [5])["total"] - measure.flops(config, 691)["total"]
    assert difference / G == pytest.approx(-50.26, abs=0.05)  # Table 1: -402.1 for 8, -603.0 for 12


def test_flops_of_a_llama_by_hand():
    d, f, layers, t, heads, head = toys.WIDTH, 53, toys.LAYERS, 17, 2, 14
    found = measure.flops(toys.text_config(), t, mask=[1])
    kept = layers - 1
    assert found["attention_projections"] == kept * t * d * (2 * heads + 2 * 1) * head  # q, o: 2 heads; k, v: 1
    assert found["attention_scores"] == kept * 2 * heads * t * t * head
    assert found["ffn"] == layers * 3 * t * d * f
    assert found["adapter"] == found["other"] == 0
    assert found["total"] == sum(found[part] for part in measure.PARTS)


def test_flops_of_a_model_and_of_its_config_agree(net):
    by_config = measure.flops(toys.make_llava().config, 23, [0, 2])
    assert measure.flops(net, tokens=23, mask=[0, 2]) == by_config
    model = toys.make_llama()
    inputs = {"input_ids": torch.randint(3, 90, (1, 23))}
    measured = measure.flops(model, inputs)
    expected = measure.flops(model.config, 23)
    assert {part: measured[part] for part in (*measure.PARTS, "total")} == {
        part: expected[part] for part in (*measure.PARTS, "total")
    }
    assert measured["other"] == 23 * toys.WIDTH * toys.VOCAB  # the output head
    with pytest.raises(ConfigError, match=r"set net.mask instead"):
        measure.flops(model, inputs, mask=[1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_of_a_forward_with_adapters_by_hand(attention):
    base = toys.make_llava()
    base.set_attn_implementation(attention)
    net = eas.attach(base, eas.EASConfig(skip_rank=6, adapt_rank=4))
    inputs = toys.make_prompts()
    rows, t = inputs["input_ids"].shape
    dense = measure.flops(toys.make_llava(), inputs)
    d, skip, keep = toys.WIDTH, 6, 4
    # Down: one matrix per token; up: one, mixed per prompt from two, in two groups, so half; per prompt: the router,
    # the mix of the two matrices and of their biases, and the pooled path of a skipped site.
    per_kept = rows * t * (d * keep + d * keep // 2) + rows * (2 * d + 2 * d * keep // 2 + 2 * d)
    per_skipped = rows * t * (d * skip + d * skip // 2) + rows * (2 * d + 2 * d * skip // 2 + 2 * d + d * skip)
    assert measure.flops(net, inputs)["adapter"] == 5 * per_kept
    net.mask = [0, 3]
    net.train()
    found = measure.flops(net, inputs)
    assert net.training
    assert found["adapter"] == 3 * per_kept + 2 * per_skipped
    for part in ("attention_projections", "attention_scores"):
        assert found[part] == dense[part] * 3 // 5
    assert found["ffn"] == dense["ffn"]
    assert found["other"] == dense["other"]
    assert eas.PIA.route.__qualname__ == "PIA.route"  # put back


def test_merged_decoding_costs_no_adapter_and_no_skipped_attention(net):
    net.mask = [1, 4]
    inputs = toys.make_prompts((7,), (True,))

    def cost(new_tokens, merge):
        return measure.count_flops(net, lambda: net.generate(**inputs, max_new_tokens=new_tokens, merge=merge))

    def per_token(merge):  # the cost of decoding: more tokens less fewer
        long, short = cost(7, merge), cost(4, merge)
        return {part: long[part] - short[part] for part in measure.PARTS}

    merged, unmerged = per_token(True), per_token(False)
    assert merged["adapter"] == 0 < unmerged["adapter"]
    assert merged["ffn"] == unmerged["ffn"]
    assert merged["attention_projections"] == unmerged["attention_projections"]
    net.mask = ()
    assert per_token(True)["attention_projections"] * 3 == merged["attention_projections"] * 5


def test_condensed_adapters_by_hand(net):
    """A low-rank decoding step: D and [U_0, U_1] of every adapter, 3 d r, and nothing in another part."""
    net.mask = [1, 4]
    inputs, per_token = toys.make_prompts(), {}
    for merge in (False, "low_rank"):
        long, short = (
            measure.count_flops(net, lambda n=n, m=merge: net.generate(**inputs, max_new_tokens=n, merge=m))
            for n in (7, 4)
        )
        per_token[merge] = {part: long[part] - short[part] for part in (*measure.PARTS, "other")}
    for part in per_token[False].keys() - {"adapter"}:
        assert per_token["low_rank"][part] == per_token[False][part], part
    rows, steps = 3, 3
    assert per_token["low_rank"]["adapter"] == rows * steps * 3 * toys.WIDTH * (
        2 * 6 + 3 * 4
    )  # two skipped, three kept
    assert eas.slots.LowRank.__call__.__qualname__ == "LowRank.__call__"  # put back


def test_folding_is_charged_to_the_adapters(net):
    from eas_kit import merging

    net.mask = [1, 4]
    inputs = toys.make_prompts((7,), (True,))
    merged, unmerged = (
        measure.count_flops(net, lambda m=merge: net.generate(**inputs, max_new_tokens=1, merge=m))
        for merge in (True, False)
    )
    assert merged["adapter"] > unmerged["adapter"]
    for part in ("other", "ffn", "attention_projections", "attention_scores"):
        assert merged[part] == unmerged[part], part
    d, f, r = toys.WIDTH, 53, 6
    linear = net.base.model.language_model.layers[1].mlp.up_proj
    pia = net.adapters["1"]["skip"]
    factors = pia.factors(pia.route(torch.randn(1, d)))
    alone = measure.count_flops(net, lambda: merging.fold_linear(linear, factors))
    assert alone["adapter"] == alone["total"] == f * d * (r + 1) + f * r * d  # W [U, b], then W' += (W U) D
    assert alone["other"] == 0


# -- parameters ----------------------------------------------------------------------------------------------------


def test_parameters_of_a_plain_model():
    model = toys.make_llava()
    model.model.vision_tower.requires_grad_(False)
    found = measure.parameters(model)
    assert found["total"] == sum(p.numel() for p in model.parameters())
    assert found["trainable"] == found["total"] - sum(p.numel() for p in model.model.vision_tower.parameters())
    assert found["share"] == found["trainable"] / found["total"]
    decoder = sum(p.numel() for p in model.model.language_model.parameters())
    assert found["language_model"] == decoder + model.lm_head.weight.numel()


def test_parameters_of_adapters_by_hand(net):
    plain = measure.parameters(toys.make_llava())
    net.mask = [1, 3]
    found = measure.parameters(net)
    d = toys.WIDTH
    keep = (d * 4 + 4) + 2 * (d * 4 // 2 + d) + (2 * d + 2)
    skip = 2 * (d * 6 + 6) + 2 * (d * 6 // 2 + d) + (2 * d + 2)
    assert found["adapters"] == {"skip": 5 * skip, "keep": 5 * keep}
    assert found["active"] == {"skip": 2 * skip, "keep": 3 * keep, "total": 2 * skip + 3 * keep}
    assert found["language_model"] == plain["language_model"]
    assert found["trainable"] == 5 * (skip + keep)
    assert found["total"] == plain["total"] + found["trainable"]


@pytest.mark.parametrize(("skipped", "share"), [(8, 0.78), (12, 0.90)])
def test_trainable_shares_of_llava_are_the_papers(skipped, share):
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**LLAMA_7B))
    net = eas.attach(base, eas.EASConfig(skip_rank=256, adapt_rank=128, groups=2))
    net.mask = range(skipped)
    assert 100 * measure.parameters(net)["active_share"] == pytest.approx(share, abs=0.03)


# -- latency and memory --------------------------------------------------------------------------------------------


def test_latency_takes_prefill_and_decode_apart(net):
    found = measure.latency(net, toys.make_prompts(), new_tokens=9, repeats=3)
    assert found["new_tokens"] == 9
    for part in ("prefill", "decode", "total"):
        spread = found[part]
        assert len(spread["runs"]) == 3
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert [p + d for p, d in zip(found["prefill"]["runs"], found["decode"]["runs"], strict=True)] == pytest.approx(
        found["total"]["runs"]
    )


def test_latency_counts_tokens_of_all_rows(net):
    inputs = toys.make_prompts()  # three rows
    found = measure.latency(net, inputs, new_tokens=5, repeats=2)
    for run in range(2):
        step = found["decode_per_token"]["runs"][run]
        assert step == found["decode"]["runs"][run] / 4
        assert found["tokens_per_second"]["runs"][run] == pytest.approx(3 / step)
    assert "decode_per_token" not in measure.latency(net, inputs, new_tokens=1, repeats=1)


def test_calls_are_compared_round_by_round(monkeypatch):
    clock, log = [0.0], []
    monkeypatch.setattr(timing, "now", lambda device: clock[0])

    def call(name, *seconds):
        taken = iter(seconds)

        def run():
            log.append(name)
            clock[0] += next(taken)

        return run

    found = measure.compare_calls({"dense": call("dense", 9, 8, 6), "rank": call("rank", 9, 2, 3)}, repeats=2)
    assert log == ["dense", "rank"] * 3  # one round to warm up
    assert found["seconds"]["dense"]["runs"] == [8, 6]
    assert found["ratio"]["rank"]["runs"] == [4, 2]
    assert found["ratio"]["rank"]["median"] == 3
    assert found["ratio"]["dense"]["runs"] == [1, 1]
    with pytest.raises(ConfigError, match=r"at least one function"):
        measure.compare_calls({})


class Slow:
    """Pretends to generate: `prefill` seconds to the first token, `step` seconds for each further one."""

    def __init__(self, prefill, step, log=None):
        self.prefill, self.step, self.log = prefill, step, log if log is not None else []

    def __call__(self, input_ids, stopping_criteria, max_new_tokens, **settings):
        self.log.append(self.prefill)
        time.sleep(self.prefill)
        for number in range(max_new_tokens):
            time.sleep(self.step if number else 0)
            stopping_criteria(input_ids, None)


def test_comparison_alternates_and_reports_ratios():
    log, inputs = [], {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    arms = {"dense": Slow(0.02, 0.004, log), "merged": Slow(0.01, 0.002, log)}
    found = measure.compare_latency(arms, inputs, new_tokens=6, repeats=3)
    assert log == [0.02, 0.01] * 4  # one round to warm up
    assert found["baseline"] == "dense"
    for part in ("prefill", "decode", "total"):
        assert found["speedup"]["merged"][part]["median"] == pytest.approx(2, rel=0.25)
        assert found["speedup"]["dense"][part]["median"] == 1
    assert found["arms"]["dense"]["decode"]["median"] == pytest.approx(5 * 0.004, rel=0.25)
    turned = measure.compare_latency(arms, inputs, new_tokens=2, repeats=1, baseline="merged")
    assert turned["speedup"]["dense"]["prefill"]["median"] < 1
    with pytest.raises(ConfigError, match=r"baseline 'x' is none of the arms \['dense', 'merged'\]"):
        measure.compare_latency(arms, inputs, baseline="x")
    with pytest.raises(ConfigError, match=r"at least one arm"):
        measure.compare_latency({}, inputs)
    with pytest.raises(ConfigError, match=r"Wanted 4 tokens one by one, the model made 0"):
        measure.latency(lambda **kwargs: None, inputs, new_tokens=4)


def test_share_of_the_attentions_bounds_the_speed_up():
    model, inputs = toys.make_llava(), toys.make_prompts()
    attention = model.model.language_model.layers[2].self_attn
    original = attention.forward

    def slow(*args, **kwargs):
        time.sleep(0.02)  # far longer than all the rest of a step
        return original(*args, **kwargs)

    attention.forward = slow
    share = measure.attention_share(model, inputs, [2], new_tokens=4, repeats=2)
    other = measure.attention_share(model, inputs, [0], new_tokens=4, repeats=2)
    assert share["decode"]["share"] > 0.7
    assert other["decode"]["share"] < 0.3
    assert share["decode"]["bound"] == pytest.approx(1 / (1 - share["decode"]["share"]))
    assert share["decode"]["share_with_norm"] > share["decode"]["share"]
    assert share["decode"]["bound_with_norm"] > share["decode"]["bound"]
    assert not attention._forward_hooks


def test_peak_memory_sees_a_passing_rise(monkeypatch):
    """The system's readings are made up: a real process can be given less memory at any moment."""
    now, seen = [100 * 2**20], threading.Event()

    def memory_info(process):
        if now[0] == 329 * 2**20:
            seen.set()
        return SimpleNamespace(rss=now[0])

    monkeypatch.setattr(psutil.Process, "memory_info", memory_info)
    with measure.peak_memory() as memory:
        now[0] = 329 * 2**20
        assert seen.wait(10)
        now[0] = 120 * 2**20
    assert (memory["resident_before"], memory["resident_peak"]) == (100, 329)


def test_peak_memory_is_that_of_this_process():
    with measure.peak_memory() as memory:
        pass
    assert memory["resident_peak"] == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.5)


# -- the roofline --------------------------------------------------------------------------------------------------

D, F, HEADS, KV = toys.WIDTH, 53, 28, 14  # widths of the stream, the feed-forward, all queries, all keys
ATTENTION = 2 * D * HEADS + 2 * D * KV
LAYER = ATTENTION + 3 * D * F + 2 * D
OUTSIDE = D + toys.VOCAB * D + 7  # last norm, output head, frequencies of the rotary embedding


def prompts(rows=3):
    return toys.make_prompts((7, 5, 11)[:rows], images=None)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_decoding_step_of_a_llama_reads_each_weight_once(attention):
    model = toys.make_llama()
    model.set_attn_implementation(attention)
    model.train()
    before = toys.snapshot(model)
    found = measure.decode_bytes(model, prompts())
    assert found["weights"] == 4 * (5 * LAYER + OUTSIDE + 3 * D)  # and the embeddings of three tokens
    assert found["cache_per_position"] == 4 * 3 * 5 * 2 * KV
    assert toys.snapshot(model) == before
    static = measure.decode_bytes(model, prompts(), cache_implementation="static")
    assert static == found
    half = measure.decode_bytes(toys.make_llama().to(torch.bfloat16), prompts())
    assert half["cache_per_position"] == found["cache_per_position"] // 2


def test_a_table_that_is_also_the_output_head_is_read_once():
    model = toys.make_llama(tie_word_embeddings=True)
    assert measure.decode_bytes(model, prompts())["weights"] == 4 * (5 * LAYER + OUTSIDE)


def test_a_merged_step_reads_no_skipped_attention_and_no_adapter():
    net = eas.attach(toys.make_llama(), eas.EASConfig(skip_rank=6, adapt_rank=4))
    net.mask = [1, 4]
    merged, unmerged = (measure.decode_bytes(net, prompts(1), merge=merge) for merge in (True, False))
    # Folded linears have a bias: gate and up where the attention is skipped, q, k and v where it is not. The norm
    # before the feed-forward of a skipped layer is folded in.
    folded = 2 * (2 * F - D - ATTENTION) + 3 * (HEADS + 2 * KV)
    assert merged["weights"] == 4 * (5 * LAYER + OUTSIDE + D + folded)
    assert merged["cache_per_position"] == unmerged["cache_per_position"] == 4 * 3 * 2 * KV
    adapters = sum(p.numel() for pia in net.active_adapters().values() for p in pia.parameters())
    at_least = 4 * (5 * LAYER + OUTSIDE + D - 2 * ATTENTION)
    assert at_least < unmerged["weights"] < at_least + 4 * adapters  # a router has done its work with the prompt


def test_a_step_with_adapters_reads_them_too():
    model, _ = baselines.bottlenecks(toys.make_llama(), rank=7)
    assert measure.decode_bytes(model, prompts(1))["weights"] == 4 * (5 * (LAYER + 2 * D * 7 + 7 + D) + OUTSIDE + D)
    model, _ = baselines.skip_layers(toys.make_llama(), [2], rank=7)
    assert measure.decode_bytes(model, prompts(1)) == {
        "weights": 4 * (4 * LAYER + 2 * D * 7 + 7 + D + OUTSIDE + D),
        "cache_per_position": 4 * 4 * 2 * KV,
    }
    model, _ = baselines.lora(toys.make_llama(), rank=3, linears=("q_proj", "down_proj"))
    more = 5 * 3 * (D + HEADS + F + D)
    assert measure.decode_bytes(model, prompts(1))["weights"] == 4 * (5 * LAYER + more + OUTSIDE + D)


def test_bandwidth_is_that_of_the_quickest_read(monkeypatch):
    times = iter([moment for read in range(15) for moment in (100 * read, 100 * read + (3 if read == 7 else 5))])
    monkeypatch.setattr(roofline, "now", lambda device: next(times))
    assert measure.bandwidth("cpu", torch.bfloat16, mebibytes=2) == 2 * 2**20 / 3
    assert next(times, None) is None
