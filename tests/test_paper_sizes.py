"""Models of the papers' sizes, without weights: the published counts come out, and nothing large is held."""

from __future__ import annotations

import json

import psutil
import pytest
import torch
import toys
from test_benchmarks import load

import eas_kit as eas
from eas_kit.errors import ConfigError
from eas_kit.meta import meta_model
from eas_kit.models import PAPER_SIZES, paper_config

PARAMETERS = {  # of the published checkpoints
    "llama-7b": 6_738_415_616,
    "vicuna-7b": 6_738_415_616,
    "llava-1.5-7b": 7_063_427_072,
    # CLIP ViT-L/14's tower (303,179,776), LLaMA-7B with three more tokens, and what LaVIN trains (tests/test_lavin.py)
    "lavin-7b": 303_179_776 + 6_738_415_616 + 3 * 2 * 4096 + 1_159_536,
    "qwen2.5-vl-7b": 8_292_166_656,
}


@pytest.fixture(scope="module")
def script():
    return load("paper_sizes")


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_parameters_and_sites(name):
    before = psutil.Process().memory_info().rss
    config = paper_config(name)
    found = eas.measure.parameters(config)
    assert found["total"] == PARAMETERS[name]
    assert found == eas.measure.parameters(name)
    sites = eas.describe(config)
    assert len(sites) == config.get_text_config().num_hidden_layers
    assert sites.mergeable.all()
    assert (sites.reason == "").all()
    weights = eas.estimate_memory(name, dtype="bfloat16", prompt_tokens=3, new_tokens=1).weights
    assert sum(weights.values()) == pytest.approx(2 * PARAMETERS[name], rel=1e-6)  # and a few buffers
    assert psutil.Process().memory_info().rss - before < 500e6  # the weights would be 13 GB and more


def test_a_config_is_not_changed_and_never_shared():
    config = paper_config("llava-1.5-7b")
    before = config.to_dict()
    meta_model(config, "bfloat16", attn_implementation="eager")
    eas.describe(config)
    assert config.to_dict() == before
    config.text_config.hidden_size = 8
    assert paper_config("llava-1.5-7b").text_config.hidden_size == 4096
    with pytest.raises(ConfigError, match=r"wanted one of \['llama-7b', .*got 'llava-13b'"):
        paper_config("llava-13b")


def test_describe_without_a_model_says_what_the_model_will_say(tmp_path):
    model = toys.make_llava()
    expected = eas.describe(model)
    assert eas.describe(model.config).equals(expected)
    model.save_pretrained(tmp_path)
    assert eas.describe(tmp_path, kinds=("mha", "ffn")).equals(eas.describe(model, kinds=("mha", "ffn")))
    plain = {"site", "path", "kind", "norm", "ffn", "params"}
    for name in plain:  # one that was built without weights, by hand, holds nothing that could be merged
        assert eas.describe(meta_model(model.config))[name].equals(expected[name])
    assert not eas.describe(meta_model(model.config)).mergeable.any()


def test_multiply_accumulates_are_the_papers(script):
    rows = script.operations()
    assert [row["published"] for row in rows] == [1714.8, 1497.1, -50.26, -402.1, -603.0, 23.2]
    for row in rows:
        assert row["measured"] == pytest.approx(row["published"], rel=0.005)
        assert abs(row["difference"]) < 0.005
    assert (
        eas.measure.flops("qwen2.5-vl-7b", tokens=17)["total"]
        == eas.measure.flops(paper_config("qwen2.5-vl-7b"), tokens=17)["total"]
    )


def test_trained_shares_are_the_papers(script):
    eight, twelve, lavin, alone, itself = script.shares()
    assert eight["measured"] == pytest.approx(0.78, abs=0.03)
    assert twelve["measured"] == pytest.approx(0.90, abs=0.03)
    assert lavin["measured"] == pytest.approx(0.11, abs=0.01)
    # without LaVIN's own parts the share is missed, and with them alone LaVIN's own count is met
    assert alone["measured"] != pytest.approx(0.11, abs=0.01)
    assert itself["measured"] / 100 * PARAMETERS["llama-7b"] == pytest.approx(3.8e6, abs=0.05e6)
    assert script.lavin_extras() < 1.2e6


def test_flops_of_adapters_on_a_meta_model():
    net = eas.attach(meta_model("llama-7b").get_decoder(), eas.EASConfig(skip_rank=256, adapt_rank=128))
    net.mask = range(30)
    inputs = {
        "inputs_embeds": torch.empty(1, 17, 4096, dtype=torch.float16, device="meta"),
        "attention_mask": torch.empty(1, 1, 17, 17, dtype=torch.float16, device="meta"),
        "prompt_mask": torch.empty(1, 17, dtype=torch.bool, device="meta"),
    }
    found = eas.measure.flops(net, inputs)
    bare = eas.measure.flops("llama-7b", tokens=17, mask=range(30))
    assert {part: found[part] for part in ("attention_projections", "attention_scores", "ffn")} == {
        part: bare[part] for part in ("attention_projections", "attention_scores", "ffn")
    }
    d = 4096
    each = {r: 17 * (d * r + d * r // 2) + 2 * d + 2 * d * r // 2 + 2 * d for r in (128, 256)}
    assert found["adapter"] == 30 * (each[256] + d * 256) + 2 * each[128]


def test_memory_of_llava_by_hand():
    setting = {"dtype": "bfloat16", "prompt_tokens": 691, "new_tokens": 65}
    found = eas.estimate_memory(
        "llava-1.5-7b", **setting, eas=eas.EASConfig(skip_rank=256, adapt_rank=128), mask=range(8)
    )
    d, ffn, kept = 4096, 11008, 32 - 8
    assert found.cache["keys_values"] == kept * 2 * (691 + 64) * d * 2
    assert found.merge["copies"] == 2 * (8 * 2 * (ffn * d + ffn) + kept * 3 * (d * d + d))
    factors = 4 * 257 * (ffn + 3 * d)  # W [U, b], and U as it came, scaled, and beside b
    assert found.merge["folding"] == pytest.approx((4 + 2) * ffn * d + factors, rel=0.02)  # in float32, and cast
    assert found.merge["low_rank"] < found.merge["copies"] / 20
    assert found.weights["embeddings"] == found.weights["head"] == 2 * 32064 * d
    assert found.weights["vision"] == pytest.approx(2 * 303.5e6, rel=0.001)  # CLIP ViT-L/14 at 336 pixels


def test_the_script_writes_what_it_prints(script, tmp_path, capsys, monkeypatch):
    toy = {"toy": lambda: toys.make_llava(num_hidden_layers=11).config}  # the script skips 8
    monkeypatch.setitem(PAPER_SIZES, *toy.popitem())
    monkeypatch.setattr(script, "PAPER_SIZES", ("toy",))
    rows = script.memory(("toy",))
    monkeypatch.setattr(script, "memory", lambda: rows)
    monkeypatch.setattr(script, "meter", lambda: [{"what": "pass", "macs": [1.0, 2.0], "published": None}])
    for part in ("operations", "shares"):
        monkeypatch.setattr(script, part, lambda: [{"what": "w", "measured": 1.5, "published": 1.0, "difference": 0.5}])
    assert script.main(["--out", str(tmp_path / "new" / "sizes.json")]) == 0
    record = json.loads((tmp_path / "new" / "sizes.json").read_text())
    (model,), (row,) = record["models"], record["memory"]
    assert model["sites"] == model["mergeable"] == 11
    assert model["flops_without_8"] < model["flops"]
    assert row["inference_dense"] < row["inference_unmerged"] < row["inference_low_rank"]
    assert row["training_checkpointing"] < row["training"]
    assert row["cache_skipping"] * 11 == row["cache_dense"] * 3
    printed = capsys.readouterr().out
    assert "training_full" in printed
    assert "1.5000        1.0000        0.5000  w" in printed
    assert "MB resident" in printed
