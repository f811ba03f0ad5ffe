"""A language model, with adapters and a mask, run on the meta device: what it holds, without holding it.

Prefill, training step and optimiser step are the ones of the real model, on tensors without data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .baselines import full_tuning
from .config import EASConfig
from .errors import ConfigError, EASError, MergeError, UnsupportedModelError
from .families import readers
from .masks import check_mask
from .merging import MergedLinear, check_attentions_only, condense, fold_linear, merge_target, routes_of
from .model import EASModel, attach
from .processes import recompute
from .sites import find_sites
from .slots import skipping
from .tracing import LiveBytes
from .trained_parts import TrainedParts, wanted_parts


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all the tensors, each once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def all_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    return chain(module.parameters(), module.buffers())


class DryRun:
    """The language model on the meta device, with adapters and mask, and what is measured on it."""

    def __init__(self, base: nn.Module, eas: EASConfig | None, mask: tuple[int, ...], attention: str) -> None:
        self.base, self.decoder, self.attention = base, base.get_decoder(), attention
        self.net: EASModel | None = None
        self.parts = TrainedParts(base, wanted_parts(base, eas.modules_to_save) if eas is not None else ())
        if eas is not None:
            self.net = attach(self.decoder, replace(eas, modules_to_save=()))
            self.net.mask = mask
            mask = self.net.mask
        elif mask:
            sites = find_sites(self.decoder)
            mask = check_mask(mask, len(sites))
            if len(mask) == len(sites):
                raise ConfigError(f"mask {list(mask)} skips all attentions; keep at least one")
            self._skipping = skipping(self.decoder, mha=mask)  # for good, as the model is this object's own
            self._skipping.__enter__()
        self.mask = mask

    def adapters(self) -> dict[str, int]:
        if self.net is None:
            return {}
        found = {"skip": 0, "keep": 0}
        for roles in self.net.adapters.values():
            for role, adapter in roles.items():
                found[role] += count_bytes(adapter.parameters())
        used = self.net.active_adapters().values()
        return found | {"active": count_bytes(p for adapter in used for p in adapter.parameters())}

    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        """Hidden states (B, S, d) of the last layer."""
        rows, length = ids.shape
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": cache is not None}
        if self.attention == "eager":  # as transformers makes it, which has to look at values to do so
            inputs["attention_mask"] = torch.empty(rows, 1, length, length, dtype=self.base.dtype, device="meta")
        try:
            if self.net is not None:
                prompt = torch.empty(rows, length, dtype=torch.bool, device="meta")
                return self.net(**inputs, prompt_mask=prompt).last_hidden_state
            return self.decoder(**inputs).last_hidden_state
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, EASError):
                raise
            raise UnsupportedModelError(
                f"{type(self.decoder).__name__} does not run on the meta device in {self.base.dtype}, so that its"
                f" memory cannot be told beforehand ({str(error).splitlines()[0]}); another dtype may do (for mixtures"
                " of experts: bfloat16), and eas_kit.measure.parameters(config) needs no run"
            ) from error

    def known(self) -> Iterator[Tensor]:
        return chain(all_tensors(self.base), all_tensors(self.net) if self.net is not None else ())

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.decoder.config.get_text_config(decoder=True))

    def cache(self, rows: int, length: int) -> dict[str, int]:
        cache = self.new_cache()
        with torch.no_grad():
            self.forward(_ids(rows, length), cache)
        return _cache_bytes(cache)

    def prefill(self, rows: int, length: int) -> int:
        cache, head = self.new_cache(), self.base.get_output_embeddings()
        with torch.no_grad(), LiveBytes(self.known()) as memory:
            hidden = self.forward(_ids(rows, length), cache)
            if head is not None:
                head(hidden[:, -1:]).float()  # generate asks for the last position alone
        return memory.peak - sum(_cache_bytes(cache).values())

    def train(self, rows: int, length: int, checkpointing: bool) -> tuple[dict[str, int], int]:
        """Bytes of gradients and optimiser states, and the peak of one step without what was there before it."""
        head = self.base.get_output_embeddings()
        if head is None:
            raise ConfigError(
                f"training needs an output head, which {type(self.base).__name__} has not; take the model's"
                " configuration, or its class with a head"
            )
        if self.net is None:
            full_tuning(self.base)
        elif not self.net.trainable_parameters(active=True) and not self.parts.parameters:
            raise ConfigError("training: no adapter is at work under this mask; skip a site, or set adapt_rank")
        else:
            head.requires_grad_(False)
            self.base.get_input_embeddings().requires_grad_(False)
            self.parts.train()
        (self.net or self.base).train()
        if checkpointing:
            recompute(self.decoder if self.net is not None else self.base, True)
        with LiveBytes(self.known()) as memory:
            ids = _ids(rows, length)
            logits = head(self.forward(ids, None))
            loss = self.base.loss_function(logits=logits, labels=ids, vocab_size=logits.shape[-1])
            forward = memory.peak
            loss.backward()
        own = [] if self.net is None else [*self.net.adapters.parameters(), *self.parts.parameters]
        trained = [p for p in own or self.base.parameters() if p.requires_grad]
        inside = {id(p) for p in (self.net or self.decoder).parameters()}
        for parameter in trained:
            if id(parameter) not in inside and parameter.grad is None:  # a projector trains too, when images come
                parameter.grad = torch.empty_like(parameter)
        trained = [p for p in trained if p.grad is not None]
        optimizer = torch.optim.AdamW(trained, foreach=False)
        optimizer.step()
        states = (value for state in optimizer.state.values() for value in state.values())
        moments = count_bytes(value for value in states if isinstance(value, Tensor) and value.dim() > 0)
        gradients = count_bytes(p.grad for p in trained)
        # gradients come while activations go, and are counted apart: the larger of the two ends
        return {"gradients": gradients, "optimizer": moments}, max(forward, memory.peak - gradients)

    @torch.no_grad()
    def merge(self, rows: int) -> tuple[dict[str, int], str]:
        """Bytes of both forms of the merge, and why there is no per-prompt one."""
        if self.net is None:
            return {}, ""
        try:
            check_attentions_only(self.net)
        except MergeError as error:
            return {}, str(error)
        cache = self.new_cache()
        self.forward(_ids(rows, 1), cache)
        routes = routes_of(self.net, cache)
        seats = [
            (seat.pia, merge_target(self.net, seat), routes[seat.layer_idx]) for seat in self.net._seats if seat.role
        ]
        known = [*self.known(), *(value for route in routes.values() for value in route if value is not None)]
        with LiveBytes(known) as memory:
            condensed = [condense(pia, route, to.gain, to.shift, self.base.dtype) for pia, to, route in seats]
        found = {"low_rank": memory.live}
        del condensed
        try:
            names = [readers(to.parent, to.table, data=False) for _, to, _ in seats]
        except UnsupportedModelError as error:
            return found, str(error)
        copies = [
            [MergedLinear(getattr(to.parent, name)) for name in own]
            for (_, to, _), own in zip(seats, names, strict=True)
        ]
        held = [tensor for linears in copies for linear in linears for tensor in linear.folded]
        with LiveBytes([*known, *held]) as memory:
            for (pia, to, route), linears in zip(seats, copies, strict=True):
                factors = pia.factors(route.map(lambda t: t[:1]))
                for linear in linears:
                    linear.write(*fold_linear(linear.original, factors, to.gain, to.shift))
        return {"copies": count_bytes(held), "folding": memory.peak} | found, ""


def _ids(rows: int, length: int) -> Tensor:
    return torch.empty(rows, length, dtype=torch.long, device="meta")


def _cache_bytes(cache: Any) -> dict[str, int]:
    everything = (value for entry in cache.layers for value in vars(entry).values())
    held = [value for value in everything if isinstance(value, Tensor) and value.dim() > 1]  # without counters
    routes = [route for entry in cache.layers for route in getattr(entry, "routes", {}).values()]
    state = [value for route in routes for value in route if value is not None]
    return {"keys_values": count_bytes(held), "prompt_state": count_bytes(state)}
