"""EASModel: a transformers model with adapters at its sites, and a mask that says which sites are skipped.

`attach` freezes the base model and adds an adapter for "skipped" and one for "kept" to every attention. Setting
`net.mask` swaps modules in and out of the layers' slots; the layers' own code is never touched, nothing is
renumbered, and `detach` gives the base model back bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import EASConfig
from .errors import ConfigError, EASError, MergeError, PromptError, UnsupportedModelError
from .masks import check_mask
from .merging import Merge, merged
from .pia import PIA
from .prompt import check_prompt, forward_prompt, generate_prompt, has_route, renew
from .saving import load_adapters, save_adapters
from .sites import Site, find_sites
from .slots import BeforeAttention, Desk, SkippedAttention, SkippedFeedForward, SkippedNorm, place, restore

__all__ = ["EASModel", "attach", "detach", "load"]


@dataclass
class Seat:
    """One decoder layer and what the mask has put into it."""

    layer: nn.Module
    layer_idx: int
    desk: Desk = field(default_factory=Desk)
    sites: dict[str, Site] = field(default_factory=dict)  # kind to site
    placed: list[str] = field(default_factory=list)  # slots that hold a stand-in
    handles: list[Any] = field(default_factory=list)
    adapter: tuple[str, PIA] | None = None  # ("skip" or "keep", the adapter at work at the attention)

    @property
    def active(self) -> bool:
        """True if an adapter of this layer reads the prompt."""
        return bool(self.handles)


class EASModel(nn.Module):
    """The model with its adapters. Made by `attach` or `load`; the contract is in the methods' docstrings.

    Attributes: `base` (the transformers model), `config` (EASConfig), `sites` (list[Site]), `num_sites`,
    `adapters` (nn.ModuleDict: site number, then "skip" or "keep"; all that is trained and saved).
    """

    supports_gradient_checkpointing = True

    def __init__(self, base: nn.Module, config: EASConfig | None = None) -> None:
        super().__init__()
        config = config or EASConfig()
        if is_attached(base):
            raise ConfigError("this model carries eas_kit adapters already; eas_kit.detach(net) it first")
        sites = find_sites(base, config.kinds)
        self.config, self.sites, self.num_sites = config, sites, len(sites)
        self.adapters = _make_adapters(base, sites, config)
        self.base = base
        self.training = base.training
        self._unfrozen = [p for p in base.parameters() if p.requires_grad]
        for parameter in self._unfrozen:
            parameter.requires_grad_(False)
        seats: dict[int, Seat] = {}
        for site in sites:
            layer = base.get_submodule(site.layer_path)
            seats.setdefault(site.layer, Seat(layer, site.layer_idx)).sites[site.kind] = site
        self._seats = list(seats.values())
        self._mask: tuple[int, ...] = ()
        self._merge: Merge | None = None
        self._prompt: Tensor | None = None  # (B, S) bool during a prefill or training forward
        self._inside = False  # a forward of the base model is running
        self._explicit: Tensor | None = None  # prompt_mask of the running net.forward
        self._given: Tensor | None = None  # (b, P) bool mask of the running net.generate
        self._fold_next = False  # merge when the running generate has prefilled
        self._detached = False
        self._checkpointing = False  # switched on through this object
        self._parameter_names = list(inspect.signature(base.forward).parameters)
        self._top_handles = [
            base.register_forward_pre_hook(self._enter, with_kwargs=True),
            base.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        self._fill_seats()

    # ------------------------------------------------------------------------------------------------ the mask

    @property
    def mask(self) -> tuple[int, ...]:
        """The skipped sites, sorted, zero-based. Settable at any time; `()` skips none."""
        return self._mask

    @mask.setter
    def mask(self, sites: Iterable[int]) -> None:
        self._check_usable("set net.mask")
        mask = check_mask(sites, self.num_sites)
        attentions = {site.index for site in self.sites if site.kind == "mha"}
        if attentions and attentions <= set(mask):
            raise ConfigError(
                f"mask {list(mask)} skips all {len(attentions)} attentions; keep at least one, or nothing carries"
                " information from one position to another and the KV cache has no length"
            )
        self._mask = mask
        self._fill_seats()

    def _fill_seats(self) -> None:
        self._clear_seats()
        for seat in self._seats:
            self._fill(seat)

    def _fill(self, seat: Seat) -> None:
        layer, desk, adapter_at = seat.layer, seat.desk, self.adapters
        mha, ffn = seat.sites.get("mha"), seat.sites.get("ffn")
        names = (mha or ffn).names
        if mha and mha.index in self._mask:
            pia, source = adapter_at[str(mha.index)]["skip"], self.config.source
            attention, norm = getattr(layer, names.attention), getattr(layer, names.norm_ffn)
            self._place(seat, names.attention, SkippedAttention(attention, seat.layer_idx, pia, desk, source))
            self._place(seat, names.norm_ffn, SkippedNorm(norm, mha.gain_offset, pia, desk, source))
            seat.adapter = ("skip", pia)
        elif mha and self.config.adapt_rank:
            seat.adapter = ("keep", adapter_at[str(mha.index)]["keep"])
        if ffn and ffn.index in self._mask:
            feed_forward = SkippedFeedForward(getattr(layer, names.ffn), adapter_at[str(ffn.index)]["skip"], desk)
            self._place(seat, names.ffn, feed_forward)
        if seat.adapter or names.ffn in seat.placed:
            self._hook(seat)

    def _place(self, seat: Seat, slot: str, stand_in: Any) -> None:
        place(seat.layer, slot, stand_in)
        seat.placed.append(slot)

    def _hook(self, seat: Seat) -> None:
        """Deliver the prompt mask to this layer's attention, as a keyword: gradient checkpointing keeps it."""
        seat.handles.append(seat.layer.register_forward_pre_hook(self._at_layer, with_kwargs=True))
        name = next(iter(seat.sites.values())).names.attention
        if name not in seat.placed:
            pia = seat.adapter[1] if seat.adapter else None
            hook = BeforeAttention(seat.layer_idx, pia, seat.desk)
            seat.handles.append(getattr(seat.layer, name).register_forward_pre_hook(hook, with_kwargs=True))

    def _unhook(self, seat: Seat) -> None:
        for handle in seat.handles:
            handle.remove()
        seat.handles.clear()

    def _clear_seats(self) -> None:
        for seat in self._seats:
            self._unhook(seat)
            for slot in reversed(seat.placed):
                restore(seat.layer, slot)
            seat.placed.clear()
            seat.desk.clear()
            seat.adapter = None

    # ---------------------------------------------------------------------------------------- one forward pass

    def forward(self, *args: Any, prompt_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's forward, with the mask and the adapters in effect.

        The prompt of each example is what stands before its first label that is not -100, padding excluded; or
        `prompt_mask` (B, S) bool. Raises PromptError in train mode without either, and for an empty prompt. In eval
        mode without labels all attended positions are prompt: right for a prefill, wrong for scoring an answer.
        """
        self._check_usable("call net(...)", merged=False)
        if self.training or kwargs.get("labels") is not None:
            kwargs.setdefault("use_cache", False)  # nobody decodes after a loss
        before, self._explicit = self._explicit, prompt_mask
        try:
            return self.base(*args, **kwargs)
        finally:
            self._explicit = before

    def _enter(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        values = {**dict(zip(self._parameter_names, args, strict=False)), **kwargs}
        if self._merge is not None:
            self._merge.check(values.get("past_key_values"))
        else:
            self._prompt = self._read_prompt(values)
        self._inside = True

    def _leave(self, base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        prefilled, self._prompt, self._inside = self._prompt is not None, None, False
        for seat in self._seats:
            seat.desk.clear()
        if prefilled and self._fold_next and output is not None:
            self._fold_next = False
            self._start_merge(output["past_key_values"])

    def _read_prompt(self, values: dict[str, Any]) -> Tensor | None:
        first = next((seat.layer_idx for seat in self._seats if seat.active), None)
        if first is None:
            return None
        cache = values.get("past_key_values")
        if cache is not None:
            past = cache.get_seq_length()  # of a static cache: a tensor, not looked at while decoding
            if has_route(cache, first):
                if torch.is_tensor(past) or past > 0:
                    return None
            elif int(past) > 0:
                raise PromptError(
                    f"past_key_values holds {int(past)} positions but nothing of their prompt for these adapters; it"
                    " was filled without them or under another mask: prefill the whole prompt with net and a new cache"
                )
            renew(cache, frozenset(s.layer_idx for s in self._seats if not s.adapter or s.adapter[0] != "skip"))
        if self._explicit is not None:
            return self._checked_explicit(values)
        if self._given is not None:
            return generate_prompt(self._given, values)
        return forward_prompt(values, training=self.base.training)

    def _checked_explicit(self, values: dict[str, Any]) -> Tensor:
        tokens = values.get("input_ids") if values.get("input_ids") is not None else values["inputs_embeds"]
        if self._explicit.shape != tokens.shape[:2]:
            raise PromptError(
                f"prompt_mask: wanted (B, S) = {tuple(tokens.shape[:2])}, got {tuple(self._explicit.shape)}"
            )
        return check_prompt(self._explicit.bool())

    def _at_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if not self._inside:
            raise PromptError(
                "a decoder layer was called outside a forward of the whole model, where the prompt is unknown; call"
                " net(...) or net.generate(...), or eas_kit.detach(net) to use parts of the base model"
            )
        return args, {**kwargs, "eas_prompt": self._prompt}

    # ------------------------------------------------------------------------------------------------ generate

    def generate(self, inputs: Tensor | None = None, *, merge: bool = False, **kwargs: Any) -> Any:
        """The base model's generate, on the processor's inputs: greedy, sampling, beams, prompt lookup, any batch.

        With `merge=True` (one prompt only) the adapters are folded into the weights after prefill, the rest is
        decoded at the cost of the plain, smaller model, and the weights are restored bit for bit, also after an
        exception. Raises MergeError where that is not possible and PromptError where the prompt is not known. Call
        this and not `net.base.generate`, which cannot tell drafted or already written tokens from the prompt.
        """
        self._check_usable("call net.generate")
        if inputs is not None:
            kwargs["input_ids"] = inputs
        given = self._prompt_of_generate(kwargs)
        if merge:
            self._check_mergeable(given, kwargs)
        before, self._given = self._given, given
        try:
            cache = kwargs.get("past_key_values")
            if merge and cache is not None and any(has_route(cache, seat.layer_idx) for seat in self._seats):
                with merged(self, cache):  # the next turn on a cache that knows its prompt
                    return self.base.generate(**kwargs)
            self._fold_next = merge
            return self.base.generate(**kwargs)
        finally:
            self._given, self._fold_next = before, False
            self._end_merge()

    def generate_batch(self, *args: Any, **kwargs: Any) -> None:
        """Refused: continuous batching splits and shares prompts."""
        raise PromptError(
            "generate_batch (continuous batching) feeds prompts in pieces, but their mean needs the whole prompt at"
            " once; use net.generate"
        )

    def prefill(self, **inputs: Any) -> Any:
        """One forward over whole prompts: `.logits` (B, 1, vocab) and `.past_key_values`, ready for `merged`."""
        if inputs.get("labels") is not None:
            raise PromptError("prefill takes prompts, without labels; for a loss call net(**batch)")
        if self.training:
            raise PromptError("prefill is for inference: call net.eval() first")
        with torch.no_grad():
            return self(**inputs, use_cache=True, logits_to_keep=1)

    def _prompt_of_generate(self, kwargs: dict[str, Any]) -> Tensor:
        """(b, P) bool mask of the prompts given to generate; writes an inferred attention_mask into kwargs."""
        if kwargs.pop("labels", None) is not None:
            raise PromptError(
                "generate takes prompts, but this batch has labels, so its input_ids hold the answers too;"
                " collate it with answers=False"
            )
        config = kwargs.get("generation_config") or self.base.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
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
            pad, end = kwargs.get("pad_token_id", config.pad_token_id), kwargs.get("eos_token_id", config.eos_token_id)
            if pad is not None and tokens.dim() == 2 and pad not in (end if isinstance(end, list) else [end]):
                mask = tokens.ne(pad).long()  # what transformers infers as well
            kwargs["attention_mask"] = mask
        if mask.dim() != 2:
            raise PromptError(f"generate: wanted a 2D attention_mask (B, S), got {tuple(mask.shape)}")
        return check_prompt(mask.bool())

    # --------------------------------------------------------------------------------------- merge, life cycle

    def _check_mergeable(self, given: Tensor, kwargs: dict[str, Any]) -> None:
        if len(given) != 1:
            raise MergeError(
                f"merge=True folds the adapters into the weights for one prompt, but the inputs hold {len(given)};"
                " generate them one by one, or all at once with merge=False"
            )
        config = kwargs.get("generation_config") or self.base.generation_config
        if kwargs.get("use_cache", config.use_cache) is False:
            raise MergeError("merge=True needs the KV cache, where the prompt's state lives; leave use_cache on")

    def _start_merge(self, cache: Any) -> None:
        self._check_usable("merge")
        self._merge = Merge(self, cache)
        for seat in self._seats:  # nothing is left for the hooks to do, and a decoding step is faster without
            self._unhook(seat)

    def _end_merge(self) -> None:
        if self._merge is not None:
            self._merge.undo()
            self._merge = None
            for seat in self._seats:
                if seat.adapter:
                    self._hook(seat)

    def _check_usable(self, action: str, *, merged: bool = True) -> None:
        if self._detached:
            raise EASError(f"cannot {action}: this EASModel was detached from its base; eas_kit.attach makes a new one")
        if merged and self._merge is not None:
            raise MergeError(
                f"cannot {action}: the adapters are folded into the weights for one prompt; leave the block of"
                " merged(net, cache) first"
            )

    @property
    def is_merged(self) -> bool:
        """True inside a block of `merged(net, cache)`."""
        return self._merge is not None

    @property
    def device(self) -> torch.device:
        return next(self.adapters.parameters()).device

    def active_adapters(self) -> dict[str, PIA]:
        """The adapters the present mask uses, by their name in the state dict, e.g. {"2.skip": PIA, "3.keep": PIA}."""
        out = {}
        for site in self.sites:
            role = "skip" if site.index in self._mask else "keep"
            if role in self.adapters[str(site.index)]:
                out[f"{site.index}.{role}"] = self.adapters[str(site.index)][role]
        return out

    def trainable_parameters(self, *, active: bool = False) -> list[nn.Parameter]:
        """The adapters' parameters that train; with `active` only those the present mask uses."""
        owners = self.active_adapters().values() if active else [self.adapters]
        return [p for owner in owners for p in owner.parameters() if p.requires_grad]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """As the base model's; `detach` and `gradient_checkpointing_disable` leave no trace of it."""
        if hasattr(self.base, "activation_checkpointing_enable"):  # its name in newer transformers
            self.base.activation_checkpointing_enable(activation_checkpointing_kwargs=gradient_checkpointing_kwargs)
        else:
            self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
        self._checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        if hasattr(self.base, "activation_checkpointing_disable"):
            self.base.activation_checkpointing_disable()
        else:
            self.base.gradient_checkpointing_disable()
        if self._checkpointing:
            self.base.disable_input_require_grads()
        self._checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        value = getattr(self.base, "is_activation_checkpointing", None)
        return bool(self.base.is_gradient_checkpointing if value is None else value)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter_config.json, adapter_model.safetensors and mask.json: all or nothing."""
        self._check_usable("save")
        save_adapters(self, Path(folder))

    def detach(self) -> nn.Module:
        """See `detach`."""
        self._check_usable("detach")
        if self._checkpointing:
            self.gradient_checkpointing_disable()
        self._clear_seats()
        for handle in self._top_handles:
            handle.remove()
        for parameter in self._unfrozen:
            parameter.requires_grad_(True)
        self._detached = True
        return self.base

    def extra_repr(self) -> str:
        return f"mask={list(self._mask)}, num_sites={self.num_sites}"


def _make_adapters(base: nn.Module, sites: list[Site], config: EASConfig) -> nn.ModuleDict:
    shape = {
        "groups": config.groups,
        "scale": config.scale,
        "temperature": config.temperature,
        "dropout": config.dropout,
    }
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
        weight = next(base.get_submodule(site.layer_path).parameters())
        # half precision is too coarse for the small steps of an optimiser: train in float32, cast after if wanted
        wide = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        adapters[str(site.index)] = roles.to(device=weight.device, dtype=wide)
    return adapters.train(base.training)


def is_attached(base: nn.Module) -> bool:
    """True if an EASModel holds this base model."""
    return any(isinstance(getattr(hook, "__self__", None), EASModel) for hook in base._forward_pre_hooks.values())


def attach(base: nn.Module, config: EASConfig | None = None) -> EASModel:
    """Freeze `base` and give all its sites adapters; nothing is skipped until `net.mask` is set.

    New adapters return their input, so with mask () the outputs are those of the base model. Raises
    UnsupportedModelError for a model that does not fit, ConfigError for settings that do not fit the model.
    """
    return EASModel(base, config)


def detach(net: EASModel) -> nn.Module:
    """The base model again, bit for bit: parameters, modules, hooks and requires_grad as before `attach`."""
    return net.detach()


def load(folder: str | Path, base: nn.Module | None = None, **kwargs: Any) -> EASModel:
    """An EASModel from a folder written by `net.save_pretrained`, with its mask set.

    `base` is the model it was attached to; without it, `eas_kit.load_model` loads the one named in the folder
    (`kwargs` go there). Raises ConfigError for missing files and for a base of another shape.
    """
    return load_adapters(EASModel, Path(folder), base, kwargs)
