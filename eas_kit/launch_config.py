"""What a run is, read from a YAML file and checked to the last name before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from .config import Config, EASConfig, LoopConfig, SearchConfig, TrainConfig, is_int
from .errors import ConfigError

SECTIONS = {"eas": EASConfig, "search": SearchConfig, "train": TrainConfig}
SET_BY_THE_RUN = ("output_dir", "resume")  # of search and tuning; each has its own folder of checkpoints
CHECKPOINTS = {"search": "search", "train": "tuning"}  # folders in output_dir
CHECKPOINT_EVERY = 100  # steps, where the file does not say: a run that nobody watches can be killed at any time
ROLES = ("train", "search", "val", "test")


@dataclass
class LaunchConfig(Config):
    """Everything about a run of `python -m eas_kit.training`; the file has these names at its top.

    search: the bandit chooses the mask; None: `mask` is given, or nothing is skipped. train: tuning under that mask,
    with the adapters that the search has trained; None: none. evaluate: arguments of `task.evaluate`; None: none.
    """

    model: dict[str, Any]
    """`name`, and what `load_model` takes: dtype, attn_implementation, ... A name alone will do."""
    task: dict[str, Any]
    """`name`, and what `load_task` takes: data_dir, sizes, ... A name alone will do. `closed: true`: for a
    model with a head in place of words (METER), see `eas_kit.tasks.heads`."""
    output_dir: str
    """Checkpoints (search/, tuning/), search.json, mask.json, adapters/ and results.json go here."""
    eas: EASConfig = field(default_factory=EASConfig)
    mask: list[int] | str | None = None
    """Sites to skip, or a mask file, where nothing is searched."""
    search: SearchConfig | None = None
    train: TrainConfig | None = None
    evaluate: dict[str, Any] | None = None
    seed: int = 0
    """Of new adapters, and of search and tuning where these have none of their own."""

    def __post_init__(self) -> None:
        self._check(is_int(self.seed, 0), "seed", "a whole number from 0 up")
        self._check(isinstance(self.output_dir, str) and self.output_dir != "", "output_dir", "the path of a folder")
        mask = self.mask
        listed = isinstance(mask, list) and all(is_int(site, 0) for site in mask)
        self._check(mask is None or isinstance(mask, str) or listed, "mask", "a list of sites, a mask file, or null")
        if mask is not None and self.search is not None:
            raise ConfigError("mask and search: a search finds a mask of its own; set one of the two to null")
        if self.search is None and self.train is None and self.evaluate is None:
            raise ConfigError("search, train and evaluate are all null: there is nothing to do")

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for files, without a token for the hub."""
        values = super().to_dict()
        values["model"].pop("token", None)
        return values

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must share with the one before. Evaluation is done anew, so it may differ."""
        loops = {name: None if one is None else one.identity() for name, one in self.loops().items()}
        return self.to_dict() | {"output_dir": None, "evaluate": None} | loops

    def loops(self) -> dict[str, LoopConfig | None]:
        return {"search": self.search, "train": self.train}


def read_config(path: str | Path, changes: Iterable[str] = ()) -> LaunchConfig:
    """The settings in a YAML file, with `changes` like "train.epochs=2" made to it first.

    Raises ConfigError for a file that cannot be read, for every name that nothing knows, and for values out of range.
    """
    values = _read(path)
    for change in changes:
        _make_change(values, change)
    return make_config(values, str(path))


def make_config(values: Mapping[str, Any], where: str) -> LaunchConfig:
    """The settings in a dictionary; `where` it comes from, for errors."""
    known = [f.name for f in fields(LaunchConfig)]
    _refuse_unknown(where, values, known)
    missing = [f.name for f in fields(LaunchConfig) if _is_required(f) and values.get(f.name) is None]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given")
    values = {key: value for key, value in values.items() if value is not None}
    for name in ("model", "task"):
        values[name] = _named(where, name, values[name])
    _check_task(where, values["task"], values.get("evaluate"))
    for name, kind in SECTIONS.items():
        if name in values:
            values[name] = _section(where, name, kind, values)
    try:
        return LaunchConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _is_required(one: Any) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _read(path: str | Path) -> dict[str, Any]:
    import yaml

    from .notebooks import YamlLoader

    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=YamlLoader)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"the settings {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: wanted lines `name: value`, the file holds a {type(values).__name__}")
    return values


def _make_change(values: dict[str, Any], change: str) -> None:
    from .notebooks import parse_value

    name, equals, value = change.partition("=")
    *sections, last = name.split(".")
    if not equals or not last:
        raise ConfigError(f"--set {change}: wanted NAME=VALUE, as in train.epochs=2")
    for section in sections:
        inner = values.get(section)
        if section in ("model", "task") and isinstance(inner, str):
            inner = {"name": inner}
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"--set {change}: {section} is {inner!r}, which has nothing inside")
        values[section] = values = dict(inner or {})
    values[last] = parse_value(value)


def _refuse_unknown(where: str, values: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        raise ConfigError(f"{where}: there is no setting {', '.join(unknown)}; there are {', '.join(known)}")


def _named(where: str, section: str, value: Any) -> dict[str, Any]:
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(f"{where}, {section}: wanted a name, or `name:` and settings, got {value!r}")
    return value


def _check_task(where: str, task: Mapping[str, Any], evaluate: Any) -> None:
    """Names of settings, as far as the task's class tells them."""
    from .tasks import _find, _settings
    from .tasks.heads import kind_for_a_head

    found = _find(task["name"])
    if not _takes_anything(found.__init__):
        _refuse_unknown(f"{where}, task {task['name']}", task, ["name", "closed", *_settings(found)])
    if evaluate is None:
        return
    if not isinstance(evaluate, dict):
        raise ConfigError(f"{where}, evaluate: wanted settings of task.evaluate, got {evaluate!r}")
    if evaluate.get("split", "test") not in ROLES:
        raise ConfigError(f"{where}, evaluate: split is one of {', '.join(ROLES)}, not {evaluate['split']!r}")
    method = getattr(kind_for_a_head(found) if task.get("closed") else found, "evaluate", None)
    if method is None:
        raise ConfigError(f"{where}, evaluate: {found.__name__} has no method evaluate; set it to null")
    if not _takes_anything(method):
        known = list(inspect.signature(method).parameters)[2:]  # without self and the model
        _refuse_unknown(f"{where}, evaluate", evaluate, known)


def _takes_anything(function: Any) -> bool:
    """Whether it takes keywords that its signature does not name, and no base class of ours names for it."""
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds and not function.__module__.startswith("eas_kit.")


def _section(where: str, name: str, kind: type[Config], everything: Mapping[str, Any]) -> Config:
    where, values, own = f"{where}, {name}", everything[name], {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: wanted settings of {kind.__name__}, got {values!r}")
    known = [f.name for f in fields(kind)]
    if issubclass(kind, LoopConfig):
        wrong = [one for one in SET_BY_THE_RUN if one in values]
        if wrong:
            raise ConfigError(
                f"{where}: {', '.join(wrong)} cannot be set here: output_dir stands at the top, and the same command"
                " goes on by itself"
            )
        known = [one for one in known if one not in SET_BY_THE_RUN]
        folder = str(Path(str(everything["output_dir"])).expanduser() / CHECKPOINTS[name])
        values = {"seed": everything.get("seed", 0), "checkpoint_every": CHECKPOINT_EVERY} | values
        own = {"output_dir": folder, "resume": True}
    _refuse_unknown(where, values, known)
    for f in fields(kind):
        if isinstance(f.default, bool) and not isinstance(values.get(f.name, f.default), bool):
            raise ConfigError(f"{where}: {f.name} is true or false, not {values[f.name]!r}")
    try:
        return kind(**values | own)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (TypeError, ValueError) as error:  # a number for a list
        raise ConfigError(f"{where}: {values!r} does not fit {kind.__name__} ({error})") from None
