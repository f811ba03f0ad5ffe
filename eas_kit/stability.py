"""How stable is a choice of sites? Agreement between several of them, and what each chosen mask is worth.

The order among sites that cost nothing is not defined, so look at the overlap of the sets and at the loss of the
masks before the rank correlation of whole rankings.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .bandit import lowest
from .errors import ConfigError
from .model import EASModel

if TYPE_CHECKING:
    import pandas


def rank_correlation(one: Sequence[float] | torch.Tensor, other: Sequence[float] | torch.Tensor) -> float:
    """Spearman's rho of two rankings of the same sites, ties by mean rank; nan if one of them is all ties."""
    ranks = [_ranks(np.array([float(v) for v in values])) for values in (one, other)]
    if len(ranks[0]) != len(ranks[1]):
        raise ConfigError(f"Rankings of the same sites are wanted; got {len(ranks[0])} and {len(ranks[1])} sites.")
    first, second = (values - values.mean() for values in ranks)
    size = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / size) if size > 0 else float("nan")


def overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of two masks of equal size that they have in common: 1 equal, 0 disjoint."""
    if len(one) != len(other) or not one:
        raise ConfigError(f"Masks of equal size, not empty, are wanted; got {list(one)} and {list(other)}.")
    return len(set(one) & set(other)) / len(one)


def agreement(rankings: Mapping[str, Sequence[float] | torch.Tensor], k: int) -> pandas.DataFrame:
    """One row per pair of rankings (preferences or scores, lower = skipped first): one, other, overlap of their k
    lowest sites, overlap expected by chance (k / L), rank_correlation."""
    import pandas as pd

    rows = []
    for one, other in itertools.combinations(rankings, 2):
        masks = [lowest(rankings[name], k) for name in (one, other)]
        rows.append(
            {
                "one": one,
                "other": other,
                "overlap": overlap(*masks),
                "chance": k / len(rankings[one]),
                "rank_correlation": rank_correlation(rankings[one], rankings[other]),
            }
        )
    return pd.DataFrame(rows)


def score_masks(
    net: EASModel,
    task: Any,
    masks: Mapping[str, Sequence[int]],
    split: str = "val",
    limit: int | None = None,
    batch_size: int = 64,
) -> pandas.DataFrame:
    """What each mask is worth with the adapters as they are: name, mask, loss, accuracy, reward = exp(-loss).

    The net's own mask is as before afterwards.
    """
    import pandas as pd

    before, rows = net.mask, []
    try:
        for name, mask in masks.items():
            net.mask = mask
            found = task.score(net, split, limit=limit, batch_size=batch_size)
            loss = float(found["loss"])
            rows.append(
                {
                    "name": name,
                    "mask": net.mask,
                    "loss": loss,
                    "accuracy": float(found["accuracy"]),
                    "reward": float(np.exp(-loss)),
                }
            )
    finally:
        net.mask = before
    return pd.DataFrame(rows)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])
