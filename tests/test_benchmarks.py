"""The benchmarks run and write what they print."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_latency_writes_json(tmp_path, capsys):
    latency = load("latency")
    out = tmp_path / "new" / "latency.json"
    shape = [
        "--width",
        "32",
        "--layers",
        "5",
        "--heads",
        "2",
        "--vocabulary",
        "97",
        "--skip-rank",
        "4",
        "--adapt-rank",
        "2",
    ]
    run = ["--skip", "1", "3", "--prompt-tokens", "7", "--new-tokens", "3", "--repeats", "2"]
    assert latency.main([*shape, *run, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [entry["k"] for entry in record["runs"]] == [1, 3]
    entry = record["runs"][1]
    assert len(entry["mask"]) == 3
    assert list(entry["arms"]) == ["dense", "unmerged", "merged"]
    assert entry["speedup"]["merged"]["decode"]["median"] > 0
    assert entry["bound"]["decode"]["bound"] > 1
    printed = capsys.readouterr().out
    assert "3 of 5 attentions skipped" in printed
    assert "bound" in printed


def test_latency_says_what_is_wrong(capsys):
    latency = load("latency")
    assert latency.main(["--width", "32", "--layers", "2", "--heads", "2", "--skip", "2", "--new-tokens", "2"]) == 1
    assert "skips all 2 attentions" in capsys.readouterr().err


@pytest.mark.parametrize("k", [1, 2, 3, 5, 11, 12])
def test_skipped_sites_are_distinct(k):
    mask = load("latency").spread_over(12, k)
    assert len(set(mask)) == k
    assert set(mask) <= set(range(12))
