"""Fixtures all tests share: tiny random models built from configs, batches for them, a toy task."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import toys

torch.set_num_threads(1)  # much the fastest for models this small, the more so on a busy machine


@pytest.fixture
def tiny_llava():
    """Makes a random LLaVA: tiny_llava(seed=0, **changes of its text config). 5 layers, width 38, 9 image tokens."""
    return toys.make_llava


@pytest.fixture
def tiny_llama():
    """Makes a random Llama: tiny_llama(seed=0, **changes of its config). 5 layers, width 38."""
    return toys.make_llama


@pytest.fixture
def make_batch():
    """Makes right-padded batches with labels, some rows with an image; see toys.make_batch."""
    return toys.make_batch


@pytest.fixture
def make_prompts():
    """Makes left-padded prompts for generate; see toys.make_prompts."""
    return toys.make_prompts


@pytest.fixture
def toy_task():
    """A task with train, search, val, test, collate, score and evaluate over random token ids."""
    return toys.ToyTask()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory):
    """Where browser tests put their pictures: the folder that EAS_KIT_SCREENSHOTS names, else pytest's own."""
    named = os.environ.get("EAS_KIT_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
