"""Parts of the base model that train beside the adapters: peft's `modules_to_save`.

LaVIN trains its projection and modality vectors, METER its task's head, a LLaVA often its projector. They stay where
they are in the model; what they held before `attach` is kept, so that `detach` gives the base back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .errors import ConfigError

PREFIX = "modules_to_save."  # of their tensors' names in the file of adapters


class TrainedParts:
    """The tensors of the modules (or single parameters) at `paths` in `base`, and copies of what they were.

    Attributes: `tensors`, parameters and persistent buffers by their full names in the base; `parameters`, those that
    train. Raises ConfigError for a path that is not there or holds nothing, before anything is changed.
    """

    def __init__(self, base: nn.Module, paths: Iterable[str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        for path in paths:
            found = _tensors_at(base, path)
            if not found:
                raise ConfigError(
                    f"EASConfig.modules_to_save: {type(base).__name__} has no weights at {path!r}; wanted the path of a"
                    " module or parameter, as in base.named_modules(), e.g."
                    f" {', '.join(repr(name) for name, _ in base.named_children())}"
                )
            self.tensors |= found
        self.parameters = [tensor for tensor in self.tensors.values() if isinstance(tensor, nn.Parameter)]
        self._before = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def train(self) -> None:
        """They require a gradient from now on."""
        for parameter in self.parameters:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)

    @torch.no_grad()
    def restore(self) -> None:
        """What they were, and frozen."""
        for name, tensor in self.tensors.items():
            tensor.copy_(self._before[name])
            tensor.requires_grad_(False)


def _tensors_at(base: nn.Module, path: str) -> dict[str, Tensor]:
    """Parameters and persistent buffers at a path of `base`, by full name; empty if there are none."""
    try:
        module = base.get_submodule(path)
    except AttributeError:  # no module: perhaps a parameter
        own = dict(base.named_parameters())
        return {path: own[path]} if path in own else {}
    return {f"{path}.{name}".lstrip("."): tensor for name, tensor in module.state_dict(keep_vars=True).items()}


def wanted_parts(base: nn.Module, paths: tuple[str, ...] | None) -> tuple[str, ...]:
    """The paths that a configuration asks for; None: what the model itself names in `eas_modules_to_save`."""
    return tuple(getattr(base, "eas_modules_to_save", ())) if paths is None else paths
