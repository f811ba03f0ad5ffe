"""Settings as plain dataclasses: checked when made, saved as JSON, tolerant of files from newer versions."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from .errors import ConfigError

KINDS = ("mha", "ffn", "layer")
SOURCES = ("attention_norm", "ffn_norm")
ADAPTERS = ("pia", "bottleneck")
PARTS = ("base", "exchange", "frozen")  # as in pia.py, which brings torch
POOLS = ("prompt", "sequence")


@dataclass
class Config:
    """What all settings share: `to_dict`, `from_dict`, `save` and `load`."""

    # Fields that came after files had been written: at their default they are no part of what identifies a run, so
    # that results and checkpoints from before stay valid.
    _ADDED = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that tell a run from others."""
        default = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in self.to_dict().items() if k not in self._ADDED or v != default[k]}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, ignore: tuple[str, ...] = ()) -> Self:
        """Build from a dict. Keys this version does not know (and that are not in `ignore`) warn and are dropped."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known - set(ignore))
        if unknown:
            warnings.warn(
                f"{cls.__name__}: ignoring unknown settings {unknown}, perhaps from a newer version of eas_kit",
                stacklevel=2,
            )
        return cls(**{key: value for key, value in values.items() if key in known})

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        return cls.from_dict(read_json(path, what=cls.__name__))

    def _check(self, ok: bool, name: str, wanted: str) -> None:
        if not ok:
            raise ConfigError(f"{type(self).__name__}.{name}: wanted {wanted}, got {getattr(self, name)!r}")


def read_json(path: str | Path, *, what: str) -> dict[str, Any]:
    """The JSON object in `path`; ConfigError if the file is missing, broken, or holds something else."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{what}: no file {path}; check the folder, or save one first")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{what}: {path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what}: {path} should hold one JSON object, it holds a {type(values).__name__}")
    return values


def is_int(value: Any, at_least: int) -> bool:
    """True for a whole number (bool excluded) that is not below `at_least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_number(value: Any) -> bool:
    """True for a finite int or float (bool excluded)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


@dataclass
class EASConfig(Config):
    """Shape of the adapters that `attach` adds to a model (paper section 3.2; DESIGN of PIA in `eas_kit.pia`)."""

    skip_rank: int = 32
    """Rank r of the adapter that stands in for a skipped site."""
    adapt_rank: int = 16
    """Rank of the adapter before a kept attention; 0 for none."""
    groups: int = 2
    """Blocks of the grouped up-projections; divides both ranks and the model's width."""
    scale: float = 1.0
    """s: weight of what the adapter adds."""
    temperature: float = 10.0
    """tau of the path router's softmax."""
    dropout: float = 0.1
    """Dropout on the bottleneck z, in training only."""
    kinds: tuple[str, ...] = ("mha",)
    """Which sub-modules are sites: attentions, feed-forwards, or ("layer",), whole decoder layers. Sites are numbered
    kind after kind, in the order given here."""
    modules_to_save: tuple[str, ...] | None = None
    """Paths of modules or parameters of the base model that train beside the adapters and are saved with them (peft's
    term), in their own dtype; `detach` puts them back. None: what the model's class names, e.g. LaVIN's projection."""
    source: str = "attention_norm"
    """What a skipped attention's adapter reads: "attention_norm" for g2 * PIA(LN1(x)), "ffn_norm" for PIA(LN2(x))."""
    adapter: str = "pia"
    """"pia", or "bottleneck" for n + up(silu(down n)), which reads no prompt and cannot be merged (DAS)."""
    parts: str = "frozen"
    """How much of PIA there is (the paper's ablation): "base", "exchange" or "frozen", all of it; see `eas_kit.pia`."""
    pool: str = "prompt"
    """What the pooled path averages in training: the "prompt", or the whole "sequence" with the answer in it, which a
    prefill does not see."""
    path_factor: float = 0.5
    """Factor of the sum of the two down paths; 1.0: the plain sum."""

    _ADDED = ("modules_to_save", "adapter", "parts", "pool", "path_factor")

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str):
            self.kinds = (self.kinds,)
        self.kinds = tuple(self.kinds)
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = (self.modules_to_save,)
        if self.modules_to_save is not None:
            self.modules_to_save = tuple(self.modules_to_save)
            every = all(isinstance(path, str) and path for path in self.modules_to_save)
            self._check(every, "modules_to_save", "paths of modules in the base model, or None")
        self._check(is_int(self.groups, 1), "groups", "a whole number from 1 up")
        divides = f"divisible by groups={self.groups}"
        self._check(
            is_int(self.skip_rank, 1) and self.skip_rank % self.groups == 0,
            "skip_rank",
            f"a whole number from 1 up, {divides}",
        )
        self._check(
            is_int(self.adapt_rank, 0) and self.adapt_rank % self.groups == 0,
            "adapt_rank",
            f"0 (no adapter at kept sites) or a positive whole number, {divides}",
        )
        self._check(is_number(self.scale), "scale", "a finite number")
        self._check(is_number(self.temperature) and self.temperature > 0, "temperature", "a number above 0")
        self._check(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", "a number from 0 up to, not with, 1")
        self._check(
            len(self.kinds) > 0 and set(self.kinds) <= set(KINDS) and len(set(self.kinds)) == len(self.kinds),
            "kinds",
            f"one or more of {KINDS}, each once",
        )
        self._check(
            "layer" not in self.kinds or len(self.kinds) == 1,
            "kinds",
            "('layer',) alone, as a skipped layer takes its attention and feed-forward along",
        )
        self._check(self.source in SOURCES, "source", f"one of {SOURCES}")
        self._check(self.adapter in ADAPTERS, "adapter", f"one of {ADAPTERS}")
        self._check(self.parts in PARTS, "parts", f"one of {PARTS}")
        self._check(self.pool in POOLS, "pool", f"one of {POOLS}")
        if self.pool == "sequence" and self.parts != "frozen":
            raise ConfigError(
                f'EASConfig: pool="sequence" is about the frozen mean of a prompt, which parts={self.parts!r} has not'
            )
        self._check(is_number(self.path_factor), "path_factor", "a finite number")


REWARDS = ("exp", "standardized")
DRAWS = ("uniform", "multinomial")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("no", "bf16", "fp16")


@dataclass
class LoopConfig(Config):
    """What `fit` and `search` share: the optimiser, the batches, checkpoints and the seed."""

    batch_size: int = 32
    """Examples in one forward, all processes together: two processes take half of it each."""
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    """Of AdamW, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"
    """After the warm-up: "cosine" or "linear" down to 0, or "constant"."""
    lr_warmup_steps: int = 0
    """Optimiser steps over which the learning rate rises from 0."""
    gradient_accumulation_steps: int = 1
    """Forwards in one optimiser step; the step is the one that a single large batch would make."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this; 0: never."""
    mixed_precision: str = "no"
    """Autocast to "bf16" or "fp16" (with loss scaling), or "no"."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    checkpoint_every: int | None = None
    """Optimiser steps between checkpoints in `output_dir`; None: only when interrupted and at the end."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted."""
    output_dir: str | None = None
    """Where checkpoints go; None: there are none, and nothing to resume."""
    resume: bool = False
    """Go on from the newest checkpoint of `output_dir`; start afresh if there is none."""
    seed: int = 0
    """Of the order of the examples, of dropout and of the search's draws."""
    progress: bool = True
    """Show a progress bar."""

    # May change between a run and the run that resumes it; anything else would make it another run.
    _FREE = ("checkpoint_every", "keep_checkpoints", "output_dir", "resume", "progress")

    def __post_init__(self) -> None:
        self.betas = tuple(self.betas)
        if self.output_dir is not None:
            self.output_dir = str(self.output_dir)
        for name in ("batch_size", "gradient_accumulation_steps", "keep_checkpoints"):
            self._check(is_int(getattr(self, name), 1), name, "a whole number from 1 up")
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            self._check(is_number(getattr(self, name)) and getattr(self, name) >= 0, name, "a number from 0 up")
        self._check(is_int(self.lr_warmup_steps, 0), "lr_warmup_steps", "a whole number from 0 up")
        self._check(
            len(self.betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in self.betas),
            "betas",
            "two numbers in [0, 1)",
        )
        self._check(self.schedule in SCHEDULES, "schedule", f"one of {SCHEDULES}")
        self._check(self.mixed_precision in PRECISIONS, "mixed_precision", f"one of {PRECISIONS}")
        self._check(
            self.checkpoint_every is None or is_int(self.checkpoint_every, 1),
            "checkpoint_every",
            "a whole number from 1 up, or None",
        )
        self._check(is_int(self.seed, 0), "seed", "a whole number from 0 up")
        if (self.checkpoint_every or self.resume) and self.output_dir is None:
            raise ConfigError(
                f"{type(self).__name__}: checkpoint_every and resume need output_dir, the folder of the checkpoints"
            )

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it resumes."""
        return {key: value for key, value in super().identity().items() if key not in self._FREE}


@dataclass
class TrainConfig(LoopConfig):
    """Settings of `fit`."""

    epochs: float = 1
    """Passes over task.train; a part of one is allowed."""
    max_steps: int | None = None
    """Optimiser steps; overrides `epochs`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(is_number(self.epochs) and self.epochs > 0, "epochs", "a number above 0")
        self._check(
            self.max_steps is None or is_int(self.max_steps, 1), "max_steps", "a whole number from 1 up, or None"
        )


@dataclass
class SearchConfig(LoopConfig):
    """Settings of `search`: the bandit of eq. 14-16 and the training steps around it."""

    num_skipped: int = 4
    """k: sites that every subnetwork skips."""
    num_subnetworks: int = 3
    """H: subnetworks compared in an update."""
    warmup_steps: int = 100
    """Training steps with uniformly random skips before the first update."""
    updates: int = 60
    """Updates of the preferences."""
    train_steps_per_update: int = 10
    """Training steps before each update, with masks drawn by the preferences."""
    preference_lr: float | None = None
    """beta of eq. 16; None: 5 for the reward "exp", 1 for "standardized", whose rewards differ by much more."""
    reward: str = "exp"
    """"exp": the paper's exp(-loss). "standardized": over the H subnetworks, for losses far above 1."""
    candidates: str | tuple[int, ...] | None = None
    """Sites that may be skipped: "mha", "ffn", "layer", a list of sites, or None for all."""
    reward_batch_size: int = 64
    """Examples of task.search in the batch that the subnetworks share."""
    schedule: str = "constant"
    draws: str = "uniform"
    """How subnetworks are drawn: "uniform", the paper's eq. 14, or "multinomial": site after site, none twice, each
    with a probability proportional to sigma(-s_i)."""

    _ADDED = ("draws",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_skipped", "updates", "train_steps_per_update", "reward_batch_size"):
            self._check(is_int(getattr(self, name), 1), name, "a whole number from 1 up")
        self._check(is_int(self.num_subnetworks, 2), "num_subnetworks", "a whole number from 2 up")
        self._check(is_int(self.warmup_steps, 0), "warmup_steps", "a whole number from 0 up")
        self._check(self.reward in REWARDS, "reward", f"one of {REWARDS}")
        self._check(self.draws in DRAWS, "draws", f"one of {DRAWS}")
        if self.preference_lr is None:
            self.preference_lr = 5.0 if self.reward == "exp" else 1.0
        self._check(is_number(self.preference_lr) and self.preference_lr > 0, "preference_lr", "a number above 0")
        if isinstance(self.candidates, str):
            self._check(self.candidates in KINDS, "candidates", f"one of {KINDS}, a list of sites, or None")
        elif self.candidates is not None:
            self.candidates = tuple(sorted({int(site) for site in self.candidates}))

    @property
    def total_steps(self) -> int:
        """Training steps of the whole search."""
        return self.warmup_steps + self.updates * self.train_steps_per_update
