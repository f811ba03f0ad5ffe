"""Models without weights: built from a configuration on torch's meta device, where tensors have shapes and no data.

What does not depend on the values of weights can be read off such a model in a moment: sites, parameters, operations,
memory. A model of 7 billion parameters takes a twentieth of a second and a few MB.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ConfigError, EASError
from .sites import unwrap


def read_config(source: Any) -> Any:
    """A transformers config of one's own (a copy), from a config, a model, or a name.

    Names: a paper-size model (`eas_kit.models.paper_config`), a bundled model, or a local folder with a config.json;
    nothing is downloaded. Raises EASError for anything else.
    """
    from transformers import PreTrainedConfig

    from .models import BUNDLED, METER_SIZES, OWN, PAPER_SIZES, auto_config, is_own, load_base, paper_config

    if isinstance(source, PreTrainedConfig):
        return copy.deepcopy(source)
    if isinstance(source, nn.Module):
        return copy.deepcopy(unwrap(source).config)
    if not isinstance(source, str | Path):
        raise ConfigError(
            f"wanted a transformers config, a model, or a name or folder, got a {type(source).__name__};"
            " a dict of settings becomes a config with transformers.AutoConfig.for_model(model_type, **settings)"
        )
    if str(source) in {*PAPER_SIZES, *METER_SIZES}:
        return paper_config(str(source))
    if is_own(source):
        return copy.deepcopy(load_base(source).config)
    folder = BUNDLED.get(str(source), Path(source))
    if not (folder / "config.json").is_file():
        raise EASError(
            f"{str(source)!r} is neither a folder with a config.json nor one of {[*BUNDLED, *OWN, *PAPER_SIZES]};"
            " for a name on the hub, download its configuration first: transformers.AutoConfig.from_pretrained(name)"
        )
    config = auto_config(folder, local_files_only=True)
    if str(source) in BUNDLED:
        config.dtype = torch.float32  # as load_model loads it
    return config


def meta_model(source: Any, dtype: torch.dtype | str | None = None, attn_implementation: str = "sdpa") -> nn.Module:
    """The model that `source` (see `read_config`) describes, in eval mode on the meta device.

    It is built with its output head, by transformers' auto classes; for a model with the class of that model. `dtype`
    None: the configuration's own, else float32. Raises EASError for a quantised configuration, whose tensors only the
    quantiser knows, and for one that is no language model.
    """
    from .models import auto_class

    config = read_config(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            "the configuration is quantised, and only its quantiser knows what that takes; for the unquantised model"
            " delete config.quantization_config"
        )
    if isinstance(source, nn.Module):
        make = type(unwrap(source))._from_config
    else:
        name = source if isinstance(source, str) else type(config).__name__
        make = auto_class(name, config, {"trust_remote_code": False}).from_config
    with torch.device("meta"):
        model = make(config, dtype=as_dtype(dtype, config), attn_implementation=attn_implementation)
    return model.eval()


def as_dtype(dtype: torch.dtype | str | None, config: Any = None) -> torch.dtype:
    """A floating-point torch.dtype from itself or its name; None: the configuration's own, else float32."""
    found = getattr(config, "dtype", None) or torch.float32 if dtype is None else dtype
    found = getattr(torch, found, found) if isinstance(found, str) else found
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype: wanted a floating-point type such as 'bfloat16', got {dtype!r}")
    return found
