"""Links between the notebooks: written by one command, never stale."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from eas_kit.errors import RunError
from eas_kit.navigation import BADGE, BINDER, CONTENTS_MARKS, NOTEBOOK_ONLY, contents_of, linked, links_of, main

ROOT = Path(__file__).parents[1]
NAMES = ["00_start_here", "01_probe_redundancy", "02_search_with_bandit"]


def test_the_notebooks_links_are_not_stale(capsys):
    """If this fails: make navigation."""
    assert main([str(ROOT / "notebooks"), "--check"]) == 0, capsys.readouterr().out


def test_links_of_the_first_the_last_and_one_between():
    assert links_of(NAMES, 0) == "next: [01_probe_redundancy](01_probe_redundancy.ipynb)"
    assert links_of(NAMES, 1) == (
        "previous: [00_start_here](00_start_here.ipynb) · contents: [00_start_here](00_start_here.ipynb)"
        " · next: [02_search_with_bandit](02_search_with_bandit.ipynb)"
    )
    assert links_of(NAMES, 2).endswith("contents: [00_start_here](00_start_here.ipynb)")
    assert links_of(NAMES[:1], 0) == ""


def test_the_contents_have_the_title_and_a_link_to_binder():
    assert contents_of({"03_draw_line": "A line: is it straight?"}).splitlines()[2:] == [
        f"| [03_draw_line](03_draw_line.ipynb) | A line: is it straight? | [open]({BINDER}03_draw_line.ipynb) |"
    ]


def notebook(title: str, *more: str) -> nbformat.NotebookNode:
    parameters = new_code_cell("seed = 0  # of all", metadata={"tags": ["parameters"]})
    words = [new_markdown_cell(text) for text in (f"# {title}", *more)]
    return new_notebook(cells=[*words[:2], parameters, *words[2:]])


@pytest.fixture
def folder(tmp_path):
    """Two notebooks without links, and badges that open something else."""
    badge = BADGE.format(url="https://mybinder.org/v2/gh/other/place/HEAD")
    contents = "\n".join(["The tour", *CONTENTS_MARKS, "and on"])
    nbformat.write(notebook("First: why?", f"Why? {badge}", contents), tmp_path / "00_first_one.ipynb")
    nbformat.write(notebook("Second", f"How? {badge}"), tmp_path / "01_second_one.ipynb")
    return tmp_path


def cells(folder: Path, name: str) -> list[str]:
    return [cell.source for cell in nbformat.read(folder / f"{name}.ipynb", as_version=4).cells]


def test_one_command_writes_everything_and_does_not_write_twice(folder, capsys):
    assert main([str(folder), "--check"]) == 1
    assert "00_first_one.ipynb: stale; run python -m eas_kit.navigation" in capsys.readouterr().out
    assert "previous" not in cells(folder, "01_second_one")[-1], "--check writes nothing"

    assert main([str(folder)]) == 0
    first, second = cells(folder, "00_first_one"), cells(folder, "01_second_one")
    assert first[1] == f"Why? {BADGE.format(url=BINDER + '00_first_one.ipynb')}"
    begin, end = CONTENTS_MARKS
    table = contents_of({"00_first_one": "First: why?", "01_second_one": "Second"})
    assert first[3] == f"The tour\n{begin}\n\n{table}\n\n{end}\nand on"
    assert first[-1] == "next: [01_second_one](01_second_one.ipynb)"
    assert second[-1].startswith("previous: [00_first_one](00_first_one.ipynb)")
    last = nbformat.read(folder / "01_second_one.ipynb", as_version=4).cells[-1]
    assert last.metadata["tags"] == [NOTEBOOK_ONLY]

    written = {path: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == ""
    assert written == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_notebook_that_comes_and_one_that_goes(folder):
    main([str(folder)])
    nbformat.write(notebook("Third", "next: [an old link](gone.ipynb)"), folder / "02_third_one.ipynb")
    (folder / "01_second_one.ipynb").unlink()
    main([str(folder)])
    assert cells(folder, "00_first_one")[-1] == "next: [02_third_one](02_third_one.ipynb)"
    assert "01_second_one" not in "\n".join(cells(folder, "00_first_one"))
    third = cells(folder, "02_third_one")
    assert len(third) == 4, "a cell of links is made where the last one is none"
    assert third[-1].startswith("previous: [00_first_one]")


def test_a_first_notebook_without_a_place_for_the_contents(folder, capsys):
    path = folder / "00_first_one.ipynb"
    nbformat.write(notebook("First", "Why?"), path)
    with pytest.raises(RunError, match=r"00_first_one.ipynb: 0 cells with <!-- contents --> and .*, wanted one"):
        linked(folder)
    assert main([str(folder)]) == 1
    assert "the first notebook lists all of them between these two lines" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert main([str(folder)]) == 1
    assert "no notebooks" in capsys.readouterr().err


def test_the_address_is_that_of_the_readme():
    assert BADGE.format(url=f"{BINDER}00_start_here.ipynb") in (ROOT / "README.md").read_text()


def test_make_format_writes_them():
    makefile = (ROOT / "Makefile").read_text()
    body = makefile.partition("\nformat:")[2].partition("\n\n")[0]
    assert "$(BIN)/python -m eas_kit.navigation" in body
    assert "$(BIN)/python -m eas_kit.navigation" in makefile.partition("\nnavigation:")[2].partition("\n\n")[0]
