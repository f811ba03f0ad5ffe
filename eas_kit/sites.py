"""Where a model's attentions and feed-forwards are, and whether they can be skipped exactly.

A *site* is one sub-module that can be skipped. `families.py` says what a family calls the parts of its layers, and
`rehearsal.py` tries whether a layer puts them together as the names promise. A layer that does not fit is left out,
with the reason in `describe`; a model in which no layer fits is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import nn

from .config import KINDS, EASConfig
from .errors import ConfigError, UnsupportedModelError
from .families import ATTENTION_READERS, FFN_READERS, LAYER_LISTS, Names, gain_offset, layer_names, readers
from .rehearsal import rehearse

if TYPE_CHECKING:
    import pandas


LEAVE_NO_LINEAR = {"ffn": "feed-forward", "layer": "layer"}


@dataclass(frozen=True)
class Site:
    """One skippable sub-module; of kind "layer" a whole decoder layer.

    `index` is the number used in masks; `layer` counts decoder layers; both from 0.
    """

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
    """The norm before the FFN multiplies by weight + gain_offset and adds its bias; None if it does anything else."""

    returns_tuple: bool = False
    """The layer takes (output, something) from its feed-forward, not an output alone."""

    unmergeable: ClassVar[str] = ""
    """Why no adapter at a site of this class can ever be folded into weights; "" where that depends on the layer."""

    def check_config(self, config: EASConfig) -> None:
        """Raises UnsupportedModelError where adapters of these settings cannot stand in exactly."""
        if self.kind == "mha" and self.gain_offset is None and config.source == "attention_norm":
            raise UnsupportedModelError(
                f"{self.layer_path}.{self.names.norm_ffn} is more than a gain and a bias, so PIA(LN1(x)) cannot take"
                ' its place exactly; use EASConfig(source="ffn_norm")'
            )

    @property
    def slot(self) -> str:
        """Name of the sub-module inside its decoder layer."""
        return self.names.ffn if self.kind == "ffn" else self.names.attention

    @property
    def ffn_path(self) -> str:
        """Module path of the layer's feed-forward, whatever the kind of site."""
        return f"{self.layer_path}.{self.names.ffn}"


def unwrap(model: nn.Module) -> nn.Module:
    """The plain transformers model inside an EASModel; any other model as it is."""
    return model.base if hasattr(model, "adapters") and isinstance(getattr(model, "base", None), nn.Module) else model


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Module path and list of the language model's decoder layers."""
    model = unwrap(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for holder in (decoder, getattr(decoder, "model", None)):  # Llama 4's text model calls itself its decoder
        for name in LAYER_LISTS:
            layers = getattr(holder, name, None)
            if isinstance(layers, nn.ModuleList) and len(layers):
                return next(path for path, module in model.named_modules() if module is layers), layers
    raise UnsupportedModelError(
        f"{type(model).__name__}: wanted a decoder with a list of {' or '.join(LAYER_LISTS)}, found none; eas_kit works"
        " on decoder-only language models of transformers and on multimodal models built around one"
    )


class _Fit(NamedTuple):
    """A layer that has sites."""

    names: Names
    width: int
    returns_tuple: bool


def _fit_or_reason(config: Any, layer: nn.Module, number: int) -> _Fit | str:
    try:
        names = layer_names(layer)
        weight = getattr(getattr(layer, names.norm_in), "weight", None)
        width = weight.numel() if weight is not None else config.hidden_size
        fit = _Fit(names, width, rehearse(layer, names, width))
    except UnsupportedModelError as error:
        return str(error)
    sharing = getattr(config, "kv_sharing_modes", None)
    if sharing and sharing[number] is not None:
        return (
            f"{type(layer).__name__}: the keys and values of this layer are shared with other layers"
            f" ({sharing[number]!r}), which a skipped attention would leave without"
        )
    return fit


def _survey(model: nn.Module) -> tuple[str, list[tuple[int, nn.Module, _Fit | str]]]:
    """Path of the list of layers; number, layer, and how it fits or the reason why it has no sites."""
    path, layers = decoder_layers(model)
    config = getattr(unwrap(model), "config", None)
    config = config.get_text_config(decoder=True) if config is not None else None
    found = [(number, layer, _fit_or_reason(config, layer, number)) for number, layer in enumerate(layers)]
    if all(isinstance(fit, str) for *_, fit in found):
        raise UnsupportedModelError(found[0][2])
    for _, layer, _ in found:
        crossing = [name for name, _ in layer.named_children() if "cross" in name]
        if crossing:
            raise UnsupportedModelError(
                f"{type(layer).__name__} has {crossing[0]}: this model reads pictures through cross-attention layers,"
                " which keep the picture's keys in the same KV cache that tells how long the text is; with an attention"
                " skipped it would be told wrongly. Models that put the picture's tokens into the text work (Llava,"
                " Qwen-VL, ...)"
            )
    return path, found


def names_its_sites(model: nn.Module) -> bool:
    """True for a model that says itself where its sites are: it has no decoder that could be surveyed."""
    return hasattr(unwrap(model), "eas_sites")


def find_sites(model: nn.Module, kinds: tuple[str, ...] = ("mha",)) -> list[Site]:
    """All sites of the model, kind after kind in the order of `kinds`, layer after layer within a kind.

    With L layers and kinds ("mha", "ffn"), sites 0..L-1 are the attentions and L..2L-1 the feed-forwards; of kind
    "layer" a site is both together. Layers that do not fit (linear attention, convolution, cross-attention) have no
    sites and no numbers; `describe` lists them. A model that has a method `eas_sites(kinds)` names them itself
    (`post_norm.py`). Raises UnsupportedModelError for a model in which no layer fits, ConfigError for an unknown kind.
    """
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not kinds or not set(kinds) <= set(KINDS):
        raise ConfigError(f"kinds: wanted some of {KINDS}, got {kinds!r}")
    if names_its_sites(model):
        return unwrap(model).eas_sites(kinds)
    path, layers = _survey(model)
    sites: list[Site] = []
    offsets: dict[type, float | None] = {}
    for kind in kinds:
        for number, layer, fit in layers:
            if isinstance(fit, str):
                continue
            names, width, returns_tuple = fit
            offset = 0.0  # a parallel layer has nothing in between
            if names.norm_ffn is not None:
                norm = getattr(layer, names.norm_ffn)
                norm = getattr(norm, "original", norm)  # below a stand-in
                if type(norm) not in offsets:
                    offsets[type(norm)] = gain_offset(norm, width)
                offset = offsets[type(norm)]
            own = {"mha": f".{names.attention}", "ffn": f".{names.ffn}", "layer": ""}[kind]
            sites.append(
                Site(
                    index=len(sites),
                    kind=kind,
                    layer=number,
                    layer_idx=getattr(getattr(layer, names.attention), "layer_idx", number),
                    path=f"{path}.{number}{own}",
                    layer_path=f"{path}.{number}",
                    names=names,
                    hidden_size=width,
                    gain_offset=offset,
                    returns_tuple=returns_tuple,
                )
            )
    return sites


def merge_problem(model: nn.Module, site: Site, *, data: bool = True) -> str:
    """Why the adapters at this site cannot be folded into weights; "" if they can. `data` as in `readers`."""
    if site.unmergeable:
        return site.unmergeable
    if site.kind in LEAVE_NO_LINEAR:
        return f"a skipped {LEAVE_NO_LINEAR[site.kind]} leaves no linear to fold its adapter into"
    if site.gain_offset is None:
        return f"{site.names.norm_ffn} is more than a gain and a bias"
    layer = unwrap(model).get_submodule(site.layer_path)
    try:
        readers(getattr(layer, site.names.ffn), FFN_READERS, data=data)
        readers(getattr(layer, site.names.attention), ATTENTION_READERS, data=data)
    except UnsupportedModelError as error:
        return str(error)
    return ""


def _rows(model: nn.Module, kinds: tuple[str, ...], data: bool) -> Iterator[dict[str, Any]]:
    plain = unwrap(model)
    if names_its_sites(plain):
        yield from (site.row(plain) for site in find_sites(plain, kinds))
        return
    for site in find_sites(plain, kinds):
        layer = plain.get_submodule(site.layer_path)
        norm = getattr(layer, site.names.norm_ffn) if site.names.norm_ffn else None
        ffn = getattr(layer, site.names.ffn)
        reason = merge_problem(plain, site, data=data)
        yield {
            "site": site.index,
            "path": site.path,
            "kind": site.kind,
            "norm": type(getattr(norm, "original", norm)).__name__ if norm is not None else "none (parallel)",
            "ffn": type(getattr(ffn, "original", ffn)).__name__,
            "params": sum(p.numel() for p in plain.get_submodule(site.path).parameters()),
            "mergeable": reason == "",
            "reason": reason,
        }
    path, layers = _survey(plain)
    for number, layer, reason in layers:
        if isinstance(reason, str):
            yield {
                "site": None,
                "path": f"{path}.{number}",
                "kind": "none",
                "norm": "",
                "ffn": "",
                "params": sum(p.numel() for p in layer.parameters()),
                "mergeable": False,
                "reason": f"no site: {reason}",
            }


def describe(model: nn.Module | Any, kinds: tuple[str, ...] = ("mha",)) -> pandas.DataFrame:
    """One row a site: site, path, kind, norm, ffn, params, mergeable, reason.

    Layers without sites follow, with site <NA>, kind "none" and the reason. Of a model, or of one that is not loaded: a
    transformers config, a local folder, or a name as in `eas_kit.estimate_memory`. Then `mergeable` says what holds
    once the model has its weights. A model that is refused whole raises UnsupportedModelError, as `attach` would.
    """
    import pandas

    loaded = isinstance(model, nn.Module)
    if not loaded:
        from .meta import meta_model

        model = meta_model(model)
    table = pandas.DataFrame(list(_rows(model, kinds, loaded)))
    return table.astype({"site": "Int64"}) if table.site.isna().any() else table
