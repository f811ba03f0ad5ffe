"""Where the time goes, on a clock that only the parts themselves move on: every second is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import toys

import eas_kit as eas
from eas_kit import measure, spending, timing
from eas_kit.errors import ConfigError

ATTENTION, FFN, VISION, HEAD, ADAPTER, MERGE = 3.0, 5.0, 7.0, 2.0, 11.0, 13.0
TOKENS = 4


@pytest.fixture
def clock(monkeypatch):
    time = SimpleNamespace(now=100.0)
    for module in (timing, spending):
        monkeypatch.setattr(module, "now", lambda device: time.now)
    return time


def spend(clock, module, seconds):
    def pass_by(*_):
        clock.now += seconds

    module.register_forward_pre_hook(pass_by)


@pytest.fixture
def model(clock):
    """A Llava in which a part's last linear takes the part's seconds."""
    model = toys.make_llava()
    for layer in model.model.language_model.layers:
        spend(clock, layer.self_attn.o_proj, ATTENTION)
        spend(clock, layer.mlp.down_proj, FFN)
    spend(clock, model.model.multi_modal_projector.linear_2, VISION)
    spend(clock, model.lm_head, HEAD)
    return model


@pytest.fixture
def net(clock, model, monkeypatch):
    net = eas.attach(model, eas.EASConfig(skip_rank=6, adapt_rank=4, dropout=0.0))
    net.mask = [0, 2]
    net.eval()
    for adapters in net.adapters.values():
        for pia in adapters.values():
            spend(clock, pia, ADAPTER)
    start = net._start_merge

    def slow(*args, **kwargs):
        clock.now += MERGE
        return start(*args, **kwargs)

    monkeypatch.setitem(net.__dict__, "_start_merge", slow)
    return net


def medians(found, phase):
    return {part: one["median"] for part, one in found["seconds"][phase].items() if one["median"]}


def prompt():
    return toys.row_of(toys.make_prompts(), 0)


def test_dense_model_by_part_and_phase(model):
    layers = model.config.text_config.num_hidden_layers
    found = measure.time_parts(model, prompt(), new_tokens=TOKENS, repeats=2)
    once = {"attention": layers * ATTENTION, "ffn": layers * FFN, "other": HEAD}
    assert medians(found, "prefill") == once | {"vision": VISION}
    assert medians(found, "decode") == {part: (TOKENS - 1) * seconds for part, seconds in once.items()}
    assert medians(found, "total") == {part: TOKENS * seconds for part, seconds in once.items()} | {"vision": VISION}
    whole = sum(once.values())
    assert found["share"]["decode"]["ffn"] == pytest.approx(layers * FFN / whole)
    assert sum(found["share"]["decode"].values()) == pytest.approx(1)
    assert found["seconds"]["prefill"]["attention"]["runs"] == [layers * ATTENTION] * 2
    assert (found["new_tokens"], found["repeats"]) == (TOKENS, 2)


def test_adapters_before_kept_attentions_and_in_place_of_skipped_ones(net):
    layers = net.base.config.text_config.num_hidden_layers
    found = measure.time_parts(net, prompt(), new_tokens=TOKENS, repeats=1)
    wanted = {
        "attention": (layers - 2) * ATTENTION,
        "ffn": layers * FFN,
        "adapters": layers * ADAPTER,
        "other": HEAD,
    }
    assert medians(found, "prefill") == wanted | {"vision": VISION}
    assert medians(found, "decode") == {part: (TOKENS - 1) * seconds for part, seconds in wanted.items()}


def test_a_merge_is_paid_once_and_takes_the_adapters_away(net):
    layers = net.base.config.text_config.num_hidden_layers
    found = measure.time_parts(net, prompt(), new_tokens=TOKENS, repeats=1, merge=True)
    kept = {"attention": (layers - 2) * ATTENTION, "ffn": layers * FFN, "other": HEAD}
    assert medians(found, "prefill") == kept | {"vision": VISION, "adapters": layers * ADAPTER, "merging": MERGE}
    assert medians(found, "decode") == {part: (TOKENS - 1) * seconds for part, seconds in kept.items()}


def test_condensed_adapters_are_adapters(clock, net, monkeypatch):
    """They come with hooks that are placed while the model runs."""
    from eas_kit.slots import LowRank

    layers, call = net.base.config.text_config.num_hidden_layers, LowRank.__call__

    def slow(self, n):
        clock.now += ADAPTER
        return call(self, n)

    monkeypatch.setattr(LowRank, "__call__", slow)
    found = measure.time_parts(net, prompt(), new_tokens=TOKENS, repeats=1, merge="low_rank")
    assert medians(found, "decode")["adapters"] == (TOKENS - 1) * layers * ADAPTER
    assert medians(found, "decode")["attention"] == (TOKENS - 1) * (layers - 2) * ATTENTION


def test_the_model_is_left_as_it_was(net):
    def marks():
        return [
            (name, "forward" in module.__dict__, list(module._forward_pre_hooks))
            for name, module in net.base.named_modules()
        ]

    before, slow = marks(), net.__dict__["_start_merge"]
    measure.time_parts(net, prompt(), new_tokens=2, repeats=1, merge=True)
    with pytest.raises(ConfigError, match="Wanted 2 tokens one by one, the model made 1"):
        measure.time_parts(net, prompt(), new_tokens=2, repeats=1, min_new_tokens=1, max_new_tokens=1)
    # hooks of the seats are placed anew by a merge; clocks would stand on other modules, or before them
    assert [(n, f, len(h)) for n, f, h in marks()] == [(n, f, len(h)) for n, f, h in before]
    assert net.__dict__["_start_merge"] is slow


def test_text_models_have_no_vision_and_repeats_are_wanted(clock):
    model = toys.make_llama()
    spend(clock, model.lm_head, HEAD)
    found = measure.time_parts(model, {"input_ids": torch.tensor([[5, 6, 7]])}, new_tokens=2, repeats=1)
    assert medians(found, "total") == {"other": 2 * HEAD}
    with pytest.raises(ConfigError, match="wanted repeats of 1 or more, got 0"):
        measure.time_parts(model, {"input_ids": torch.tensor([[5, 6, 7]])}, repeats=0)
