"""Which positions are the prompt, and what skipped and adapted attentions remember of it.

The prompt is everything before the first answer token, padding excluded. Each adapter reads the prompt once, at
prefill, and keeps a `Route` (its router's weights and pooled feature). The route lives in the KV cache, in the entry
of its layer, so that it is reordered for beams, repeated, selected, cropped, reset and copied together with the keys
and values it belongs to, and so that two generations never mix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer

from .errors import PromptError
from .pia import Running

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from .pia import Route

IGNORE = -100  # transformers' label of a position without loss


def find_cache(values: Mapping[str, Any]) -> Cache | None:
    """The KV cache among a forward's keywords or outputs; versions and families differ in what they call it.

    `cache` since transformers 5.24, `past_key_values` before, `layer_past` in the attentions of some families.
    """
    for name in ("cache", "past_key_values", "layer_past"):
        if values.get(name) is not None:
            return values[name]
    return None


def name_cache(kwargs: dict[str, Any], parameters: Collection[str]) -> None:
    """Call a cache among the keywords what a forward with these parameters calls it, so that either name works."""
    old, new = ("past_key_values", "cache") if "cache" in parameters else ("cache", "past_key_values")
    if old in kwargs and new not in kwargs and new in parameters:
        kwargs[new] = kwargs.pop(old)


class PromptState:
    """Marks an entry of a KV cache that has `routes`: what that adapter keeps, by "skip", "keep" or "ffn"."""

    __slots__ = ()
    routes: dict[str, Route | Running]
    length: Tensor | None
    """(B,) positions of the prompts that the routes were read from."""


@cache
def with_state(cls: type) -> type:
    """The kind of cache entry `cls`, with routes that share the entry's life. Living entries may change class to it."""

    class Entry(cls, PromptState):
        _layer_type = None  # else transformers would register this class for all caches to come

        def __reduce_ex__(self, protocol: Any) -> Any:  # this class has no name to be found by; copies go through here
            if type(self) is not Entry:
                return super().__reduce_ex__(protocol)
            return _new_entry, (cls,), vars(self)

        def _change(self, change: Callable[[Tensor], Tensor]) -> None:
            self.routes = {key: route.map(change) for key, route in self.routes.items()}
            self.length = None if self.length is None else change(self.length)

        def reset(self) -> None:
            super().reset()
            self.routes, self.length = {}, None

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

        def crop(self, max_length: int) -> None:
            if any(isinstance(route, Running) for route in self.routes.values()):
                raise PromptError(
                    'adapters with parts="exchange" keep a running mean of all positions, from which none can be taken'
                    " back: no assisted decoding, no prompt lookup, no cache.crop"
                )
            super().crop(max_length)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._change(lambda t: t.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._change(lambda t: t[indices])

    Entry.__name__ = Entry.__qualname__ = f"{cls.__name__}WithPrompt"
    return Entry


def _new_entry(cls: type) -> Any:
    kind = with_state(cls)
    return kind.__new__(kind)


class PromptMean(with_state(DummyLayer)):
    """Entry of a skipped attention: no keys, no values, only what its adapter keeps of the prompt.

    A DummyLayer, so the cache asks the first attention that is left for its length and mask sizes.
    """

    def __init__(self, displaced: Any = None) -> None:
        super().__init__()
        self.routes, self.length = {}, None
        self.displaced = displaced  # the untouched entry, put back if a reset cache meets another mask

    def reset(self) -> None:
        super().reset()
        if self.displaced is not None:
            self.displaced.reset()

    def update(self, key_states: Tensor | None, value_states: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if key_states is None and value_states is None:
            return None, None
        raise PromptError(
            "this KV cache was filled while the attention of this layer was skipped, so it holds no keys for it;"
            " the mask changed since: prefill again with a new cache"
        )


def _entry(cache: Cache, index: int) -> Any:
    while len(cache.layers) <= index:  # a DynamicCache made without a config grows as layers write to it
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def skipped_state(cache: Cache | None, index: int) -> PromptState:
    """The state of a layer without attention; takes the place of the layer's keys and values."""
    if cache is None:
        return PromptMean()
    entry = _entry(cache, index)
    if not isinstance(entry, PromptMean):
        if entry.is_initialized and entry.get_seq_length() > 0:
            raise PromptError(
                "this KV cache holds keys for an attention that is skipped now; the mask changed since:"
                " prefill again with a new cache"
            )
        cache.layers[index] = entry = PromptMean(displaced=entry)
    return entry


def kept_state(cache: Cache | None, index: int) -> PromptState:
    """The state of a layer that keeps its attention; lives in the same entry as its keys and values."""
    if cache is None:
        return PromptMean()
    entry = _entry(cache, index)
    if not isinstance(entry, PromptState):
        entry.__class__ = with_state(type(entry))
        entry.routes, entry.length = {}, None
    return entry


def has_route(cache: Cache, index: int) -> bool:
    """True if an adapter of this layer has already read the prompt of this cache."""
    return index < len(cache.layers) and bool(getattr(cache.layers[index], "routes", None))


def check_same_prompt(given: Tensor, cache: Cache) -> None:
    """PromptError if generate is given other prompts (b, P) bool than the cache has read: a growing chat, mostly."""
    entry = next(entry for entry in cache.layers if getattr(entry, "routes", None))
    wanted, read = given.sum(dim=1).to(entry.length.device), entry.length
    if len(read) % len(wanted) == 0:  # beams, returned sequences
        wanted = wanted.repeat_interleave(len(read) // len(wanted))
    if not torch.equal(wanted, read):
        raise PromptError(
            f"past_key_values has read prompts of {read.tolist()} positions, and these inputs hold"
            f" {given.sum(1).tolist()}. If it is the same prompt, pass the same attention_mask to prefill and to"
            " generate: without one, prefill counts every token, and generate leaves out those that pad. If it is a"
            " chat that has grown, be it by the model's own answer: every position of a skipped layer depends on the"
            " mean of the whole prompt, so what was read before cannot be gone on with exactly; leave past_key_values"
            " out and the whole chat is read anew"
        )


def renew(cache: Cache, kept: frozenset[int]) -> None:
    """Before a prefill on an emptied cache: forget old prompts, and give kept layers their own entry back."""
    for index, entry in enumerate(cache.layers):
        if isinstance(entry, PromptState):
            entry.routes, entry.length = {}, None
            if index in kept and isinstance(entry, PromptMean) and entry.displaced is not None:
                cache.layers[index] = entry.displaced


def batch_shape(kwargs: Mapping[str, Any]) -> tuple[int, int, torch.device]:
    """(B, S) of the tokens of a forward, and their device."""
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        raise PromptError("a forward needs input_ids or inputs_embeds to tell the prompt; got neither")
    return tokens.shape[0], tokens.shape[1], tokens.device


def padded_positions(kwargs: Mapping[str, Any]) -> Tensor | None:
    """(B, S) positions counted without the padding, as generate counts them; None where nothing is padded."""
    mask = kwargs.get("attention_mask")
    if not torch.is_tensor(mask) or mask.is_meta or mask.shape != batch_shape(kwargs)[:2] or mask.bool().all():
        return None
    return (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 0)


def forward_prompt(kwargs: dict[str, Any], *, training: bool) -> Tensor:
    """(B, S) bool prompt mask of a forward on whole examples: before the first label, minus padding.

    Without labels every attended position is prompt, which is right for a prefill and wrong for scoring an answer;
    in training it is refused with a PromptError. So are an empty prompt and rows packed with several examples.
    """
    B, S, device = batch_shape(kwargs)
    labels, attended = kwargs.get("labels"), kwargs.get("attention_mask")
    if attended is not None and (not torch.is_tensor(attended) or attended.dim() != 2):
        raise PromptError(
            "wanted a 2D attention_mask (B, S) to tell padding from prompt, got"
            f" {tuple(attended.shape) if torch.is_tensor(attended) else type(attended).__name__};"
            " generate with net.generate, or pass prompt_mask=..."
        )
    _refuse_packed(kwargs, attended)
    mask = torch.ones(B, S, dtype=torch.bool, device=device) if attended is None else attended[:, -S:].bool()
    if labels is not None:
        mask = mask & (labels.ne(IGNORE).cumsum(dim=1) == 0)
    elif training:
        raise PromptError(
            "training needs labels, to tell the prompt from the answer: pass labels=... with -100 on the prompt"
            " (an option that takes labels out of the batch, such as label smoothing in a Trainer, must be off),"
            " or call net.eval() first"
        )
    return check_prompt(mask)


def generate_prompt(given: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """(B, S) bool prompt mask of a prefill inside generate, from the (b, P) mask `given` to generate.

    B is b times the beams or returned sequences; positions after P are drafted or already written, not prompt.
    """
    B, S, device = batch_shape(kwargs)
    rows, length = given.shape
    if length > S:
        raise PromptError(
            f"the prompt has {length} positions but its first forward only {S}: the prompt's mean needs the whole"
            " prompt in one forward (no prefill_chunk_size, no cache filled without these adapters)"
        )
    mask = given.to(device)
    if rows != B:
        mask = mask.repeat_interleave(B // rows, dim=0)
    return torch.nn.functional.pad(mask, (0, S - length), value=False)


def option(kwargs: Mapping[str, Any], default: GenerationConfig, name: str) -> Any:
    """What generate takes for an option: the keyword, else what generation_config sets, else the model's `default`."""
    if name in kwargs:
        return kwargs[name]
    value = getattr(kwargs.get("generation_config"), name, None)
    return getattr(default, name, None) if value is None else value


def read_given(kwargs: dict[str, Any], default: GenerationConfig) -> Tensor:
    """(b, P) bool mask of the prompts given to generate; writes an inferred attention_mask into kwargs.

    Raises PromptError for labels, for a prefill in chunks, for continuous batching, for classifier-free guidance, and
    where there is nothing to read.
    """
    if kwargs.pop("labels", None) is not None:
        raise PromptError(
            "generate takes prompts, but this batch has labels, so its input_ids hold the answers too;"
            " collate it with answers=False"
        )
    guidance = option(kwargs, default, "guidance_scale")
    if guidance not in (None, 1):
        raise PromptError(
            f"guidance_scale={guidance} runs the model on a second, unconditional prompt in between, and the adapters"
            " would take it for the first; leave it out (or 1)"
        )
    if option(kwargs, default, "cache_implementation") == "paged":
        raise PromptError(
            'cache_implementation="paged" (continuous batching) feeds prompts in pieces, but their mean needs the whole'
            " prompt at once; leave it out"
        )
    if option(kwargs, default, "prefill_chunk_size"):
        raise PromptError(
            "prefill_chunk_size splits the prompt, but every position of a skipped layer depends on the mean of the"
            " whole prompt; leave it out"
        )
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        raise PromptError("generate: wanted input_ids or inputs_embeds, got neither")
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        pad, end = option(kwargs, default, "pad_token_id"), option(kwargs, default, "eos_token_id")
        if pad is not None and tokens.dim() == 2 and pad not in (end if isinstance(end, list) else [end]):
            mask = tokens.ne(pad).long()  # what transformers infers as well
        kwargs["attention_mask"] = mask
    if mask.dim() != 2:
        raise PromptError(f"generate: wanted a 2D attention_mask (B, S), got {tuple(mask.shape)}")
    return check_prompt(mask.bool())


def check_explicit(mask: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """A prompt_mask passed to a forward, if it has the shape of the tokens."""
    B, S, _ = batch_shape(kwargs)
    if mask.shape != (B, S):
        raise PromptError(f"prompt_mask: wanted (B, S) = {(B, S)}, got {tuple(mask.shape)}")
    return check_prompt(mask.bool())


def check_prompt(mask: Tensor) -> Tensor:
    """The mask, if every example has a prompt; PromptError naming those that have none."""
    if mask.is_meta:  # counting operations without data
        return mask
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise PromptError(
            f"examples {empty} of the batch have an empty prompt (no attended position before the first label);"
            " label the prompt with -100"
        )
    return mask


def _refuse_packed(kwargs: dict[str, Any], attended: Tensor | None) -> None:
    packed = any(kwargs.get(key) is not None for key in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
    positions = kwargs.get("position_ids")
    if not packed and attended is None and positions is not None and positions.dim() == 2:
        packed = bool((positions[:, 1:] < positions[:, :-1]).any())
    if packed:
        raise PromptError(
            "this batch packs several examples into one row (positions start again), which would mix their prompts;"
            " use one example a row with padding"
        )
