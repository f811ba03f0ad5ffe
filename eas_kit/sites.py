"""Where a model's attentions and feed-forwards are, and whether they can be skipped exactly.

A *site* is one sub-module that can be skipped. A family of models is one row of `FAMILIES`: what its decoder layer
calls the four parts of x + Attention(norm(x)), x + FFN(norm(x)). What does not fit is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .config import KINDS
from .errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Names:
    """What one family calls the parts of its decoder layer."""

    norm_in: str = "input_layernorm"
    attention: str = "self_attn"
    norm_ffn: str = "post_attention_layernorm"
    ffn: str = "mlp"


# The first row that a layer has all of wins, so rows with rarer names come first.
FAMILIES: tuple[Names, ...] = (
    Names(norm_ffn="pre_feedforward_layernorm"),  # Gemma 2 and 3: a norm on either side of attention and FFN
    Names(),  # Llama, Mistral, Qwen, Phi-3, Gemma 1, ..., and the language model of LLaVA
    Names(ffn="feed_forward", norm_ffn="pre_ff_layernorm"),  # Jamba's attention layers
    Names(ffn="feed_forward"),  # Llama 4
    Names(norm_in="attention_layernorm", norm_ffn="feedforward_layernorm"),  # Apertus
)

# The linears that read the input of a feed-forward, or of an attention: the ones a merge rewrites.
FFN_READERS = (("gate_proj", "up_proj"), ("gate_up_proj",), ("up_proj",))
ATTENTION_READERS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))


@dataclass(frozen=True)
class Site:
    """One skippable sub-module. `index` is the number used in masks; `layer` counts decoder layers; both from 0."""

    index: int
    kind: str
    layer: int
    layer_idx: int
    """The layer's entry in the KV cache."""
    path: str
    """Module path of the sub-module, as in `model.get_submodule(path)`."""
    layer_path: str
    names: Names
    hidden_size: int
    gain_offset: float | None
    """g2 = weight + gain_offset of the norm before the FFN; None if that norm is more than a gain."""

    @property
    def slot(self) -> str:
        """Name of the sub-module inside its decoder layer."""
        return self.names.attention if self.kind == "mha" else self.names.ffn


def unwrap(model: nn.Module) -> nn.Module:
    """The plain transformers model inside an EASModel; any other model as it is."""
    return model.base if hasattr(model, "adapters") and isinstance(getattr(model, "base", None), nn.Module) else model


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Module path and list of the language model's decoder layers."""
    model = unwrap(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else getattr(model, "model", model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise UnsupportedModelError(
            f"{type(model).__name__}: wanted a decoder with a list `layers`, found none; eas_kit works on decoder-only"
            " language models of transformers and on multimodal models built around one"
        )
    path = next(name for name, module in model.named_modules() if module is layers)
    return path, layers


def layer_names(layer: nn.Module) -> Names:
    """The row of FAMILIES that fits the layer; UnsupportedModelError if none does."""
    for names in FAMILIES:
        if all(isinstance(getattr(layer, part, None), nn.Module) for part in astuple(names)):
            return names
    parts = ", ".join(name for name, _ in layer.named_children())
    raise UnsupportedModelError(
        f"{type(layer).__name__}: wanted a norm, an attention, a second norm and a feed-forward one after the other,"
        f" with names eas_kit knows; it has {parts}. Layers that are parallel, have norms only after their parts, or"
        " use no attention cannot be skipped this way; for new names add a row to eas_kit.sites.FAMILIES"
    )


def gain_offset(norm: nn.Module) -> float | None:
    """0.0 if norm(x) = weight * normalise(x), 1.0 if (1 + weight) * normalise(x), None if it is anything else.

    Read off by running a small copy of the norm, so no family needs a name here and no weight is needed either.
    """
    weight = getattr(norm, "weight", None)
    if weight is None or weight.dim() != 1 or getattr(norm, "bias", None) is not None:
        return None
    probe = copy.copy(norm)
    probe._parameters = {"weight": nn.Parameter(torch.full((weight.numel(),), 0.25), requires_grad=False)}
    try:
        # the class's forward: accelerate puts another one on the instance, bound to the real weights
        seen = type(norm).forward(probe, torch.ones(1, weight.numel()))
    except Exception:
        return None
    for offset in (0.0, 1.0):
        if torch.allclose(seen, torch.full_like(seen, 0.25 + offset), rtol=1e-2):
            return offset
    return None


def find_sites(model: nn.Module, kinds: tuple[str, ...] = ("mha",)) -> list[Site]:
    """All sites of the model, kind after kind in the order of `kinds`, layer after layer within a kind.

    With L layers and kinds ("mha", "ffn"), sites 0..L-1 are the attentions and L..2L-1 the feed-forwards.
    Raises UnsupportedModelError for a model whose layers do not fit, ConfigError for an unknown kind.
    """
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not kinds or not set(kinds) <= set(KINDS):
        raise ConfigError(f"kinds: wanted some of {KINDS}, got {kinds!r}")
    path, layers = decoder_layers(model)
    sites, offsets = [], {}
    for kind in kinds:
        for number, layer in enumerate(layers):
            names = layer_names(layer)
            norm = getattr(layer, names.norm_ffn)
            norm = getattr(norm, "original", norm)  # below a stand-in
            if type(norm) not in offsets:
                offsets[type(norm)] = gain_offset(norm)
            slot = names.attention if kind == "mha" else names.ffn
            weight = getattr(getattr(layer, names.norm_in), "weight", None)
            sites.append(
                Site(
                    index=len(sites),
                    kind=kind,
                    layer=number,
                    layer_idx=getattr(getattr(layer, names.attention), "layer_idx", number),
                    path=f"{path}.{number}.{slot}",
                    layer_path=f"{path}.{number}",
                    names=names,
                    hidden_size=weight.numel() if weight is not None else model.config.get_text_config().hidden_size,
                    gain_offset=offsets[type(norm)],
                )
            )
    return sites


def readers(module: nn.Module, table: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """Names of the linears of `module` that read its input; UnsupportedModelError saying why one cannot be changed."""
    kind = type(getattr(module, "original", module)).__name__
    for names in table:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            break
    else:
        raise UnsupportedModelError(f"{kind} has none of {[list(names) for names in table]}")
    for name in names:
        linear = getattr(module, name)
        if type(linear) is not nn.Linear:
            found = f"{type(linear).__module__}.{type(linear).__name__}"
            raise UnsupportedModelError(
                f"{kind}.{name} is a {found}, not a plain nn.Linear; merge needs plain weights: load the model"
                " unquantised, unload other adapters, or run unmerged"
            )
        weight = linear.weight
        if weight.is_meta or not weight.is_floating_point() or type(weight.data) is not torch.Tensor:
            where = "on the meta device (offloaded?)" if weight.is_meta else f"a {type(weight.data).__name__}"
            raise UnsupportedModelError(
                f"{kind}.{name}.weight ({weight.dtype}) is {where}; merge needs a whole floating-point weight in memory"
            )
    return names


def merge_problem(model: nn.Module, site: Site) -> str:
    """Why the adapters at this site cannot be folded into weights; "" if they can."""
    if site.kind == "ffn":
        return "a skipped feed-forward leaves no linear to fold its adapter into"
    if site.gain_offset is None:
        return f"{site.names.norm_ffn} is not a plain gain"
    layer = unwrap(model).get_submodule(site.layer_path)
    try:
        readers(getattr(layer, site.names.ffn), FFN_READERS)
        readers(getattr(layer, site.names.attention), ATTENTION_READERS)
    except UnsupportedModelError as error:
        return str(error)
    return ""


def _rows(model: nn.Module, kinds: tuple[str, ...]) -> Iterator[dict]:
    plain = unwrap(model)
    for site in find_sites(plain, kinds):
        layer = plain.get_submodule(site.layer_path)
        norm, ffn = getattr(layer, site.names.norm_ffn), getattr(layer, site.names.ffn)
        reason = merge_problem(plain, site)
        yield {
            "site": site.index,
            "path": site.path,
            "kind": site.kind,
            "norm": type(getattr(norm, "original", norm)).__name__,
            "ffn": type(getattr(ffn, "original", ffn)).__name__,
            "params": sum(p.numel() for p in plain.get_submodule(site.path).parameters()),
            "mergeable": reason == "",
            "reason": reason,
        }


def describe(model: nn.Module, kinds: tuple[str, ...] = ("mha",)) -> pandas.DataFrame:
    """One row a site: site, path, kind, norm, ffn, params, mergeable, reason."""
    import pandas

    return pandas.DataFrame(list(_rows(model, kinds)))
