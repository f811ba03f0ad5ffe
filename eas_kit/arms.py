"""The rows of a comparison of tuning methods, and the settings they share. compare.py runs them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from . import baselines, virtual_tokens
from .config import EASConfig, SearchConfig, TrainConfig
from .errors import ConfigError

BASELINES = {
    "full": baselines.full_tuning,
    "lora": baselines.lora,
    "prompt": virtual_tokens.prompt_tuning,
    "prefix": virtual_tokens.prefix_tuning,
    "llama_adapter": baselines.llama_adapter,
    "adapter": baselines.bottlenecks,
    "mam": virtual_tokens.mam,
}
"""Methods that are a function (model, **settings) -> (model, trainable share)."""
METHODS = ("zero_shot", *BASELINES, "das", "pia")
SKIPPING = ("das", "pia")
CHOICES = ("bandit", "random", "scorer")
CANDIDATES = {"mha": ("mha",), "ffn": ("mha", "ffn"), "mha+ffn": ("mha", "ffn"), "layer": ("layer",)}
"""Which sites may go, and the kinds of sites attached for it: kept attentions have their adapter in every row."""
LEARNING_RATES = {
    "full": 5e-4,
    "lora": 3e-3,
    "prompt": 3e-1,
    "prefix": 1e-1,
    "llama_adapter": 1e-1,
    "adapter": 1e-2,
    "mam": 1e-3,
    "das": 1e-2,
    "pia": 1e-2,
}
"""On the bundled model; from prompt to das the best of GRIDS by loss on val (benchmarks/grids/rates.yaml)."""
GRIDS = {
    "full": (2e-4, 5e-4, 1e-3),
    "lora": (1e-3, 3e-3, 1e-2),
    "prompt": (3e-2, 1e-1, 3e-1),
    "prefix": (1e-2, 3e-2, 1e-1),
    "llama_adapter": (1e-2, 3e-2, 1e-1),
    "adapter": (1e-3, 3e-3, 1e-2),
    "mam": (1e-3, 3e-3, 1e-2),
    "das": (1e-3, 3e-3, 1e-2),
    "pia": (3e-3, 1e-2, 3e-2),
}
"""To choose from on `val`: `run_arms(..., grid=GRIDS)`."""


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    method: one of METHODS. k: how many sites are skipped ("pia", "das"), chosen_by whom. candidates: which sites may be
    skipped, one of CANDIDATES ("das" skips layers). settings: changes to the plan's settings of this method, as a dict
    or as pairs: fields of EASConfig for "pia" and "das", arguments of its function for a baseline. ConfigError for what
    does not go together.
    """

    method: str
    k: int = 0
    chosen_by: str | None = None
    candidates: str = "mha"
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"Arm.method: wanted one of {METHODS}, got {self.method!r}")
        skips = self.k > 0
        if (skips and self.method not in SKIPPING) or skips != (self.chosen_by in CHOICES) or self.k < 0:
            raise ConfigError(
                f"Arm: only 'pia' and 'das' skip, and k above 0 goes with chosen_by in {CHOICES}; "
                f"got method={self.method!r}, k={self.k}, chosen_by={self.chosen_by!r}"
            )
        if self.method == "das":
            object.__setattr__(self, "candidates", "layer")
        if self.candidates not in CANDIDATES:
            raise ConfigError(f"Arm.candidates: wanted one of {tuple(CANDIDATES)}, got {self.candidates!r}")
        if self.candidates != "mha" and self.method not in SKIPPING:
            raise ConfigError(f"Arm: {self.method!r} skips nothing, so candidates={self.candidates!r} says nothing")
        if self.candidates == "mha+ffn" and self.chosen_by == "scorer":
            raise ConfigError("Arm: scorers rank sites of one kind; candidates 'mha+ffn' need 'bandit' or 'random'")
        object.__setattr__(self, "settings", _pairs(self.settings))
        self._check_settings()

    def _check_settings(self) -> None:
        if self.method in SKIPPING:
            known = {f.name for f in fields(EASConfig)} - {"kinds"}
        elif self.method in BASELINES:
            known = set(list(inspect.signature(BASELINES[self.method]).parameters)[1:])
        else:
            known = set()
        unknown = [name for name, _ in self.settings if name not in known]
        if unknown:
            raise ConfigError(f"Arm.settings of {self.method!r}: wanted some of {sorted(known)}, got {unknown}")

    @property
    def name(self) -> str:
        """Unique and readable, e.g. "pia k=4 bandit", "pia k=4 random ffn skip_rank=16"."""
        parts = [self.method]
        if self.k:
            parts += [f"k={self.k}", self.chosen_by]
        if self.candidates != "mha" and self.method != "das":
            parts.append(self.candidates)
        return " ".join(parts + [f"{name}={_shown(value)}" for name, value in self.settings])

    @property
    def file_name(self) -> str:
        """The name as part of a file's."""
        return re.sub(r"[^\w.+-]", "", self.name.replace(" ", "_"))

    @property
    def plain(self) -> Arm:
        """The arm of this method that a learning rate is chosen with. Nothing is trained in DAS without skipping."""
        return Arm("das", self.k, "random") if self.method == "das" and self.k else Arm(self.method)

    def key(self) -> dict[str, Any]:
        """What tells this arm from others. Fields at their default are left out: older results stay valid."""
        found = asdict(self)
        if self.candidates == "mha":
            del found["candidates"]
        if not self.settings:
            del found["settings"]
        return found


def _pairs(settings: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    try:
        found = dict(settings)
        return tuple((str(name), _hashable(found[name])) for name in sorted(found))
    except (TypeError, ValueError):
        raise ConfigError(
            f"Arm.settings: wanted a dict of plain values, as {{'skip_rank': 16}}, got {settings!r}"
        ) from None


def _hashable(value: Any) -> Any:
    value = tuple(_hashable(v) for v in value) if isinstance(value, list | tuple) else value
    hash(value)
    return value


def _shown(value: Any) -> str:
    return "+".join(map(_shown, value)) if isinstance(value, tuple) else f"{value}"


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
    """Of "pia"; "das" has the same ranks, with bottlenecks at whole layers."""
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
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of the other baselines, by method: {"prefix": {"tokens": 20}}; else their functions' defaults."""
    latency: dict[str, Any] | None = None
    """For `measure.latency`, such as {"new_tokens": 16, "repeats": 3}: times every arm, on one prompt of val; None: no
    times, which take a while and want a machine that does nothing else."""

    def eas_config(self, arm: Arm) -> EASConfig:
        """The adapters of an arm that skips."""
        values = self.eas.to_dict() | {"kinds": CANDIDATES[arm.candidates]}
        if arm.method == "das":
            values["adapter"] = "bottleneck"
        return EASConfig(**values | dict(arm.settings))

    def search_config(self, arm: Arm, seed: int) -> SearchConfig:
        """The bandit's settings for an arm."""
        changes = {"num_skipped": arm.k, "seed": seed}
        if arm.candidates == "ffn":
            changes["candidates"] = "ffn"
        return SearchConfig(**self.search.to_dict() | changes)

    def settings(self, arm: Arm) -> dict[str, Any]:
        """The arguments of a baseline's function."""
        own = self.lora if arm.method == "lora" else self.methods.get(arm.method, {})
        return own | dict(arm.settings)

    def key(self, arm: Arm) -> dict[str, Any]:
        """The settings that this arm's result depends on: changing others leaves its file valid."""
        timed = {} if self.latency is None else {"latency": self.latency}
        if arm.method == "zero_shot":
            return {"zero_shot": self.zero_shot} | timed
        own = ("learning_rate", "seed", "max_steps", "epochs")  # set for each run, and in its key already
        train = {name: value for name, value in self.train.identity().items() if name not in own}
        found = {"steps": self.steps, "train": train, "evaluate": self.evaluate} | timed
        if arm.method == "lora":
            found["lora"] = self.settings(arm)
        elif arm.method in BASELINES and self.settings(arm):
            found["settings"] = self.settings(arm)
        if arm.method in SKIPPING:
            found["eas"] = self.eas_config(arm).identity()
        if arm.chosen_by == "bandit":
            found |= {"search": self.search.identity(), "tune_on": self.tune_on}
        if arm.chosen_by == "scorer":
            found["score_limit"] = self.score_limit
        return found
