"""The benchmark of a session's memory: its meter sees children, and the kept record is under the limit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_benchmarks import load

ROOT = Path(__file__).parents[1]
HOLDS = "import sys; held = b'x' * int(sys.argv[1]); print(len(held), flush=True); sys.stdin.read()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS!r}, sys.argv[1]])"


@pytest.fixture(scope="module")
def benchmark():
    return load("session_memory")


@pytest.mark.parametrize("program", [HOLDS, PARENT], ids=["a process", "the child of a process"])
def test_the_meter_sees_a_process_and_its_children(benchmark, program):
    peaks = {}
    for size in (1_000_000, 81_000_000):
        command = [sys.executable, "-c", program, str(size)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as process:
            assert int(process.stdout.readline()) == size
            with benchmark.Meter(process.pid, interval=0.01) as meter:
                while not meter.peak["proportional MB"]:
                    time.sleep(0.01)
            held = meter.look()
            process.stdin.close()
        peaks[size] = held
        assert meter.peak["resident MB"] >= meter.peak["proportional MB"] > 0
    for name in ("resident MB", "proportional MB"):
        assert peaks[81_000_000][name] - peaks[1_000_000][name] == pytest.approx(80, abs=3)


def test_the_record_is_of_this_benchmark_and_under_the_limit(benchmark):
    record = json.loads((ROOT / "benchmarks" / "results" / "session_memory.json").read_text())
    assert record["limit_mb"] == benchmark.LIMIT_MB == 1500
    assert record["peak"]["proportional MB"] < record["limit_mb"]
    after = [step["after"] for step in record["steps"]]
    assert after[:2] == ["the server's start", "00_start_here"]
    assert {"02_search_with_bandit", "06_skip_mask_playground"} <= set(after)
    assert max(step.get("kernels", 0) for step in record["steps"]) == record["open at once"] == 2
    assert all((ROOT / "notebooks" / f"{name}.ipynb").exists() for name in after[1:])
    held = [step["proportional MB"] for step in record["steps"]]
    assert held[:3] == sorted(held[:3])  # of the first two notebooks both are open
    assert record["peak"]["proportional MB"] >= max(held)


def test_it_says_what_is_missing(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "why_not", lambda: "no chromium: install it")
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: no chromium: install it\n")
