"""Checkpoints of a static merge for everyone else: stock transformers, and engines that know layers without attention.

- `"llama"`: a stock Llama (also inside of LLaVA and its kin) that computes the merged model exactly. A skipped layer's
  attention is there with zero weights, so it costs time as before; the norm before the feed-forward takes the gain of
  the norm before the attention, and the feed-forward the folded weights with a bias. Loads with `from_pretrained`.
- `"nemotron-nas"`: `block_configs` with `no_op` attention, the format of NVIDIA's Nemotron-NAS models (DeciLM), which
  vLLM, SGLang, TensorRT-LLM and mlx-lm have model files for. A skipped layer has no attention at all: no weights, no
  keys and values, no time. The language model only. No engine runs in this project's tests: they read the checkpoint
  with an independent reader of the format. No library knows the model_type, so a small configuration class lies beside
  config.json: `AutoConfig.from_pretrained(folder, trust_remote_code=True)`, and `--trust-remote-code` for engines.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import read_json
from .errors import ConfigError, UnsupportedModelError
from .saving import swap
from .sites import decoder_layers

if TYPE_CHECKING:
    from .static import StaticMerge

# Text models that compute what a Llama computes, once biases are written out, and what must not be set for that.
LLAMA_ALIKE: dict[str, Callable[[Any], bool]] = {
    "llama": lambda config: True,
    "mistral": lambda config: getattr(config, "sliding_window", None) is None,
    "qwen2": lambda config: not getattr(config, "use_sliding_window", False),
}
SHARED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("tie_word_embeddings", "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"),
)
REPORT_FILE = "eas_export.json"


def export(
    static: StaticMerge,
    folder: str | Path,
    format: str = "llama",
    processor: Any = None,
    *,
    language_model_only: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write `static` to a new or empty `folder`: config, safetensors, and the processor or tokenizer if given.

    `eas_export.json` beside them says what was exported and what averaging cost. `language_model_only`: allow
    "nemotron-nas" for a multimodal model, whose vision parts are then left out. `overwrite`: replace an earlier export
    in that folder, and all else that is in it. Everything is written into a temporary folder beside `folder` first, so
    an export that fails leaves no trace and no earlier export is lost by it. Raises UnsupportedModelError where the
    format cannot express the model exactly, ConfigError for an unknown format or a folder that holds something,
    MergeError if the net's mask or adapters are not those of the merge any more. Warns of sizes that some engines do
    not read from "nemotron-nas".
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise ConfigError(f"export: wanted format one of {sorted(FORMATS)}, got {format!r}")
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (overwrite and (folder / REPORT_FILE).is_file()):
        raise ConfigError(
            f"export: wanted a new or empty folder, {folder} is not; name another, or pass overwrite=True to replace an"
            " earlier export"
        )
    net = static.net
    net._check_usable("export")
    static.check_fresh()
    text = net.base.config.get_text_config(decoder=True)
    if not LLAMA_ALIKE.get(text.model_type, lambda config: False)(text):
        raise UnsupportedModelError(
            f"export: {text.model_type} ({type(net.base).__name__}) does not compute what a Llama computes"
            f" (known to: {', '.join(LLAMA_ALIKE)} without sliding windows), and the formats hold Llamas;"
            " serve it with eas_kit, by `with static: net.generate(...)`"
        )
    about = {
        "format": format,
        "base_model": getattr(net.base, "name_or_path", None),
        "skipped": list(static.mask),
        "calibration": static.calibration,
        "report": static.report,
    }
    place = folder.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        FORMATS[format](static, temporary, text, language_model_only)
        if processor is not None:
            processor.save_pretrained(temporary)
        (temporary / REPORT_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        swap(temporary, place, keep=False)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _folded_state(static: StaticMerge) -> tuple[dict[str, Tensor], str]:
    """The base model's state dict with folded linears and all biases written out, and the path of its layers."""
    base = static.net.base
    state = dict(base.state_dict())
    path, layers = decoder_layers(base)
    for number, layer in enumerate(layers):
        for part, names in (("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")), ("mlp", ("gate_proj", "up_proj"))):
            for name in names:
                weight = getattr(getattr(layer, part), name).weight
                state.setdefault(f"{path}.{number}.{part}.{name}.bias", weight.new_zeros(len(weight)))
        down = layer.mlp.down_proj.weight
        state.setdefault(f"{path}.{number}.mlp.down_proj.bias", down.new_zeros(len(down)))
    for name, weight, bias in static.folded():
        state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias
    for site in static.net.sites:
        if site.index in static.mask and static.net.config.source == "attention_norm":
            # the feed-forward reads LN1(x): its norm's gain is in the weights, and the norm takes LN1's place
            norm_in, norm_ffn = (
                f"{site.layer_path}.{name}.weight" for name in (site.names.norm_in, site.names.norm_ffn)
            )
            state[norm_ffn] = state[norm_in].clone()
    return state, path


def _skipped_layers(static: StaticMerge) -> list[int]:
    return [site.layer for site in static.net.sites if site.index in static.mask]


def _llama(static: StaticMerge, folder: Path, text: Any, language_model_only: bool) -> None:
    from transformers import LlamaConfig

    base = static.net.base
    values = {name: getattr(text, name) for name in SHARED_FIELDS if hasattr(text, name)}
    llama = LlamaConfig(**values, attention_bias=True, mlp_bias=True, dtype=text.dtype)
    config = copy.deepcopy(base.config)
    if config.get_text_config(decoder=True) is config:
        from transformers import LlamaForCausalLM

        config, cls = llama, LlamaForCausalLM
    else:
        name = next(key for key in config.sub_configs if getattr(config, key).model_type == text.model_type)
        setattr(config, name, llama)
        cls = type(base)
    with torch.device("meta"):
        stock = cls(config)
    decoder = stock.get_decoder()
    if type(decoder).__name__ != "LlamaModel":
        raise UnsupportedModelError(
            f"export: {cls.__name__} builds its own {type(decoder).__name__}, so a Llama cannot take its place;"
            " serve it with eas_kit, by `with static: net.generate(...)`"
        )
    state, path = _folded_state(static)
    for number in _skipped_layers(static):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            for tensor in (f"{path}.{number}.self_attn.{name}.{kind}" for kind in ("weight", "bias")):
                state[tensor] = torch.zeros_like(state[tensor])
    stock.load_state_dict(state, strict=True, assign=True)
    stock.tie_weights()
    stock.generation_config = base.generation_config
    stock.save_pretrained(folder)


def _nemotron_nas(static: StaticMerge, folder: Path, text: Any, language_model_only: bool) -> None:
    from huggingface_hub import save_torch_state_dict

    base = static.net.base
    if base.config.get_text_config(decoder=True) is not base.config and not language_model_only:
        raise UnsupportedModelError(
            f"export: {type(base).__name__} reads images, and nemotron-nas holds a language model only; pass"
            ' language_model_only=True to leave the vision parts out, or use format="llama"'
        )
    skipped = _skipped_layers(static)
    if 0 in skipped:
        raise UnsupportedModelError(
            "export: engines that read nemotron-nas need an attention in layer 0 (vLLM fuses the first norm with the"
            f' residual that it starts), and the mask skips it: {skipped}; choose a mask without it, or format="llama"'
        )
    _warn_of_sizes(text)
    state, path = _folded_state(static)
    decoder_path = path.rpartition(".")[0]
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(f"{decoder_path}."):
            continue
        short = name.removeprefix(f"{decoder_path}.")
        number = int(short.split(".")[1]) if short.startswith("layers.") else None
        if number in skipped and short.split(".")[2] in ("self_attn", "input_layernorm"):
            continue
        out[f"model.{short}"] = tensor
    head, embeddings = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    tied = head is embeddings
    if not tied:
        out["lm_head.weight"] = head
    save_torch_state_dict({name: tensor.detach().contiguous() for name, tensor in out.items()}, folder)
    shutil.copy(Path(__file__).with_name("configuration_decilm.py"), folder)
    (folder / "config.json").write_text(json.dumps(_nas_config(text, skipped, base.dtype, tied), indent=2) + "\n")
    base.generation_config.save_pretrained(folder)


def _warn_of_sizes(text: Any) -> None:
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    odd = []
    if head_dim * text.num_attention_heads != text.hidden_size:
        odd.append(f"heads of {head_dim} x {text.num_attention_heads} that are not the width {text.hidden_size}")
    if text.intermediate_size % 256:
        odd.append(f"a feed-forward of {text.intermediate_size}, no multiple of 256")
    if odd:
        warnings.warn(
            f"export: this model has {' and '.join(odd)}; nemotron-nas can say so, but some engines (mlx-lm) do not"
            ' read it: try yours, or use format="llama"',
            stacklevel=5,
        )


def _nas_config(text: Any, skipped: list[int], dtype: torch.dtype, tied: bool) -> dict[str, Any]:
    rope = dict(getattr(text, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    feed_forward: dict[str, Any] = {"no_op": False, "replace_with_linear": False, "sparsify": None}
    if text.intermediate_size % 256 == 0:
        # engines recover the size as a multiple of 256 from ffn_mult, rounding up; 128 below is safe from rounding
        feed_forward["ffn_mult"] = round(1.5 * (text.intermediate_size - 128) / text.hidden_size, 6)
    else:
        feed_forward["intermediate_size"] = text.intermediate_size
    attention = {"replace_with_linear": False, "sparsify": None}
    group = text.num_attention_heads // text.num_key_value_heads
    blocks = [
        {
            "attention": attention
            | {"no_op": number in skipped, "n_heads_in_group": None if number in skipped else group},
            "ffn": feed_forward,
        }
        for number in range(text.num_hidden_layers)
    ]
    fields = {
        name: getattr(text, name) for name in SHARED_FIELDS if hasattr(text, name) and name != "num_key_value_heads"
    }
    return fields | {
        "tie_word_embeddings": tied,
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "block_configs": blocks,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": rope,
        "rope_theta": rope.get("rope_theta", 10000.0),  # what readers before rope_parameters look for
        "rope_scaling": None if kind == "default" else {k: v for k, v in rope.items() if k != "rope_theta"},
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


FORMATS: dict[str, Callable[..., None]] = {"llama": _llama, "nemotron-nas": _nemotron_nas}


def read_report(folder: str | Path) -> dict[str, Any]:
    """What was exported to `folder`: format, base_model, skipped, calibration, report."""
    return read_json(Path(folder) / REPORT_FILE, what="export")
