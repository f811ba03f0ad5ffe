"""Checkpoints of a training run: only what is trained, and everything needed to go on bit for bit.

A checkpoint is a folder `checkpoint-00000120` (the step) with
    trainable.safetensors   the weights that require a gradient, by parameter name
    state.pt                optimiser, schedule, loss scaler, records, and the caller's own state
    rng-0.pt, rng-1.pt ...  random states, one file a process
    config.json             the settings that a resumed run must share
It is written under another name and renamed when complete, so that a killed run leaves no half checkpoint.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .errors import TrainingError


def trainable(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def complete(folder: str | Path) -> list[Path]:
    """The complete checkpoints in `folder`, by step. Folders of other names are none of ours."""
    found = [p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    return next(reversed(complete(folder)), None)


def refuse_older(folder: str | Path) -> None:
    """Raises TrainingError if `folder` holds checkpoints: a new run would mix its own with those of another."""
    newest = latest(folder)
    if newest is not None:
        raise TrainingError(
            f"output_dir {folder} holds the checkpoints of a run that got to {newest.name}. "
            "Go on with it (resume=True), choose another output_dir, or delete them."
        )


def save(folder: str | Path, net: nn.Module, step: int, state: dict, identity: dict, keep: int, accelerator) -> Path:
    """Writes a checkpoint from all processes together and deletes all but the newest `keep`."""
    folder = Path(folder)
    path, partial = folder / f"checkpoint-{step:08d}", folder / f"partial-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = {name: p.detach().cpu().contiguous() for name, p in trainable(net).items()}
        save_file(weights, partial / "trainable.safetensors")
        torch.save({"step": step, **state}, partial / "state.pt")
        (partial / "config.json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    torch.save(rng_state(), partial / f"rng-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        for old in [*complete(folder)[:-keep], *folder.glob("partial-*")]:  # those of killed runs, too
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return path


def restore(path: Path, net: nn.Module, identity: dict, accelerator) -> dict:
    """Puts weights and random states of a checkpoint back; returns the `state` that `save` was given, and "step".

    Raises TrainingError if the checkpoint belongs to another run: other settings, weights or number of processes.
    """
    saved = json.loads((path / "config.json").read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    different = [
        f"{key} (saved {saved.get(key)!r}, now {wanted.get(key)!r})"
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key)
    ]
    if different:
        raise TrainingError(
            f"{path} is the checkpoint of another run: {'; '.join(different)}. "
            "Resume with the same settings, or choose another output_dir."
        )
    weights, parameters = load_file(path / "trainable.safetensors"), trainable(net)
    if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in parameters.items()}:
        odd = sorted(weights.keys() ^ parameters.keys()) or ["the same names, but other shapes"]
        raise TrainingError(f"{path} holds other trainable weights than this model: {', '.join(odd[:4])}.")
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    set_rng_state(torch.load(path / f"rng-{accelerator.process_index}.pt", weights_only=True))
    return torch.load(path / "state.pt", weights_only=True, map_location="cpu")


def rng_state() -> dict:
    """Random states of python, numpy (legacy) and torch, in types that a safe torch.load reads."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - the state users' code may draw from
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
