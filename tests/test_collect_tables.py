"""From the folder of a sweep to the README's table, without running anything."""

from __future__ import annotations

import json

import pytest
from test_benchmarks import load

from eas_kit.grids import Job
from eas_kit.paper import read_tables, row_of
from eas_kit.sweep import DONE, FAILED, SweepReport, Went, _write_table


def went(table, row, seed, accuracy, status=DONE, **result):
    settings = {"table": table, "row": row, "seed": seed, "model": "tiny", "task": "elements", "steps": 7}
    arm = {"arm": row, "mask": [1, 2], "test_columns": {"SOC": accuracy}, "trainable_share": 0.0123, "seed": seed}
    values = {
        "table": table,
        "row": row,
        "test_accuracy": accuracy,
        "test_loss": 1 - accuracy,
        "model": "tiny",
        "task": "elements",
        "k": 3 if row.endswith("8") else 0,
        **arm,
        **result,
    }
    return Went(Job(f"{row}-{seed}", "arms", settings, {}), status, result=values if status == DONE else {})


@pytest.fixture
def sweep_of(tmp_path):
    def write(name, *runs):
        (tmp_path / name).mkdir()
        _write_table(SweepReport(tmp_path / name, list(runs)))
        return str(tmp_path / name)

    return write


@pytest.fixture
def collected(sweep_of, tmp_path):
    costs = {"macs": 30e6, "merged_macs": 20e6}
    runs = sweep_of(
        "runs",
        went("1", "zero-shot", 0, 0.25, macs=40e6, steps=0),
        went("1", "EAS8", 0, 0.90, **costs),
        went("1", "EAS8", 1, 0.94, **costs),
        went("1", "DAS8", 0, 0.0, FAILED),
        went("5", "MHA", 0, 0.90, **costs),
    )
    times = sweep_of(
        "times",
        went("1", "zero-shot", 0, 0.01, decode_seconds=0.3),
        went("1", "EAS8", 0, 0.01, decode_seconds=0.4, merged_decode_seconds=0.2),
    )
    out = tmp_path / "results" / "tables.json"
    assert load("collect_tables").main([runs, "--times", times, "--out", str(out)]) == 0
    return out


def test_finished_runs_are_collected_with_their_settings(collected):
    found = json.loads(collected.read_text())
    assert [(run["row"], run["seed"]) for run in found["runs"]] == [
        ("zero-shot", 0),
        ("EAS8", 0),
        ("EAS8", 1),
        ("MHA", 0),
    ]
    assert found["runs"][1]["mask"] == [1, 2]
    assert found["runs"][1]["test_columns"] == {"SOC": 0.90}
    assert found["settings"]["Tables 1, 5: tiny, elements"]["steps"] == 7
    assert found["settings"]["Tables 1, 5: tiny, elements"]["skip_rank"] == 64  # of ArmRun, where the grid does not say
    assert len(found["times"]) == 2


def test_the_readmes_table(collected, monkeypatch):
    fill = load("fill_readme")
    monkeypatch.setattr(fill, "RESULTS", collected.parent)
    lines = fill.tables().splitlines()
    cells = row_of(read_tables()["1"], "EAS8")["cells"]
    published = f"trained {cells['trained']['value']:g} %, MACs more {cells['MACs more']['value']:g} G"
    assert f"| 1 | EAS8 | 3 | 2 | 92.0% ± 2.8% | 0.080 | 1.23% | 20 | 1.50 | {published} |" in lines
    assert "| 1 | zero-shot |  | 1 | 25.0% | 0.750 | 1.23% | 40 | 1.00 | not known to us |" in lines
    assert "| 5 | MHA |  | 1 | 90.0% | 0.100 | 1.23% | 20 |  | not known to us |" in lines
    assert not any("DAS8" in line for line in lines)
    monkeypatch.setattr(fill, "RESULTS", collected.parent / "none")
    assert fill.tables().startswith("Not measured yet;")
