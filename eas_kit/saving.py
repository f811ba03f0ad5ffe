"""Adapters on disk: adapter_config.json, adapter_model.safetensors and mask.json, replaced together."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from . import __version__
from .config import EASConfig, read_json
from .errors import ConfigError
from .masks import load_mask, read_origin, save_mask

if TYPE_CHECKING:
    from .model import EASModel

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE, MASK_FILE = "adapter_config.json", "adapter_model.safetensors", "mask.json"
# keys of adapter_config.json that are about the file and the base model, not settings of the adapters
ABOUT = (
    "peft_type",
    "format",
    "eas_kit_version",
    "base_model_name_or_path",
    "base_model_class",
    "revision",
    "num_sites",
    "hidden_size",
)


def base_name(base: nn.Module) -> str | None:
    """What the base model was loaded from: the name of a bundled model, a folder (absolute), or a hub id."""
    from .models import BUNDLED

    name = getattr(base, "name_or_path", None)
    if not name:
        return None
    return str(Path(name).resolve()) if name not in BUNDLED and Path(name).is_dir() else str(name)


def save_adapters(net: EASModel, folder: Path) -> None:
    """Write the three files into a temporary folder beside `folder`, then rename: never old and new files mixed.

    What else an existing `folder` holds is kept. If the second of the two renames fails, the old folder comes back.
    """
    base = net.base
    about = {
        "peft_type": "EAS",
        "format": FORMAT,
        "eas_kit_version": __version__,
        "base_model_name_or_path": base_name(base),
        "base_model_class": type(base).__name__,
        "revision": getattr(base.config, "_commit_hash", None),
        "num_sites": net.num_sites,
        "hidden_size": net.sites[0].hidden_size,
    }
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"save_pretrained: wanted a folder, {folder} is a file")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (temporary / CONFIG_FILE).write_text(json.dumps(about | net.config.to_dict(), indent=2) + "\n")
        tensors = {name: value.detach().contiguous().cpu() for name, value in net.adapters.state_dict().items()}
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        kind = "+".join(net.config.kinds)
        about_mask = {"num_sites": net.num_sites, "kind": kind, "model": base_name(base)}
        save_mask(temporary / MASK_FILE, net.mask, **about_mask, **net.mask_origin)
        _swap(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`, which may exist; what only the old folder held moves over."""
    new.chmod(folder.stat().st_mode if folder.exists() else 0o755)
    if not folder.exists():
        new.rename(folder)
        return
    old = new.with_name(new.name + ".old")
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    for file in list(old.iterdir()):
        if not (folder / file.name).exists():
            file.rename(folder / file.name)
    shutil.rmtree(old, ignore_errors=True)


def load_adapters(cls: type[EASModel], folder: Path, base: nn.Module | None, kwargs: dict[str, Any]) -> EASModel:
    """See `eas_kit.load`."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE, MASK_FILE) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"load: {folder} has no {', '.join(missing)}; wanted a folder of net.save_pretrained")
    about = read_json(folder / CONFIG_FILE, what="load")
    if about.get("peft_type") != "EAS" or about.get("format", 0) > FORMAT:
        raise ConfigError(
            f"load: {folder / CONFIG_FILE} has peft_type {about.get('peft_type')!r}, format {about.get('format')!r};"
            f" wanted 'EAS' and at most {FORMAT}: load other adapters with peft, newer ones with a newer eas_kit"
        )
    config = EASConfig.from_dict(about, ignore=ABOUT)
    if base is None:
        base = _load_base(about, folder, kwargs)
    net = cls(base, config)
    try:
        _fill(net, about, folder)
    except BaseException:
        net.detach()  # the caller's base model comes back untouched
        raise
    return net


def _load_base(about: dict[str, Any], folder: Path, kwargs: dict[str, Any]) -> nn.Module:
    name = about.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"load: {folder} does not name its base model; pass it as eas_kit.load(folder, base=model)")
    from .models import load_model

    if about.get("revision"):
        kwargs = {"revision": about["revision"]} | kwargs
    base, _ = load_model(name, **kwargs)
    return base


def _fill(net: EASModel, about: dict[str, Any], folder: Path) -> None:
    for what, here in (("num_sites", net.num_sites), ("hidden_size", net.sites[0].hidden_size)):
        if about.get(what, here) != here:
            raise ConfigError(
                f"load: {folder} was made for {about.get('base_model_class')} with {what} {about[what]}, this base"
                f" model has {here}; pass the base it was attached to ({about.get('base_model_name_or_path')})"
            )
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
        net.adapters.load_state_dict(tensors, strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ConfigError(f"load: {folder / WEIGHTS_FILE} does not fit its {CONFIG_FILE}: {error}") from error
    net.mask = load_mask(folder / MASK_FILE, num_sites=net.num_sites)
    net.mask_origin = read_origin(folder / MASK_FILE)
