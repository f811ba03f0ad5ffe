"""Every notebook of notebooks/ (a glob): its form, and that it runs headless with small parameters.

The form is the one CONTRIBUTING.md describes. A notebook asserts its own claims, so running it is a test of them.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
from pathlib import Path

import nbformat
import pytest
from packaging.utils import canonicalize_name
from test_binder import declared
from test_project import DISTRIBUTIONS, imported_by

from eas_kit.exercises.verdict import NOT_YET
from eas_kit.navigation import NOTEBOOK_ONLY
from eas_kit.notebooks import RUN_DIR, read_notebook, read_notebooks, read_parameters
from eas_kit.pages import write_pages
from eas_kit.rendered import faults
from eas_kit.runner import run

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in PATHS]
SMALL = FOLDER / "params" / "test.yaml"
PLOTLY = "application/vnd.plotly.v1+json"

each = pytest.mark.parametrize("path", PATHS, ids=NAMES)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> str:
    """All code, without lines of shell or magic."""
    lines = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code").splitlines()
    return "\n".join("" if line.lstrip().startswith(("!", "%")) else line for line in lines)


def section(notebook: nbformat.NotebookNode, heading: str) -> list[nbformat.NotebookNode]:
    """The cells from the heading (of any level) to the next one; the first of them begins with it."""
    starts = [
        i
        for i, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown" and re.match(rf"#+ *{heading}", cell.source, re.IGNORECASE)
    ]
    assert starts, f"no section {heading!r}"
    end = starts[-1] + 1
    while end < len(notebook.cells) and not notebook.cells[end].source.startswith("#"):
        end += 1
    return notebook.cells[starts[-1] : end]


@each
def test_name_says_what_it_does(path):
    assert re.fullmatch(r"\d\d(_[a-z0-9]+){2,}", path.stem), "NN_verb_object"


@each
def test_source_is_clean(path):
    raw = json.loads(path.read_text())
    assert raw["nbformat"] == 4
    assert raw["metadata"]["kernelspec"]["name"] == "python3"
    assert not {"widgets", "papermill"} & set(raw["metadata"])
    for cell in raw["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert not {"papermill", "execution"} & set(cell["metadata"])
    ids = [cell["id"] for cell in raw["cells"]]
    assert len(set(ids)) == len(ids)
    local = re.search(r"/(work|tmp|home|root|Users)/", "".join(cell["source"] for cell in read(path).cells))
    assert not local, f"names a folder of one machine: {local}"


@each
def test_opening_cells(path):
    title, opening, parameters, imports, *_ = read(path).cells
    assert title.cell_type == "markdown"
    assert re.fullmatch(r"# .+", title.source.strip()), "the first cell is the title alone"
    assert opening.cell_type == "markdown"
    for what, pattern in {
        "a question": r"\?",
        "its minutes": r"\b(minutes?|seconds?)\b",
        "its memory": r"\b(MB|GB)\b",
        "whether it needs a GPU": r"\bGPU\b",
        "a Binder badge": r"(?i)binder",
    }.items():
        assert re.search(pattern, opening.source), f"the second cell names {what}"
    assert parameters.cell_type == imports.cell_type == "code"
    assert "parameters" in parameters.metadata.get("tags", [])
    assert "import" in imports.source
    assert re.search(r"from eas_kit\.doctor import check\b", imports.source)
    assert "check()" in imports.source


@each
def test_parameters_are_explained(path):
    notebook = read_notebook(path)
    assert notebook.defaults[RUN_DIR] == "runs/manual"
    assert type(notebook.defaults["seed"]) is int
    for name, comment in notebook.comments.items():
        assert len(comment) > 8, f"{name}: a comment with its unit and effect"


@each
def test_imports_are_declared(path):
    allowed = {name.replace("-", "_") for name in declared()} | {"eas_kit"}
    for module in imported_by(code(read(path))):
        name = canonicalize_name(DISTRIBUTIONS.get(module, module)).replace("-", "_")
        assert name in allowed, f"imports {module}, which pyproject.toml does not declare"


@each
def test_code_teaches_and_the_library_works(path):
    source = code(read(path))
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 12, f"{node.name} has {length} lines: move it to eas_kit"
    assert any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "asserts what it claims"
    assert "os.environ" not in source, "no hidden switch: what differs is a parameter"
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    writes = [c for c in calls if getattr(c.func, "attr", getattr(c.func, "id", "")) == "write_results"]
    assert writes, "leaves results.json"
    literals = [arg.value for arg in (*writes[0].args, *(k.value for k in writes[0].keywords)) if hasattr(arg, "value")]
    assert path.stem in literals, f"write_results is told the notebook's own name, {path.stem!r}"


@each
def test_what_we_saw_is_printed_and_not_typed(path):
    cells = section(read(path), "What we saw")
    assert any(cell.cell_type == "code" for cell in cells), "printed by code"
    for cell in cells:
        if cell.cell_type == "markdown":
            typed = re.search(r"\d\s*%|\b\d+\.\d+\b", cell.source)
            assert not typed, f"a typed number: {typed}"


@each
def test_exercises_have_folded_solutions(path):
    text = "\n".join(cell.source for cell in section(read(path), "Exercise"))
    assert text.count("<details") == text.count("</details>") >= 1


def exercises_of(notebook: nbformat.NotebookNode) -> list[tuple[nbformat.NotebookNode, ast.Module, str]]:
    """Of each exercise with a check: the cell that asks for an answer and checks it, its code, the solution's code."""
    cells = section(notebook, "Exercise")
    found = []
    for text, cell in itertools.pairwise(cells):
        if cell.cell_type == "code":
            solutions = re.findall(r"<details>.*?```python\n(.*?)```.*?</details>", text.source, re.DOTALL)
            assert len(solutions) == 1, f"one solution in code before {cell.source!r}"
            found.append((cell, ast.parse(cell.source), solutions[0]))
    return found


@each
def test_exercises_check_their_answers(path):
    notebook = read(path)
    for cell, source, solution in exercises_of(notebook):
        answer, *_, check = source.body
        assert isinstance(answer, ast.Assign) and ast.unparse(answer.value) == "None", "begins with no answer"
        assert ast.unparse(check.value.func).startswith("exercises."), "ends with a check"
        name = answer.targets[0].id
        assert ast.unparse(check.value.args[0]) == name, "of that answer"
        assert re.search(rf"^ *{name} = ", solution, re.MULTILINE), f"the solution says what {name} is"
        assert NOTEBOOK_ONLY in cell.metadata.get("tags", []), "an app made of this page leaves it out"
    asked = len(re.findall(r"^\*\*Exercise \d", "\n".join(c.source for c in notebook.cells), re.MULTILINE))
    assert len(exercises_of(notebook)) == asked, "every exercise has its check"


@each
def test_navigation(path):
    last = read(path).cells[-1]
    assert last.cell_type == "markdown"
    links = dict(re.findall(r"\[([^\]]+)\]\(([^)]+)\)", last.source))
    targets = list(links.values())
    place = PATHS.index(path)
    if place > 0:
        assert PATHS[place - 1].name in targets, "a link to the previous one"
        assert PATHS[0].name in targets, "a link to the contents, which stand in the first one"
    if place < len(PATHS) - 1:
        assert PATHS[place + 1].name in targets, "a link to the next one"


@each
def test_links_lead_somewhere(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", cell.source):
                assert (FOLDER / target).exists(), f"links to {target}"


@pytest.mark.skipif(not PATHS, reason="no notebooks yet")
def test_the_first_one_lists_them_all():
    text = "\n".join(cell.source for cell in read(PATHS[0]).cells if cell.cell_type == "markdown")
    missing = [path.name for path in PATHS[1:] if path.name not in text]
    assert not missing, f"the contents lack {missing}"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("params/*.yaml")), ids=lambda file: file.stem)
def test_parameter_files_fit_the_notebooks(file):
    read_parameters(file, read_notebooks(FOLDER))


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    """One run folder for all: later notebooks read what earlier ones left, and make it when run alone."""
    return tmp_path_factory.mktemp("notebooks") / "run"


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """The notebooks with every check there twice: as it is, without an answer, and after its own solution."""
    folder = tmp_path_factory.mktemp("answered")
    for path in PATHS:
        notebook = read(path)
        for cell, source, solution in exercises_of(notebook):
            *before, check = map(ast.unparse, source.body[1:])
            lines = [solution, *before, f"verdict = {check}", "assert verdict.right, verdict"]
            again = nbformat.v4.new_code_cell("\n".join(lines))
            notebook.cells.insert(notebook.cells.index(cell) + 1, again)
        nbformat.write(notebook, folder / path.name)
    return folder


@pytest.mark.notebook
@each
def test_runs_headless(path, answered, shared_run):
    stream = io.StringIO()
    params = SMALL if SMALL.exists() else None
    report = run([path.stem], params_file=params, out=shared_run, folder=answered, stream=stream, pages=False)
    (outcome,) = report.outcomes
    if not report.ok:
        pytest.fail(stream.getvalue(), pytrace=False)
    assert outcome.peak_mb < 1536, "make demo promises at most 1.5 GB"

    results = json.loads((shared_run / path.stem / "results.json").read_text())
    assert results["notebook"] == path.stem
    assert results["metrics"]
    assert isinstance(results["seed"], int)
    assert set(results["parameters"]) | {"seed"} == set(read_notebook(path).defaults) - {RUN_DIR}
    executed = shared_run / f"{path.stem}.ipynb"
    check_executed(executed)
    shown = [o.data["text/plain"] for c in read(executed).cells for o in c.get("outputs", []) if "data" in o]
    assert shown.count(f"… {NOT_YET}") == len(exercises_of(read(path))), "no answer is no failure"


@pytest.mark.notebook
def test_the_run_as_pages(shared_run):
    if not (shared_run / "run.json").exists():
        pytest.skip("no notebook ran")
    page = write_pages(shared_run).read_text()
    for executed in shared_run.glob("*.ipynb"):
        assert f"{executed.stem}.html" in page
        assert executed.with_suffix(".html").exists()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("rendered/*.ipynb")), ids=lambda path: path.stem)
def test_rendered_copies(path):
    assert path.stem in NAMES
    assert not list(faults(read(path), path.stat().st_size))
    check_executed(path)


def check_executed(path: Path) -> None:
    """An executed copy that reads well anywhere: small, no widget state, a picture beside every plotly figure."""
    notebook = read(path)
    assert path.stat().st_size < 300_000
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if PLOTLY in output.get("data", {}):
                assert "image/png" in output.data, "a plotly figure without a PNG is blank on paper and on the web"
