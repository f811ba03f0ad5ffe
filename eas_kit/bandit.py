"""The k-armed bandit that searches for redundant sites (Effective Attention Skipping, arXiv 2403.15226, eq. 14-16).

    pi_i ~ Uniform(0, sigma(s_i))                       one draw per site and subnetwork; skip the k smallest
    R_h = exp(-loss_h)                                  H subnetworks, one shared held-out batch
    s_i += beta (R_h - Rbar) sigma(s_i) (1 - sigma(s_i))    for every site i kept by subnetwork h

Pure arithmetic in float64: it knows no model, only a callable `loss(mask) -> float`. Shapes: L sites, H subnetworks,
k skipped sites. A mask is the sorted tuple of the zero-based sites it skips. The random stream is numpy's PCG64,
whose state is plain integers, so that a saved bandit goes on exactly where it stopped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from .errors import ConfigError, TrainingError

REWARDS = ("exp", "standardized")
DRAWS = ("uniform", "multinomial")
_SMALLEST = 1e-300  # of a weight that something is divided by
_TRIES_PER_MASK = 200  # draws before a distinct mask is forced; see draw_masks

Mask = tuple[int, ...]


def rewards(losses: Sequence[float] | torch.Tensor, kind: str = "exp") -> np.ndarray:
    """(H,) rewards from (H,) losses, in float64.

    "exp" is the paper's exp(-loss) (eq. 15). It vanishes while the loss is high: at loss 8 a whole unit of loss is
    worth 0.0006. "standardized" is (mean - loss) / sd over the H subnetworks, blind to the loss's level (all zero if
    the losses are equal).

    Raises ConfigError for another `kind`, TrainingError for a loss that is not finite.
    """
    if kind not in REWARDS:
        raise ConfigError(f"reward must be one of {', '.join(REWARDS)}; got {kind!r}.")
    loss = _array(losses)
    if loss.ndim != 1 or loss.size == 0:
        raise ConfigError(f"losses must be a row of H numbers, one per subnetwork; got shape {loss.shape}.")
    if not np.isfinite(loss).all():
        raise TrainingError(
            f"The subnetworks' losses must be finite; got {loss.tolist()}. Lower the learning rate of the adapters, "
            "or start again from the last checkpoint."
        )
    if kind == "exp":
        return np.exp(-loss)
    gain = -_centred(loss)
    spread = math.sqrt(math.fsum(gain**2) / gain.size)
    return gain / spread if spread > 0 else np.zeros_like(gain)


def update_preferences(
    preferences: torch.Tensor | np.ndarray | Sequence[float],
    masks: Iterable[Sequence[int]] | torch.Tensor | np.ndarray,
    losses: Sequence[float] | torch.Tensor,
    learning_rate: float,
    reward: str = "exp",
) -> torch.Tensor | np.ndarray:
    """One update of the preferences, eq. 16 and nothing else: (L,), H masks, (H,) losses -> (L,).

    All H subnetworks are weighed with the sigma of the preferences that came in, so their order does not matter.
    Each mask lists its skipped sites; a boolean (H, L) array, True where skipped, does as well. Computed in float64;
    what comes back has the type and dtype of `preferences` (a plain sequence gives a float64 tensor), which is
    left as it was.
    """
    s = _array(preferences)
    if s.ndim != 1:
        raise ConfigError(f"preferences must be (L,), one number per site; got shape {s.shape}.")
    skipped = _skipped_matrix(masks, s.size)  # (H, L)
    advantage = _centred(rewards(losses, reward))  # (H,): R_h - Rbar
    if skipped.shape[0] != advantage.size:
        raise ConfigError(f"One loss per mask is wanted; got {skipped.shape[0]} masks and {advantage.size} losses.")
    sigma = _sigmoid(s)
    step = np.array([_kept_sum(advantage, skipped[:, i]) for i in range(s.size)])
    new = s + learning_rate * step * sigma * (1.0 - sigma)
    if isinstance(preferences, np.ndarray):
        return new.astype(preferences.dtype if preferences.dtype.kind == "f" else np.float64)
    out = torch.from_numpy(new)
    if isinstance(preferences, torch.Tensor):
        out = out.to(preferences.device, preferences.dtype if preferences.is_floating_point() else torch.float64)
    return out


def lowest(
    scores: torch.Tensor | np.ndarray | Sequence[float], k: int, candidates: Sequence[int] | None = None
) -> Mask:
    """The k sites with the lowest score, as a mask; equal scores go to the lower site. (L,) -> k sites."""
    values = _array(scores)
    sites = np.arange(values.size) if candidates is None else np.asarray(sorted(candidates))
    if not 0 <= k <= sites.size:
        raise ConfigError(f"k must be between 0 and the {sites.size} candidate sites; got {k}.")
    order = np.argsort(values[sites], kind="stable")
    return tuple(sorted(int(i) for i in sites[order[:k]]))


def draw_masks(
    preferences: torch.Tensor | np.ndarray | Sequence[float],
    num_skipped: int,
    num_masks: int,
    rng: np.random.Generator,
    candidates: Sequence[int] | None = None,
    draws: str = "uniform",
) -> list[Mask]:
    """Distinct masks of k sites, drawn by eq. 14: pi_i ~ Uniform(0, sigma(s_i)), skip the k smallest.

    draws="multinomial": the k are drawn one after the other, none twice, each with a probability proportional to
    sigma(-s_i) among those that are left.
    If no more than `num_masks` masks of that size exist, all of them come back, in order. If very strong preferences
    give the same few masks again and again, the rest is drawn uniformly, so that there is always something to compare.
    """
    if draws not in DRAWS:
        raise ConfigError(f"draws must be one of {', '.join(DRAWS)}; got {draws!r}.")
    s = _array(preferences)
    sigma = _sigmoid(-s if draws == "multinomial" else s)
    sites = list(range(sigma.size)) if candidates is None else sorted(int(i) for i in candidates)
    if not 0 <= num_skipped <= len(sites):
        raise ConfigError(f"num_skipped must be between 0 and the {len(sites)} candidate sites; got {num_skipped}.")
    if math.comb(len(sites), num_skipped) <= num_masks:
        return list(itertools.combinations(sites, num_skipped))
    found: dict[Mask, None] = {}  # a dict keeps the order of drawing
    tries = 0
    while len(found) < num_masks:
        tries += 1
        upper = sigma if tries <= _TRIES_PER_MASK * num_masks else np.ones_like(sigma)
        if draws == "multinomial":
            # exponential races: the first k to finish are k weighted draws without replacement
            scores = rng.standard_exponential(sigma.size) / np.maximum(upper, _SMALLEST)
        else:
            scores = rng.random(sigma.size) * upper
        found[lowest(scores, num_skipped, sites)] = None
    return list(found)


class Bandit:
    """The search's state: preferences, random stream, counts and history.

    Args:
        num_sites: L.
        num_skipped: k, sites that every subnetwork skips.
        num_subnetworks: H, subnetworks compared in an update.
        learning_rate: beta of eq. 16.
        reward: "exp" (the paper's) or "standardized"; see `rewards`.
        candidates: sites that may be skipped; None: all. The others are always kept and their preference stays 0.
        seed: of the draws.
        draws: "uniform" (the paper's) or "multinomial"; see `draw_masks`.

    Attributes: `preferences` (L,) float64 tensor; `skipped`, the k candidates of lowest preference; `counts` (L,),
    how often each site was skipped in a comparison; `history`, one dict per update.
    """

    def __init__(
        self,
        num_sites: int,
        num_skipped: int,
        num_subnetworks: int = 3,
        learning_rate: float = 1.0,
        reward: str = "exp",
        candidates: Sequence[int] | None = None,
        seed: int = 0,
        draws: str = "uniform",
    ):
        if draws not in DRAWS:
            raise ConfigError(f"draws must be one of {', '.join(DRAWS)}; got {draws!r}.")
        sites = list(range(num_sites)) if candidates is None else sorted({int(i) for i in candidates})
        if any(not 0 <= i < num_sites for i in sites):
            raise ConfigError(f"candidates must be sites between 0 and {num_sites - 1}; got {sites}.")
        if not 0 < num_skipped < len(sites):
            raise ConfigError(
                f"num_skipped must be between 1 and {len(sites) - 1}, so that there is a choice among the "
                f"{len(sites)} candidate sites; got {num_skipped}."
            )
        if num_subnetworks < 2:
            raise ConfigError(f"num_subnetworks must be 2 or more, there is nothing to compare with {num_subnetworks}.")
        rewards([0.0], reward)  # refuses an unknown reward now, not after the warm-up
        self.num_sites, self.num_skipped, self.num_subnetworks = num_sites, num_skipped, num_subnetworks
        self.learning_rate, self.reward, self.candidates = learning_rate, reward, tuple(sites)
        self.preferences = torch.zeros(num_sites, dtype=torch.float64)
        self.counts = np.zeros(num_sites, dtype=np.int64)
        self.history: list[dict] = []
        self.draws, self.rng = draws, np.random.default_rng(seed)

    @property
    def skipped(self) -> Mask:
        return lowest(self.preferences, self.num_skipped, self.candidates)

    def random_mask(self) -> Mask:
        """k candidates, each set equally likely (warm-up)."""
        return draw_masks(torch.zeros(self.num_sites), self.num_skipped, 1, self.rng, self.candidates)[0]

    def draw(self, num_masks: int = 1) -> list[Mask]:
        """Distinct masks by the present preferences (eq. 14)."""
        return draw_masks(self.preferences, self.num_skipped, num_masks, self.rng, self.candidates, self.draws)

    def update(self, loss: Callable[[Mask], float]) -> dict:
        """Draws H subnetworks, asks for their losses on one batch, and moves the preferences (eq. 14-16).

        Returns the record that was added to `history`: update, preferences, masks, losses, rewards, counts, skipped
        (lists of plain numbers, ready for JSON).
        """
        masks = self.draw(self.num_subnetworks)
        losses = [float(loss(mask)) for mask in masks]
        self.preferences = update_preferences(self.preferences, masks, losses, self.learning_rate, self.reward)
        for mask in masks:
            self.counts[list(mask)] += 1
        record = {
            "update": len(self.history) + 1,
            "preferences": self.preferences.tolist(),
            "masks": [list(mask) for mask in masks],
            "losses": losses,
            "rewards": rewards(losses, self.reward).tolist(),
            "counts": self.counts.tolist(),
            "skipped": list(self.skipped),
        }
        self.history.append(record)
        return record

    def state_dict(self) -> dict:
        """Everything that changes, as plain numbers: fit for JSON and for torch.load(weights_only=True)."""
        return {
            "preferences": self.preferences.tolist(),
            "counts": self.counts.tolist(),
            "history": [dict(record) for record in self.history],
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict) -> None:
        if len(state["preferences"]) != self.num_sites:
            raise ConfigError(
                f"This bandit has {self.num_sites} sites, the saved one has {len(state['preferences'])}. "
                "Resume with the model and the settings it was saved with."
            )
        self.preferences = torch.tensor(state["preferences"], dtype=torch.float64)
        self.counts = np.array(state["counts"], dtype=np.int64)
        self.history = [dict(record) for record in state["history"]]
        self.rng.bit_generator.state = state["rng"]


def _array(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)


def _sigmoid(s: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * s))  # never overflows


def _centred(values: np.ndarray) -> np.ndarray:
    # Relative to the first one: equal values give exact zeros, where a rounding error would become a preference.
    offset = values - values[0]
    return offset - math.fsum(offset) / offset.size


def _kept_sum(advantage: np.ndarray, skipped: np.ndarray) -> float:
    # A site that all subnetworks kept has learned nothing: the advantages sum to zero, here without a rounding error.
    return math.fsum(advantage[~skipped]) if skipped.any() else 0.0


def _skipped_matrix(masks, num_sites: int) -> np.ndarray:
    if isinstance(masks, torch.Tensor):
        masks = masks.detach().cpu().numpy()
    if isinstance(masks, np.ndarray) and masks.dtype == bool:
        if masks.ndim != 2 or masks.shape[1] != num_sites:
            raise ConfigError(f"Boolean masks must be (H, {num_sites}), True where skipped; got shape {masks.shape}.")
        return masks
    masks = [list(mask) for mask in masks]
    if any(isinstance(i, bool | np.bool_) for mask in masks for i in mask):
        raise ConfigError("Masks of true and false must be one (H, L) array; as lists, name the skipped sites.")
    rows = [sorted(int(i) for i in mask) for mask in masks]
    out = np.zeros((len(rows), num_sites), dtype=bool)
    for h, row in enumerate(rows):
        if len(set(row)) != len(row) or any(not 0 <= i < num_sites for i in row):
            raise ConfigError(f"A mask lists each skipped site once, from 0 to {num_sites - 1}; got {row}.")
        out[h, row] = True
    return out
