"""What a run leaves behind in numbers: one ``results.json`` for each notebook.

A run folder looks like this; a notebook reads the earlier ones' folders and writes its own:

    runs/demo/run.json                         what ran, how long, with which parameters
    runs/demo/index.html                       everything on one page
    runs/demo/01_probe_redundancy.ipynb        the executed copy (.html beside it)
    runs/demo/01_probe_redundancy/             what the notebook wrote: results.json and its artefacts

Every notebook has a parameter ``run_dir`` ("runs/manual" by default), which the runner sets.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RunError

FORMAT = 1
# the packages whose version can change a number
REPORTED_PACKAGES = ("eas_kit", "torch", "transformers", "accelerate", "peft", "tokenizers", "numpy")


def notebook_folder(run_dir: str | Path, notebook: str) -> Path:
    """``run_dir/notebook``, made if need be: where that notebook keeps its results and artefacts."""
    folder = Path(run_dir) / notebook
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_results(
    run_dir: str | Path,
    notebook: str,
    metrics: Mapping[str, Any],
    parameters: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: Any = "cpu",
    **extra: Any,
) -> Path:
    """Write ``run_dir/notebook/results.json`` and return its path.

    Args:
        notebook: the notebook's name without ``.ipynb``, "01_probe_redundancy".
        metrics: numbers, texts, lists and dicts of them, pandas tables (kept as lists of rows), arrays and tensors.
            Not-a-number and infinity become null, which JSON has and they are not.
        device: where the model was, ``base.device``.
        extra: more top-level entries, for example ``splits=...``. ``summary=``, a sentence or a list of them, stands
            first on the index page.

    Raises:
        RunError: something in it cannot be kept as JSON; the message says where.
    """
    record = {
        "format": FORMAT,
        "notebook": notebook,
        "written": now(),
        "seed": seed,
        "device": device_name(device),
        "versions": versions(),
        "parameters": dict(parameters or {}),
        "metrics": dict(metrics),
        **extra,
    }
    path = notebook_folder(run_dir, notebook) / "results.json"
    write_json(path, plain(record, "results"))
    return path


def read_results(run_dir: str | Path, notebook: str) -> dict[str, Any]:
    """What ``write_results`` wrote for ``notebook`` in ``run_dir``.

    Raises:
        RunError: there is none (the message lists those that are there), or the file is damaged.
    """
    path = Path(run_dir) / notebook / "results.json"
    if not path.exists():
        there = sorted(p.parent.name for p in Path(run_dir).glob("*/results.json"))
        raise RunError(
            f"no results of {notebook!r} in {run_dir}: "
            + (f"there are results of {', '.join(there)}. " if there else "no notebook has left results there. ")
            + f"Run it first: eas-kit run {notebook} --out {run_dir}"
        )
    return read_json(path)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            from . import __version__

            found[name] = __version__ if name == "eas_kit" else "not installed"
    return found


def device_name(device: Any = "cpu") -> str:
    """ "cpu (2 threads)" or "cuda:0 (NVIDIA ...)", of a torch.device or of its name."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' if threads > 1 else ''})" if device.type == "cpu" else str(device)


def machine(device: Any = "cpu") -> dict[str, Any]:
    """What a time was measured on: `device` as `device_name` says it, `processor`, `cores` and torch's `threads`."""
    import torch

    return {
        "device": device_name(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def plain(value: Any, where: str = "value") -> Any:
    """``value`` in JSON's own types: tensors, arrays and tables as lists, paths as text, nan and infinity as None."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [plain(item, where) for item in sorted(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "to_dict") and hasattr(value, "columns"):  # a pandas table
        named = value if value.index.name is None and value.index.dtype.kind in "iu" else value.reset_index()
        return plain(named.to_dict(orient="records"), where)
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu()
    if hasattr(value, "tolist"):  # numpy scalars, arrays and pandas columns as well
        return plain(value.tolist(), where)
    raise RunError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold: "
        "give numbers, texts, lists, dicts, arrays, tensors or pandas tables"
    )


def write_json(path: Path, value: Any) -> None:
    """Write at once or not at all: an interrupt must not leave half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error}): delete it and run again") from error
