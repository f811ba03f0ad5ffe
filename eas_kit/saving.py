"""Adapters on disk: adapter_config.json, adapter_model.safetensors, mask.json and README.md, replaced together."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import InvalidVersion, Version
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from . import __version__
from .config import EASConfig, is_int, read_json
from .errors import ConfigError
from .hub import CARD_FILE, fetch, looks_like_path, make_card, may_replace
from .masks import read_mask, save_mask
from .trained_parts import PREFIX

if TYPE_CHECKING:
    from .model import EASModel

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE, MASK_FILE = FILES = ("adapter_config.json", "adapter_model.safetensors", "mask.json")
# keys of adapter_config.json that are about the file and the base model, not settings of the adapters
ABOUT = (
    "peft_type",
    "format",
    "eas_kit_version",
    "torch_version",
    "transformers_version",
    "base_model_name_or_path",
    "base_model_class",
    "base_model_dtype",
    "revision",
    "subfolder",
    "processor_class",
    "num_sites",
    "hidden_size",
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def base_name(base: nn.Module) -> str | None:
    """What the base model was loaded from: the name of a bundled model, a folder (absolute), or a hub id."""
    from .models import BUNDLED

    name = getattr(base, "name_or_path", None)
    if not name:
        return None
    folder = Path(name).expanduser()
    return str(folder.resolve()) if name not in BUNDLED and folder.is_dir() else str(name)


def _class_name(base: nn.Module) -> str:
    # fully_shard puts a class of its own, FSDP<name>, before the model's
    return next(c.__name__ for c in type(base).__mro__ if not c.__name__.startswith("FSDP"))


def _source(base: nn.Module) -> dict[str, Any]:
    """revision (commit), subfolder and processor_class, as far as they are known: `load_model` notes them."""
    noted = getattr(base, "eas_kit_source", {})
    commit = noted.get("revision") or getattr(getattr(base, "config", None), "_commit_hash", None)
    return {"revision": commit, "subfolder": noted.get("subfolder"), "processor_class": noted.get("processor_class")}


def describe_net(net: EASModel) -> dict[str, Any]:
    """What adapter_config.json says beside the settings of the adapters (the keys of `ABOUT`)."""
    import transformers

    base = net.base
    return {
        "peft_type": "EAS",
        "format": FORMAT,
        "eas_kit_version": __version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "base_model_name_or_path": base_name(base),
        "base_model_class": _class_name(base),
        "base_model_dtype": str(base.dtype).removeprefix("torch.") if hasattr(base, "dtype") else None,
        **_source(base),
        "num_sites": net.num_sites,
        "hidden_size": net.sites[0].hidden_size,
    }


def save_adapters(net: EASModel, folder: Path, repo_id: str | None = None) -> None:
    """Write the files into a temporary folder beside `folder`, then rename: never old and new files mixed.

    What else an existing `folder` holds is kept, and so is a README.md that eas_kit did not write or somebody edited.
    If the second of the two renames fails, the old folder comes back. With `repo_id`, the files are for that
    repository on the hub: they do not name a folder of this machine as the base model. Where the adapters are sharded
    (FSDP2), every process has to call this, and the first one writes.
    """
    about = describe_net(net)
    name = about["base_model_name_or_path"]
    if repo_id and name and Path(name).is_absolute():
        name = about["base_model_name_or_path"] = None
    parts = {PREFIX + name: value for name, value in net.trained_parts.tensors.items()}
    state = {name: value.detach() for name, value in (net.adapters.state_dict() | parts).items()}
    if any(isinstance(value, DTensor) for value in state.values()):
        state = {name: value.full_tensor() for name, value in state.items()}  # by all processes together
        if distributed.get_rank() != 0:
            return
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"save_pretrained: wanted a folder, {folder} is a file")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (temporary / CONFIG_FILE).write_text(json.dumps(about | net.config.to_dict(), indent=2) + "\n")
        tensors = {name: value.contiguous().cpu() for name, value in state.items()}
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        about_mask = {"num_sites": net.num_sites, "kind": "+".join(net.config.kinds), "model": name}
        save_mask(temporary / MASK_FILE, net.mask, **about_mask, **net.mask_origin)
        if may_replace(folder / CARD_FILE):
            (temporary / CARD_FILE).write_text(make_card(net, about, repo_id), encoding="utf-8")
        swap(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def swap(new: Path, folder: Path, *, keep: bool = True) -> None:
    """Put `new` in the place of `folder`, which may exist; with `keep` what only the old folder held moves over."""
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
        if keep and not (folder / file.name).exists():
            file.rename(folder / file.name)
    shutil.rmtree(old, ignore_errors=True)


@dataclass
class Saved:
    """A folder of `save_pretrained`, read and checked as far as it can be without a base model."""

    folder: Path
    about: dict[str, Any]
    config: EASConfig
    tensors: dict[str, Tensor]
    mask: dict[str, Any]
    newer: str
    """What to add to an error if a newer version wrote the folder, else empty."""

    def error(self, file: str, problem: str) -> ConfigError:
        return ConfigError(f"load: {self.folder / file} {problem}{self.newer}")


def load_adapters(cls: type[EASModel], source: str | Path, base: nn.Module | None, kwargs: dict[str, Any]) -> EASModel:
    """See `eas_kit.load`. Everything that can be is checked before a base model is loaded or touched."""
    kwargs = dict(kwargs)
    folder = Path(source).expanduser()
    shared = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in kwargs}
    if not folder.exists() and not looks_like_path(source):
        folder = fetch(source, FILES, **shared, revision=kwargs.pop("revision", None))
    elif not folder.exists():
        raise ConfigError(f"load: there is no such folder: {folder}; wanted one that net.save_pretrained wrote")
    if (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"load: {folder} holds a model and has no {CONFIG_FILE}; for a model: eas_kit.load_model. Wanted a folder"
            " of net.save_pretrained"
        )
    if base is not None and set(kwargs) - set(shared):
        raise ConfigError(
            f"load: {sorted(set(kwargs) - set(shared))} are for loading the base model, but base= is one already;"
            " give one or the other"
        )
    saved = read_saved(folder)
    base = _load_base(saved, kwargs) if base is None else base
    _check_base(saved, base)
    net = cls(base, saved.config)
    try:
        _fill(net, saved)
    except BaseException:
        net.detach()  # the caller's base model comes back untouched
        raise
    return net


def read_saved(folder: Path) -> Saved:
    """Read the three files. Raises ConfigError for one that is missing, damaged, or does not go with the others."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.ckpt") for file in folder.glob(kind))
        raise ConfigError(
            f"load: {folder} has no {', '.join(missing)}; wanted a folder of net.save_pretrained, all its files"
            + (f" ({', '.join(pickles)} will not do: adapters are read from safetensors alone)" if pickles else "")
        )
    about = read_json(folder / CONFIG_FILE, what="load")
    if about.get("peft_type") != "EAS" or not is_int(about.get("format"), 1):
        raise ConfigError(
            f"load: {folder / CONFIG_FILE} has peft_type {about.get('peft_type')!r}, format {about.get('format')!r};"
            " wanted 'EAS' and a whole number: load other adapters with peft"
        )
    newer = _warn_of_newer(folder, about)
    known = {key: about[key] for key in (field.name for field in fields(EASConfig)) if key in about}
    try:
        config = EASConfig(**known)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"load: {folder / CONFIG_FILE} has settings that do not fit: {error}{newer}") from error
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"load: {folder / WEIGHTS_FILE} is cut off, damaged, or no safetensors file ({error}); copy or save it"
            " again (pickles are not read)"
        ) from error
    saved = Saved(folder, about, config, tensors, read_mask(folder / MASK_FILE), newer)
    wanted = {"num_sites": about.get("num_sites"), "kind": "+".join(config.kinds)}
    for key, here in wanted.items():
        if saved.mask.get(key, here) != here:
            raise saved.error(MASK_FILE, f"has {key} {saved.mask[key]!r}, but {CONFIG_FILE} beside it {here!r}")
    return saved


def _warn_of_newer(folder: Path, about: dict[str, Any]) -> str:
    wrote, number = about.get("eas_kit_version"), about["format"]
    try:
        newer = number > FORMAT or Version(str(wrote)) > Version(__version__)
    except InvalidVersion:
        newer = True
    unknown = sorted(set(about) - set(ABOUT) - {field.name for field in fields(EASConfig)})
    if not newer and not unknown:
        return ""
    warnings.warn(
        f"load: {folder} was written by eas_kit {wrote} (format {number}), this is {__version__} (format {FORMAT});"
        f" ignoring what is unknown here: {', '.join(unknown) or 'nothing'}. Compare results, or update eas_kit",
        stacklevel=5,
    )
    return f"; it was written by eas_kit {wrote} (format {number}): update eas_kit"


def _load_base(saved: Saved, kwargs: dict[str, Any]) -> nn.Module:
    from .models import load_base

    about = saved.about
    name = about.get("base_model_name_or_path")
    if not name:
        raise ConfigError(
            f"load: {saved.folder} does not name its base model; pass it as eas_kit.load(folder, base=model)"
        )
    noted = {key: about[key] for key in ("revision", "subfolder") if about.get(key)}
    if about.get("base_model_dtype") and "torch_dtype" not in kwargs:
        noted["dtype"] = about["base_model_dtype"]  # else it could come in the type of its files, and answer otherwise
    base = load_base(name, **noted | kwargs)
    if hasattr(base, "eas_kit_source"):
        base.eas_kit_source["processor_class"] = about.get("processor_class")  # for when it is saved again
    return base


def _check_base(saved: Saved, base: nn.Module) -> None:
    wanted, here = saved.about.get("base_model_class"), _class_name(base)
    if wanted is not None and wanted != here:
        raise saved.error(
            CONFIG_FILE,
            f"says {wanted}, this base model is {here}; pass the base that the adapters were attached to"
            f" ({saved.about.get('base_model_name_or_path')}), or change base_model_class there if this is meant",
        )
    recorded, commit = saved.about.get("revision"), _source(base)["revision"]
    if recorded and commit and recorded != commit:
        warnings.warn(
            f"load: the adapters in {saved.folder} were trained on revision {recorded} of"
            f" {saved.about.get('base_model_name_or_path')}, this base model is revision {commit}; results can differ",
            stacklevel=4,
        )


def _fill(net: EASModel, saved: Saved) -> None:
    about = saved.about
    for what, here in (("num_sites", net.num_sites), ("hidden_size", net.sites[0].hidden_size)):
        if about.get(what, here) != here:
            raise ConfigError(
                f"load: {saved.folder} was made for {about.get('base_model_class')} with {what} {about[what]}, this"
                f" base model has {here}; pass the base it was attached to ({about.get('base_model_name_or_path')})"
            )
    parts = {PREFIX + name: tensor for name, tensor in net.trained_parts.tensors.items()}
    own = dict(net.adapters.named_parameters()) | parts
    problems = [f"{name} is missing" for name in own if name not in saved.tensors]
    unknown = [name for name in saved.tensors if name not in own] if saved.newer else []
    if unknown and not problems:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        warnings.warn(
            f"load: {saved.folder / WEIGHTS_FILE} has tensors that are unknown here, which are left out:"
            f" {', '.join(unknown[:3])}{more}; the adapters can answer otherwise{saved.newer}",
            stacklevel=4,
        )
    for name, tensor in saved.tensors.items():
        if name in unknown:
            continue
        if name not in own:
            problems.append(f"{name} is unknown")
        elif tensor.shape != own[name].shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, wanted {tuple(own[name].shape)}")
        elif tensor.dtype not in FLOATS and own[name].is_floating_point():
            problems.append(f"{name} has dtype {tensor.dtype}, wanted 16, 32 or 64 bits of floating point")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise saved.error(WEIGHTS_FILE, f"does not fit its {CONFIG_FILE}: {'; '.join(problems[:3])}{more}")
    for name, parameter in own.items():
        # in the type that was saved, parts of the base in the base's; a copy, for what load_file returns is the file
        # itself, mapped into memory
        dtype = parameter.dtype if name in parts else None
        parameter.data = saved.tensors[name].to(parameter.device, dtype, copy=True)
    net.mask = saved.mask["skipped"]
    net.mask_origin = {"made_by": saved.mask.get("made_by", "user"), "seed": saved.mask.get("seed")}
