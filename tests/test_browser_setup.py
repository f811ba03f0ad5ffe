"""Whether browser tests can run, and what is said where they cannot: here, in the Makefile, in .ci/run. No browser."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import lab
import nbformat
import pytest
from test_project import outside_make

ROOT = Path(__file__).parents[1]


def executable(path: Path, text: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_browser_is_the_named_one_else_an_installed_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert lab.chromium() is None
    chrome = executable(tmp_path / "google-chrome")
    assert lab.chromium() == str(chrome)
    debian = executable(tmp_path / "chromium")
    assert lab.chromium() == str(debian)
    named = executable(tmp_path / "elsewhere" / "my-browser")
    monkeypatch.setenv("CHROMIUM", str(named))
    assert lab.chromium() == str(named)
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "none"))  # a wrong path is not used
    assert lab.chromium() == str(debian)


def test_why_there_are_no_browser_tests(tmp_path, monkeypatch):
    here = {"playwright": object()}
    monkeypatch.setattr(importlib.util, "find_spec", here.get)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert lab.why_not() == (
        "no chromium: apt-get install chromium fonts-dejavu-core, or set CHROMIUM to the browser's path"
    )
    executable(tmp_path / "chromium")
    assert lab.why_not() == ""
    here.clear()
    assert lab.why_not() == 'no playwright: pip install -c constraints.txt "eas_kit[browser]"'


def test_the_module_says_it_too(tmp_path):
    environment = {"PATH": str(tmp_path)}
    asked = subprocess.run([sys.executable, ROOT / "tests" / "lab.py"], env=environment, capture_output=True, text=True)
    assert asked.returncode == 1
    assert re.fullmatch(r"no (playwright|chromium): .*\n", asked.stderr)


def test_make_test_browser_installs_playwright_and_asks_for_chromium_first(tmp_path):
    command = ["make", "--dry-run", f"VENV={tmp_path}/venv", "test-browser"]
    lines = subprocess.run(
        command, cwd=ROOT, env=outside_make(), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    order = [
        next(i for i, line in enumerate(lines) if text in line)
        for text in ('-e ".[test,browser]"', "tests/lab.py", "pytest -m browser")
    ]
    assert order == sorted(order)


# -- .ci/run -------------------------------------------------------------------------------------------------------

APT = 'if [ "$1" = install ]; then echo "$*" >> {log}; {effect}; fi'


@pytest.fixture
def ready(tmp_path):
    """Calls browser_ready of .ci/run in a folder of its own, where nothing but grep, tail and a stand-in for apt is."""
    function = re.search(r"^browser_ready\(\) \{.*?^\}$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE | re.DOTALL)
    programs = tmp_path / "bin"
    for name in ("grep", "tail", "touch", "chmod"):
        where = next(p for p in (Path("/usr/bin") / name, Path("/bin") / name) if p.exists())
        programs.mkdir(exist_ok=True)
        (programs / name).symlink_to(where)
    (tmp_path / "tests").mkdir()

    def call(marked: bool = True, effect: str = "true", **environment: str) -> tuple[bool, str, str]:
        (tmp_path / "tests" / "test_it.py").write_text("pytestmark = pytest.mark.browser\n" if marked else "\n")
        executable(programs / "apt-get", APT.format(log=tmp_path / "apt", effect=effect))
        script = f"set -euo pipefail\n{function[0]}\nif browser_ready; then exit 0; else exit 7; fi"
        done = subprocess.run(
            ["/bin/bash", "-c", script],
            cwd=tmp_path,
            env={"PATH": str(programs)} | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode in (0, 7), done.stderr
        asked = (tmp_path / "apt").read_text() if (tmp_path / "apt").exists() else ""
        return done.returncode == 0, done.stdout, asked

    return call


def test_ci_takes_the_browser_that_is_there(ready, tmp_path):
    assert ready(CHROMIUM=str(executable(tmp_path / "mine"))) == (True, "", "")
    executable(tmp_path / "bin" / "google-chrome")
    assert ready() == (True, "", "")


def test_ci_installs_chromium_with_letters_to_draw(ready, tmp_path):
    brings = "touch bin/chromium; chmod +x bin/chromium"
    found, said, asked = ready(effect=brings)
    assert found
    assert said == "== chromium for the browser tests\n"
    assert {"chromium", "fonts-dejavu-core", "--no-install-recommends", "-y"} <= set(asked.split())
    assert ready(effect=brings)[2] == asked  # once


def test_ci_says_why_there_is_no_chromium(ready):
    found, said, _ = ready(effect="echo 'E: Unable to locate package chromium' >&2; exit 100")
    assert not found
    assert said.endswith("E: Unable to locate package chromium\n")


def test_ci_asks_for_no_browser_without_tests_that_need_one(ready):
    assert ready(marked=False) == (False, "", "")


# -- notebooks for the server --------------------------------------------------------------------------------------


def parameters_of(path: Path) -> dict:
    cell = next(c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", []))
    values: dict = {}
    exec(cell.source, values)
    return values


def test_a_copy_has_small_parameters_and_the_source_stays(tmp_path):
    source = lab.NOTEBOOKS / "00_start_here.ipynb"
    before = source.read_bytes()
    server = lab.Lab(tmp_path)
    assert server.add("00_start_here") == "notebooks/00_start_here.ipynb"
    assert parameters_of(server.root / "notebooks" / "00_start_here.ipynb")["examples"] == 24  # of params/test.yaml
    assert server.add("00_start_here", {"seed": 5, "model": "it's"}, "other") == "notebooks/other.ipynb"
    values = parameters_of(server.root / "notebooks" / "other.ipynb")
    assert (values["seed"], values["model"], values["examples"]) == (5, "it's", 120)
    with pytest.raises(AssertionError, match=r"00_start_here has no parameters \['exampels'\]"):
        server.add("00_start_here", {"exampels": 3})
    assert source.read_bytes() == before
    assert sorted(os.listdir(server.root / "notebooks")) == ["00_start_here.ipynb", "other.ipynb"]
