"""What a model will need in memory, before it is loaded.

Nothing here is a formula. The model is built on the meta device, the adapters are attached to it, and a prefill, a
training step and an optimiser step run there: weights, adapters, KV cache, gradients and optimiser states are the bytes
of the tensors that then exist. Activations are the most that a prefill or a training step holds at once besides those
(`eas_kit.tracing.LiveBytes`): a rough figure, see `MemoryEstimate.activations`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .config import EASConfig, is_int
from .dryrun import DryRun, all_tensors
from .errors import ConfigError
from .meta import as_dtype, meta_model, read_config
from .model import EASModel
from .sites import decoder_layers, unwrap
from .tracing import register

BETWEEN = re.compile(r"projector|connector|merger|aligner", re.IGNORECASE)  # in the paths of what maps image to text
ATTENTIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by part. `totals` adds them up; printing it, or showing it in a notebook, gives a table."""

    model: str
    dtype: torch.dtype
    settings: dict[str, Any]
    """batch_size, prompt_tokens, new_tokens, mask, attention, training, gradient_checkpointing."""
    weights: dict[str, int]
    """vision (towers), projector, embeddings, language_layers, head (0 if tied to the embeddings), other."""
    adapters: dict[str, int]
    """skip, keep: of all sites, as `attach` makes both for each; active: of them the ones the mask uses."""
    cache: dict[str, int]
    """keys_values, of a DynamicCache, after the last new token (skipped attentions keep none); prompt_state: what
    adapters remember of the prompt."""
    merge: dict[str, int]
    """copies: the linears of the per-prompt merge, which stay for the next prompt; folding: on top while they are made;
    low_rank: the adapters condensed for a batch. Empty without adapters; low_rank alone with a `merge_problem`."""
    merge_problem: str
    """Why this mask cannot be merged per prompt, or at all; "" if it can."""
    activations: dict[str, int]
    """prefill; training (with `training`). The most held at once in the language model and its head, the logits and
    the loss included, the parts above not. Not in it: the vision tower at work, a kernel's own scratch memory, the
    allocator's waste. Peaks measured on small models on a CPU
    are 0.9 to 1.1 times these (tests/test_memory.py)."""
    training: dict[str, int]
    """gradients and optimizer (AdamW's two moments) of what trains: adapters in float32, in full tuning the weights
    in their own type. Empty without `training`."""

    @property
    def totals(self) -> dict[str, int]:
        """inference; with adapters also inference_merged (per prompt) and inference_low_rank (batch); training.

        All tensors that stay, and on top the larger of the things that pass: activations, folding.
        """
        stay = sum(self.weights.values()) + self.adapters.get("skip", 0) + self.adapters.get("keep", 0)
        cached, prefill = sum(self.cache.values()), self.activations["prefill"]
        found = {"inference": stay + cached + prefill}
        if "copies" in self.merge:
            found["inference_merged"] = stay + cached + self.merge["copies"] + max(prefill, self.merge["folding"])
        if "low_rank" in self.merge:
            found["inference_low_rank"] = found["inference"] + self.merge["low_rank"]
        if self.training:
            found["training"] = stay + sum(self.training.values()) + self.activations["training"]
        return found

    def _rows(self) -> Iterator[tuple[str, int]]:
        yield "weights", sum(self.weights.values())
        for part, size in self.weights.items():
            yield f"  {part}", size
        for part, size in self.adapters.items():
            yield f"adapters, {part}", size
        for part, size in chain(self.cache.items(), self.training.items()):
            yield part, size
        for part, size in self.merge.items():
            yield f"merge, {part}", size
        for part, size in self.activations.items():
            yield f"activations, {part} (rough)", size
        for part, size in self.totals.items():
            yield f"total, {part}", size

    @property
    def _title(self) -> str:
        s = self.settings
        skipped = f", {len(s['mask'])} attentions skipped" if s["mask"] else ""
        return (
            f"{self.model} in {str(self.dtype).removeprefix('torch.')}: batch {s['batch_size']},"
            f" {s['prompt_tokens']} prompt and {s['new_tokens']} new tokens{skipped}, {self._unit[0]}"
        )

    @property
    def _unit(self) -> tuple[str, int]:
        """Of the whole table, so that its rows compare: small models would be 0.000 GiB."""
        return ("MiB", 2**20) if max(self.totals.values()) < 0.1 * 2**30 else ("GiB", 2**30)

    def __str__(self) -> str:
        rows = [(name.replace("_", " "), f"{size / self._unit[1]:.3f}") for name, size in self._rows()]
        wide = max(len(name) for name, _ in rows)
        lines = [self._title, *(f"{name:<{wide}}  {size:>9}" for name, size in rows)]
        return "\n".join(lines + ([f"no per-prompt merge: {self.merge_problem}"] if self.merge_problem else []))

    def _repr_html_(self) -> str:
        from html import escape

        indent = {True: "padding-left:2em", False: ""}
        cells = "".join(
            f"<tr><th style='text-align:left;{indent[name.startswith(' ')]}'>"
            f"{escape(name.strip().replace('_', ' '))}</th>"
            f"<td style='text-align:right'>{size / self._unit[1]:.3f}</td></tr>"
            for name, size in self._rows()
        )
        note = f"<p>no per-prompt merge: {escape(self.merge_problem)}</p>" if self.merge_problem else ""
        return f"<table><caption>{escape(self._title)}</caption>{cells}</table>{note}"


def estimate_memory(
    target: Any,
    *,
    dtype: torch.dtype | str | None = None,
    batch_size: int = 1,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    eas: EASConfig | None = None,
    mask: Iterable[int] | None = None,
    training: bool = False,
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
) -> MemoryEstimate:
    """What inference, merged and not, and training will take, before anything is loaded.

    Args:
        target: a transformers config, a name or local folder (`eas_kit.meta.read_config`), or a model, of which an
            EASModel brings its own `eas` and `mask`.
        dtype: of the weights; None: the model's own, else the configuration's, else float32. No quantisation.
        prompt_tokens: with those of the images. Training sees `prompt_tokens + new_tokens` positions a row.
        eas: the adapters; None for none. Then training means full tuning, all but the vision tower.
        mask: skipped sites; without adapters, attentions that are just left out.
        attention: "sdpa" for any fused kernel, which never holds the scores, or "eager".

    Raises ConfigError for settings that make no sense, UnsupportedModelError for a model that does not fit.
    """
    whole = {"batch_size": (batch_size, 1), "prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 0)}
    for name, (value, least) in whole.items():
        if not is_int(value, least):
            raise ConfigError(f"estimate_memory: {name}: wanted a whole number from {least} up, got {value!r}")
    if attention not in ATTENTIONS:
        raise ConfigError(f"estimate_memory: attention: wanted one of {ATTENTIONS}, got {attention!r}")
    if eas is not None and not isinstance(eas, EASConfig):
        raise ConfigError(f"estimate_memory: eas: wanted an EASConfig or None, got a {type(eas).__name__}")
    if isinstance(target, EASModel):
        eas, mask = eas or target.config, target.mask if mask is None else mask
    if dtype is None and isinstance(target, nn.Module):
        dtype = next((p.dtype for p in unwrap(target).parameters() if p.is_floating_point()), None)
    config = read_config(target)
    dtype = as_dtype(dtype, config)
    base = meta_model(target, dtype, attn_implementation=register() if attention == "sdpa" else "eager")
    weights = _weights(base)
    run = DryRun(base, eas, tuple(mask or ()), attention)
    merge, problem = run.merge(batch_size)
    cache = run.cache(batch_size, prompt_tokens + max(new_tokens - 1, 0))  # the last new token is never read
    activations = {"prefill": run.prefill(batch_size, prompt_tokens)}
    trained: dict[str, int] = {}
    if training:
        trained, activations["training"] = run.train(batch_size, prompt_tokens + new_tokens, gradient_checkpointing)
    return MemoryEstimate(
        model=target if isinstance(target, str) else config.name_or_path or type(base).__name__,
        dtype=dtype,
        settings={name: value for name, (value, _) in whole.items()}
        | {"mask": run.mask, "attention": attention, "training": training}
        | {"gradient_checkpointing": gradient_checkpointing},
        weights=weights,
        adapters=run.adapters(),
        cache=cache,
        merge=merge,
        merge_problem=problem,
        activations=activations,
        training=trained,
    )


def _weights(base: nn.Module) -> dict[str, int]:
    decoder = base.get_decoder()
    owners = {
        "embeddings": base.get_input_embeddings(),
        "language_layers": decoder_layers(base)[1],
        "head": base.get_output_embeddings(),
        "other": decoder,
    }
    found = dict.fromkeys(("vision", "projector", *owners), 0)
    seen: set[int] = set()

    def charge(part: str, tensor: Tensor) -> None:
        if id(tensor) not in seen:  # a tied head is the embeddings' tensor
            seen.add(id(tensor))
            found[part] += tensor.nbytes

    for part, owner in owners.items():
        for tensor in all_tensors(owner) if owner is not None else ():
            charge(part, tensor)
    for name, tensor in chain(base.named_parameters(), base.named_buffers()):
        charge("projector" if BETWEEN.search(name) else "vision", tensor)
    return found
