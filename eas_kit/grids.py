"""Grids of runs as YAML files: which runs a file stands for, checked before any of them starts.

    run: arms                                  # or the name of a notebook, such as 03_train_pia
    fixed: {model: tiny, steps: 300}           # the same in every run
    grid:                                      # every combination of these lists is a run
      arm: [{method: full}, {method: pia, k: 4, chosen_by: bandit}]
      seed: [0, 1, 2]
    exclude: [{arm: {method: full}, seed: 2}]  # not those in which all of this holds
    include: [{arm: {method: lora}, seed: 0}]  # and these besides, on top of `fixed`

A run of arms takes the settings of `arm_runs.ArmRun`; one that names a `table` and no `row` stands for every row of
that table of the paper. A run of a notebook takes the notebook's parameters.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import __version__
from .errors import RunError
from .notebooks import RUN_DIR, Notebook, YamlLoader, choose, find_folder, fit_value, read_notebooks

ARMS = "arms"
KEYS = ("run", "fixed", "grid", "include", "exclude")
MAX_RUNS = 10_000  # a slip of the pen, not a plan


@dataclass(frozen=True)
class Job:
    """One run. `name` is short and unlike the others'; `settings` are what it is given; `key`, what it depends on."""

    name: str
    kind: str
    settings: Mapping[str, Any]
    varied: Mapping[str, Any]
    digest: str = ""

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": self.kind, "settings": dict(self.settings), "source": self.digest, "version": __version__}


@dataclass(frozen=True)
class Grid:
    """A file, read: what runs (`arms` or a notebook) and the jobs in order."""

    run: str
    jobs: tuple[Job, ...]


def read_grid(path: str | Path, notebooks: str | Path | None = None) -> Grid:
    """The runs that a grid file stands for.

    Args:
        notebooks: their folder, as for `eas-kit run`.

    Raises:
        RunError: no YAML; unknown keys, settings, parameters, notebooks, tables or rows; values of a wrong kind; no run
            at all; two runs with the same settings. Nothing has run then.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=YamlLoader)
    except (OSError, yaml.YAMLError) as error:
        raise RunError(f"the grid {path} cannot be read: {error}") from error
    content = _checked(path, content)
    book = None if content["run"] == ARMS else _notebook(path, content["run"], notebooks)
    points = _points(path, content)
    if not points:
        raise RunError(f"{path} stands for no run: everything in `grid` is excluded; take an `exclude` away")
    if book is None:
        from .arm_runs import expand

        fit: Callable[[dict], list[dict]] = expand
    else:

        def fit(point: dict) -> list[dict]:
            return [_for_notebook(book, point)]

    settings = []
    for number, point in enumerate(points, 1):
        try:
            settings += fit(point)
        except RunError as error:
            raise RunError(f"{path}, run {number} of {len(points)}: {error}") from None
    kind, digest = (ARMS, "") if book is None else (book.name, book.digest)
    return Grid(kind, _named(path, kind, digest, settings, content["fixed"]))


def _checked(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a {type(content).__name__}, wanted the keys {', '.join(KEYS)}")
    unknown = [str(key) for key in content if key not in KEYS]
    if unknown:
        raise RunError(f"{path}: unknown key {', '.join(unknown)}; a grid has {', '.join(KEYS)}")
    run = content.get("run")
    if not isinstance(run, str):
        raise RunError(f"{path}: `run` says what runs, {ARMS!r} or a notebook such as 03_train_pia; got {run!r}")
    fixed, grid = content.get("fixed") or {}, content.get("grid") or {}
    for name, value in (("fixed", fixed), ("grid", grid)):
        if not isinstance(value, dict):
            raise RunError(f"{path}: `{name}` holds a {type(value).__name__}, wanted `name: value` lines")
    for name, values in grid.items():
        if not isinstance(values, list):
            raise RunError(
                f"{path}: `grid: {name}` is {values!r}, wanted a list of values; a single value stands in `fixed`"
            )
        if not values:
            raise RunError(f"{path}: `grid: {name}` is an empty list, so there is no run; give it values")
    both = sorted(set(fixed) & set(grid))
    if both:
        raise RunError(f"{path}: {', '.join(both)} stands in `fixed` and in `grid`; take it out of one")
    found = {"run": run, "fixed": fixed, "grid": grid}
    for name in ("include", "exclude"):
        entries = content.get(name) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and entry for entry in entries):
            raise RunError(f"{path}: `{name}` wants a list of `{{name: value}}`, got {entries!r}")
        found[name] = entries
    if not grid and not found["include"]:
        raise RunError(f"{path} stands for no run: it has neither `grid` nor `include`")
    for entry in found["exclude"]:
        foreign = sorted(set(entry) - set(grid) - set(fixed))
        if foreign:
            raise RunError(f"{path}: `exclude` names {', '.join(foreign)}, which is neither in `grid` nor in `fixed`")
    return found


def _points(path: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    fixed, grid = content["fixed"], content["grid"]
    points: list[dict[str, Any]] = []
    if grid:
        number = 1
        for values in grid.values():
            number *= len(values)
        if number > MAX_RUNS:
            raise RunError(f"{path} stands for {number} runs; more than {MAX_RUNS} are refused: make it several grids")
        points = [{**fixed, **dict(zip(grid, values, strict=True))} for values in itertools.product(*grid.values())]
    for entry in content["exclude"]:
        left = [point for point in points if not all(point[name] == value for name, value in entry.items())]
        if len(left) == len(points):
            raise RunError(f"{path}: `exclude: {entry}` fits no run of the grid; correct it or take it out")
        points = left
    return points + [{**fixed, **entry} for entry in content["include"]]


def _notebook(path: Path, name: str, folder: str | Path | None) -> Notebook:
    known = read_notebooks(find_folder(folder))
    try:
        (book,) = choose(known, [name])
    except RunError as error:
        raise RunError(f"{path}: `run` is {ARMS!r} or a notebook: {error}") from None
    return book


def _for_notebook(book: Notebook, point: dict[str, Any]) -> dict[str, Any]:
    if RUN_DIR in point:
        raise RunError(f"{RUN_DIR} is set by the sweep; choose the folder with --out DIR")
    unknown = [name for name in point if name not in book.defaults]
    if unknown:
        valid = ", ".join(name for name in book.defaults if name != RUN_DIR)
        raise RunError(f"unknown parameter {', '.join(unknown)}; {book.name} has {valid}")
    return {name: fit_value(book, name, value) for name, value in point.items()}


def _named(path: Path, kind: str, digest: str, settings: list[dict], fixed: Mapping) -> tuple[Job, ...]:
    """Jobs with names made of what differs between them, and a few letters of their settings' digest."""
    jobs, seen = [], {}
    for values in settings:
        varied = {name: value for name, value in values.items() if name not in fixed or fixed[name] != value}
        marks = hashlib.sha256(json.dumps([kind, digest, values], sort_keys=True, default=str).encode()).hexdigest()[:8]
        if marks in seen:
            raise RunError(f"{path}: two runs have the same settings, {varied}; take one of them out")
        seen[marks] = True
        jobs.append(Job(f"{_slug(varied)}-{marks}", kind, values, varied, digest))
    return tuple(jobs)


def _slug(varied: Mapping[str, Any]) -> str:
    """A readable file name: the values, with their names where they are numbers."""
    parts = []
    for name, value in varied.items():
        if isinstance(value, Mapping):
            parts.append("_".join(str(v) for v in value.values() if not isinstance(v, Mapping | list)))
        elif isinstance(value, int | float) or str(value).isdigit():
            parts.append(f"{name}{value}")
        else:
            parts.append(str(value))
    return re.sub(r"[^\w.+-]+", "_", "_".join(parts)).strip("_")[:80] or "run"
