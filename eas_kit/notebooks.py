"""Which notebooks there are, which parameters each has, and whether what was asked for makes sense.

papermill only warns of an unknown parameter and then runs for minutes with the default. Here every name and every
kind of value is checked, for all notebooks, before the first one starts.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import yaml

from .errors import RunError

RUN_DIR = "run_dir"  # the one parameter that the runner itself sets
PARAMETERS_TAG = "parameters"


@dataclass(frozen=True)
class Notebook:
    """A notebook as it lies in the folder. ``defaults`` are the literals of its parameters cell."""

    name: str
    path: Path
    title: str
    defaults: Mapping[str, Any]
    comments: Mapping[str, str]
    digest: str


@dataclass(frozen=True)
class Raw:
    """A value as typed on a command line. It is YAML, except where the notebook's default is a text."""

    text: str


@dataclass
class Parameters:
    """What a parameters file holds: values for every notebook that has them, and values for one notebook."""

    shared: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)


class YamlLoader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number: PyYAML follows YAML 1.1, where that is a text."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_value(text: str) -> Any:
    """A YAML literal: 4, 1e-3, true, null, [0, 2], tiny.

    Raises:
        RunError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=YamlLoader)
    except yaml.YAMLError as error:
        raise RunError(f"{text!r} is not a YAML value; quote it, as in '\"{text}\"'") from error


def find_folder(folder: str | Path | None = None) -> Path:
    """The folder of notebooks: the given one, else ./notebooks, else that of the checkout eas_kit runs from."""
    if folder is not None:
        candidates = [Path(folder)]
    else:
        candidates = [Path.cwd() / "notebooks", Path(__file__).resolve().parents[1] / "notebooks"]
    for candidate in candidates:
        if any(candidate.glob("*.ipynb")):
            return candidate.resolve()
    raise RunError(
        f"no notebooks (*.ipynb) in {' or '.join(map(str, candidates))}: "
        "run this in a checkout of eas_kit, or name their folder with --notebooks DIR"
    )


def read_notebooks(folder: Path) -> dict[str, Notebook]:
    """All notebooks of ``folder`` by name, in reading order.

    Raises:
        RunError: one cannot be read or has no proper parameters cell; the message names all that are wrong.
    """
    notebooks, problems = {}, []
    for path in sorted(folder.glob("*.ipynb")):
        try:
            notebooks[path.stem] = read_notebook(path)
        except RunError as error:
            problems.append(str(error))
    if problems:
        raise RunError("\n".join(problems))
    return notebooks


def read_notebook(path: Path) -> Notebook:
    """One notebook. Its cell tagged ``parameters`` may hold only ``name = literal`` lines (and comments)."""
    try:
        content = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds
        raise RunError(f"{path.name} is not a notebook that can be read: {error}") from error
    tagged = [cell for cell in content.cells if PARAMETERS_TAG in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        tags = sorted({tag for cell in content.cells for tag in cell.metadata.get("tags", [])})
        raise RunError(
            f"{path.name} has {len(tagged) or 'no'} cell{'s' if len(tagged) > 1 else ''} tagged {PARAMETERS_TAG!r}, "
            f"wanted one (tags found: {', '.join(tags) or 'none'}). "
            "In JupyterLab: select the cell, property inspector (the gear), Cell Tags"
        )
    defaults, comments = _literals(path.name, tagged[0].source)
    titles = re.findall(r"^# +(.+)$", "\n".join(c.source for c in content.cells if c.cell_type == "markdown"), re.M)
    # outputs and counters left over from Lab do not make it another notebook
    sources = "\0".join(f"{cell.cell_type}:{cell.source}" for cell in content.cells)
    digest = hashlib.sha256(sources.encode()).hexdigest()[:16]
    return Notebook(path.stem, path, titles[0] if titles else path.stem, defaults, comments, digest)


def _literals(name: str, source: str) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise RunError(f"{name}: the parameters cell is not Python: {error}") from error
    defaults, comments, lines = {}, {}, source.splitlines()
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        try:
            if len(targets) != 1 or not isinstance(targets[0], ast.Name):
                raise ValueError("not an assignment to one name")
            defaults[targets[0].id] = ast.literal_eval(statement.value)
        except (ValueError, AttributeError) as error:
            raise RunError(
                f"{name}: line {statement.lineno} of the parameters cell, {lines[statement.lineno - 1]!r}, "
                "is not `name = literal`: move what is computed to a later cell"
            ) from error
        _, mark, comment = lines[statement.end_lineno - 1][statement.end_col_offset :].partition("#")
        comments[targets[0].id] = comment.strip() if mark else ""
    return defaults, comments


def choose(notebooks: Mapping[str, Notebook], wanted: Sequence[str]) -> list[Notebook]:
    """The wanted notebooks in reading order; all of them if none is named.

    A name may be given with or without ``.ipynb``, as a path, or as its beginning (``03``) where that is clear.
    """
    chosen, unknown = set(), []
    for text in wanted:
        name = Path(text).name.removesuffix(".ipynb")
        matches = [name] if name in notebooks else [known for known in notebooks if known.startswith(name)]
        if Path(text).is_file() and not any(Path(text).samefile(notebooks[known].path) for known in matches):
            folder = next(iter(notebooks.values())).path.parent if notebooks else "the folder of notebooks"
            unknown.append(f"{text} (not a notebook of {folder}; name another folder with --notebooks DIR)")
        elif len(matches) == 1 and name:
            chosen.add(matches[0])
        else:
            unknown.append(f"{text} (could be {' or '.join(matches)})" if name and matches else text)
    if unknown:
        raise RunError(f"unknown notebook: {', '.join(unknown)}. The notebooks are: {', '.join(notebooks)}")
    return [notebook for name, notebook in notebooks.items() if name in chosen or not wanted]


def read_parameters(path: str | Path, notebooks: Mapping[str, Notebook]) -> Parameters:
    """A parameters file: either flat (``seed: 1``), or with a section ``all`` and one for each notebook.

    Raises:
        RunError: not YAML, both forms mixed, a section for an unknown notebook, or values that no notebook takes.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=YamlLoader) or {}
    except (OSError, yaml.YAMLError) as error:
        raise RunError(f"the parameters file {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"the parameters file {path} holds a {type(content).__name__}, wanted `name: value` lines")
    content = {str(key): value for key, value in content.items()}
    # a parameter's name cannot begin with a digit, so this also catches a misspelt notebook
    if not any(key == "all" or key in notebooks or key[:1].isdigit() for key in content):
        parameters = Parameters(shared=content)
    else:
        wrong = [key for key in content if key not in (*notebooks, "all")]
        if wrong:
            raise RunError(
                f"{path}: {', '.join(wrong)} is no section; with sections there can be only `all` and "
                f"the notebooks: {', '.join(notebooks)}"
            )
        broken = [key for key, value in content.items() if value is not None and not isinstance(value, dict)]
        if broken:
            raise RunError(f"{path}: the section {broken[0]} must hold `name: value` lines")
        sections = {key: dict(value or {}) for key, value in content.items()}
        parameters = Parameters(sections.pop("all", {}), sections)

    # the file is for the whole set, so it is checked against the whole set, whichever notebooks run now
    _refuse_unknown(parameters.shared, notebooks.values(), f"{path}")
    for name, values in parameters.sections.items():
        _refuse_unknown(values, [notebooks[name]], f"{path}, section {name}")
    return parameters


def resolve(
    chosen: Sequence[Notebook], given: Mapping[str, Any], from_file: Parameters | None = None
) -> dict[str, dict[str, Any]]:
    """For each chosen notebook the parameters that differ from its cell: file, its section there, then ``given``.

    Raises:
        RunError: a given parameter that no chosen notebook has, or a value of another kind than the default's.
    """
    from_file = from_file or Parameters()
    _refuse_unknown(given, chosen, "-p")
    resolved = {}
    for notebook in chosen:
        values = {**from_file.shared, **from_file.sections.get(notebook.name, {}), **given}
        resolved[notebook.name] = {
            name: fit_value(notebook, name, value) for name, value in values.items() if name in notebook.defaults
        }
    return resolved


def _refuse_unknown(values: Mapping[str, Any], notebooks: Collection[Notebook], where: str) -> None:
    known = {name for notebook in notebooks for name in notebook.defaults}
    if RUN_DIR in values:
        raise RunError(f"{where}: {RUN_DIR} is set by the runner; choose the run folder with --out DIR")
    unknown = [name for name in values if name not in known]
    if unknown:
        valid = "\n".join(
            f"  {notebook.name}: {', '.join(n for n in notebook.defaults if n != RUN_DIR) or '(none)'}"
            for notebook in notebooks
        )
        raise RunError(f"{where}: unknown parameter {', '.join(unknown)}. Valid parameters are:\n{valid}")


def fit_value(notebook: Notebook, name: str, value: Any) -> Any:
    """The value in the default's kind. None is always allowed: it is how notebooks say "all" or "choose for me"."""
    default = notebook.defaults[name]
    if isinstance(value, Raw):
        parsed = parse_value(value.text)
        # -p model 7 and -p revision 1e5 name things, where the default is a text
        value = value.text if isinstance(default, str) and parsed is not None else parsed
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        return value
    if default is None or value is None or type(value) is type(default):
        return value
    raise RunError(
        f"{notebook.name}: parameter {name} is {default!r} by default, so a {type(default).__name__} is wanted; "
        f"got {value!r}, a {type(value).__name__}"
    )
