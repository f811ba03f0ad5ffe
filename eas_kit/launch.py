"""A run from a file: warm-up and search, tuning, evaluation, in as many processes as the launcher has started.

    python -m eas_kit.training CONFIG.yaml                                     one process
    accelerate launch --multi_gpu -m eas_kit.training CONFIG.yaml              a whole model in each
    accelerate launch --use_fsdp --fsdp_version 2 -m eas_kit.training CONFIG.yaml     its frozen weights shared

The same command goes on with a run that was killed. It leaves in the run's output_dir:
    config.json     what the run is; another configuration is refused there
    search/, tuning/            checkpoints of the two loops
    search.json     preferences, history and steps of the search; mask.json, its choice or the given mask
    adapters/       net.save_pretrained
    results.json    numbers, versions and settings, as the notebooks leave them
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from . import measure, report
from .errors import ConfigError, EASError
from .launch_config import LaunchConfig, read_config
from .masks import load_mask, save_mask
from .model import EASModel, attach
from .models import load_model
from .processes import world_size
from .saving import base_name
from .sharding import is_sharded, sharding_is_asked_for
from .tasks import load_task
from .tasks.heads import for_a_head
from .training import History, SearchResult, fit, search

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 an error that its message explains, 130 interrupted."""
    parser = argparse.ArgumentParser("eas_kit.training", description=__doc__.partition("\n")[0])
    parser.add_argument("config", metavar="CONFIG.yaml", help="examples: notebooks/params/launch/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting: --set train.epochs=2"
    )
    arguments = parser.parse_args(argv)
    try:
        return run(read_config(arguments.config, arguments.set))
    except EASError as error:
        print(f"eas_kit.training: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def run(config: LaunchConfig) -> int:
    """Does all of it, or what is left of it; returns the exit code."""
    folder = Path(config.output_dir).expanduser()
    _check_launch(config)
    _claim(folder, config)
    base, processor = load_model(**_model_settings(config))
    task = _load_task(config, base, processor)
    torch.manual_seed(config.seed)  # new adapters are random in part, and alike in all processes
    net = attach(base, config.eas)
    result, history = None, None
    if config.search is not None:
        result = search(net, task, config.search)
        if result.interrupted:
            return INTERRUPTED
    elif config.mask is not None:
        net.mask = _given_mask(config.mask, net)
    if is_main():
        _save_choice(folder, net, result)
    if config.train is not None:
        history = fit(net, task, config.train)
        if history.interrupted:
            return INTERRUPTED
    if is_main():
        net.save_pretrained(folder / "adapters")
    processes, sharded = world_size(), is_sharded(net)
    found = _evaluate(config, net, task, folder)
    if is_main():
        _write_results(config, net, task, folder, result, history, found, processes, sharded)
        _say(net, found, folder)
    _leave_the_group()
    return 0


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def _leave_the_group() -> None:
    """Where all goes well: after an error the others may still wait for this process, and the launcher ends them."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _check_launch(config: LaunchConfig) -> None:
    """Whether the settings go with how this process was launched."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    for name, loop in config.loops().items():
        if loop is not None and asked not in ("no", loop.mixed_precision):  # it would be overruled, and nobody know
            raise ConfigError(
                f"accelerate was launched with mixed precision {asked}, and {name}.mixed_precision is"
                f" {loop.mixed_precision!r}; set it there (--set {name}.mixed_precision={asked}), or leave it out of"
                " the launch"
            )
    sharded = world_size() > 1 and sharding_is_asked_for()
    if sharded and (config.evaluate or {}).get("predictions") is not None:
        raise ConfigError(
            "evaluate.predictions: a file of answers is written by one process, and a sharded model (FSDP) answers in"
            " all; leave it out (--set evaluate.predictions=null), or evaluate the folder adapters/ afterwards"
        )


def _claim(folder: Path, config: LaunchConfig) -> None:
    """Writes down which run the folder is of; ConfigError if it is another's."""
    here, path = report.plain(config.identity(), "settings"), folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; wanted a folder")
    if path.exists():
        saved = report.read_json(path)
        other = [
            f"{name} (there {there!r}, now {now!r})" for name, there, now in _differences(saved, here) if there != now
        ]
        if other:
            raise ConfigError(
                f"output_dir {folder} is of a run with other settings: {'; '.join(other)}. Go on with those, or choose"
                " another output_dir"
            )
    elif is_main():
        if (folder / "search").exists() or (folder / "tuning").exists():
            raise ConfigError(
                f"output_dir {folder} holds search/ or tuning/ but no config.json that says of which run; choose"
                " another output_dir"
            )
        report.write_json(path, here)


def _differences(saved: dict, here: dict, above: str = "") -> list[tuple[str, Any, Any]]:
    """Names (train.epochs), values there and now."""
    found = []
    for name in sorted(saved.keys() | here.keys()):
        there, now = saved.get(name), here.get(name)
        if isinstance(there, dict) and isinstance(now, dict):
            found += _differences(there, now, f"{above}{name}.")
        else:
            found.append((above + name, there, now))
    return found


def _model_settings(config: LaunchConfig) -> dict[str, Any]:
    settings = dict(config.model)
    settings["name_or_folder"] = settings.pop("name")
    if world_size() == 1 and "device_map" not in settings:  # else accelerate or fully_shard brings it to the device
        settings.setdefault("device", "auto")
    return settings


def _load_task(config: LaunchConfig, base: nn.Module, processor: Any) -> Any:
    settings = dict(config.task)
    if not settings.pop("closed", False):
        return load_task(processor=processor, **settings)
    return for_a_head(load_task(processor=processor, **settings), base.config.num_labels, settings.get("sizes"))


def _given_mask(mask: list[int] | str, net: EASModel) -> Sequence[int]:
    if isinstance(mask, str):
        return load_mask(mask, site_kinds=[site.kind for site in net.sites])
    return mask


def _save_choice(folder: Path, net: EASModel, result: SearchResult | None) -> None:
    path = folder / "search.json"
    if result is not None and not path.exists():  # where it does, the search was over before, and took no seconds now
        part = path.with_name("search.json.part")
        result.save(part)
        part.replace(path)  # never half a file
    about = {"num_sites": net.num_sites, "kind": "+".join(net.config.kinds), "model": base_name(net.base)}
    save_mask(folder / "mask.json", net.mask, **about, **net.mask_origin)


def _evaluate(config: LaunchConfig, net: EASModel, task: Any, folder: Path) -> dict[str, Any] | None:
    """What task.evaluate says; None where nothing is evaluated, or not in this process.

    A whole model is asked in the main process alone, and the others end: no collective has to wait for hours. A sharded
    one answers everything in all processes together, which gather its weights for each other.
    """
    if config.evaluate is None:
        return None
    settings = {"split": "test"} | config.evaluate
    if is_sharded(net):
        return task.evaluate(net, **settings)
    _leave_the_group()
    if not is_main():
        return None
    if settings.get("predictions") is not None:
        settings["predictions"] = folder / settings["predictions"]  # a whole path stays what it is
    return task.evaluate(net, **settings)


def _write_results(
    config: LaunchConfig,
    net: EASModel,
    task: Any,
    folder: Path,
    result: SearchResult | None,
    history: History | None,
    found: dict[str, Any] | None,
    processes: int,
    sharded: bool,
) -> None:
    metrics: dict[str, Any] = {"mask": list(net.mask), "num_sites": net.num_sites, "parameters": _parameters(net)}
    roles = {}
    if result is not None:
        metrics["search"] = {
            "preferences": result.preferences,
            "skipped": list(result.skipped),
            "updates": len(result.history),
            "steps": len(result.steps),
            "last_loss": result.steps[-1]["loss"],
        }
        roles["search"] = {"role": "rewards of the search", "examples": len(task.search)}
    if history is not None:
        metrics["train"] = {"steps": len(history), "first_loss": history.losses[0], "last_loss": history.losses[-1]}
    if result is not None or history is not None:
        roles["train"] = {"role": "trains the adapters", "examples": len(task.train)}
    if found is not None:
        metrics["evaluate"] = found
        split = (config.evaluate or {}).get("split", "test")
        roles[split] = {"role": "evaluated at the end", "examples": found.get("count")}
    report.write_results(
        folder.absolute().parent,
        folder.absolute().name,
        metrics,
        parameters=config.to_dict(),
        seed=config.seed,
        device=net.device,
        splits=roles,
        processes=processes,
        sharded=sharded,
    )


def _say(net: EASModel, found: dict[str, Any] | None, folder: Path) -> None:
    print(f"skipped: {list(net.mask)} of {net.num_sites} sites")
    if found is not None:
        numbers = {name: found.get(name) for name in ("accuracy", "loss", "count")}
        print(f"{found.get('split')}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if v is not None))
    print(f"results: {folder / 'results.json'}")


def _parameters(net: nn.Module) -> dict[str, Any]:
    found = measure.parameters(net)
    return {name: found[name] for name in ("total", "trainable", "share", "active", "active_share") if name in found}
