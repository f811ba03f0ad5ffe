"""The one training loop, on accelerate: `fit` and `search` in training.py are two ways of driving it.

Order of the examples, gradients and losses are defined for the whole batch, whoever computes them: a batch split over
two processes, or over two forwards, weighs every answer token alike and so makes the same step (up to rounding).
A step either happens whole or not at all: an interrupt waits for the step to end, a loss that is not finite stops
before the optimiser moves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .config import LoopConfig
from .errors import ConfigError, NothingOpenedError, TrainingError
from .modes import keeping_modes
from .processes import Order, StopOnInterrupt, make_accelerator, recompute, recomputing
from .sites import unwrap


@dataclass
class Event:
    """What a callback gets. Of kind "step" after every training step, "update" after every update of the bandit.

    An update's event also has `preferences` (list of L), `masks`, `losses`, `rewards` (H each), `counts` (list of L),
    `skipped` (the k lowest now) and `update` (its number, from 1). Callbacks run in the main process only; one that
    raises KeyboardInterrupt stops the run cleanly.
    """

    kind: str
    phase: str  # "train", "warmup" or "search"
    step: int  # training steps done
    total_steps: int
    seconds: float  # since the run started or was resumed
    net: nn.Module
    loss: float | None = None  # of the training step, mean over answer tokens
    learning_rate: float | None = None
    grad_norm: float | None = None
    mask: tuple[int, ...] | None = None  # skipped in that step
    update: int | None = None
    preferences: list[float] | None = None
    masks: list[list[int]] | None = None
    losses: list[float] | None = None
    rewards: list[float] | None = None
    counts: list[int] | None = None
    skipped: list[int] | None = None


class Loop:
    """Takes training steps on `net` and keeps what is needed to resume. Use `with loop.running(): ...`.

    Attributes: `done`, steps taken; `records`, one dict per step (step, phase, loss, learning_rate, grad_norm, mask);
    `interrupted`; `accelerator`.
    """

    def __init__(
        self,
        net: nn.Module,
        examples: Sequence,
        collate: Callable,
        config: LoopConfig,
        total_steps: int,
        callbacks: Iterable[Callable[[Event], Any]] = (),
        title: str = "train",
        about: dict[str, Any] | None = None,
    ):
        """about: what else tells this run from others, for the check on resuming."""
        self.about = about or {}
        self.net, self.examples, self.collate, self.config = net, examples, collate, config
        self.total_steps, self.callbacks, self.title = total_steps, list(callbacks), title
        self.done, self.records, self.interrupted = 0, [], False
        self._stop, self._whole, self._started = False, True, time.perf_counter()
        if len(examples) == 0:
            raise TrainingError("There are no examples to train on; check the task's split.")
        self.parameters = list(checkpoint.trainable(net).values())
        if not self.parameters:
            raise TrainingError(
                "Nothing to train: no parameter of the model requires a gradient. Call eas_kit.attach first, "
                "or one of eas_kit.baselines, or set requires_grad yourself."
            )
        if config.mixed_precision == "fp16" and any(p.dtype == torch.float16 for p in self.parameters):
            raise TrainingError(
                "mixed_precision='fp16' needs trainable weights in float32, these are in float16; "
                "convert them with .float(), the frozen ones may stay."
            )
        self.order = Order(len(examples), config.seed)

    # -- the run ---------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self, state: Callable[[], dict] = dict, restore: Callable[[dict], None] = lambda state: None):
        """Sets everything up, resumes if asked, and cleans up: the model's mode, the caller's random state, signals.

        `state()` is the caller's own state, saved in every checkpoint and given to `restore` on resuming.
        """
        self._state = state
        before = checkpoint.rng_state()
        base = unwrap(self.net)
        was_recomputing = recomputing(base)
        self._started = time.perf_counter()
        if self.config.output_dir and not self.config.resume:
            checkpoint.refuse_older(self.config.output_dir)
        try:
            self._prepare()
            if self.config.resume:
                self._resume(restore)
            self._first = self.done
            with keeping_modes(self.net), StopOnInterrupt(self.stop), self._progress() as self._bar:
                try:
                    yield self
                except KeyboardInterrupt:
                    self.interrupted = True
                except Exception:
                    # A callback failed, the step before it did not. In several processes the others know nothing of it
                    # and would not join in the saving.
                    if self.config.output_dir and self._whole and self.accelerator.num_processes == 1:
                        self.save()
                    raise
                if self.config.output_dir and self._whole:
                    self.save()
        finally:
            self._release()
            if self.config.gradient_checkpointing and not was_recomputing:
                recompute(base, False)
            checkpoint.set_rng_state(before)

    def steps(self) -> Iterable[int]:
        """Yields the number of each step still to take; checkpoints between them; ends early when asked to stop.

        The body of the caller's loop is one unit: it is saved whole or not at all.
        """
        while self.done < self.total_steps:
            if self._anyone(self._stop):
                self.interrupted = True
                return
            self._whole = False
            yield self.done
            self.done += 1
            self._whole = True
            self._bar.update(1)
            for event in self._events:
                self._notify(event)
            self._events = []
            every = self.config.checkpoint_every
            if every and self.done % every == 0 and self.done < self.total_steps:
                self.save()

    def stop(self) -> None:
        """Asks the loop to end before the next step."""
        self._stop = True

    # -- one step --------------------------------------------------------------------------------------------------

    def train_step(self, phase: str = "train", mask: tuple[int, ...] | None = None) -> float:
        """One optimiser step on the next batch; returns its mean loss over the answer tokens of all processes."""
        config, accelerator = self.config, self.accelerator
        size = config.batch_size
        first = self.done * config.gradient_accumulation_steps * size
        parts = [self._training_batch(first + part * size, size) for part in range(config.gradient_accumulation_steps)]
        counts = [answer_tokens(batch) for batch in parts]
        total = self._sum(float(sum(counts)))
        loss_sum = 0.0
        self.net.train()
        for part, (batch, count) in enumerate(zip(parts, counts, strict=True)):
            last = part == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    loss = self.model(**batch).loss
                # DDP averages gradients over processes; undo it, so that every answer token weighs 1 / total.
                accelerator.backward(loss * (count * accelerator.num_processes / total))
            loss_sum = loss_sum + loss.detach().double() * count
        mean = self._sum(float(loss_sum)) / total
        norm = float(accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm or math.inf))
        overflow_is_handled = accelerator.scaler is not None  # fp16: the scaler skips such a step by itself
        if not math.isfinite(mean) or not (math.isfinite(norm) or overflow_is_handled):
            self.optimizer.zero_grad()
            self._not_finite(mean, norm)
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        record = {"step": self.done + 1, "phase": phase, "loss": mean, "learning_rate": rate, "grad_norm": norm}
        self.records.append(record | {"mask": None if mask is None else list(mask)})
        self._bar.set_postfix(loss=f"{mean:.3f}", examples_s=self._rate(), refresh=False)
        self.event("step", phase, **{k: v for k, v in record.items() if k not in ("step", "phase")}, mask=mask)
        return mean

    @torch.no_grad()
    def loss(self, examples: Sequence) -> float:
        """Mean loss over the answer tokens of one batch, in eval mode, the same in every process."""
        batch = self._share(examples)
        count = answer_tokens(batch)
        self.net.eval()
        with self.accelerator.autocast():
            value = self.net(**batch).loss
        return self._sum(float(value.double()) * count) / self._sum(float(count))

    def event(self, kind: str, phase: str, **values) -> None:
        """Queues an event for the callbacks; they run when the step is complete."""
        seconds = time.perf_counter() - self._started
        self._events.append(Event(kind, phase, self.done + 1, self.total_steps, seconds, self.net, **values))

    # -- parts -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint of the present state into `output_dir`."""
        scaler = self.accelerator.scaler
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "records": self.records,
            "caller": self._state(),
        }
        config = self.config
        checkpoint.save(
            config.output_dir, self.net, self.done, state, self._identity(), config.keep_checkpoints, self.accelerator
        )

    def _resume(self, restore: Callable[[dict], None]) -> None:
        path = checkpoint.latest(self.config.output_dir)
        if path is None:
            return
        state = checkpoint.restore(path, self.net, self._identity(), self.accelerator)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.records, self.done = list(state["records"]), state["step"]
        restore(state["caller"])

    def _identity(self) -> dict:
        world = self.accelerator.num_processes
        run = {"examples": len(self.examples), "processes": world, "loop": self.title}
        return self.config.identity() | run | self.about

    def _prepare(self) -> None:
        from transformers import get_scheduler

        config = self.config
        self.accelerator = accelerator = make_accelerator(config.mixed_precision, self.net)
        from accelerate.utils import set_seed

        set_seed(config.seed, device_specific=True)
        world = accelerator.num_processes
        smallest = min(config.batch_size, getattr(config, "reward_batch_size", config.batch_size))
        if smallest < world:
            raise ConfigError(f"A batch of {smallest} cannot be shared by {world} processes; make it larger.")
        if config.gradient_checkpointing:
            recompute(unwrap(self.net), True)
        self.model = accelerator.prepare_model(self.net) if world > 1 else self.net
        self.device = accelerator.device if world > 1 else next(self.net.parameters()).device
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas)
        self.optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        self.scheduler = get_scheduler(
            schedule, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=self.total_steps
        )
        self._events: list[Event] = []

    def _release(self) -> None:
        if getattr(self, "model", self.net) is not self.net:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model = self.net

    def _training_batch(self, first: int, size: int) -> dict:
        """The batch at a place of the order.

        Where none of its pictures opens, and such examples are to be left out, the next one of the order that does open
        stands in for it: every step is a step.
        """
        try:
            return self._share([self.examples[i] for i in self.order.take(first, size)])
        except NothingOpenedError:
            for i in self.order.take(first + size, len(self.examples)):
                with suppress(NothingOpenedError):
                    return self._share([self.examples[i]] * self.accelerator.num_processes)
            raise

    def _share(self, examples: Sequence) -> dict:
        """This process's part of a batch, collated, on the device."""
        mine = examples[self.accelerator.process_index :: self.accelerator.num_processes]
        batch = self.collate(list(mine), answers=True)
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def _sum(self, value: float) -> float:
        """The sum over processes, the same number in each of them."""
        if self.accelerator.num_processes == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=self.device), "sum"))

    def _anyone(self, flag: bool) -> bool:
        return self._sum(float(flag)) > 0

    def _notify(self, event: Event) -> None:
        if not self.accelerator.is_main_process:
            return
        for callback in self.callbacks:
            try:
                callback(event)
            except KeyboardInterrupt:
                self._stop = True

    def _not_finite(self, loss: float, norm: float) -> None:
        saved = checkpoint.latest(self.config.output_dir) if self.config.output_dir else None
        kept = (
            f"The last good checkpoint is {saved}; resume=True goes on from it." if saved else "There is no checkpoint."
        )
        what = f"loss is {loss}" if not math.isfinite(loss) else f"length of the gradient is {norm}"
        raise TrainingError(
            f"Step {self.done + 1}: the {what}. The weights were left as they were after step {self.done}. {kept} "
            f"Try a lower learning_rate (now {self.config.learning_rate:g}) or more lr_warmup_steps."
        )

    def _progress(self):
        from tqdm.auto import tqdm

        hidden = not (self.config.progress and self.accelerator.is_main_process)
        return tqdm(total=self.total_steps, initial=self.done, desc=self.title, unit="step", disable=hidden)

    def _rate(self) -> str:
        since = max(time.perf_counter() - self._started, 1e-9)
        per_step = self.config.batch_size * self.config.gradient_accumulation_steps
        return f"{(self.done + 1 - self._first) * per_step / since:.0f}"


def answer_tokens(batch: dict) -> int:
    """Labels that enter the loss: of tokens (B, S) those that are not -100, of a classifier one an example.

    A model that predicts position t + 1 at t has no say about the first token. A classifier's labels are (B,) classes,
    or soft targets (B, classes) of a float type.
    """
    labels = batch["labels"]
    if labels.ndim == 1 or labels.is_floating_point():
        return len(labels)
    count = int((labels[:, 1:] != -100).sum())
    if count == 0:
        raise TrainingError("A batch has no answer token: all its labels are -100. Check the task's collate.")
    return count
