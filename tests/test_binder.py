"""The Binder configuration, tested without Docker: repo2docker's buildpacks only read files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# conda-forge's name -> PyPI's, where they differ
CONDA_NAMES = {"pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}
NOT_PYTHON_PACKAGES = {"python", "pip"}


def environment() -> tuple[list[str], list[Requirement]]:
    """The conda lines and the pip lines of environment.yml."""
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = [line for line in lines if isinstance(line, str)]
    pip = [Requirement(p) for line in lines if isinstance(line, dict) for p in line["pip"]]
    return conda, pip


def pinned() -> dict[str, Version]:
    """constraints.txt: every tested version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version) for pin in pins}


def declared() -> dict[str, Requirement]:
    """The dependencies of pyproject.toml, without the extras."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {canonicalize_name(r.name): r for r in map(Requirement, project["dependencies"])}


def test_binder_has_the_root_environment():
    # a binder/ folder hides every root file, so environment.yml must be in it too
    assert (ROOT / "binder" / "environment.yml").read_bytes() == (ROOT / "environment.yml").read_bytes()
    script = ROOT / "binder" / "postBuild"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!")
    assert "pip install --no-deps" in script.read_text()


def test_repo2docker_picks_conda_and_the_right_python():
    app = pytest.importorskip("repo2docker.app")
    with contextlib.chdir(ROOT):
        r2d = app.Repo2Docker()
        pack = next(p for p in (kind(r2d.base_image) for kind in r2d.buildpacks) if p.detect())
        pack.platform = "linux/amd64"
        dockerfile = pack.render(build_args={})
    assert type(pack).__name__ == "CondaBuildPack"
    assert pack.python_version == "3.11"
    assert re.search(r'env update .*--file "binder/environment.yml"', dockerfile)
    assert "binder/postBuild" in dockerfile

    assert re.search(r'^ENV R2D_ENTRYPOINT="\S*binder/start"', dockerfile, re.MULTILINE)


def test_a_session_starts_with_one_thread_and_what_it_was_asked_to_run():
    script = ROOT / "binder" / "start"
    assert os.access(script, os.X_OK)
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [
        script,
        sys.executable,
        "-c",
        "import os, sys; print(os.environ['OMP_NUM_THREADS'], sys.argv[1:])",
        "a b",
    ]
    for given, wanted in ({}, "1 ['a b']\n"), ({"OMP_NUM_THREADS": "3"}, "3 ['a b']\n"):
        assert subprocess.run(command, env=clean | given, capture_output=True, text=True, check=True).stdout == wanted
    assert subprocess.run([script, "false"]).returncode == 1


@pytest.mark.slow
def test_no_question_stands_over_the_first_page(tmp_path):
    (line,) = re.findall(r"^jupyter (labextension .*)$", (ROOT / "binder" / "postBuild").read_text(), re.MULTILINE)
    command = [
        sys.executable,
        "-m",
        "jupyter",
        *shlex.split(line),
        "--level=user",
    ]  # the build's level: its environment
    subprocess.run(command, env=os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path)}, capture_output=True, check=True)
    written = json.loads((tmp_path / "labconfig" / "page_config.json").read_text())
    assert written["disabledExtensions"] == {"@jupyterlab/apputils-extension:announcements": True}


def badges(text: str) -> list[dict[str, str]]:
    """owner, repository, revision and the path that the session opens, of each Binder badge that is a link."""
    form = r"\[!\[[^]]*\]\(https://mybinder\.org/badge_logo\.svg\)\]\(([^)]+)\)"
    found = []
    for link in re.findall(form, text):
        url = urlsplit(link)
        assert (url.scheme, url.netloc) == ("https", "mybinder.org")
        provider, owner, repository, revision = url.path.removeprefix("/v2/").split("/")
        assert provider == "gh"
        assert list(parse_qs(url.query)) == ["urlpath"]
        found.append({"at": (owner, repository, revision), "opens": parse_qs(url.query)["urlpath"][0]})
    return found


def test_badges_open_the_page_they_stand_on():
    (readme,) = badges((ROOT / "README.md").read_text())
    assert readme["opens"] == "lab/tree/notebooks/00_start_here.ipynb"
    assert readme["at"][-1] == "HEAD"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = "\n".join(
            cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"
        )
        assert badges(text) == [{"at": readme["at"], "opens": f"lab/tree/notebooks/{path.name}"}], path.name


def test_no_local_path_in_the_pip_section():
    # "-e ." would be taken from the file's own folder, binder/, and keeps repo2docker from caching the layer
    assert not re.search(r"^\s*-\s*(-e\s+)?\.", (ROOT / "environment.yml").read_text(), re.MULTILINE)


def test_conda_lines_are_strict_and_admit_the_tested_versions():
    rattler = pytest.importorskip("rattler")
    conda, _ = environment()
    for line in conda:
        spec = rattler.MatchSpec(line, strict=True)
        name = re.match(r"[\w-]+", line)[0]
        if name in NOT_PYTHON_PACKAGES:
            continue
        tested = pinned()[canonicalize_name(CONDA_NAMES.get(name, name))]
        assert rattler.VersionSpec(spec.version).matches(rattler.Version(str(tested))), (line, tested)


def test_pip_lines_are_the_tested_versions():
    for requirement in environment()[1]:
        assert str(requirement.specifier) == f"=={pinned()[canonicalize_name(requirement.name)]}", requirement


def test_the_environment_holds_all_that_the_package_needs_and_nothing_else():
    # postBuild installs eas_kit with --no-deps
    conda, pip = environment()
    names = {re.match(r"[\w-]+", line)[0] for line in conda} - NOT_PYTHON_PACKAGES
    there = {canonicalize_name(CONDA_NAMES.get(n, n)) for n in names} | {canonicalize_name(r.name) for r in pip}
    assert there == set(declared())
