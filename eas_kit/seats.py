"""One decoder layer with its adapters: what a mask puts into the layer's slots, and how it comes out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .config import EASConfig
from .errors import ConfigError, UnsupportedModelError
from .pia import PIA
from .sites import Site
from .slots import (
    BeforeAttention,
    Desk,
    NoAttention,
    NoFeedForward,
    SkippedAttention,
    SkippedFeedForward,
    SkippedNorm,
    StandIn,
    place,
    restore,
)


class Seat:
    """One decoder layer, its sites by kind, and what is in place there now."""

    def __init__(self, layer: nn.Module, site: Site) -> None:
        self.layer, self.layer_idx, self.names = layer, site.layer_idx, site.names
        self.desk = Desk()
        self.sites: dict[str, Site] = {}
        self.placed: list[str] = []  # slots that hold a stand-in
        self.handles: list[Any] = []
        self.role: str | None = None  # "skip" or "keep": which adapter is at work at the attention
        self.pia: PIA | None = None  # that adapter

    @property
    def active(self) -> bool:
        """True if an adapter of this layer reads the prompt."""
        return self.role is not None or self.names.ffn in self.placed

    @property
    def reads_prompt(self) -> bool:
        """True if an adapter will read the prompt now: not in a block of `skipping` that took the attention away."""
        return self.active and not isinstance(getattr(self.layer, self.names.attention), NoAttention)

    def check_free(self) -> None:
        """Raises ConfigError if a block of `skipping` holds one of the slots."""
        for slot in (self.names.attention, self.names.ffn):
            held = getattr(self.layer, slot)
            if isinstance(held, NoAttention | NoFeedForward):
                raise ConfigError(
                    f"cannot set net.mask inside a block of skipping(...), which holds {slot} of layer"
                    f" {self.layer_idx}; leave the block first"
                )

    def fill(self, mask: tuple[int, ...], adapters: nn.ModuleDict, config: EASConfig, deliver: Callable) -> None:
        """Put in place what `mask` asks for; `deliver` is the pre-hook that brings the layer its prompt mask."""
        self.clear()
        layer, names, mha, ffn = self.layer, self.names, self.sites.get("mha"), self.sites.get("ffn")
        if mha and mha.index in mask:
            self.role, self.pia = "skip", adapters[str(mha.index)]["skip"]
            shared = (self.pia, self.desk, config.source)
            attention, norm = getattr(layer, names.attention), getattr(layer, names.norm_ffn)
            self._place(names.attention, SkippedAttention(attention, self.layer_idx, *shared))
            self._place(names.norm_ffn, SkippedNorm(norm, mha.gain_offset, *shared))
        elif mha and config.adapt_rank:
            self.role, self.pia = "keep", adapters[str(mha.index)]["keep"]
        if ffn and ffn.index in mask:
            feed_forward = getattr(layer, names.ffn)
            self._place(names.ffn, SkippedFeedForward(feed_forward, adapters[str(ffn.index)]["skip"], self.desk))
        self.hook(deliver)

    def _place(self, slot: str, stand_in: StandIn) -> None:
        place(self.layer, slot, stand_in)
        self.placed.append(slot)

    def hook(self, deliver: Callable) -> None:
        """Bring the prompt mask to this layer's attention, as a keyword, so that gradient checkpointing keeps it."""
        if not self.active:
            return
        self.handles.append(self.layer.register_forward_pre_hook(deliver, with_kwargs=True))
        if self.names.attention not in self.placed:
            adapt = BeforeAttention(self.layer_idx, self.pia, self.desk)
            attention = getattr(self.layer, self.names.attention)
            self.handles.append(attention.register_forward_pre_hook(adapt, with_kwargs=True))

    def unhook(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def clear(self) -> None:
        """The layer as it came."""
        self.unhook()
        for slot in reversed(self.placed):
            restore(self.layer, slot)
        self.placed.clear()
        self.desk.clear()
        self.role = self.pia = None


def make_seats(base: nn.Module, sites: list[Site]) -> list[Seat]:
    """One seat a decoder layer that has sites."""
    seats: dict[int, Seat] = {}
    for site in sites:
        if site.layer not in seats:
            seats[site.layer] = Seat(base.get_submodule(site.layer_path), site)
        seats[site.layer].sites[site.kind] = site
    return list(seats.values())


def make_adapters(base: nn.Module, sites: list[Site], config: EASConfig) -> nn.ModuleDict:
    """Adapters for all sites, by site number and then "skip" or "keep", on the devices of their layers."""
    shape = {name: getattr(config, name) for name in ("groups", "scale", "temperature", "dropout")}
    adapters = nn.ModuleDict()
    for site in sites:
        if site.hidden_size % config.groups:
            raise ConfigError(f"EASConfig.groups={config.groups} must divide the model's width {site.hidden_size}")
        if site.kind == "mha" and site.gain_offset is None and config.source == "attention_norm":
            raise UnsupportedModelError(
                f"{site.layer_path}.{site.names.norm_ffn} is more than a gain, so PIA(LN1(x)) cannot take its place"
                ' exactly; use EASConfig(source="ffn_norm")'
            )
        roles = nn.ModuleDict({"skip": PIA(site.hidden_size, config.skip_rank, **shape)})
        if site.kind == "mha" and config.adapt_rank:
            roles["keep"] = PIA(site.hidden_size, config.adapt_rank, **shape, paths=1)
        layer = base.get_submodule(site.layer_path)
        weight = next(layer.parameters())
        if weight.is_meta and any(hasattr(module, "_hf_hook") for module in layer.modules()):
            raise UnsupportedModelError(
                f"{site.layer_path} is offloaded to CPU or disk (its weights are on the meta device between calls), so"
                " that its norm cannot be read; load the model without offloading, e.g. in 4 bits or on more devices"
            )
        # half precision is too coarse for the small steps of an optimiser: train in float32, cast after if wanted
        wide = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        adapters[str(site.index)] = roles.to(device=weight.device, dtype=wide)
    return adapters.train(base.training)
