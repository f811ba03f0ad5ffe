"""What is asked of the runner is checked by name and by kind before anything runs."""

from __future__ import annotations

import nbformat
import papermill
import pytest
from books import make_book

from eas_kit.errors import RunError
from eas_kit.notebooks import (
    Parameters,
    Raw,
    choose,
    find_folder,
    parse_value,
    read_notebook,
    read_notebooks,
    read_parameters,
    resolve,
)


@pytest.fixture
def books(tmp_path):
    make_book(tmp_path, "00_start", title="Start")
    make_book(tmp_path, "01_probe", parameters="trials = 5  # how many\nlimit = None\nmasks = [0, 2]\nseed = 3")
    make_book(tmp_path, "01_search", parameters="steps = 7\nrun_dir = 'runs/manual'")
    return read_notebooks(tmp_path)


def test_defaults_and_comments_are_read_as_papermill_reads_them(books):
    book = books["00_start"]
    assert book.title == "Start"
    assert book.defaults == {"seed": 3, "rate": 0.5, "model": "tiny", "run_dir": "runs/manual"}
    assert book.comments["rate"] == "per step"
    content = nbformat.read(book.path, as_version=4)
    content.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(content, book.path)
    theirs = papermill.inspect_notebook(str(book.path))
    assert list(theirs) == list(book.defaults)
    assert {name: p["help"].strip() for name, p in theirs.items()} == book.comments


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("seed = 3\nk = seed + 1", r"line 2 of the parameters cell, 'k = seed \+ 1', is not `name = literal`"),
        ("import os", "is not `name = literal`: move what is computed to a later cell"),
        ("a = b = 1", "is not `name = literal`"),
        ("seed = ", "the parameters cell is not Python"),
        (None, r"has no cell tagged 'parameters', wanted one \(tags found: none\)"),
    ],
)
def test_a_poor_parameters_cell_is_refused(tmp_path, parameters, message):
    with pytest.raises(RunError, match=message):
        read_notebook(make_book(tmp_path, "00_x", parameters=parameters))


def test_every_poor_notebook_is_named_at_once(tmp_path):
    make_book(tmp_path, "00_a", parameters=None)
    make_book(tmp_path, "01_b")
    (tmp_path / "02_c.ipynb").write_text("{not json")
    with pytest.raises(RunError) as caught:
        read_notebooks(tmp_path)
    assert "00_a.ipynb has no cell" in str(caught.value)
    assert "02_c.ipynb is not a notebook that can be read" in str(caught.value)


def test_two_tagged_cells_are_refused(tmp_path):
    path = make_book(tmp_path, "00_a", "x = 1")
    book = nbformat.read(path, as_version=4)
    book.cells[2].metadata["tags"] = ["parameters"]
    nbformat.write(book, path)
    with pytest.raises(RunError, match="has 2 cells tagged 'parameters', wanted one"):
        read_notebook(path)


def test_digest_sees_the_source_and_not_the_outputs(tmp_path):
    path = make_book(tmp_path, "00_a", "x = 1")
    before = read_notebook(path).digest
    book = nbformat.read(path, as_version=4)
    book.cells[2].execution_count = 7
    nbformat.write(book, path)
    assert read_notebook(path).digest == before
    book.cells[2].source = "x = 2"
    nbformat.write(book, path)
    assert read_notebook(path).digest != before


def test_choice_is_in_reading_order_and_by_any_clear_name(books):
    names = lambda *wanted: [book.name for book in choose(books, wanted)]  # noqa: E731
    assert names() == ["00_start", "01_probe", "01_search"]
    assert names("01_search", "00") == ["00_start", "01_search"]
    assert names("notebooks/01_probe.ipynb") == ["01_probe"]
    with pytest.raises(
        RunError, match=r"unknown notebook: 01 \(could be 01_probe or 01_search\)\. The notebooks are: 00_"
    ):
        names("01")
    with pytest.raises(RunError, match="unknown notebook: 07_x, 9. The notebooks are: 00_start, 01_probe, 01_search"):
        names("07_x", "00", "9")


def test_another_folders_notebook_of_the_same_name_is_not_taken_for_ours(books, tmp_path):
    ours, other = books["01_probe"].path, tmp_path / "elsewhere" / "01_probe.ipynb"
    other.parent.mkdir()
    other.write_bytes(ours.read_bytes())
    assert [book.name for book in choose(books, [str(ours)])] == ["01_probe"]
    with pytest.raises(RunError, match=r"elsewhere/01_probe.ipynb \(not a notebook of .*--notebooks DIR"):
        choose(books, [str(other)])


def test_a_parameter_goes_to_the_notebooks_that_have_it(books):
    values = resolve(list(books.values()), {"seed": 11})
    assert values == {"00_start": {"seed": 11}, "01_probe": {"seed": 11}, "01_search": {}}


def test_a_parameter_that_no_chosen_notebook_has_is_refused_with_the_valid_ones(books):
    with pytest.raises(RunError) as caught:
        resolve([books["00_start"], books["01_search"]], {"seed": 1, "trials": 2})
    assert str(caught.value) == (
        "-p: unknown parameter trials. Valid parameters are:\n  00_start: seed, rate, model\n  01_search: steps"
    )


def test_run_dir_belongs_to_the_runner(books):
    with pytest.raises(RunError, match="run_dir is set by the runner; choose the run folder with --out DIR"):
        resolve(list(books.values()), {"run_dir": "x"})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "11", 11),
        ("rate", "1e-3", 0.001),
        ("rate", "2", 2.0),
        ("model", "007", "007"),
        ("model", "org/name", "org/name"),
        ("model", "null", None),
        ("limit", "1e2", 100.0),
        ("masks", "[1, 5]", [1, 5]),
        ("seed", "-4", -4),
    ],
)
def test_a_typed_value_takes_the_kind_of_the_default(books, name, text, value):
    values = resolve(list(books.values()), {name: Raw(text)})
    found = [given[name] for given in values.values() if name in given]
    assert found[0] == value
    assert type(found[0]) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "kind"), [("seed", "1O", "str"), ("seed", "true", "bool"), ("rate", "x", "str")]
)
def test_a_value_of_another_kind_is_refused(books, name, text, kind):
    with pytest.raises(RunError, match=f"00_start: parameter {name} is .* by default, so .* is wanted; got .* {kind}"):
        resolve(list(books.values()), {name: Raw(text)})


def test_yaml_values():
    assert parse_value("1e-3") == 0.001
    assert parse_value("2.5E+2") == 250.0
    assert parse_value("1e3x") == "1e3x"
    with pytest.raises(RunError, match="is not a YAML value; quote it"):
        parse_value("[1, ")


def write(tmp_path, text):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return path


def test_flat_file_and_command_line(books, tmp_path):
    parameters = read_parameters(write(tmp_path, "seed: 9\nrate: 1e-2\n"), books)
    assert parameters == Parameters({"seed": 9, "rate": 0.01})
    values = resolve([books["00_start"]], {"seed": Raw("2")}, parameters)
    assert values == {"00_start": {"seed": 2, "rate": 0.01}}


def test_sections_win_over_all(books, tmp_path):
    parameters = read_parameters(write(tmp_path, "all: {seed: 9}\n01_probe: {seed: 4, trials: 2}\n00_start:\n"), books)
    assert resolve(list(books.values()), {}, parameters) == {
        "00_start": {"seed": 9},
        "01_probe": {"seed": 4, "trials": 2},
        "01_search": {},
    }


def test_a_file_for_the_whole_set_serves_one_notebook(books, tmp_path):
    parameters = read_parameters(write(tmp_path, "all: {steps: 9}\n01_probe: {trials: 2}"), books)
    assert resolve([books["00_start"]], {}, parameters) == {"00_start": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trails: 3", "unknown parameter trails. Valid parameters are:"),
        (
            "01_probe: {steps: 3}",
            r"section 01_probe: unknown parameter steps. Valid parameters are:\n  01_probe: trials",
        ),
        ("01_prob: {trials: 3}", "01_prob is no section; .* the notebooks: 00_start, 01_probe, 01_search"),
        ("all: {seed: 1}\nseed: 2", "seed is no section"),
        ("all: 3", "the section all must hold `name: value` lines"),
        ("- 3", "holds a list, wanted `name: value` lines"),
        ("a: [", "cannot be read"),
        ("run_dir: x", "run_dir is set by the runner"),
    ],
)
def test_poor_files_are_refused(books, tmp_path, text, message):
    with pytest.raises(RunError, match=message):
        read_parameters(write(tmp_path, text), books)


def test_a_missing_file_is_refused(books):
    with pytest.raises(RunError, match="the parameters file nowhere.yaml cannot be read"):
        read_parameters("nowhere.yaml", books)


def test_a_folder_without_notebooks_is_refused(tmp_path):
    with pytest.raises(RunError, match="name their folder with --notebooks DIR"):
        find_folder(tmp_path)
