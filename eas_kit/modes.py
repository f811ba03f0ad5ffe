"""Train and eval mode, module by module, as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """The mode of every module comes back after the block: a tower that was frozen in eval mode stays in it."""
    overall, modes = model.training, [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.train(overall)  # modules that came in meanwhile, by another mask
        for module, mode in modes:
            module.training = mode


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside."""
    with keeping_modes(model):
        model.eval()
        yield
