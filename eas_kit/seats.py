"""One decoder layer with its adapters: what a mask puts into the layer's slots, and how it comes out again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .bottleneck import Bottleneck
from .config import EASConfig
from .errors import ConfigError, UnsupportedModelError
from .families import takes_keywords
from .pia import PIA
from .sites import Site
from .slots import (
    BeforeAttention,
    BeforeFeedForward,
    BeforeMerged,
    Desk,
    LastOfLayer,
    LowRank,
    NoAttention,
    NoFeedForward,
    SkippedAttention,
    SkippedFeedForward,
    SkippedNorm,
    StandIn,
    UnreadNorm,
    place,
    restore,
)


class Seat:
    """One decoder layer, its sites by kind, and what is in place there now."""

    def __init__(self, layer: nn.Module, site: Site, prompt: Callable[[], Tensor | None]) -> None:
        self.prompt = prompt  # gives the prompt mask of the forward that is running
        self.layer, self.layer_idx, self.names = layer, site.layer_idx, site.names
        self.desk = Desk()
        self.sites: dict[str, Site] = {}
        self.placed: list[str] = []  # slots that hold a stand-in
        self.handles: list[Any] = []
        self.role: str | None = None  # "skip" or "keep": which adapter is at work at the attention
        self.pia: PIA | Bottleneck | None = None  # that adapter
        self.reads = False  # the adapters at work keep something of the prompt
        self.takes_keywords = takes_keywords(layer)

    @property
    def site(self) -> Site | None:
        """The site whose adapter stands in for the attention (and, of a layer, the rest) or before it."""
        return self.sites.get("mha") or self.sites.get("layer")

    @property
    def active(self) -> bool:
        """True if an adapter of this layer is at work."""
        return self.role is not None or self.names.ffn in self.placed

    @property
    def reads_prompt(self) -> bool:
        """True if an adapter will read the prompt now: not in a block of `skipping` that took the attention away."""
        return self.active and self.reads and not isinstance(getattr(self.layer, self.names.attention), NoAttention)

    def check_free(self) -> None:
        """Raises ConfigError if a block of `skipping` holds one of the slots."""
        for slot in (self.names.attention, self.names.ffn):
            held = getattr(self.layer, slot)
            if isinstance(held, NoAttention | NoFeedForward):
                raise ConfigError(
                    f"cannot set net.mask inside a block of skipping(...), which holds {slot} of layer"
                    f" {self.layer_idx}; leave the block first"
                )

    def fill(self, mask: tuple[int, ...], adapters: nn.ModuleDict, config: EASConfig) -> None:
        """Put in place what `mask` asks for."""
        self.clear()
        layer, names, site, ffn = self.layer, self.names, self.site, self.sites.get("ffn")
        if site and site.index in mask:
            self.role, self.pia = "skip", adapters[str(site.index)]["skip"]
            source = config.source if names.norm_ffn else "attention_norm"  # both are the one norm of a parallel layer
            shared = (self.pia, self.desk, "layer" if site.kind == "layer" else source)
            self._place(names.attention, SkippedAttention(getattr(layer, names.attention), self.layer_idx, *shared))
            norm = getattr(layer, names.norm_ffn) if names.norm_ffn else None
            if site.kind == "layer":
                self._place(names.ffn, LastOfLayer(getattr(layer, names.ffn), self.desk, site.returns_tuple))
                if norm is not None:
                    self._place(names.norm_ffn, UnreadNorm(norm))
            elif norm is not None:
                self._place(names.norm_ffn, SkippedNorm(norm, site.gain_offset, *shared))
        elif site and config.adapt_rank:
            self.role, self.pia = "keep", adapters[str(site.index)]["keep"]
        if ffn and ffn.index in mask:
            feed_forward, pia = getattr(layer, names.ffn), adapters[str(ffn.index)]["skip"]
            self._place(names.ffn, SkippedFeedForward(feed_forward, pia, self.desk, ffn.returns_tuple))
        self.reads = config.adapter == "pia" and config.parts != "base"
        self.hook()

    def _place(self, slot: str, stand_in: StandIn) -> None:
        place(self.layer, slot, stand_in)
        self.placed.append(slot)

    def hook(self) -> None:
        """Bring the prompt mask to this layer's attention, as a keyword, so that gradient checkpointing keeps it."""
        if not self.active:
            return
        layer, names = self.layer, self.names
        self._before(layer, self._deliver)
        if names.attention not in self.placed:
            self._before(getattr(layer, names.attention), BeforeAttention(self.layer_idx, self.pia, self.desk))
        elif names.norm_ffn is None and names.ffn not in self.placed:
            self._before(getattr(layer, names.ffn), BeforeFeedForward(self.desk))

    def _deliver(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.desk.prompt = self.prompt()
        return args, {**kwargs, "eas_prompt": self.desk.prompt} if self.takes_keywords else kwargs

    def _before(self, module: nn.Module, hook: Callable) -> None:
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def merge(self, low_rank: LowRank | None = None) -> None:
        """Decode without the adapter: it is in the linears, or condensed to `low_rank`."""
        self.unhook()  # nothing is left for the hooks to do, and a decoding step is faster without
        layer, names = self.layer, self.names
        if self.role == "skip":
            getattr(layer, names.attention).merged = True
            if names.norm_ffn:
                getattr(layer, names.norm_ffn).merged = low_rank or _as_it_is
            elif low_rank:
                self._before(getattr(layer, names.ffn), BeforeMerged(low_rank))
        elif low_rank:
            self._before(getattr(layer, names.attention), BeforeMerged(low_rank))

    def unmerge(self) -> None:
        """The adapter is at work again."""
        self.unhook()
        if self.role == "skip":
            getattr(self.layer, self.names.attention).merged = False
            if self.names.norm_ffn:
                getattr(self.layer, self.names.norm_ffn).merged = None
        self.hook()

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


def _as_it_is(n: Tensor) -> Tensor:
    return n


def make_seats(base: nn.Module, sites: list[Site], prompt: Callable[[], Tensor | None]) -> list[Seat]:
    """One seat a decoder layer that has sites; `prompt` gives the prompt mask of the forward that is running."""
    seats: dict[int, Seat] = {}
    for site in sites:
        if site.layer not in seats:
            seats[site.layer] = Seat(base.get_submodule(site.layer_path), site, prompt)
        seats[site.layer].sites[site.kind] = site
    return list(seats.values())


def make_adapters(base: nn.Module, sites: list[Site], config: EASConfig) -> nn.ModuleDict:
    """Adapters for all sites, by site number and then "skip" or "keep", on the devices of their layers."""
    shared = {name: getattr(config, name) for name in ("scale", "dropout")}
    names = ("groups", "temperature", "parts", "path_factor")
    shape = shared | {name: getattr(config, name) for name in names}

    def make(width: int, rank: int, paths: int) -> nn.Module:
        if config.adapter == "bottleneck":
            return Bottleneck(width, rank, **shared)
        return PIA(width, rank, **shape, paths=paths)

    adapters = nn.ModuleDict()
    for site in sites:
        if site.hidden_size % config.groups and config.adapter == "pia":
            raise ConfigError(f"EASConfig.groups={config.groups} must divide the model's width {site.hidden_size}")
        if site.kind == "mha" and site.gain_offset is None and config.source == "attention_norm":
            raise UnsupportedModelError(
                f"{site.layer_path}.{site.names.norm_ffn} is more than a gain and a bias, so PIA(LN1(x)) cannot take"
                ' its place exactly; use EASConfig(source="ffn_norm")'
            )
        layer = base.get_submodule(site.layer_path)
        weight, device = next(layer.parameters()), where_it_runs(layer)
        with device if device.type == "meta" else nullcontext():  # half a GB at 7 B that nobody would look at
            roles = nn.ModuleDict({"skip": make(site.hidden_size, config.skip_rank, 2)})
            if site.kind != "ffn" and config.adapt_rank:
                roles["keep"] = make(site.hidden_size, config.adapt_rank, 1)
        # half precision is too coarse for the small steps of an optimiser: train in float32, cast after if wanted
        wide = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        adapters[str(site.index)] = roles.to(device=device, dtype=wide)
    return adapters.train(base.training)


def where_it_runs(layer: nn.Module) -> torch.device:
    """The device of the layer's weights; of accelerate's hook where it keeps them elsewhere between two calls."""
    device = next(layer.parameters()).device
    if device.type != "meta":
        return device
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return device
