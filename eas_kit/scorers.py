"""Training-free scores of how redundant each site is, to compare the bandit with. Lower = more skippable.

Every scorer has the signature `scorer(model, task, kind="mha", split="search", limit=None, batch_size=64, seed=0)`
and returns (L,) float64. kind is "mha", "ffn" or "layer" (both at once). `eas_kit.bandit.lowest(scores, k)` is the
mask a scorer proposes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .errors import ConfigError
from .modes import eval_mode
from .probe import KINDS, single_site_sweep
from .sites import find_sites, unwrap

if TYPE_CHECKING:
    import pandas


def cosine_similarity(
    model: nn.Module,
    task: Any,
    kind: str = "mha",
    split: str = "search",
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> torch.Tensor:
    """1 - mean cosine of a block's input and output, as in LLM-Drop ("What Matters in Transformers?", He et al., 2024).

    The input is the residual stream before the block, the output the stream after it: x and x + Attention(norm(x))
    for "mha". The mean is over all positions but padding. (L,)
    """
    return _change_of_stream(model, task, kind, split, limit, batch_size)


def block_influence(
    model: nn.Module,
    task: Any,
    kind: str = "mha",
    split: str = "search",
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> torch.Tensor:
    """Block Influence of ShortGPT (Men et al., 2024): 1 - mean cosine of a whole layer's input and output.

    A score of layers: attention and feed-forward of a layer get the same one, whatever the kind. (L,)
    """
    return _change_of_stream(model, task, "layer", split, limit, batch_size)


def single_ablation(
    model: nn.Module,
    task: Any,
    kind: str = "mha",
    split: str = "search",
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> torch.Tensor:
    """Change of the loss when this site alone is skipped, without tuning. L + 1 passes over the data. (L,)"""
    sweep = single_site_sweep(model, task, (kind,), split, limit, batch_size, progress=False)
    return torch.tensor(sweep["loss_change"].to_numpy(copy=True), dtype=torch.float64)


def random(
    model: nn.Module,
    task: Any,
    kind: str = "mha",
    split: str = "search",
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> torch.Tensor:
    """Uniform numbers that know nothing of the model: the control. (L,)"""
    return torch.from_numpy(np.random.default_rng(seed).random(len(find_sites(model))))


SCORERS: Mapping[str, Callable[..., torch.Tensor]] = {
    "cosine_similarity": cosine_similarity,
    "block_influence": block_influence,
    "single_ablation": single_ablation,
    "random": random,
}


def score_table(
    model: nn.Module,
    task: Any,
    kinds: Sequence[str] = ("mha",),
    scorers: Mapping[str, Callable[..., torch.Tensor]] = SCORERS,
    split: str = "search",
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> pandas.DataFrame:
    """One row per kind and site, one column per scorer."""
    import pandas as pd

    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    parts = []
    for kind in kinds:
        columns = {
            name: scorer(model, task, kind=kind, split=split, limit=limit, batch_size=batch_size, seed=seed).numpy()
            for name, scorer in scorers.items()
        }
        length = len(find_sites(model))
        parts.append(pd.DataFrame({"kind": [kind] * length, "site": range(length), **columns}))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def _change_of_stream(
    model: nn.Module, task: Any, kind: str, split: str, limit: int | None, batch_size: int
) -> torch.Tensor:
    if kind not in KINDS:
        raise ConfigError(f"kind: wanted one of {KINDS}, got {kind!r}")
    examples = getattr(task, split)
    examples = [examples[i] for i in range(len(examples) if limit is None else min(limit, len(examples)))]
    device = next(model.parameters()).device
    total, count = torch.zeros(len(find_sites(model)), dtype=torch.float64), 0
    with eval_mode(model), _streams(model) as streams:
        for start in range(0, len(examples), batch_size):
            batch = task.collate(examples[start : start + batch_size], answers=True)
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            model(**batch)
            seen = batch["attention_mask"].bool()
            for layer, (before, between, after) in enumerate(streams):
                x, y = {"mha": (before, between), "ffn": (between, after), "layer": (before, after)}[kind]
                cosine = F.cosine_similarity(x.double(), y.double(), dim=-1)  # (B, S)
                total[layer] += (1 - cosine[seen]).sum().cpu()
            count += int(seen.sum())
    return total / count


@contextmanager
def _streams(model: nn.Module) -> Iterator[list[list[torch.Tensor]]]:
    """During a forward, fills a list of L triples: the residual stream before a layer, between its parts, after it.

    Between the parts is what the norm before the feed-forward reads.
    """
    plain = unwrap(model)
    sites = find_sites(plain)
    streams: list[list[torch.Tensor]] = [[None, None, None] for _ in sites]
    handles = []
    for site in sites:
        layer, triple = plain.get_submodule(site.layer_path), streams[site.index]

        def before(module, args, kwargs, triple=triple):
            triple[0] = args[0] if args else kwargs["hidden_states"]

        def between(module, args, triple=triple):
            triple[1] = args[0]

        def beside(module, args, output, triple=triple):  # a parallel layer: nothing reads the stream in between
            triple[1] = triple[0] + output[0]

        def after(module, args, output, triple=triple):
            triple[2] = output[0] if isinstance(output, tuple) else output

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        if site.names.norm_ffn:
            handles.append(getattr(layer, site.names.norm_ffn).register_forward_pre_hook(between))
        else:
            handles.append(getattr(layer, site.names.attention).register_forward_hook(beside))
        handles.append(layer.register_forward_hook(after))
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()
