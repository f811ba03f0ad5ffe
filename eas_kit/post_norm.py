"""Sites whose norm comes after: LayerNorm(x + Attention(x, context)), as BERT and the co-attention models have them.

    x (B, S, d) -------------------------+
                                         + --> LayerNorm --> (B, S, d)
    context (B, T, d) --> mean, m (B, d) |
                              x, m --> PIA --> s * (w0 (Bu z + c_B) + w1 (Du z + c_D))

A skipped site returns LayerNorm(x + PIA's delta): the attention goes, its norm stays. The pooled path and the router
read the mean of what the attention would have read: x itself in a self-attention, the other stream in a
cross-attention, padding excluded. There is no prompt to tell apart and nothing to remember between two forwards.

Nothing of this can be folded into the feed-forward behind it. That one reads LayerNorm(x + delta), and a norm behind
the sum divides by a number that depends on every position, so that no change of weights gives the same.

A model names such sites itself, in a method `eas_sites(kinds)`; `find_sites` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import EASConfig
from .errors import ConfigError, UnsupportedModelError
from .pia import PIA
from .seats import make_seat
from .slots import Desk, NoAttention, StandIn, nothing_there, place, restore

NO_FOLD = (
    "its LayerNorm comes after the sum (post-norm), so that no change of the feed-forward's weights gives"
    " FFN(LayerNorm(x + adapter)); the adapter stays and runs unmerged"
)


@dataclass(frozen=True)
class PostNormSite:
    """One attention of the form LayerNorm(x + Attention(x, context)). `index` is the number used in masks, from 0."""

    index: int
    name: str
    """What people call it: "text cross 3"."""
    layer_path: str
    slot: str
    """Name of the attention inside the module at `layer_path`."""
    hidden_size: int
    kind: str = "mha"

    unmergeable: ClassVar[str] = NO_FOLD

    @property
    def path(self) -> str:
        """Module path of the attention, as in `model.get_submodule(path)`."""
        return f"{self.layer_path}.{self.slot}"

    @property
    def layer(self) -> int:
        """Every site has a seat of its own: nothing passes from one to another."""
        return self.index

    layer_idx = layer

    @property
    def names(self) -> Any:
        """What asks a decoder layer for its parts cannot go on here: UnsupportedModelError says so."""
        raise UnsupportedModelError(
            f"{self.path} ({self.name}) is a post-norm attention, not a part of a decoder layer: there is no residual"
            " stream beside its norm and no decoding. Of the training-free scores single_ablation works; for times,"
            " time net(**batch)"
        )

    def check_config(self, config: EASConfig) -> None:
        """ConfigError for settings that these sites do not have."""
        if config.adapt_rank:
            raise ConfigError(
                f"EASConfig.adapt_rank: wanted 0, got {config.adapt_rank}: {self.path} is a post-norm attention, and"
                " these have an adapter where they are skipped and none where they are kept (the paper's setting for"
                " METER: EASConfig(skip_rank=144, adapt_rank=0))"
            )
        if config.source != "attention_norm":
            raise ConfigError(
                f"EASConfig.source: wanted 'attention_norm', got {config.source!r}: before the post-norm attention"
                f" {self.path} there is no second norm to read from; leave source out"
            )

    def row(self, model: nn.Module) -> dict[str, Any]:
        """The site's row in `describe`."""
        attention, layer = model.get_submodule(self.path), model.get_submodule(self.layer_path)
        return {
            "site": self.index,
            "name": self.name,
            "path": self.path,
            "kind": self.kind,
            "norm": f"{type(attention.output.LayerNorm).__name__} (after)",
            "ffn": type(layer.intermediate).__name__ if hasattr(layer, "intermediate") else "",
            "params": sum(p.numel() for p in attention.parameters()),
            "mergeable": False,
            "reason": self.unmergeable,
        }


def post_norm_sites(model: nn.Module, named: list[tuple[str, str, str]]) -> list[PostNormSite]:
    """The sites (name, layer_path, slot), numbered in this order.

    Raises UnsupportedModelError where one is not a BERT attention: query, key, value and, in `output`, dense and
    LayerNorm, all of one width.
    """
    sites = []
    for index, (name, layer_path, slot) in enumerate(named):
        attention = getattr(model.get_submodule(layer_path), slot)
        inner, norm = getattr(attention, "self", None), getattr(getattr(attention, "output", None), "LayerNorm", None)
        linears = [getattr(inner, part, None) for part in ("query", "key", "value")]
        if norm is None or None in linears:
            raise UnsupportedModelError(
                f"{layer_path}.{slot}: wanted a BERT attention (self.query, self.key, self.value, output.LayerNorm),"
                f" got a {type(attention).__name__}"
            )
        widths = {norm.weight.numel(), *(linear.in_features for linear in linears)}
        if len(widths) > 1:
            raise UnsupportedModelError(
                f"{layer_path}.{slot}: wanted one width for the stream and what it reads, got {sorted(widths)}; the"
                " adapter takes the mean of the one to the other"
            )
        sites.append(PostNormSite(index, name, layer_path, slot, norm.weight.numel()))
    return sites


def attended(context: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T) bool, the positions of context (B, T, d) that an attention with this mask may read.

    `mask` as transformers passes it: None, (B, T), or (B, 1, S, T) with the same row for every query, boolean or
    added to the scores (0 where a position may be read).
    """
    if mask is None:
        return torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
    if mask.dim() == 4:
        mask = mask[:, 0, 0]
        return mask if mask.dtype == torch.bool else mask == 0
    return mask.bool()


class SkippedPostNorm(StandIn):
    """LayerNorm(x + PIA's delta), in the slot of the whole attention with its norm."""

    def __init__(self, original: nn.Module, pia: PIA) -> None:
        super().__init__(original)
        self.adapter = (pia,)  # in a tuple: owned by the adapters' container, not by the base model

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        x, context, mask = hidden_states, encoder_hidden_states, encoder_attention_mask
        if context is None:
            context, mask = x, attention_mask
        (pia,) = self.adapter
        delta = pia.delta(x, pia.route(pia.mean(context, attended(context, mask))))
        return self.output.LayerNorm(x + delta.to(x.dtype)), None


class NoPostNorm(NoAttention):
    """LayerNorm(x): an attention that adds nothing, under its norm."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.output.LayerNorm(hidden_states), None


@nothing_there.register
def _(site: PostNormSite, original: nn.Module) -> StandIn:
    return NoPostNorm(original, site.layer_idx)


class PostNormSeat:
    """One post-norm site, and what is in place there now; see `eas_kit.seats.Seat`."""

    reads_prompt = active = False  # it pools over what the attention reads, not over a prompt
    role = pia = None  # what a merge would ask for

    def __init__(self, layer: nn.Module, site: PostNormSite) -> None:
        self.layer, self.site, self.layer_idx = layer, site, site.layer_idx
        self.sites: dict[str, PostNormSite] = {}
        self.desk = Desk()
        self.placed: list[str] = []

    def check_free(self) -> None:
        """Raises ConfigError if a block of `skipping` holds the slot."""
        if isinstance(getattr(self.layer, self.site.slot), NoAttention):
            raise ConfigError(
                f"cannot set net.mask inside a block of skipping(...), which holds {self.site.path} ({self.site.name});"
                " leave the block first"
            )

    def fill(self, mask: tuple[int, ...], adapters: nn.ModuleDict, config: EASConfig) -> None:
        """Put in place what `mask` asks for."""
        self.clear()
        if self.site.index in mask:
            attention, pia = getattr(self.layer, self.site.slot), adapters[str(self.site.index)]["skip"]
            place(self.layer, self.site.slot, SkippedPostNorm(attention, pia))
            self.placed.append(self.site.slot)

    def clear(self) -> None:
        """The attention as it came."""
        while self.placed:
            restore(self.layer, self.placed.pop())


@make_seat.register
def _(site: PostNormSite, layer: nn.Module, prompt: Callable[[], Tensor | None]) -> PostNormSeat:
    return PostNormSeat(layer, site)
