"""Any task, for a model that has a head in place of words (METER)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import TaskError
from .closed import ClosedTask, closed
from .matching import MatchingTask, matching


def kind_for_a_head(task_class: type) -> type[ClosedTask]:
    """The class of what `for_a_head` makes of such a task."""
    return MatchingTask if hasattr(task_class, "captioned") else ClosedTask


def for_a_head(task: Any, labels: int, sizes: Mapping[str, int] | None = None) -> ClosedTask:
    """The task for a model whose head has so many labels; `task` as `load_task` returns it, with these `sizes`.

    Captioned pictures (Flickr30K) are to be matched with a text, see `matching`; of other tasks the answers make a
    closed list, see `closed`. Raises TaskError where the task has another number of answers than the head.
    """
    found = matching(task, sizes=sizes) if kind_for_a_head(type(task)) is MatchingTask else closed(task)
    if len(found.answers) != labels:
        raise TaskError(
            f"closed: {task.name} has {len(found.answers)} answers, and the model's head {labels}; give it as many,"
            f" answers: {len(found.answers)} among the model's settings"
        )
    return found
