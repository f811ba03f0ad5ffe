"""Runs as processes of their own, which can be killed: a model folder, a task, and the processes. See test_launch.py.

The processes are forks of a server that has imported everything: a fresh interpreter each would take most of the time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import toys
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

KILL = "KILL_AT_BATCH"
IMPORTED = ("accelerate", "peft", "transformers.optimization", "transformers.generation")  # what a run does import


class LaunchedTask(toys.ToyTask):
    """The toy task as `load_task` wants one: the processor first. SIGKILLs its process at a batch, if asked to."""

    def __init__(self, processor, sizes: dict[str, int] | None = None, images: bool = False) -> None:
        super().__init__(sizes, images=images)
        self.batches, self.kill_at = 0, int(os.environ.get(KILL, "0"))

    def collate(self, examples, answers: bool = True):
        self.batches += answers
        if self.batches == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().collate(examples, answers)


def save_model(folder: Path) -> Path:
    """A random Llama with a tokenizer beside it, which the task does not use."""
    toys.make_llama().save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({str(number): number for number in range(toys.VOCAB)}, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="0").save_pretrained(folder)
    return folder


def settings(model: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A short run. Without dropout, whose noise several processes cannot share, it is the same in all of them."""
    loop = {"learning_rate": 0.01, "checkpoint_every": 2, "progress": False}
    search = {"num_skipped": 2, "warmup_steps": 3, "updates": 3, "train_steps_per_update": 2, "preference_lr": 30.0}
    return {
        "model": {"name": str(model), "attn_implementation": "eager"},
        "task": "launched:LaunchedTask",
        "output_dir": str(output_dir),
        "eas": {"skip_rank": 6, "adapt_rank": 4, "dropout": 0.0},
        "search": loop | search | {"batch_size": 6, "reward_batch_size": 7},  # odd: two processes share it unevenly
        "train": loop | {"max_steps": 5, "batch_size": 4, "gradient_accumulation_steps": 2},
        "evaluate": {"split": "val", "limit": 5},
        "seed": 5,
    } | changes


def write(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def launch(config: str) -> None:
    """One process of a run."""
    from eas_kit.launch import main

    raise SystemExit(main([config]))


def _enter(environment: dict[str, str], target: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*arguments)


def start(target: Callable, *arguments: Any, processes: int = 1, **environment: str) -> list[int]:
    """`target(*arguments)` in so many processes of one group, as a launcher would; their exit codes (-9: SIGKILL).

    As a launcher does, it kills the others where one of them is killed.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["launched", "test_launch", "eas_kit.launch", "eas_kit.notebooks", *IMPORTED])
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= world | {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    children = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        children.append(context.Process(target=_enter, args=(environment | own, target, arguments)))
        children[-1].start()
    try:
        for child in children:
            child.join(timeout=100)
            if child.exitcode == -signal.SIGKILL:
                break
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL) if child.is_alive() else None
            child.join()
    return [child.exitcode for child in children]
