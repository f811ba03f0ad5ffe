"""The tasks: one file each. ``load_task(name, processor)`` finds them by name."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from typing import Any

from eas_kit.errors import TaskError

# name -> (module, class); imported when first asked for
_TASKS = {
    "aid": ("eas_kit.tasks.aid", "AID"),
    "boards-nlvr2": ("eas_kit.tasks.boards", "BoardsNLVR2"),
    "boards-retrieval": ("eas_kit.tasks.boards", "BoardsRetrieval"),
    "boards-vqa": ("eas_kit.tasks.boards", "BoardsVQA"),
    "conversations": ("eas_kit.tasks.conversations", "Conversations"),
    "definitions": ("eas_kit.tasks.definitions", "Definitions"),
    "digits": ("eas_kit.tasks.digits", "Digits"),
    "elements": ("eas_kit.tasks.elements", "Elements"),
    "flickr30k": ("eas_kit.tasks.flickr30k", "Flickr30K"),
    "nlvr2": ("eas_kit.tasks.nlvr2", "NLVR2"),
    "reading": ("eas_kit.tasks.reading", "Reading"),
    "scienceqa": ("eas_kit.tasks.scienceqa", "ScienceQA"),
    "slake": ("eas_kit.tasks.slake", "Slake"),
    "vqav2": ("eas_kit.tasks.vqav2", "VQAv2"),
}
_FROM_BASE = {"Example": "eas_kit.tasks.base", "Task": "eas_kit.tasks.base"}


def __getattr__(name: str) -> Any:  # torch and transformers come with the first task
    if name in _FROM_BASE:
        return getattr(importlib.import_module(_FROM_BASE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def task_names() -> list[str]:
    """The names that ``load_task`` knows."""
    return sorted(_TASKS)


def data_sets() -> dict[str, Any]:
    """The real data sets by name, each with its card: title, owners' page, licence, hub copy, published sizes."""
    found = {name: _find(name) for name in task_names()}
    return {name: task.card for name, task in found.items() if hasattr(task, "card")}


def load_task(name: str | type, processor, **settings):
    """A task by name, bound to the processor of the model that will be used.

    Args:
        name: of a bundled task ("boards-nlvr2", "boards-retrieval", "boards-vqa", for METER; "definitions", "digits",
            "elements", "reading"), of a real data set ("aid",
            "flickr30k", "nlvr2", "scienceqa", "slake", "vqav2"), "conversations" for files of one's own in LLaVA's
            form; or one's own sub-class of ``eas_kit.tasks.Task``, itself or as "module:Class" (the module is looked
            for in the working folder too).
        processor: as ``eas.load_model`` returns it; of a model of text alone, its tokenizer; None where only answers
            are scored.
        settings: passed to the task: ``sizes={"test": 200}``; real data sets want ``data_dir`` or ``hub=True``.

    Raises:
        TaskError: for a name that does not exist, listing those that do; for a processor that the task cannot use;
            for settings that the task does not have.
    """
    if not isinstance(name, str | type):
        raise TaskError(f"load_task(name, processor): wanted the name of a task first, got a {type(name).__name__}")
    found = name if isinstance(name, type) else _find(name)
    try:
        return found(processor, **settings)
    except TypeError as error:
        wrong = re.search(r"__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if wrong is None or wrong[1] not in settings:
            raise  # of something that the task makes
        title, known = name if isinstance(name, str) else name.__name__, ", ".join(_settings(found)) or "none"
        raise TaskError(f"{title}: there is no setting {wrong[1]!r}; it has {known}") from error


def _settings(task: type) -> list[str]:
    """The keywords that a task and its bases take."""
    taken = (inspect.signature(base.__init__).parameters.values() for base in task.__mro__ if "__init__" in vars(base))
    named = {p.name for some in taken for p in some if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return sorted(named - {"self", "processor"})


def _find(name: str) -> type:
    if name in _TASKS:
        module, attribute = _TASKS[name]
        return getattr(importlib.import_module(module), attribute)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise TaskError(
            f"there is no task {name!r}; choose one of {', '.join(task_names())}, or give your own as 'module:Class'"
        )
    if os.getcwd() not in sys.path:  # a notebook's folder is there, that of eas-kit is not
        sys.path.append(os.getcwd())
    if not module or not attribute:
        raise TaskError(f"task {name!r}: wanted 'module:Class', as in 'my_task:MyTask' for the class of my_task.py")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module != error.name and not module.startswith(f"{error.name}."):
            raise  # of what the module itself imports
        raise TaskError(f"task {name!r}: {error}; is {module}.py in the working folder or on the path?") from error
    found = getattr(loaded, attribute, None)
    if not isinstance(found, type):
        raise TaskError(f"task {name!r}: module {module} has no class {attribute}")
    return found


def check_task(caller: str, task, *parts: str) -> None:
    """Raises TaskError if `task` lacks an attribute that `caller` will use. Any object that has them is a task."""
    missing = [part for part in parts if not hasattr(task, part)]
    if missing:
        raise TaskError(
            f"{caller}: wanted a task with {', '.join(parts)}; this {type(task).__name__} has no {', '.join(missing)}."
            ' Take one of eas_kit.load_task, or see data/README.md, "A task of your own"'
        )
