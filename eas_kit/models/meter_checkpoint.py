"""The published METER checkpoint (`meter_clip16_288_roberta_pretrain.ckpt`), name by name.

A Lightning file: `state_dict` holds OpenAI's CLIP visual tower as `vit_model.*`, RoBERTa of transformers as
`text_transformer.*`, and `cross_modal_{text,image}_{transform,layers,pooler}.*`, `token_type_embeddings`, heads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor
from torch.nn import functional as F

from eas_kit.errors import EASError

from .meter import Meter

SHOWN = 8
# names there -> names here; the rest of a name stays
_RENAMED = (
    (r"text_transformer\.(?!pooler)", "text."),
    (r"cross_modal_(text|image)_transform\.", r"\1_transform."),
    (r"cross_modal_(text|image)_layers\.", r"\1_layers."),
    (r"cross_modal_(text|image)_pooler\.dense\.", r"\1_pooler."),
    (r"token_type_embeddings\.", "token_type."),
)
_VISUAL = (
    (r"class_embedding$", "embeddings.class_embedding"),
    (r"positional_embedding$", "embeddings.position_embedding.weight"),
    (r"conv1\.weight$", "embeddings.patch_embedding.weight"),
    (r"ln_pre\.", "pre_layrnorm."),
    (r"ln_post\.", "post_layernorm."),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"encoder.layers.\1.self_attn.in_proj."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
)
_HEADS = {"vqa_classifier": "vqa", "nlvr2_classifier": "nlvr2", "rank_output": "retrieval"}
# of use in pretraining alone, or not of the visual tower
_UNUSED = ("mlm_score.", "itm_score.", "text_transformer.pooler.", "vit_model.visual.proj", "vit_model.proj")


@dataclass
class CheckpointReport:
    """What became of a checkpoint's names. `new`: parameters that it does not hold and that were drawn (the head)."""

    loaded: int = 0
    new: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    """Known, and not needed here: heads of pretraining and of other tasks, CLIP's last block and its text side."""
    misfits: list[str] = field(default_factory=list)
    """Names with shapes that differ."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The `state_dict` of a Lightning file, or the tensors of a plain one. Nothing that a pickle says is run.

    Raises EASError for a file that is not there, broken, holds more than tensors and plain values, or no tensors.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise EASError(f"METER: there is no checkpoint {file}; give checkpoint= the path of the .ckpt file")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EASError(
            f"METER: {file} cannot be read with weights_only=True ({reason}). If it is whole, it holds objects beside"
            " its tensors, which would be run: open it once where you trust it, and save its tensors alone:"
            " torch.save({'state_dict': torch.load(file, weights_only=False)['state_dict']}, new_file)"
        ) from error
    state = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise EASError(f"METER: {file} holds no state_dict of tensors; wanted a Lightning checkpoint of METER")
    return tensors


def fill(model: Meter, state: dict[str, Tensor]) -> CheckpointReport:
    """Load the tensors of a checkpoint into `model`, in its dtype; the head too where the checkpoint has this task's.

    Position embeddings of another number of patches are resized bicubically; a third token type starts as the second;
    a retrieval head that the checkpoint lacks starts as the matching row of its `itm_score`. Raises EASError, listing
    the names, where tensors are missing or have other shapes; the model is then as it was.
    """
    report, wanted = CheckpointReport(), model.state_dict()
    found = _renamed(state, model, report)
    _fit(found, model, state)
    report.unexpected += [name for name in found if name not in wanted]
    for name, tensor in wanted.items():
        if name not in found:
            (report.new if name.startswith("head.") else report.missing).append(name)
        elif found[name].shape != tensor.shape:
            report.misfits.append(f"{name} {tuple(found[name].shape)}, wanted {tuple(tensor.shape)}")
    report.loaded = len(wanted) - len(report.new) - len(report.missing) - len(report.misfits)
    if report.missing or report.misfits:
        raise EASError(
            f"METER: the checkpoint does not fit: {_listed('missing', report.missing)}"
            f"{_listed('of another shape', report.misfits)}{_listed('unexpected', report.unexpected)}"
            "wanted the layout of meter_clip16_288_roberta_pretrain.ckpt (config= for other sizes)"
        )
    model.load_state_dict({name: found[name] for name in wanted if name in found}, strict=False)
    return report


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:SHOWN])}{more}); " if names else ""


def _renamed(state: dict[str, Tensor], model: Meter, report: CheckpointReport) -> dict[str, Tensor]:
    """The checkpoint's tensors under the names of `model`; what is not needed goes into the report."""
    visual = "vit_model.visual." if any(name.startswith("vit_model.visual.") for name in state) else "vit_model."
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(_UNUSED) or name.endswith("embeddings.position_ids"):
            report.unused.append(name)
        elif name.startswith("vit_model."):
            own = _first(_VISUAL, name.removeprefix(visual)) if name.startswith(visual) else None
            block = re.match(r"encoder\.layers\.(\d+)\.", own or "")
            if own is None and not name.startswith(visual):
                report.unused.append(name)  # CLIP's text side
            elif own is None:
                report.unexpected.append(name)
            elif block and int(block[1]) >= model.config.vision_config.num_hidden_layers:
                report.unused.append(name)  # METER leaves out the last block
            else:
                _take_visual(found, f"vision.{own}", tensor)
        elif name.split(".")[0] in _HEADS:
            head, _, rest = name.partition(".")
            mine = _HEADS[head] == model.config.task
            fits = mine and model.state_dict().get(f"head.{rest}", tensor.new_empty(0)).shape == tensor.shape
            if fits:
                found[f"head.{rest}"] = tensor
            else:
                report.unused.append(name)
        else:
            own = _first(_RENAMED, name)
            if own is None:
                report.unexpected.append(name)
            else:
                found[own] = tensor
    return found


def _first(table: tuple[tuple[str, str], ...], name: str) -> str | None:
    for pattern, ours in table:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", ours, name)
    return None


def _take_visual(found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """OpenAI's CLIP keeps query, key and value in one matrix."""
    if ".in_proj." not in name:
        found[name] = tensor
        return
    for part, piece in zip("qkv", tensor.chunk(3), strict=True):
        found[name.replace("in_proj.", f"{part}_proj.")] = piece


def _fit(found: dict[str, Tensor], model: Meter, state: dict[str, Tensor]) -> None:
    """Tensors that are made from those of the checkpoint."""
    config = model.config.vision_config
    positions = found.get("vision.embeddings.position_embedding.weight")
    if positions is not None and positions.dim() == 2:
        side = config.image_size // config.patch_size
        found["vision.embeddings.position_embedding.weight"] = resize_positions(positions, side)
    types = found.get("token_type.weight")
    if types is not None and len(types) == 2 and model.config.task == "nlvr2":
        found["token_type.weight"] = torch.cat([types, types[1:]])
    matching = state.get("itm_score.fc.weight"), state.get("itm_score.fc.bias")
    if model.config.task == "retrieval" and "head.weight" not in found and None not in matching:
        for name, value in zip(("head.weight", "head.bias"), matching, strict=True):
            found[name] = value[1:]


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """(1 + side^2, d) from (1 + n^2, d): the class token's as it is, the patches' resized bicubically."""
    own = round((len(positions) - 1) ** 0.5)
    if own * own + 1 != len(positions):
        raise EASError(
            f"METER: wanted position embeddings of a class token and a square of patches, got {len(positions)}"
        )
    if own == side:
        return positions
    wide = positions[1:].to(torch.promote_types(positions.dtype, torch.float32))
    grid = wide.view(1, own, own, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].T.to(positions.dtype)])
