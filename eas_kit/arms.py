"""The rows of a comparison of tuning methods, and the settings they share. compare.py runs them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .config import EASConfig, SearchConfig, TrainConfig
from .errors import ConfigError

METHODS = ("zero_shot", "full", "lora", "pia")
CHOICES = ("bandit", "random", "scorer")
LEARNING_RATES = {"full": 5e-4, "lora": 3e-3, "pia": 1e-2}


@dataclass(frozen=True)
class Arm:
    """One row of the table: a method and, for "pia", how many sites are skipped and who chose them."""

    method: str
    k: int = 0
    chosen_by: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"Arm.method: wanted one of {METHODS}, got {self.method!r}")
        skips = self.k > 0
        if (skips and self.method != "pia") or skips != (self.chosen_by in CHOICES) or self.k < 0:
            raise ConfigError(
                f"Arm: only 'pia' skips, and k above 0 goes with chosen_by in {CHOICES}; "
                f"got method={self.method!r}, k={self.k}, chosen_by={self.chosen_by!r}"
            )

    @property
    def name(self) -> str:
        return f"pia k={self.k} {self.chosen_by}" if self.k else self.method


def standard_arms(num_skipped: Iterable[int] = (4,), choices: Iterable[str] = CHOICES) -> list[Arm]:
    """Zero-shot, full tuning, LoRA, PIA without skipping, and for each k PIA with k skipped by each way to choose."""
    choices = tuple(choices)
    skipping = [Arm("pia", k, choice) for k in num_skipped for choice in choices]
    return [Arm("zero_shot"), Arm("full"), Arm("lora"), Arm("pia"), *skipping]


@dataclass
class Plan:
    """Everything that all arms share, and what determines their results besides arm, seed and learning rate."""

    steps: int = 600
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr_warmup_steps=20, progress=False))
    eas: EASConfig = field(default_factory=lambda: EASConfig(skip_rank=64, adapt_rank=32))
    search: SearchConfig = field(default_factory=lambda: SearchConfig(progress=False))
    lora: dict[str, Any] = field(default_factory=lambda: {"rank": 8, "alpha": 16.0, "dropout": 0.05})
    evaluate: dict[str, Any] = field(default_factory=dict)
    """For task.evaluate: limit, batch_size, method ..."""
    zero_shot: dict[str, Any] = field(default_factory=dict)
    """The same for the untuned model, whose answers may need another way of reading."""
    tune_on: bool = False
    """After a bandit's search: False tunes fresh adapters for `steps` steps, as every other arm, so that arms of equal
    k differ in the mask alone; True goes on with the search's own adapters, as the paper does."""
    score_limit: int | None = None
    """Examples that scorers see."""

    def key(self, arm: Arm) -> dict[str, Any]:
        """The settings that this arm's result depends on: changing others leaves its file valid."""
        if arm.method == "zero_shot":
            return {"zero_shot": self.zero_shot}
        own = ("learning_rate", "seed", "max_steps", "epochs")  # set for each run, and in its key already
        train = {name: value for name, value in self.train.identity().items() if name not in own}
        found = {"steps": self.steps, "train": train, "evaluate": self.evaluate}
        if arm.method == "lora":
            found["lora"] = self.lora
        if arm.method == "pia":
            found["eas"] = self.eas.to_dict()
        if arm.chosen_by == "bandit":
            found |= {"search": self.search.identity(), "tune_on": self.tune_on}
        if arm.chosen_by == "scorer":
            found["score_limit"] = self.score_limit
        return found
