"""Executed copies: what stays, what goes, and what is not fit to be one."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_project import outside_make

from eas_kit.errors import RunError
from eas_kit.figures import figure_png
from eas_kit.live import figure_bundle
from eas_kit.pages import notebook_page
from eas_kit.rendered import MAX_BYTES, PLOTLY, WIDGET, main, write_copies

ROOT = Path(__file__).parents[1]


def figure():
    import plotly.graph_objects as go

    return go.Figure(go.Scatter(x=list(range(50)), y=list(range(50))), layout={"title": {"text": "a line"}})


def executed(*outputs, count=1):
    """A notebook as papermill leaves it, its one code cell with these outputs."""
    cell = new_code_cell("show(figure)", execution_count=count, outputs=list(outputs))
    cell.metadata = {
        "papermill": {"duration": 1.5},
        "execution": {"iopub.execute_input": "2026"},
        "tags": ["parameters"],
    }
    links = "[data](../data/README.md) [next](01_probe_redundancy.ipynb) [arXiv](https://arxiv.org) [up](#top)"
    metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "papermill": {"input_path": "x"},
        "widgets": {},
    }
    return new_notebook(cells=[new_markdown_cell("# A title"), new_markdown_cell(links), cell], metadata=metadata)


def display(data):
    return new_output("display_data", data=data)


@pytest.fixture
def leave(tmp_path):
    """Leaves a run folder with this notebook in it."""

    def write(notebook, status="done", name="00_show_line"):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        nbformat.write(notebook, run / f"{name}.ipynb")
        entry = {"notebook": name, "path": f"{name}.ipynb", "status": status}
        entry |= {"title": "A title", "seconds": 12.3, "peak_mb": 456.7}
        record = {"notebooks": [entry], "versions": {"torch": "2.0"}, "written": "2026-01-02T03:04:05"}
        (run / "run.json").write_text(json.dumps(record))
        return run

    return write


def test_a_copy_keeps_what_is_shown_and_nothing_else(leave, tmp_path):
    bundle, _ = figure_bundle(figure(), live=False)
    bar = display({WIDGET: {"model_id": "a"}, "text/plain": "Loading weights:   0%|          | 0/153"})
    both = display({WIDGET: {"model_id": "b"}, "text/plain": "SkipMask()", "image/png": bundle["image/png"]})
    run = leave(executed(bar, display(bundle), both, new_output("stream", text="said")))
    (copy,) = write_copies(run, tmp_path / "rendered")
    notebook = nbformat.read(copy, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec"}
    title, links, cell = notebook.cells
    assert title.source.splitlines()[-1] == (
        "*An executed copy of [00_show_line](../00_show_line.ipynb), made by `make notebooks`.*"
    )
    assert links.source == (
        "[data](../../data/README.md) [next](01_probe_redundancy.ipynb) [arXiv](https://arxiv.org) [up](#top)"
    )
    assert cell.metadata == {"tags": ["parameters"]}
    shown, widget, said = cell.outputs
    assert shown.data[PLOTLY] == bundle[PLOTLY]
    assert base64.b64decode(shown.data["image/png"]) == figure_png(figure())
    assert set(widget.data) == {"text/plain", "image/png"}
    assert said.text == "said"
    assert "| [00_show_line](00_show_line.ipynb) | A title | 12 s | 457 MB |" in (copy.parent / "README.md").read_text()


def test_a_copy_is_smaller_than_what_papermill_left_and_shows_its_pictures_as_a_page(leave, tmp_path):
    bundle, _ = figure_bundle(figure(), live=False)
    run = leave(executed(display(bundle), display(bundle)))
    (copy,) = write_copies(run, tmp_path / "rendered")
    assert copy.stat().st_size < 0.95 * (run / copy.name).stat().st_size
    assert len(copy.read_text().splitlines()) == 6, "a line a cell, three of them, and two around them, the rest one"
    page = notebook_page(nbformat.read(copy, as_version=4), "A title")
    assert page.count(bundle["image/png"].strip()[:200]) == 2


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            display({PLOTLY: {"data": []}}),
            "code cell 1: a figure without a PNG; show it with eas_kit.live.show, headless",
        ),
        (display({WIDGET: {"model_id": "a"}, "text/plain": "SkipMask()"}), "code cell 1: a widget without a picture"),
        (display({"text/plain": "x" * MAX_BYTES}), "00_show_line: 301 kB, wanted below 300: show fewer figures"),
    ],
    ids=["plotly", "widget", "size"],
)
def test_what_reads_badly_is_no_copy(leave, tmp_path, output, message):
    with pytest.raises(RunError) as raised:
        write_copies(leave(executed(output)), tmp_path / "rendered")
    assert str(raised.value).startswith("no copies were written:\n00_show_line: ")
    assert message in str(raised.value)
    assert not (tmp_path / "rendered").exists()


def test_only_what_ran_to_its_end_is_copied(leave, tmp_path, capsys):
    with pytest.raises(RunError, match="00_show_line: code cell 1 did not run"):
        write_copies(leave(executed(count=None)), tmp_path / "rendered")
    run = leave(executed(), status="FAILED")
    assert main([str(run), str(tmp_path / "rendered")]) == 1
    assert "00_show_line: FAILED, not done" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"nothing is no folder of a run \(it has no run.json\)"):
        write_copies(tmp_path / "nothing", tmp_path / "rendered")
    assert main([]) == 2
    assert "usage: python -m eas_kit.rendered RUN TARGET" in capsys.readouterr().err


def test_copies_of_notebooks_that_are_gone_go_too(leave, tmp_path, capsys):
    target = tmp_path / "rendered"
    target.mkdir()
    (target / "07_old_one.ipynb").write_text("{}")
    assert main([str(leave(executed())), str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["00_show_line.ipynb", "README.md"]
    assert "00_show_line.ipynb  1 kB" in capsys.readouterr().out


def test_nothing_rewrites_or_reviews_the_copies():
    """git calls them generated, ruff and nbstripout leave them alone."""
    name = "notebooks/rendered/00_start_here.ipynb"
    found = subprocess.run(
        ["git", "check-attr", "linguist-generated", "diff", "--", name], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode == 0:  # not in an unpacked archive
        assert "linguist-generated: true" in found.stdout
        assert "diff: unset" in found.stdout
    assert '"notebooks/rendered"' in (ROOT / "pyproject.toml").read_text()
    assert r"files: ^notebooks/[^/]*\.ipynb$" in (ROOT / ".pre-commit-config.yaml").read_text()
    assert "NOTEBOOKS = $(wildcard notebooks/*.ipynb)" in (ROOT / "Makefile").read_text()


def test_one_command_makes_them():
    shown = subprocess.run(
        ["make", "-n", "VENV=venv", "notebooks"], cwd=ROOT, env=outside_make(), capture_output=True, text=True
    ).stdout
    run, copy = [line for line in shown.splitlines() if "runs/rendered" in line]
    assert run.split()[:4] == ["env", "-u", "EAS_KIT_DISPLAY", "venv/bin/eas-kit"]
    assert copy.endswith("-m eas_kit.rendered runs/rendered notebooks/rendered")
