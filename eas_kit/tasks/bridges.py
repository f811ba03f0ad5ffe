"""Tasks as a ``datasets.Dataset``, for whatever reads those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eas_kit.tasks.pictures import PictureCell, PictureFile, Pictures

_TEXTS = ("role", "id", "question", "answer", "explanation", "context", "group", "prompt", "target")
_LISTS = ("choices", "categories", "references")


def to_hf(task, roles: Sequence[str]):
    """See ``Task.to_hf``. Pictures that are files stay files, others are copied into the table as PNG."""
    import datasets

    text = datasets.Value("string")
    features = datasets.Features(
        {
            **dict.fromkeys(_TEXTS, text),
            **dict.fromkeys(_LISTS, datasets.List(text)),
            "images": datasets.List(datasets.Image()),
        }
    )
    if len(roles) == 1:
        task.split(roles[0])  # raises for one that does not exist, or is empty
    rows = [_row(task, role, example) for role in roles for example in getattr(task, role)]
    return datasets.Dataset.from_list(rows, features=features)


def _row(task, role: str, example) -> dict[str, Any]:
    own = {name: getattr(example, name) for name in ("id", "question", "answer", "explanation", "context", "group")}
    lists = {name: list(getattr(example, name)) for name in _LISTS}
    target = "".join(task.target_text(example)).strip() if example.answer else ""
    return (
        own
        | lists
        | {
            "role": role,
            "prompt": task.question_text(example),
            "target": target,
            "images": _images(example.images),
        }
    )


def _images(images: Sequence[Any]) -> list[Any]:
    if not isinstance(images, Pictures):
        return list(images)
    return [_image(source) for source in images.sources]


def _image(source: PictureFile | PictureCell) -> dict[str, Any]:
    if isinstance(source, PictureFile):
        return {"path": str(source.read()), "bytes": None}
    return source.rows[source.row][source.column]
