"""Every error the package raises on purpose. Each also is the built-in kind a caller would expect to catch."""

from __future__ import annotations


class EASError(Exception):
    """Base of all errors of eas_kit. Messages say what was wanted, what came, and what to do next."""


class ConfigError(EASError, ValueError):
    """A setting, a mask or a saved file does not make sense."""


class UnsupportedModelError(EASError, TypeError):
    """The model (or a part of it) has a shape in which attentions cannot be skipped exactly."""


class PromptError(EASError, ValueError):
    """It is not known, or not possible to know, which positions are the prompt."""


class MergeError(EASError, RuntimeError):
    """The adapters cannot be folded into the weights here, or the folded weights do not fit this input."""


class TaskError(EASError, ValueError):
    """A task, a split or an example is not what was asked for."""


class DataError(TaskError):
    """A file of a data set, a record of it or a picture is missing, broken or contradicts itself."""


class NothingOpenedError(DataError):
    """No example of a batch has pictures that can be opened, and such examples are to be left out."""


class TrainingError(EASError, RuntimeError):
    """Training or search cannot go on."""


class RunError(EASError, RuntimeError):
    """A notebook run failed or was asked for wrongly."""
