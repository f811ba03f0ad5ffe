"""Parameters and multiply-accumulates, as dicts of plain numbers.

"FLOPs" in the paper are multiply-accumulates (one multiplication with its addition counts as one), and so they are
here; torch.utils.flop_counter counts twice that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import merging
from .errors import ConfigError
from .masks import check_mask
from .meta import meta_model, read_config
from .modes import eval_mode
from .pia import PIA
from .sites import find_sites, unwrap
from .slots import LowRank, skipping

PARTS = ("attention_projections", "attention_scores", "ffn", "adapter")


# -- parameters ----------------------------------------------------------------------------------------------------


def parameters(net: nn.Module | Any) -> dict[str, Any]:
    """Counts of parameters, each counted once, of a model, or of what `eas_kit.meta.meta_model` builds from a config.

    total, trainable (requires a gradient) and `share` = trainable / total; `language_model`: the decoder with its
    embeddings and head, without vision parts and adapters. For an EASModel also `adapters`: all of them by kind
    ("skip", "keep"); `active`: those that the present mask uses, and the parts of the base that train beside them
    (`EASConfig.modules_to_save`); `active_share` = active / language_model, the
    paper's "trainable parameters" (section 4.1), as the adapters that a mask does not use need not be kept.
    """
    if not isinstance(net, nn.Module):
        net = meta_model(net)
    plain = unwrap(net)
    decoder = plain.get_decoder() if hasattr(plain, "get_decoder") else plain
    head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    own = {id(p) for p in net.adapters.parameters()} if plain is not net else set()
    text = {id(p): p.numel() for m in (decoder, head) if m is not None for p in m.parameters() if id(p) not in own}
    total, trained = _count(net.parameters()), _count(p for p in net.parameters() if p.requires_grad)
    found = {"total": total, "trainable": trained, "share": trained / total, "language_model": sum(text.values())}
    if plain is net:
        return found
    every = defaultdict(int)
    for roles in net.adapters.values():
        for role, adapter in roles.items():
            every[role] += _count(adapter.parameters())
    active = defaultdict(int)
    for name, adapter in net.active_adapters().items():
        active[name.split(".")[-1]] += _count(adapter.parameters())
    if net.trained_parts.parameters:
        active["modules_to_save"] = _count(net.trained_parts.parameters)
    used = sum(active.values())
    return found | {
        "adapters": dict(every),
        "active": dict(active) | {"total": used},
        "active_share": used / found["language_model"],
    }


def _count(tensors: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in tensors)


# -- multiply-accumulates ------------------------------------------------------------------------------------------


def flops(
    target: Any, inputs: Mapping[str, torch.Tensor] | int | None = None, mask: Iterable[int] = (), *, tokens: int = 262
) -> dict[str, int]:
    """Multiply-accumulates by part of the decoder layers, and their "total".

    `flops(config_or_model, tokens=262, mask=())`: of one sequence of that many tokens, by the configuration alone (or
    the name of one, see `eas_kit.meta.read_config`): nothing is loaded or computed (meta device). `mask`: attentions
    merged away, which then cost nothing.
    `flops(net, inputs)`: of one forward of `net` as it stands (its mask, its adapters, merged or not) on a batch.

    Parts: attention_projections (q, k, v, o), attention_scores (QK and the weighted sum of V, over all pairs of
    positions, as the paper counts them), ffn, adapter (condensing and folding it included); total is their sum; `other`
    is what lies outside of the decoder layers (vision tower, projector, output head; 0 for a configuration).
    """
    if isinstance(inputs, Mapping):
        if tuple(mask):
            raise ConfigError("flops(net, inputs) counts the model as it stands; set net.mask instead of passing mask.")
        with eval_mode(target), torch.no_grad():  # as in a prefill: what stands in the inputs is the prompt
            return count_flops(target, lambda: target(**inputs))
    tokens = tokens if inputs is None else int(inputs)
    config = read_config(target)
    decoder = _meta_decoder(config)
    mask = check_mask(mask, len(find_sites(decoder)))
    width = config.get_text_config(decoder=True).hidden_size
    embeddings = torch.empty(1, tokens, width, device="meta")
    # A ready 4-D mask: the model would look into a 2-D one, and there is nothing to look at on the meta device.
    visible = torch.empty(1, 1, tokens, tokens, device="meta")
    with skipping(decoder, mha=mask):
        return count_flops(decoder, lambda: decoder(inputs_embeds=embeddings, attention_mask=visible, use_cache=False))


def count_flops(net: nn.Module, call: Callable[[], Any]) -> dict[str, int]:
    """Multiply-accumulates of `call()`, any use of `net` (a forward, a generate), by part as in `flops`."""
    ledger = _Ledger()
    handles = []
    for site in find_sites(net, ("mha", "ffn")):
        module = unwrap(net).get_submodule(site.path)
        part = "attention" if site.kind == "mha" else "ffn"
        # prepend: before the hook with which the adapter of a kept attention is attached
        handles.append(module.register_forward_pre_hook(lambda *_, part=part: ledger.push(part), prepend=True))
        handles.append(module.register_forward_hook(lambda *_: ledger.pop(), always_call=True))
    try:
        with _labelled_adapters(ledger), ledger.counter:
            call()
            ledger.charge()
    finally:
        for handle in handles:
            handle.remove()
    found = {part: ledger.parts[part] // 2 for part in PARTS}
    return found | {"total": sum(found.values()), "other": ledger.parts["other"] // 2}


class _Ledger:
    """Charges what the counter has counted since the last change of part to the part that was open then."""

    MATRIX_PRODUCTS = ("mm", "addmm")  # what a linear layer becomes; batched products and fused kernels are scores

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False, custom_mapping=_fused_on_cpu())
        self.open, self.parts, self.seen = ["other"], defaultdict(int), {}

    def charge(self) -> None:
        now = {str(op): int(n) for op, n in self.counter.get_flop_counts().get("Global", {}).items()}
        for op, count in now.items():
            part = self.open[-1]
            if part == "attention":
                part += "_projections" if op.split(".")[-1] in self.MATRIX_PRODUCTS else "_scores"
            self.parts[part] += count - self.seen.get(op, 0)
        self.seen = now

    def push(self, part: str) -> None:
        self.charge()
        self.open.append(part)

    def pop(self) -> None:
        self.charge()
        self.open.pop()


def _fused_on_cpu() -> dict[Any, Callable[..., int]]:
    # The counter knows the fused attention kernels of GPUs only.
    name = "_scaled_dot_product_flash_attention_for_cpu"
    return {getattr(torch.ops.aten, name): _scores_flops} if hasattr(torch.ops.aten, name) else {}


def _scores_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


@contextmanager
def _labelled_adapters(ledger: _Ledger) -> Iterator[None]:
    # Adapters run inside of the attentions and norms they stand in for, and not always through __call__; condensed ones
    # do so too, and folding is their cost.
    methods = {(PIA, name): getattr(PIA, name) for name in ("route", "delta", "factors", "shared_factors")}
    methods |= {(LowRank, "__call__"): LowRank.__call__, (merging, "fold_linear"): merging.fold_linear}

    def labelled(method: Callable) -> Callable:
        def run(*args, **kwargs):
            ledger.push("adapter")
            try:
                return method(*args, **kwargs)
            finally:
                ledger.pop()

        return run

    for (owner, name), method in methods.items():
        setattr(owner, name, labelled(method))
    try:
        yield
    finally:
        for (owner, name), method in methods.items():
            setattr(owner, name, method)


def _meta_decoder(config: Any) -> nn.Module:
    from transformers import AutoModel

    text = config.get_text_config(decoder=True)
    with torch.device("meta"):
        return AutoModel.from_config(text, attn_implementation="eager").eval()
