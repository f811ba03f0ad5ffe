"""The tasks: one file each. ``load_task(name, processor)`` finds them by name."""

from __future__ import annotations

import importlib

from eas_kit.errors import TaskError

# name -> (module, class); imported when first asked for
_TASKS = {
    "definitions": ("eas_kit.tasks.definitions", "Definitions"),
    "digits": ("eas_kit.tasks.digits", "Digits"),
    "elements": ("eas_kit.tasks.elements", "Elements"),
    "reading": ("eas_kit.tasks.reading", "Reading"),
}


def load_task(name: str, processor, **settings):
    """A task by name, bound to the processor of the model that will be used.

    Args:
        name: one of "definitions", "digits", "elements", "reading".
        processor: as ``eas.load_model`` returns it; of a model of text alone, its tokenizer (for "definitions").
        settings: passed to the task: ``sizes={"test": 200}``; those with random questions also take ``seed=1``.

    Raises:
        TaskError: for a name that does not exist, listing those that do; for a processor that the task cannot use.
    """
    if name not in _TASKS:
        raise TaskError(f"there is no task {name!r}; choose one of {', '.join(sorted(_TASKS))}")
    module, attribute = _TASKS[name]
    return getattr(importlib.import_module(module), attribute)(processor, **settings)


def check_task(caller: str, task, *parts: str) -> None:
    """Raises TaskError if `task` lacks an attribute that `caller` will use. Any object that has them is a task."""
    missing = [part for part in parts if not hasattr(task, part)]
    if missing:
        raise TaskError(
            f"{caller}: wanted a task with {', '.join(parts)}; this {type(task).__name__} has no {', '.join(missing)}."
            ' Take one of eas_kit.load_task, or see data/README.md, "A task of your own"'
        )
