"""One run of one arm by plain settings, as a grid, a notebook or a parameters file gives them.

    run_arm({"arm": {"method": "pia", "k": 4, "chosen_by": "bandit"}, "seed": 1}, "arms")   # the run's row
    run_arm({"table": "1", "row": "EAS8", "model": "tiny"}, "arms")                 # a row of the paper's table

`arms.py` says what an arm is, `compare.py` runs it; here names and kinds of settings are checked, and models and tasks
are loaded by name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .arms import LEARNING_RATES, Plan
from .compare import run_arms
from .config import EASConfig, SearchConfig, TrainConfig
from .errors import EASError, RunError
from .paper import make_arm, read_tables, row_of, scaled_arm
from .sites import find_sites
from .tasks.closed import ClosedTask
from .tasks.heads import for_a_head


@dataclass(frozen=True)
class ArmRun:
    """All settings of a run. Either `arm`, or `table` and `row`: the row's arm, scaled to the model's sites."""

    arm: dict[str, Any] | None = None
    table: str | None = None
    row: str | None = None
    seed: int = 0
    model: str = "tiny"
    model_settings: dict[str, Any] = field(default_factory=dict)
    """More of `load_model`: dtype, device_map ..."""
    device: str = "auto"
    task: str = "elements"
    task_settings: dict[str, Any] = field(default_factory=dict)
    """More of `load_task`. `closed: true`: for a model with a head (METER), a closed list of the task's answers, of a
    task of captioned pictures the matching of text and picture."""
    steps: int = 300
    batch_size: int = 8
    learning_rates: dict[str, Any] = field(default_factory=dict)
    """By method, over the standard ones; a list is a grid to choose from on val (plain method, this seed)."""
    skip_rank: int = 64
    adapt_rank: int = 32
    dropout: float = 0.0
    mixed_precision: str = "no"
    search: dict[str, Any] = field(default_factory=dict)
    """More of `SearchConfig`."""
    plan: dict[str, Any] = field(default_factory=dict)
    """More of `Plan`: lora, methods, tune_on, latency ..."""
    evaluate: dict[str, Any] = field(default_factory=lambda: {"batch_size": 100})
    val_limit: int | None = 100
    test_limit: int | None = 300


_KINDS: dict[str, tuple[type, ...]] = {
    **{name: (dict, type(None)) for name in ("arm",)},
    **{name: (str, type(None)) for name in ("table", "row")},
    **dict.fromkeys(("seed", "steps", "batch_size", "skip_rank", "adapt_rank"), (int,)),
    **{name: (int, type(None)) for name in ("val_limit", "test_limit")},
    **dict.fromkeys(("model", "device", "task", "mixed_precision"), (str,)),
    **dict.fromkeys(("model_settings", "task_settings", "learning_rates", "search", "plan", "evaluate"), (dict,)),
    "dropout": (float, int),
}


def expand(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that settings stand for: one, or, of a `table` without a `row`, one for each of its rows.

    Raises:
        RunError: unknown settings, values of a wrong kind, no arm, or a table or row that is not there.
    """
    known = [f.name for f in fields(ArmRun)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise RunError(f"unknown setting {', '.join(unknown)}; a run of an arm has {', '.join(known)}")
    settings = dict(settings)
    if isinstance(settings.get("table"), int):
        settings["table"] = str(settings["table"])  # YAML reads 1 as a number
    for name, value in settings.items():
        if not isinstance(value, _KINDS[name]) or (isinstance(value, bool) and bool not in _KINDS[name]):
            wanted = " or ".join({"NoneType": "null"}.get(kind.__name__, kind.__name__) for kind in _KINDS[name])
            raise RunError(f"{name} is a {wanted}; got {value!r}, a {type(value).__name__}")
    given = [name for name in ("arm", "table") if settings.get(name) is not None]
    if len(given) != 1 or (settings.get("row") is not None and "table" not in given):
        raise RunError(
            "a run has either an `arm`, or a `table` of the paper with or without a `row`; got " + repr(settings)
        )
    try:
        _check_nested(settings)
        if given == ["arm"]:
            make_arm(settings["arm"])
            return [settings]
        table = _table(settings["table"])
        if settings.get("row") is not None:
            row_of(table, settings["row"])
            return [settings]
        return [settings | {"row": row["row"]} for row in table["rows"]]
    except RunError:
        raise
    except EASError as error:
        raise RunError(str(error)) from None


def _check_nested(settings: Mapping[str, Any]) -> None:
    """Names and values inside of `search`, `plan` and `learning_rates`, as far as they can be known without a model."""
    for name, known in (
        ("search", {f.name for f in fields(SearchConfig)} - {"num_skipped", "seed"}),
        ("plan", {f.name for f in fields(Plan)} - {"steps", "train", "eas", "search", "evaluate"}),
        ("learning_rates", set(LEARNING_RATES)),
    ):
        unknown = sorted(set(settings.get(name) or {}) - known)
        if unknown:
            raise RunError(f"{name}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    given = {name: settings[name] for name in ("batch_size", "mixed_precision") if name in settings}
    SearchConfig(**given | (settings.get("search") or {}))
    shapes = {name: settings[name] for name in ("skip_rank", "adapt_rank", "dropout") if name in settings}
    EASConfig(**shapes)


def run_arm(settings: Mapping[str, Any], folder: str | Path, log: Callable[[str], Any] = print) -> dict[str, Any]:
    """Runs the arm, or reads its file in `folder` if it was run before, and returns its row of `compare.run_arms`, with
    the arm's words in `words` and the paper's `table` and `row`, if it was named by them.

    Raises:
        RunError: as `expand`, and for settings that stand for several runs. What loading and training raise goes on.
    """
    (settings,) = expand(settings) if settings.get("table") is None or settings.get("row") else (None,)
    if settings is None:
        raise RunError("run_arm wants one run: give a `row` with the `table`")
    run = ArmRun(**settings)
    base, task = _load(run)
    words = run.arm or scaled_arm(_table(run.table), run.row, len(find_sites(base)), run.skip_rank)
    rates = {name: rate for name, rate in run.learning_rates.items() if not isinstance(rate, list)}
    frame = run_arms(
        task,
        lambda: _fresh(run),
        [make_arm(words)],
        seeds=(run.seed,),
        out_dir=folder,
        plan=make_plan(run, task),
        learning_rates={**LEARNING_RATES, **rates},
        grid={name: rate for name, rate in run.learning_rates.items() if isinstance(rate, list)},
        model_name=run.model,
        made_with={"model": run.model_settings, "task": run.task_settings},
        log=log,
    )
    (row,) = frame.to_dict("records")
    named = {"table": run.table, "row": run.row, "model": run.model, "task": run.task}
    return {**named, "words": dict(words), **row}


def make_plan(run: ArmRun, task: Any) -> Plan:
    """What all arms with these settings share."""
    rate = run.learning_rates.get("pia", LEARNING_RATES["pia"])
    shared = {
        "batch_size": run.batch_size,
        "lr_warmup_steps": 20,
        "mixed_precision": run.mixed_precision,
        "progress": False,
    }
    some = (task.test[i] for i in range(min(20, len(task.test))))
    # a model with a head over a closed list writes nothing: there is one way to ask it
    options = not isinstance(task, ClosedTask) and all(getattr(e, "choices", None) for e in some)
    search = {"learning_rate": rate[0] if isinstance(rate, list) else rate, **shared, **run.search}
    defaults = {
        "steps": run.steps,
        "train": TrainConfig(**shared),
        "eas": EASConfig(skip_rank=run.skip_rank, adapt_rank=run.adapt_rank, dropout=run.dropout),
        "search": SearchConfig(**search),
        "evaluate": dict(run.evaluate),
        # an untuned model does not know the answers' form
        "zero_shot": dict(run.evaluate) | ({"method": "options"} if options else {}),
        "score_limit": run.val_limit,
    }
    return Plan(**(defaults | run.plan))


@functools.lru_cache(maxsize=1)
def _tables() -> dict[str, dict[str, Any]]:
    return read_tables()


def _table(number: str) -> dict[str, Any]:
    found = _tables()
    if number not in found:
        raise RunError(f"the paper has no table {number!r} here; there are {', '.join(found)}")
    return found[number]


def _load(run: ArmRun) -> tuple[Any, Any]:
    """The base model and the task."""
    sizes = {split: n for split, n in (("val", run.val_limit), ("test", run.test_limit)) if n is not None}
    settings = dict(run.task_settings)
    if sizes:
        settings["sizes"] = {**(settings.get("sizes") or {}), **sizes}
    parts = (run.model, run.device, run.model_settings, run.task, settings)
    return _loaded(json.dumps(parts, sort_keys=True))


@functools.lru_cache(maxsize=1)
def _loaded(parts: str) -> tuple[Any, Any]:
    """Several runs in one process share model and task; nothing trains this model."""
    import eas_kit as eas

    model, device, model_settings, task, settings = json.loads(parts)
    base, processor = eas.load_model(model, device=device, **model_settings)
    asked = settings.pop("closed", False)
    found = eas.load_task(task, processor, **settings)
    return base, for_a_head(found, base.config.num_labels, settings.get("sizes")) if asked else found


def _fresh(run: ArmRun) -> Any:
    from .models import load_base

    return load_base(run.model, device=run.device, **run.model_settings)
