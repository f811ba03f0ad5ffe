"""EASModel: a transformers model with adapters at its sites, and a mask that says which sites are skipped.

`attach` freezes the base model and adds an adapter for "skipped" and one for "kept" to every attention. Setting
`net.mask` swaps modules in and out of the layers' slots; the layers' own code is never touched, nothing is
renumbered, and `detach` gives the base model back bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import EASConfig
from .errors import ConfigError, EASError, MergeError, PromptError, UnsupportedModelError
from .hub import push
from .masks import check_mask
from .merging import (
    FORMS,
    Merge,
    MergedLinear,
    check_attentions_only,
    check_foldable,
    default_form,
    merged,
    one_prompt,
    routes_of,
)
from .pia import PIA
from .prompt import (
    check_explicit,
    check_same_prompt,
    find_cache,
    forward_prompt,
    generate_prompt,
    has_route,
    name_cache,
    option,
    padded_positions,
    read_given,
    renew,
)
from .saving import load_adapters, save_adapters
from .seats import make_adapters, make_seats
from .sites import find_sites
from .slots import RECORDED, install_recorders
from .trained_parts import TrainedParts, wanted_parts

__all__ = ["EASModel", "attach", "detach", "load"]


NOT_SEARCHED = {"made_by": "user", "seed": None}


class Turn:
    """One thread after the other; a copy of the net has a turn of its own, as locks can be neither copied nor saved."""

    def __init__(self) -> None:
        self.lock = RLock()

    def __reduce__(self) -> tuple:
        return Turn, ()


def in_turn(method: Callable) -> Callable:
    """A method of EASModel in which other threads wait: what a running forward knows of its prompt is on the net."""

    @wraps(method)
    def waiting(self: EASModel, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        with self._turn.lock:
            return method(self, *args, **kwargs)

    return waiting


class EASModel(nn.Module):
    """The model with its adapters. Made by `attach` or `load`; the contract is in the methods' docstrings.

    Attributes: `base` (the transformers model), `config` (EASConfig), `sites` (list[Site]), `num_sites`,
    `mask_origin` (made_by and seed of the present mask, for its file),
    `adapters` (nn.ModuleDict: site number, then "skip" or "keep"), and `trained_parts` (of the base, see
    `config.modules_to_save`): together all that is trained and saved.
    """

    supports_gradient_checkpointing = True

    def __init__(self, base: nn.Module, config: EASConfig | None = None) -> None:
        super().__init__()
        if isinstance(base, EASModel):
            raise ConfigError(
                "attach: this model is attached already; eas_kit.detach(net) it first, or use it as it is"
            )
        if not isinstance(base, nn.Module):
            what = (
                "load_model returns (model, processor)" if isinstance(base, tuple) else "load it with load_model first"
            )
            raise UnsupportedModelError(f"attach: wanted a model, got a {type(base).__name__}: {what}")
        if config is not None and not isinstance(config, EASConfig):
            raise ConfigError(f"attach: wanted an EASConfig, got a {type(config).__name__}: EASConfig(**settings)")
        config = config or EASConfig()
        if type(base).__module__.startswith("peft."):
            raise UnsupportedModelError(
                f"attach: {type(base).__name__} is peft's wrapper, whose generate goes past it to the model inside;"
                " attach to what model.merge_and_unload() returns, or to model.get_base_model() with the other adapter"
                " at work"
            )
        if is_attached(base):
            raise ConfigError("this model carries eas_kit adapters already; eas_kit.detach(net) it first")
        sites = find_sites(base, config.kinds)
        parts = wanted_parts(base, config.modules_to_save)
        if parts:  # also what the model itself names goes into the file, where its class may name others one day
            config = replace(config, modules_to_save=parts)
        self.config, self.sites, self.num_sites = config, sites, len(sites)
        self.adapters = make_adapters(base, sites, config)
        self.trained_parts = TrainedParts(base, parts)
        self.base = base
        self.training = base.training
        self._unfrozen = [p for p in base.parameters() if p.requires_grad]
        for parameter in self._unfrozen:
            parameter.requires_grad_(False)
        self.trained_parts.train()
        self._seats = make_seats(base, sites, self._layer_prompt)
        self._mask: tuple[int, ...] = ()
        self.mask_origin: dict[str, Any] = dict(NOT_SEARCHED)
        self._merge: Merge | None = None
        self._prompt: Tensor | None = None  # (B, S) bool during a prefill or training forward
        self._inside = False  # a forward of the base model is running
        self._recorders = False  # transformers has put its recorders on the base's own modules
        self._explicit: Tensor | None = None  # prompt_mask of the running net.forward
        self._given: Tensor | None = None  # (b, P) bool mask of the running net.generate
        self._fold_next: str | None = None  # the form in which to merge when the running generate has prefilled
        self._folded: dict[
            tuple[int, str], MergedLinear
        ] = {}  # by layer_idx and name; allocated once, see MergedLinear
        self._detached = False
        self._turn = Turn()
        self._checkpointing = False  # switched on through this object
        self._parameter_names = list(inspect.signature(base.forward).parameters)
        self._top_handles: list[Any] = []
        self._hook_top()
        self._fill_seats()

    def _hook_top(self) -> None:
        self._top_handles = [
            self.base.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.base.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def _unhook_top(self) -> None:
        for handle in self._top_handles:
            handle.remove()
        self._top_handles = []

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
        for seat in self._seats:
            seat.check_free()
        if mask != self._mask:
            self._mask, self.mask_origin = mask, dict(NOT_SEARCHED)
            self._folded.clear()
        self._fill_seats()

    def _fill_seats(self) -> None:
        for seat in self._seats:
            seat.fill(self._mask, self.adapters, self.config)

    # ---------------------------------------------------------------------------------------- one forward pass

    @in_turn
    def forward(self, *args: Any, prompt_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's forward, with the mask and the adapters in effect. Threads take turns, as in `generate`.

        The prompt of each example is what stands before its first label that is not -100, padding excluded; or
        `prompt_mask` (B, S) bool. Raises PromptError in train mode without either, and for an empty prompt. In eval
        mode without labels all attended positions are prompt: right for a prefill, wrong for scoring an answer.
        """
        self._check_usable("call net(...)", merged=False)
        if self._merge is not None:
            self._merge.check(find_cache(kwargs))
        if self.training or kwargs.get("labels") is not None:
            kwargs.setdefault("use_cache", False)  # nobody decodes after a loss
        name_cache(kwargs, self._parameter_names)
        before, self._explicit = self._explicit, prompt_mask
        try:
            return self.base(*args, **kwargs)
        finally:
            self._explicit = before

    def _enter(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        values = {**dict(zip(self._parameter_names, args, strict=False)), **kwargs}
        if not self._recorders and any(values.get(name, getattr(base.config, name, False)) for name in RECORDED):
            self._recorders = True
            install_recorders(base, [(seat.layer, slot) for seat in self._seats for slot in seat.placed])
        if self._merge is not None:
            self._merge.check(find_cache(values))
        else:
            self._prompt = self._read_prompt(values)
        self._inside = True

    def _leave(self, base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        prefilled, self._prompt, self._inside = self._prompt is not None, None, False
        for seat in self._seats:
            seat.desk.clear()
        if prefilled and self._fold_next and output is not None:
            form, self._fold_next = self._fold_next, None
            self._start_merge(find_cache(output), form)
            # nobody else can bring another cache within this generate, and a step that torch.compile captured would be
            # compiled anew if it had to look
            self._unhook_top()

    def _read_prompt(self, values: dict[str, Any]) -> Tensor | None:
        first = next((seat.layer_idx for seat in self._seats if seat.reads_prompt), None)
        if first is None:
            return None
        cache = find_cache(values)
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
            self._renew(cache)
        if self._explicit is not None:
            return check_explicit(self._explicit, values)
        if self._given is not None:
            return generate_prompt(self._given, values)
        return forward_prompt(values, training=self.base.training)

    def _renew(self, cache: Any) -> None:
        renew(cache, frozenset(seat.layer_idx for seat in self._seats if seat.role != "skip"))

    def _layer_prompt(self) -> Tensor | None:
        if not self._inside:
            raise PromptError(
                "a decoder layer was called outside a forward of the whole model, where the prompt is unknown; call"
                " net(...) or net.generate(...), or eas_kit.detach(net) to use parts of the base model"
            )
        return self._prompt

    # ------------------------------------------------------------------------------------------------ generate

    @in_turn
    def generate(self, inputs: Tensor | None = None, *, merge: bool | str = False, **kwargs: Any) -> Any:
        """The base model's generate, on the processor's inputs, with every argument it takes.

        `merge`: decode without adapters. The prompts are read once, the adapters folded for them, the rest decoded, and
        the model restored bit for bit, also after an exception. "per_prompt": into the weights, for one prompt;
        "low_rank": condensed, exact for every row of any batch; True: the first for one prompt, the second for several.

        Raises MergeError where linears cannot be rewritten and PromptError where the prompt is not known, or where it
        would not be read in one piece: a prefill in chunks, a growing chat on the cache of an earlier turn. Call this
        and not `net.base.generate`, which cannot tell drafted or already written tokens from the prompt.
        """
        tokens = kwargs.get("input_ids") if inputs is None else inputs
        if tokens is not None and not torch.is_tensor(tokens):
            raise PromptError(
                f"generate: wanted token ids (B, S), got a {type(tokens).__name__}: give text to the processor or"
                " tokenizer, and what that returns to net.generate(**inputs)"
            )
        name_cache(kwargs, self._parameter_names)
        if self._merge is not None and self._merge.cache is None and not merge:
            return self.base.generate(inputs, **kwargs)  # merged for all prompts: nothing to read
        self._check_usable("call net.generate")
        if any(isinstance(parameter, DTensor) for parameter in self.adapters.parameters()):
            raise EASError(
                "the adapters are sharded (FSDP2) and gathered for net.forward alone; after fully_shard(net) call"
                ' torch.distributed.fsdp.register_fsdp_forward_method(net, "generate")'
            )
        if inputs is not None:
            kwargs["input_ids"] = inputs
        given = read_given(kwargs, self.base.generation_config)
        form = self._form(merge, given, kwargs)
        cache = find_cache(kwargs)
        length = 0 if cache is None else int(cache.get_seq_length())
        # cropped to nothing, a cache still has the routes of the prompt that it held
        filled = length > 0 and any(has_route(cache, seat.layer_idx) for seat in self._seats)
        if filled:
            check_same_prompt(given, cache)
        elif cache is not None and length == 0:
            self._renew(cache)  # here already: generate sizes the masks of a static cache by its entries
        before, self._given = self._given, given
        try:
            if form and filled:
                with merged(self, cache, form):
                    return self.base.generate(**kwargs)
            self._fold_next = form
            return self.base.generate(**kwargs)
        finally:
            self._given, self._fold_next = before, None
            self._end_merge()

    def generate_batch(self, *args: Any, **kwargs: Any) -> None:
        """Refused: continuous batching splits and shares prompts."""
        raise PromptError(
            "generate_batch (continuous batching) feeds prompts in pieces, but their mean needs the whole prompt at"
            " once; use net.generate"
        )

    @in_turn
    def prefill(self, **inputs: Any) -> Any:
        """One forward over whole prompts: `.logits` (B, 1, vocab) and `.past_key_values`, ready for `merged`.

        Rows with padding get the position_ids that `generate` gives them, where the family has no scheme of its own.
        `generate` goes on with the cache as it is; steps by hand, net(input_ids=..., past_key_values=cache), on rows
        with padding need the attention_mask and the position_ids that continue.
        """
        if inputs.get("labels") is not None:
            raise PromptError("prefill takes prompts, without labels; for a loss call net(**batch)")
        if self.training:
            raise PromptError("prefill is for inference: call net.eval() first")
        own_positions = "position_ids" not in self._parameter_names or "paligemma" in self.base.config.model_type
        for module in self.base.modules():  # Qwen-VL keeps the positions of the batch before, for its own generate
            own_positions = own_positions or hasattr(module, "rope_deltas")
            if getattr(module, "rope_deltas", None) is not None:
                module.rope_deltas = None
        if not own_positions and inputs.get("position_ids") is None:
            inputs["position_ids"] = padded_positions(inputs)
        with torch.no_grad():
            return self(**inputs, use_cache=True, logits_to_keep=1)

    # --------------------------------------------------------------------------------------- merge, life cycle

    def _form(self, merge: bool | str, given: Tensor, kwargs: dict[str, Any]) -> str | None:
        """The form to merge in, None for not at all; MergeError for what cannot be merged."""
        if merge is False or merge is None:
            return None
        if merge is not True and merge not in FORMS:
            raise MergeError(f"generate: wanted merge=False, True or one of {FORMS}, got {merge!r}")
        form = default_form(len(given)) if merge is True else merge
        if form == "per_prompt" and len(given) != 1:
            raise MergeError(
                f'merge="per_prompt" folds the adapters into the weights for one prompt, but the inputs hold'
                f' {len(given)}; generate them one by one, or with merge="low_rank"'
            )
        if option(kwargs, self.base.generation_config, "use_cache") is False:
            raise MergeError(f"merge={merge!r} needs the KV cache, where the prompt's state lives; leave use_cache on")
        early = option(kwargs, self.base.generation_config, "assistant_early_exit")
        if early is not None:
            raise MergeError(
                f"merge={merge!r} folds once the whole model has read the prompt, but with assistant_early_exit={early}"
                " its first layers read it alone and first; leave out one of the two"
            )
        check_attentions_only(self) if merge == "low_rank" else check_foldable(self)
        return form

    def _start_merge(self, cache: Any, form: str | None = None) -> None:
        self._check_usable("merge")
        routes = routes_of(self, cache)
        if form not in (None, *FORMS):
            raise MergeError(f"merged: wanted one of {FORMS} or None for form, got {form!r}")
        single = one_prompt(routes)
        form = form or ("per_prompt" if single else "low_rank")
        if form == "per_prompt" and not single:
            raise MergeError(
                'the cache holds different prompts, and form "per_prompt" folds the adapters into the weights for one;'
                ' use form "low_rank"'
            )
        self._merge = Merge(self, routes, form, cache)

    def _end_merge(self) -> None:
        if self._merge is not None:
            self._merge.undo()
            self._merge = None
            if not self._top_handles:
                self._hook_top()

    def _check_usable(self, action: str, *, merged: bool = True) -> None:
        if self._detached:
            raise EASError(f"cannot {action}: this EASModel was detached from its base; eas_kit.attach makes a new one")
        if merged and self._merge is not None:
            raise MergeError(
                f"cannot {action}: the adapters are folded away; leave the block of merged(net, cache) or of a static"
                " merge first"
            )

    @property
    def is_merged(self) -> bool:
        """True inside a block of `merged(net, cache)` or of a static merge."""
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
        """The parameters that train: the adapters', with `active` only those the present mask uses, and those of
        `config.modules_to_save`."""
        owners = self.active_adapters().values() if active else [self.adapters]
        every = [p for owner in owners for p in owner.parameters()] + self.trained_parts.parameters
        return [p for p in every if p.requires_grad]

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
        """Write adapter_config.json, adapter_model.safetensors, mask.json and a model card: all or nothing.

        A README.md that is not from here, or was edited, is kept. `eas_kit.load(folder)` needs nothing else.
        """
        self._check_usable("save")
        save_adapters(self, Path(folder))

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Put the files of `save_pretrained` into the repository `user/name` of the Hugging Face hub.

        It is made if it does not exist. `options`: private, token, revision (a branch), create_pr, commit_message.
        Returns huggingface_hub's CommitInfo; its errors (no right to write there, no connection) come as they are.
        """
        self._check_usable("push")
        return push(self, repo_id, **options)

    def detach(self) -> nn.Module:
        """See `detach`."""
        self._check_usable("detach")
        if self._checkpointing:
            self.gradient_checkpointing_disable()
        for seat in self._seats:
            seat.clear()
        self._unhook_top()
        self._folded.clear()
        self.trained_parts.restore()
        for parameter in self._unfrozen:
            parameter.requires_grad_(True)
        self._detached = True
        return self.base

    def extra_repr(self) -> str:
        return f"mask={list(self._mask)}, num_sites={self.num_sites}"


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
    """An EASModel from what `net.save_pretrained` or `net.push_to_hub` wrote, with its mask set.

    `folder` is a folder, or `user/name` on the Hugging Face hub, where `revision` is that of the adapters. `base` is
    the model they were attached to; without it, `eas_kit.load_model` loads the one that the folder names, at the
    revision and in the dtype noted there (`kwargs` go to it; `token`, `cache_dir`, `local_files_only` hold for both).
    Warns for a folder from a newer version and for a base of another revision. Raises ConfigError for files that are
    missing, damaged or do not go together, and for a base of another class or shape, which is left as it was.
    """
    return load_adapters(EASModel, folder, base, kwargs)
