"""Sweeps in real processes: two at once, one that fails, kills of a run and of the whole sweep, and going on."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
from books import make_book

from eas_kit.cli import main
from eas_kit.errors import RunError
from eas_kit.grids import Job, read_grid
from eas_kit.sweep import DONE, SweepReport, Went, _write_table, read_sweep, sweep

PARAMETERS = 'seed = 0  # draw\nmarks = ""  # a folder\nrun_dir = "runs/manual"  # where'
# leaves a mark for every time it runs; waits for a sign in seed 2; fails in seed 1
BODY = """
import os, time, pathlib
here = pathlib.Path(marks)
(here / f"{seed}-{time.time_ns()}-{os.getppid()}").touch()
while seed == 2 and not (here / "go").exists():
    time.sleep(0.05)
assert seed != 1, "one is not to be had"
from eas_kit.report import write_results
write_results(run_dir, "01_probe", {"twice": 2 * seed, "deep": {"list": [seed, 1], "rows": [{"a": 1}]}}, {}, seed)
"""


@pytest.fixture
def place(tmp_path):
    make_book(tmp_path / "books", "01_probe", BODY, parameters=PARAMETERS)
    (tmp_path / "marks").mkdir()
    (tmp_path / "marks" / "go").touch()
    return tmp_path


def grid(place, seeds):
    path = place / "grid.yaml"
    path.write_text(f"run: 01_probe\nfixed: {{marks: {place / 'marks'}}}\ngrid: {{seed: {seeds}}}\n")
    return path


def times_run(place):
    found = [path.name.split("-")[0] for path in (place / "marks").glob("*-*")]
    return {int(seed): found.count(seed) for seed in set(found)}


def test_two_workers_a_failure_among_them_and_going_on(place, capsys):
    path, out = grid(place, [0, 1, 3]), place / "out"
    words = ["sweep", str(path), "--out", str(out), "--workers", "2", "--notebooks", str(place / "books")]
    assert main([*words, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("3 runs of 01_probe\n")
    assert "seed=1" in listed
    assert not out.exists()
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "2 at once" in said
    assert re.search(r"\[\d/3\] seed1-\w+  FAILED in 0:\d\d: RunError: code cell 3: AssertionError: one is not", said)
    assert "2 done, 1 FAILED" in said

    frame = read_sweep(out).set_index("seed")
    assert frame["status"].to_dict() == {0: "done", 1: "FAILED", 3: "done"}
    assert frame.loc[3, "twice"] == 6
    assert frame.loc[3, "deep.list"] == [3, 1]
    assert "deep.rows" not in frame
    assert pd.isna(frame.loc[1, "twice"])
    assert "AssertionError: one is not to be had" in frame.loc[1, "error"]
    assert list(pd.read_csv(out / "results.csv")["seed"]) == [0, 1, 3]
    page = (out / "index.html").read_text()
    assert "one is not to be had" in page
    assert "2 of 3 runs done" in page
    assert page.count("class='badge bad'") == 2  # in the list and over its traceback
    assert (out / "runs" / frame.loc[0, "run"] / "run" / "01_probe.ipynb").exists()

    make_book(place / "books", "02_other", "pass")  # changes nothing for the runs
    assert main(words) == 1
    assert times_run(place) == {0: 1, 1: 2, 3: 1}  # what is done is kept, what failed is tried again
    assert "2 of them done already" in capsys.readouterr().out


def start(place, path, workers=2):
    command = [sys.executable, "-m", "eas_kit.cli", "sweep", str(path), "--out", str(place / "out")]
    command += ["--workers", str(workers), "--notebooks", str(place / "books")]
    log = open(place / "said.txt", "ab")  # noqa: SIM115
    # tests that run in the background of a shell inherit an ignored SIGINT
    reset = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=reset)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.05)


def test_a_kill_of_one_run_and_of_all_and_going_on(place):
    (place / "marks" / "go").unlink()
    path = grid(place, [2, 0])
    process = start(place, path)
    wait_for(lambda: times_run(place).get(2) == 1 and list((place / "out" / "results").glob("seed0*.json")))
    below = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)  # the whole sweep, in the midst of a run
    process.wait()
    assert not psutil.wait_procs(below, timeout=20)[1], "workers and kernels end with the sweep"
    assert list((place / "out" / "results").glob("seed2*.claim")), "the run had begun and was not finished"

    process = start(place, path)
    wait_for(lambda: times_run(place).get(2) == 2)
    (worker,) = psutil.Process(process.pid).children()
    worker.send_signal(signal.SIGKILL)  # one run alone: the sweep goes on and says so
    assert process.wait(timeout=60) == 1
    said = (place / "said.txt").read_text()
    assert re.search(r"seed2-\w+  FAILED in \d:\d\d: killed by signal 9", said)
    assert "1 kept, 1 FAILED" in said

    (place / "marks" / "go").touch()
    report = sweep(path, place / "out", notebooks=place / "books", stream=io.StringIO())
    assert report.ok
    assert times_run(place) == {2: 3, 0: 1}
    assert report.frame.set_index("seed")["twice"].to_dict() == {2: 4, 0: 0}


def test_an_interrupt_stops_the_runs_and_leaves_a_table(place):
    (place / "marks" / "go").unlink()
    process = start(place, grid(place, [2]), workers=1)
    wait_for(lambda: times_run(place).get(2) == 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (130, -signal.SIGINT)
    assert list(read_sweep(place / "out")["status"]) == ["stopped"]


ARMS = """
run: arms
fixed: {steps: 2, batch_size: 2, val_limit: 3, test_limit: 5, evaluate: {batch_size: 5}}
grid:
  arm: [{method: zero_shot}, {method: pia, k: 3, chosen_by: random}]
"""


def test_runs_of_arms_are_those_of_the_library(tmp_path):
    import eas_kit as eas
    from eas_kit.arm_runs import ArmRun, make_plan
    from eas_kit.arms import Arm
    from eas_kit.compare import run_arms

    path = tmp_path / "grid.yaml"
    path.write_text(ARMS)
    report = sweep(path, tmp_path / "out", stream=io.StringIO())
    assert report.ok, [went.traceback for went in report.went]
    frame = read_sweep(tmp_path / "out")
    assert list(frame["method"]) == ["zero_shot", "pia"]
    assert list(frame["arm"]) == ["zero_shot", "pia k=3 random"]

    _, processor = eas.load_model("tiny")
    task = eas.load_task("elements", processor, sizes={"val": 3, "test": 5})
    settings = json.loads(json.dumps(dict(read_grid(path).jobs[1].settings)))
    plan = make_plan(ArmRun(**settings), task)
    arm = Arm("pia", 3, "random")
    alone = run_arms(
        task, lambda: eas.load_model("tiny")[0], [arm], out_dir=tmp_path / "x", plan=plan, model_name="tiny"
    )
    for name in ("mask", "test_loss", "val_loss", "trainable", "steps"):
        assert frame.loc[1, name] == alone.loc[0, name], name
    assert not frame["test_loss"].isna().any()
    assert len({*frame["test_loss"]}) == 2


@pytest.mark.parametrize("values", [[4, "auto"], [True, 4], [1.5, "never"], [None, 3], [2, 0.5], [[1], "all"]])
def test_a_column_of_several_kinds_is_written(tmp_path, values):
    jobs = [Job(str(number), "arms", {}, {}) for number in range(2)]
    went = [Went(job, DONE, result={"found": value}) for job, value in zip(jobs, values, strict=True)]
    _write_table(SweepReport(tmp_path, went))
    found = read_sweep(tmp_path)["found"]
    numbers = all(isinstance(value, int | float | None) and not isinstance(value, bool) for value in values)
    assert [None if value != value else value for value in found] == [
        value if numbers or isinstance(value, str | list) else json.dumps(value) for value in values
    ]
    assert (tmp_path / "results.csv").exists()


def test_an_untuned_model_is_asked_as_the_others_but_for_its_form(tmp_path):
    import eas_kit as eas
    from eas_kit.arm_runs import ArmRun, make_plan

    task = eas.load_task("elements", eas.load_model("tiny")[1], sizes={"val": 3, "test": 5})
    plan = make_plan(ArmRun(arm={"method": "zero_shot"}, evaluate={"batch_size": 3, "limit": 2}), task)
    assert plan.zero_shot == {"batch_size": 3, "limit": 2, "method": "options"}


def test_folders_and_numbers_of_workers_that_make_no_sense(place):
    path = grid(place, [0])
    (place / "full").mkdir()
    (place / "full" / "note.txt").touch()
    for out, workers, message in [
        (place / "full", 1, "holds other things than a sweep"),
        (path, 1, "is a file; --out wants a folder"),
        (place / "new", 0, "workers is a number of processes from 1 up, got 0"),
    ]:
        with pytest.raises(RunError, match=message):
            sweep(path, out, workers, notebooks=place / "books")
    with pytest.raises(RunError, match="no results of a sweep in"):
        read_sweep(place / "new")
