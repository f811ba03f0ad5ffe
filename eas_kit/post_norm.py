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

Of kind "layer" a site is one stream's whole layer, self-attention, cross-attention and feed-forward with their norms:
x + PIA's delta, or x + a bottleneck's (DAS). The mean is of x alone, and the other stream reads what it always reads:
this stream's input of the same layer.

A model names such sites itself, in a method `eas_sites(kinds)`; `find_sites` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .bottleneck import Bottleneck
from .config import EASConfig
from .errors import ConfigError, UnsupportedModelError
from .pia import PIA
from .seats import make_seat
from .slots import Desk, NoAttention, StandIn, nothing_there, place, restore

NO_FOLD = (
    "its LayerNorm comes after the sum (post-norm), so that no change of the feed-forward's weights gives"
    " FFN(LayerNorm(x + adapter)); the adapter stays and runs unmerged"
)
FEED_FORWARD = ("intermediate", "output")  # of a BERT layer, in running order
NO_LINEAR = "a skipped layer leaves no linear to fold its adapter into; it runs unmerged"


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
    what: ClassVar[str] = "attention"

    @property
    def slots(self) -> tuple[str, ...]:
        """Where stand-ins are put, inside the module at `layer_path`."""
        return (self.slot,)

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
            f"{self.path} ({self.name}) is a post-norm {self.what}, not a part of a decoder layer: there is no residual"
            " stream beside its norm and no decoding. Of the training-free scores single_ablation works; for times,"
            " time net(**batch)"
        )

    def check_config(self, config: EASConfig) -> None:
        """ConfigError for settings that these sites do not have."""
        if config.adapt_rank:
            raise ConfigError(
                f"EASConfig.adapt_rank: wanted 0, got {config.adapt_rank}: {self.path} is a post-norm {self.what},"
                " and these have an adapter where they are skipped and none where they are kept (the paper's setting"
                " for METER: EASConfig(skip_rank=144, adapt_rank=0))"
            )
        if config.source != "attention_norm":
            raise ConfigError(
                f"EASConfig.source: wanted 'attention_norm', got {config.source!r}: before the post-norm"
                f" {self.what} {self.path} there is no second norm to read from; leave source out"
            )

    def row(self, model: nn.Module) -> dict[str, Any]:
        """The site's row in `describe`."""
        layer = model.get_submodule(self.layer_path)
        attention, ffn = getattr(layer, self.slot), getattr(layer, "intermediate", None)
        return {
            "site": self.index,
            "name": self.name,
            "path": self.path,
            "kind": self.kind,
            "norm": f"{type(attention.output.LayerNorm).__name__} (after)",
            "ffn": "" if ffn is None else type(getattr(ffn, "original", ffn)).__name__,
            "params": sum(p.numel() for p in model.get_submodule(self.path).parameters()),
            "mergeable": False,
            "reason": self.unmergeable,
        }

    def stand_ins(self, layer: nn.Module, adapter: PIA | Bottleneck) -> dict[str, StandIn]:
        """What stands in the slots of `layer`, the module at `layer_path`, while the site is skipped."""
        return {self.slot: SkippedPostNorm(getattr(layer, self.slot), adapter)}


@dataclass(frozen=True)
class PostNormLayer(PostNormSite):
    """A whole layer of one stream: attention after attention, the first at `slot`, then BERT's feed-forward."""

    others: tuple[str, ...] = ()
    """Names of the attentions behind the first."""
    kind: str = "layer"

    unmergeable: ClassVar[str] = NO_LINEAR
    what: ClassVar[str] = "layer"

    @property
    def slots(self) -> tuple[str, ...]:
        return (self.slot, *self.others, *FEED_FORWARD)

    @property
    def path(self) -> str:
        return self.layer_path

    @property
    def ffn_path(self) -> str:
        """Module path of the linear with which the feed-forward ends: what it returns is then added to its input."""
        return f"{self.layer_path}.{FEED_FORWARD[-1]}.dense"

    def stand_ins(self, layer: nn.Module, adapter: PIA | Bottleneck) -> dict[str, StandIn]:
        first = {self.slot: SkippedLayer(getattr(layer, self.slot), adapter)}
        rest = {name: PassOn(getattr(layer, name), name in self.others) for name in self.slots[1:]}
        return first | rest


def post_norm_sites(model: nn.Module, named: list[tuple[str, str, str]]) -> list[PostNormSite]:
    """The sites (name, layer_path, slot), numbered in this order.

    Raises UnsupportedModelError where one is not a BERT attention: query, key, value and, in `output`, dense and
    LayerNorm, all of one width.
    """
    return [
        PostNormSite(index, name, layer_path, slot, _width(model, layer_path, slot))
        for index, (name, layer_path, slot) in enumerate(named)
    ]


def post_norm_layers(
    model: nn.Module, named: list[tuple[str, str]], attentions: tuple[str, ...]
) -> list[PostNormLayer]:
    """The layers (name, layer_path) as sites, numbered in this order; `attentions`: their slots, in running order.

    Raises UnsupportedModelError as `post_norm_sites`, and for a layer without BERT's feed-forward.
    """
    sites = []
    for index, (name, path) in enumerate(named):
        layer, (width, *_) = model.get_submodule(path), [_width(model, path, slot) for slot in attentions]
        dense = getattr(getattr(layer, FEED_FORWARD[-1], None), "dense", None)
        if dense is None or not hasattr(layer, FEED_FORWARD[0]):
            raise UnsupportedModelError(
                f"{path}: wanted a BERT layer with its feed-forward (intermediate, output.dense), got a"
                f" {type(layer).__name__}"
            )
        sites.append(PostNormLayer(index, name, path, attentions[0], width, others=tuple(attentions[1:])))
    return sites


def _width(model: nn.Module, layer_path: str, slot: str) -> int:
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
    return norm.weight.numel()


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

    def __init__(self, original: nn.Module, pia: PIA | Bottleneck) -> None:
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
        read = pia.mean(context, attended(context, mask)) if pia.reads_prompt else x
        return self.finish(x + pia.delta(x, pia.route(read)).to(x.dtype)), None

    def finish(self, x: Tensor) -> Tensor:
        """What the attention does with its sum."""
        return self.output.LayerNorm(x)


class SkippedLayer(SkippedPostNorm):
    """x + the adapter's delta, in the slot of a layer's first attention; the layer's other parts pass it on."""

    def finish(self, x: Tensor) -> Tensor:
        return x


class PassOn(StandIn):
    """Returns its first argument: a part of a layer that is skipped whole."""

    def __init__(self, original: nn.Module, returns_tuple: bool) -> None:
        super().__init__(original)
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, None) if self.returns_tuple else hidden_states


class NoPostNorm(NoAttention):
    """LayerNorm(x): an attention that adds nothing, under its norm."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.output.LayerNorm(hidden_states), None


@nothing_there.register
def _(site: PostNormSite, original: nn.Module) -> StandIn:
    return NoPostNorm(original, site.layer_idx)


class PostNormSeat:
    """One post-norm site, attention or layer, and what is in place there now; see `eas_kit.seats.Seat`."""

    reads_prompt = active = False  # it pools over what the attention reads, not over a prompt
    role = pia = None  # what a merge would ask for

    def __init__(self, layer: nn.Module, site: PostNormSite) -> None:
        self.layer, self.site, self.layer_idx = layer, site, site.layer_idx
        self.sites: dict[str, PostNormSite] = {}
        self.desk = Desk()
        self.placed: list[str] = []

    def check_free(self) -> None:
        """Raises ConfigError if a block of `skipping` holds one of the slots."""
        if any(isinstance(getattr(self.layer, slot), NoAttention) for slot in self.site.slots):
            raise ConfigError(
                f"cannot set net.mask inside a block of skipping(...), which holds {self.site.path} ({self.site.name});"
                " leave the block first"
            )

    def fill(self, mask: tuple[int, ...], adapters: nn.ModuleDict, config: EASConfig) -> None:
        """Put in place what `mask` asks for."""
        self.clear()
        if self.site.index in mask:
            adapter = adapters[str(self.site.index)]["skip"]
            for slot, stand_in in self.site.stand_ins(self.layer, adapter).items():
                place(self.layer, slot, stand_in)
                self.placed.append(slot)

    def clear(self) -> None:
        """Attention or layer as it came."""
        while self.placed:
            restore(self.layer, self.placed.pop())


@make_seat.register
def _(site: PostNormSite, layer: nn.Module, prompt: Callable[[], Tensor | None]) -> PostNormSeat:
    return PostNormSeat(layer, site)
