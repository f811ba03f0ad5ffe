"""The benchmarks run, measure the arms they name, and write what they print."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from eas_kit import measure

ROOT = Path(__file__).parent.parent
SHAPE = ["--width", "32", "--layers", "5", "--heads", "2", "--kv-heads", "1", "--ffn", "53", "--vocabulary", "97"]
RANKS = ["--skip-rank", "4", "--adapt-rank", "2", "--lora-rank", "3", "--bottleneck-rank", "7"]
RUN = ["--prompt-tokens", "7", "--new-tokens", "3", "--repeats", "2"]


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def latency():
    return load("latency")


@pytest.fixture(autouse=True, scope="module")
def small_reads():
    """No half gigabyte for a test."""
    whole = measure.bandwidth
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "bandwidth", lambda device, dtype: whole(device, dtype, mebibytes=1))
        yield


# -- latency -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(latency, small_reads, tmp_path_factory):
    out = tmp_path_factory.mktemp("latency") / "new" / "latency_toy.json"
    assert latency.main([*SHAPE, *RANKS, *RUN, "--skip", "1", "3", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_latency_compares_all_arms(record):
    eas = [name.format(k) for k in (1, 3) for name in ("eas {}", "eas {} condensed", "eas {} merged", "das {}")]
    assert list(record["arms"]) == ["dense", *eas, "lora", "adapter"]
    assert record["left_out"] == {}
    for name, arm in record["arms"].items():
        assert len(arm["prefill"]["runs"]) == 2
        assert arm["decode_per_token"]["median"] == pytest.approx(arm["decode"]["median"] / 2)
        assert arm["tokens_per_second"]["median"] > 0
        assert arm["memory"]["peak_mib"] > arm["memory"]["tensors_mib"] > 0
        for part in ("prefill", "decode", "total"):
            ratios = record["speedup"][name][part]
            assert 0 < ratios["low"] <= ratios["median"] <= ratios["high"]
    assert set(record["speedup"]["dense"]["decode"]["runs"]) == {1.0}
    assert record["arms"]["eas 3"]["what"].startswith("attentions [0, 2, 4] skipped, adapters of rank 4, of rank 2")
    assert record["arms"]["das 3"]["what"] == "layers [1, 3, 4] replaced by bottlenecks of rank 7"
    assert list(record["merge"]) == [f"eas {k} {form}" for k in (1, 3) for form in ("condensed", "merged")]
    assert list(record["bounds"]) == ["1", "3"]
    assert record["bounds"]["3"]["decode"]["bound"] > 1
    assert record["command"].startswith("python benchmarks/latency.py --width 32")
    assert record["settings"]["new_tokens"] == 3
    assert record["machine"]["processor"]
    assert record["model"] | {"layers": 5, "kv_heads": 1, "ffn": 53} == record["model"]


def test_latency_counts_what_a_step_reads(record):
    d, f, q, kv, vocabulary = 32, 53, 32, 16, 97
    layer = 2 * d * q + 2 * d * kv + 3 * d * f + 2 * d
    dense = 5 * layer + d + vocabulary * d + d + 8  # norm, output head, one embedding, rotary frequencies
    roofline = record["arms"]["dense"]["roofline"]
    assert roofline["weights"] == 4 * dense
    assert roofline["bytes_per_token"] == 4 * dense + 4 * 5 * 2 * kv * (7 + 3 / 2)
    assert roofline["seconds_per_token"] == roofline["bytes_per_token"] / record["bandwidth"]
    reached = roofline["seconds_per_token"] / record["arms"]["dense"]["decode_per_token"]["median"]
    assert roofline["share_reached"] == reached
    merged = record["arms"]["eas 3 merged"]["roofline"]
    folded = 3 * (2 * f - d - 2 * d * q - 2 * d * kv) + 2 * (q + 2 * kv)
    assert merged["weights"] == 4 * (dense + folded)
    assert merged["cache_per_position"] == 4 * 2 * 2 * kv
    das = record["arms"]["das 3"]["roofline"]
    assert das["weights"] == 4 * (dense + 3 * (2 * d * 7 + 7 + d - layer))


def test_latency_prints_its_table(latency, record):
    lines = latency.table(record).splitlines()
    assert [line.split("  ")[0] for line in lines[1 : 1 + len(record["arms"])]] == list(record["arms"])
    assert any(line.startswith("merging alone, eas 3 merged: ") for line in lines)
    assert any(line.startswith("bound if 3 attentions") for line in lines)


def test_arms_share_the_weights_and_nothing_else(latency):
    args = latency.arguments([*SHAPE, *RANKS, "--skip", "2"])
    base = latency.make_model(args)
    before = {name: p.data_ptr() for name, p in base.named_parameters()}
    arms = latency.make_arms(base, args)
    inputs = {"input_ids": torch.randint(3, 97, (1, 7), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        logits = {name: arm.build()(**inputs).logits for name, arm in arms.items()}
    for name, arm in arms.items():
        theirs = {p.data_ptr() for p in arm.build().parameters()}
        whole = len(set(before.values()) & theirs) / len(before)
        assert whole == 1 if not name.startswith("das") else 0.5 < whole < 1
    assert arms["eas 2"].build() is arms["eas 2 merged"].build() is arms["eas 2 condensed"].build()
    # New adapters are the identity: only skipping changes what comes out.
    for name in ("lora", "adapter"):
        assert torch.equal(logits[name], logits["dense"])
    for name in ("eas 2", "das 2"):
        assert not torch.allclose(logits[name], logits["dense"])
    assert [(name, p.data_ptr()) for name, p in base.named_parameters()] == list(before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_arms_can_be_chosen_and_run_in_half_precision(latency, capsys):
    chosen = ["--arms", "merged", "lora", "--lora-linears", "q_proj", "v_proj", "--dtype", "bfloat16"]
    args = latency.arguments([*SHAPE, *RANKS, *RUN, "--skip", "2", *chosen])
    base = latency.make_model(args)
    arms = latency.make_arms(base, args)
    assert list(arms) == ["dense", "eas 2 merged", "lora"]
    assert arms["lora"].what == "LoRA of rank 3 on q_proj, v_proj, unmerged (peft)"
    assert {p.dtype for arm in arms.values() for p in arm.build().parameters()} == {torch.bfloat16}
    assert latency.main([*SHAPE, *RANKS, *RUN, "--skip", "2", *chosen, "--repeats", "1"]) == 0
    assert "eas 2 merged" in capsys.readouterr().out


def test_an_arm_that_cannot_run_is_left_out_and_says_why(latency, monkeypatch, capsys):
    from eas_kit import EASModel
    from eas_kit.errors import MergeError

    whole = EASModel.generate

    def refuse(net, *args, merge=False, **kwargs):
        if merge:
            raise MergeError("no merge today\nat all")
        return whole(net, *args, merge=merge, **kwargs)

    monkeypatch.setattr(EASModel, "generate", refuse)
    args = latency.arguments([*SHAPE, *RANKS, *RUN, "--skip", "2", "--arms", "eas", "merged"])
    found = latency.measure(latency.make_model(args), args)
    assert list(found["arms"]) == ["dense", "eas 2"]
    assert found["left_out"] == {"eas 2 merged": "MergeError: no merge today"}
    assert found["merge"] == {}
    assert "eas 2 merged left out: MergeError: no merge today" in latency.table(found)
    assert "eas 2 merged is left out" in capsys.readouterr().err


def test_compiled_arms_have_a_graph_each(latency, monkeypatch):
    """What compiling leaves on one arm's model must not be copied into another's."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(call.__self__) or call)
    args = latency.arguments([*SHAPE, *RANKS, *RUN, "--skip", "2", "--arms", "eas", "das", "adapter", "--compile"])
    with torch._dynamo.config.patch(recompile_limit=8):  # the benchmark raises it; put back after
        found = latency.measure(latency.make_model(args), args)
    assert list(found["arms"]) == ["dense", "eas 2", "das 2", "adapter"]
    assert len({id(model) for model in compiled}) == len(compiled) == 4
    assert found["bounds"] == {}


def test_batches(latency):
    args = latency.arguments([*SHAPE, *RANKS, *RUN, "--skip", "2", "--arms", "condensed", "merged", "--batch", "3"])
    found = latency.measure(latency.make_model(args), args)
    assert list(found["arms"]) == ["dense", "eas 2 condensed"]  # each row with its own prompt
    assert list(found["left_out"]) == ["eas 2 merged"]
    assert list(found["merge"]) == ["eas 2 condensed"]
    dense = found["arms"]["dense"]
    rates = [3 / step for step in dense["decode_per_token"]["runs"]]
    assert dense["tokens_per_second"]["runs"] == pytest.approx(rates)
    assert dense["roofline"]["cache_per_position"] == 3 * 4 * 5 * 2 * 16


def test_shapes_have_the_parameters_in_their_names(latency):
    for name, millions in {"100M": 110, "1B": 1042, "7B": 6738}.items():
        model = latency.make_model(latency.arguments(["--shape", name, "--device", "meta", "--dtype", "bfloat16"]))
        assert {p.device.type for p in model.parameters()} == {"meta"}  # made where asked for, not moved there
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)
    changed = latency.llama_config(latency.arguments(["--shape", "7B", "--kv-heads", "8", "--layers", "3"]))
    assert (changed.num_key_value_heads, changed.num_hidden_layers, changed.hidden_size) == (8, 3, 4096)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--width", "32", "--layers", "2", "--skip", "2"], r"--skip [2]: wanted 1 to 1 of the model's 2 attentions"),
        (["--layers", "2"], "['layers'] shape a Llama of random weights: give --width or --shape as well"),
    ],
)
def test_latency_says_what_is_wrong(latency, capsys, argv, said):
    assert latency.main(argv) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("k", [1, 2, 3, 5, 11, 12])
def test_skipped_sites_are_distinct(latency, k):
    mask = latency.spread_over(12, k)
    assert len(set(mask)) == k
    assert set(mask) <= set(range(12))


# -- folding -------------------------------------------------------------------------------------------------------


def test_folding_is_counted_by_hand_and_agrees(tmp_path, capsys):
    fold, out = load("fold"), tmp_path / "fold.json"
    d, f, r, rows = 38, 53, 6, 3
    shape = ["--width", str(d), "--ffn", str(f), "--rank", str(r), "--batch", str(rows)]
    assert fold.main([*shape, "--repeats", "2", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [run["dtype"] for run in record["runs"]] == ["float32", "bfloat16"]
    for run, close in zip(record["runs"], (1e-5, 0.02)):
        # For each of the two linears, W U and (W U) C; also U's mix of two, its product with the constant, W b.
        factors = run["multiply_accumulates"]["rank r"] - 2 * (f * d * r + f * r * d + f * d)
        assert run["multiply_accumulates"]["dense"] == factors + d * r * d + 2 * f * d * d
        assert 0 < factors < 5 * d * r
        assert run["multiply_accumulates"]["mixing"] == rows * 2 * 2 * f * r
        assert run["multiply_accumulates"]["bare"] == rows * 2 * f * d
        assert run["multiply_accumulates"]["low rank"] == rows * (2 * f * d + d * r + 2 * r * d)
        assert run["multiply_accumulates"]["through W"] == rows * (2 * f * d + d * r + 2 * 2 * r * f)
        assert all(0 <= difference < close for difference in run["difference"].values())
        assert set(run["seconds"]) == set(run["times_faster_than_dense"]) == {"dense", "rank r", "mixing"}
    assert len(capsys.readouterr().out.splitlines()) == 4


@torch.no_grad()
def test_forms_that_are_compared_compute_the_adapter():
    """Against the adapter written out, so that the forms do not merely agree with each other."""
    torch.manual_seed(0)
    layer = load("fold").Layer(38, 53, 6, torch.float32, "cpu", 3)
    pia, n = layer.pia, layer.tokens
    z = 0.5 * F.linear(n, pia.down_token.weight)
    w = layer.route.weights[:, :, None, None]
    adapted = n + w[:, 0] * F.linear(z, pia.up_0.dense()) + w[:, 1] * F.linear(z, pia.up_1.dense())
    for number, linear in enumerate(layer.linears):
        expected = linear(adapted * layer.gain)
        for form in (layer.unmerged, layer.low_rank, layer.through_w):
            assert torch.allclose(form()[number], expected, atol=1e-5)
        assert torch.allclose(F.linear(n[:1], layer.rank_r()[number]), expected[:1], atol=1e-5)
        # What is mixed is W diag(g) U for each prompt.
        mixed = layer.mixing()[number]
        carried = (mixed @ F.linear(n, pia.down_token.weight).mT).mT
        assert torch.allclose(layer.bare()[number] + carried, expected, atol=1e-5)
        assert not torch.allclose(layer.bare()[number], expected, atol=1e-2)


# -- the README ----------------------------------------------------------------------------------------------------


def test_results_become_tables(latency, record, tmp_path, monkeypatch):
    readme = load("fill_readme")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.latency_shapes().startswith("Not measured yet")
    assert readme.fold().startswith("Not measured yet")
    for name in ("latency_b.json", "latency_a.json"):
        (tmp_path / name).write_text(json.dumps(record | {"left_out": {"eas 9": "MergeError: why"}}))
    text = readme.latency_shapes()
    assert text.count(record["command"]) == 2
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 * (2 + len(record["arms"]))
    assert len({row.count("|") for row in rows}) == 1
    assert "Left out: eas 9 (MergeError: why)." in text
    assert record["machine"]["processor"] in text
    out = tmp_path / "fold.json"
    assert load("fold").main(["--width", "38", "--rank", "6", "--repeats", "1", "--out", str(out)]) == 0
    rows = [line for line in readme.fold().splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1
