"""The runner, on notebooks made here: what runs, what is kept, what counts as a failure, what is left behind."""

from __future__ import annotations

import io
import json
import sys

import nbformat
import pytest
from books import make_book

from eas_kit.errors import RunError
from eas_kit.runner import run

WRITE = """from eas_kit.report import write_results
write_results(run_dir, "{name}", dict(seed=seed), dict(seed=seed), seed)"""
# what a notebook says about where it runs
SELF_PORTRAIT = """import json, os, sys
from eas_kit.report import write_results
write_results(run_dir, "00_a", dict(
    executable=sys.executable, folder=os.getcwd(),
    marks=[m for m in ("JPY_SESSION_NAME", "VSCODE_PID") if m in os.environ], seed=seed, rate=rate), seed=seed)
hog = bytearray(60 << 20); hog[::4096] = b"x" * len(hog[::4096])
import time; time.sleep(0.7)"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkout" / "notebooks"


@pytest.fixture
def go(folder, tmp_path):
    """run() on the folder, returning the report and what was printed."""

    def call(*wanted, out=tmp_path / "run", **options):
        stream = io.StringIO()
        options.setdefault("pages", False)
        return run(wanted, out=out, folder=folder, stream=stream, **options), stream.getvalue()

    return call


def statuses(report):
    return [outcome.status for outcome in report.outcomes]


def test_a_run_and_what_it_leaves(folder, go, tmp_path, monkeypatch):
    make_book(folder, "00_a", "## The look", SELF_PORTRAIT, title="First $x^2$")
    make_book(
        folder, "01_b", "from eas_kit.report import read_results\nassert read_results(run_dir, '00_a')['seed'] == 11"
    )
    monkeypatch.setenv("JPY_SESSION_NAME", "a live session")
    monkeypatch.setenv("VSCODE_PID", "1")
    out = tmp_path / "checkout" / "runs" / "x"
    report, text = go(parameters={"seed": 11}, out=out, pages=True)

    assert statuses(report) == ["done", "done"]
    assert report.ok
    seen = json.loads((out / "00_a" / "results.json").read_text())
    assert seen["metrics"]["executable"] == sys.executable
    assert seen["metrics"]["folder"] == str(folder)
    assert seen["metrics"]["marks"] == []
    assert (seen["metrics"]["seed"], seen["metrics"]["rate"], seen["seed"]) == (11, 0.5, 11)
    assert 100 < report.outcomes[0].peak_mb < 1000
    # progress: which notebook, which cell, under which heading; a table at the end
    assert "[1/2] 00_a  seed=11" in text
    assert "cell  3/3" in text
    assert "The look" in text
    table = text[text.index("notebook ") :].splitlines()
    assert table[0].split() == ["notebook", "status", "seconds", "peak", "MB", "executed", "copy"]
    assert table[2].split()[:2] == ["00_a", "done"]
    # the executed copy names no folder of this machine: it may be shown to others
    executed = (out / "00_a.ipynb").read_text()
    assert str(tmp_path) not in executed
    assert 'run_dir = \\"../runs/x\\"' in executed
    # the page stands alone and shows both
    page = (out / "index.html").read_text()
    assert "00_a.html" in page
    assert "01_b.html" in page
    assert "../" not in page
    first = (out / "00_a.html").read_text()
    assert "<math" in first
    for content in (page, first):
        assert 'src="http' not in content
        assert "<link" not in content


def test_run_dir_is_absolute_outside_the_checkout(folder, go, tmp_path):
    make_book(folder, "00_a", WRITE.format(name="00_a"))
    out = tmp_path / "elsewhere"
    report, _ = go(out=out)
    assert report.ok
    assert f'run_dir = "{out}"' in "".join(c.source for c in nbformat.read(out / "00_a.ipynb", as_version=4).cells)


def test_a_failing_cell_stops_the_run_and_is_shown(folder, go, tmp_path):
    make_book(folder, "00_a", "x = 0", "# text", "y = 1 / x", "print('never')")
    make_book(folder, "01_b", "pass")
    report, text = go()
    assert statuses(report) == ["FAILED", "not run"]
    assert not report.ok
    assert "00_a FAILED, code cell 4 of 5: ZeroDivisionError: division by zero" in text  # with the injected cell
    assert "| y = 1 / x" in text
    assert "----> 1 y = 1 / x" in text
    assert "\x1b[" not in text
    assert (tmp_path / "run" / "00_a.ipynb").exists()
    assert not (tmp_path / "run" / "01_b.ipynb").exists()


def test_keep_going(folder, go):
    make_book(folder, "00_a", "1 / 0")
    make_book(folder, "01_b", "pass")
    report, _ = go(keep_going=True)
    assert statuses(report) == ["FAILED", "done"]
    assert not report.ok


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("import sys; sys.exit()", "SystemExit"),  # papermill alone calls this a success
        ("import os; os._exit(3)", "Kernel died"),
        ("import time; time.sleep(60)", "took longer than 3 s"),  # and this one completed
    ],
)
def test_what_papermill_lets_pass_is_a_failure(folder, go, cell, error):
    make_book(folder, "00_a", cell, "print('never')")
    report, text = go(cell_timeout=3 if "longer" in error else None)
    assert statuses(report) == ["FAILED"]
    assert error in report.outcomes[0].error
    assert report.outcomes[0].source == cell
    assert f"| {cell}" in text


def test_resume_keeps_what_is_the_same(folder, go, tmp_path):
    make_book(folder, "00_a", "pass")
    make_book(folder, "01_b", "1 / 0")
    make_book(folder, "02_c", "pass")
    report, _ = go(keep_going=True)
    assert statuses(report) == ["done", "FAILED", "done"]
    first = (tmp_path / "run" / "00_a.ipynb").stat().st_mtime_ns

    make_book(folder, "01_b", "pass")
    report, text = go(resume=True)
    assert statuses(report) == ["kept", "done", "kept"]
    assert report.ok
    assert (tmp_path / "run" / "00_a.ipynb").stat().st_mtime_ns == first
    assert "00_a  already done, kept\n" in text
    assert "02_c  already done, kept; 01_b before it was run anew" in text

    assert statuses(go(resume=True)[0]) == ["kept", "kept", "kept"]
    assert statuses(go("02_c", resume=True, parameters={"seed": 4})[0]) == ["done"]  # another parameter
    assert statuses(go("02_c", resume=True)[0]) == ["done"]  # and back: the copy was made with seed 4
    make_book(folder, "02_c", "x = 1")
    assert statuses(go("02_c", resume=True)[0]) == ["done"]  # another source
    (tmp_path / "run" / "02_c.ipynb").unlink()
    assert statuses(go("02_c", resume=True)[0]) == ["done"]  # its copy is gone
    entries = json.loads((tmp_path / "run" / "run.json").read_text())["notebooks"]
    assert [entry["notebook"] for entry in entries] == ["00_a", "01_b", "02_c"]


def test_a_new_run_forgets_what_an_old_one_wrote(folder, go, tmp_path):
    book = "from pathlib import Path\nPath(run_dir, '00_a', str(seed)).write_text('x')"
    make_book(folder, "00_a", book)
    go(parameters={"seed": 1})
    go(parameters={"seed": 2})
    assert [p.name for p in (tmp_path / "run" / "00_a").iterdir()] == ["2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": {"sead": 1}}, "-p: unknown parameter sead. Valid parameters are:\n  00_a: seed, rate, model"),
        ({"parameters": {"seed": "x"}}, "parameter seed is 3 by default, so a int is wanted"),
        ({"resume": True, "out": None}, "--resume needs --out DIR"),
    ],
)
def test_nothing_runs_when_something_is_wrong(folder, go, tmp_path, options, message):
    make_book(folder, "00_a", "pass")
    with pytest.raises(RunError, match=message):
        go(**options)
    assert not (tmp_path / "run").exists()


def test_a_notebook_without_tag_is_an_error_before_the_first_one_runs(folder, go, tmp_path):
    make_book(folder, "00_a", "pass")
    make_book(folder, "01_b", parameters=None)
    with pytest.raises(RunError, match="01_b.ipynb has no cell tagged 'parameters'"):
        go()
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_things_is_not_touched(folder, go, tmp_path):
    make_book(folder, "00_a", "pass")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="holds other things than a run"):
        go()
    with pytest.raises(RunError, match="is a file; --out wants a folder"):
        go(out=tmp_path / "run" / "thesis.tex")


def test_the_kernel_is_this_python_whatever_is_installed(folder, go, tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    make_book(folder, "00_a", f"import sys; assert sys.executable == {sys.executable!r}")
    report, _ = go()
    assert report.ok


def test_resume_keeps_finished_parts_of_a_stopped_notebook(tmp_path):
    """What a long notebook left before it failed is there when it goes on; a run anew starts clean."""
    part = "from pathlib import Path; part = Path(run_dir) / '00_a' / 'arm.json'; print('found', part.exists())"
    stop = "part.write_text('done')\nassert not Path('stop.txt').exists(), 'stopped'"
    books = tmp_path / "books"
    make_book(books, "00_a", part, stop)
    (books / "stop.txt").write_text("")
    out = tmp_path / "run"
    assert not run(out=out, folder=books, stream=io.StringIO(), pages=False).ok
    (books / "stop.txt").unlink()

    def found() -> str:
        return str(nbformat.read(out / "00_a.ipynb", as_version=4).cells)

    assert run(out=out, folder=books, stream=io.StringIO(), pages=False, resume=True).ok
    assert "found True" in found()
    assert run(out=out, folder=books, stream=io.StringIO(), pages=False).ok
    assert "found False" in found()
