"""A model's answers in a file: one line of JSON an example, written as soon as it is there, resumed after a stop."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eas_kit.errors import DataError


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model answered to one example.

    ``text``: as written, None where nothing was (method "options"); ``answer``: found in it, None if unparsed, or a
    picture's scores with all captions (retrieval); ``loss``: sum over the target's ``tokens`` in nats, None where it
    was not asked for; ``problem``: why there is no answer (its picture could not be opened, and the task was loaded
    with on_error="skip").
    """

    id: str
    text: str | None
    answer: str | list[float] | None
    loss: float | None = None
    tokens: int | None = None
    problem: str | None = None


_KINDS = {"text": str, "answer": str | list, "loss": int | float, "tokens": int, "problem": str}


def settings_path(path: str | os.PathLike) -> Path:
    """Where the settings of a predictions file stand: ``name.settings.json`` beside ``name.jsonl``."""
    return Path(path).with_suffix(".settings.json")


class PredictionsFile:
    """Predictions on disk: `done` by id, and `write` for more.

    Args:
        path: .jsonl; made, with its folder, if it is not there.
        settings: everything the answers depend on; kept beside the file.
        known: all ids that can be in it; None where the caller looks at that.

    Raises:
        DataError: if the file was made with other settings, holds an id that is not known, or is broken before its
            last line.
    """

    def __init__(self, path: str | os.PathLike, settings: Mapping[str, Any], known: Set[str] | None = None):
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise DataError(f"predictions are written to a file .jsonl, not {self.path}")
        self.done: dict[str, Prediction] = {}
        beside = settings_path(self.path)
        settings = json.loads(json.dumps(settings, default=str))
        if self.path.exists() and self.path.stat().st_size:
            self._check(beside, settings)
            drop_torn_line(self.path)
            self.done = {p.id: p for p in read_predictions(self.path)}
            strange = None if known is None else next((i for i in self.done if i not in known), None)
            if strange is not None:
                raise DataError(
                    f"{self.path} holds an answer to {strange!r}, which is not in this split; give another file"
                )
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _check(self, beside: Path, settings: dict[str, Any]) -> None:
        if not beside.exists():
            raise DataError(
                f"{self.path} exists without {beside.name}, so it is not known how it was made; give another file, or"
                " delete it"
            )
        try:
            before = dict(json.loads(beside.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(f"{beside} is broken ({error}); give another file, or delete it and {self.path}") from None
        other = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if other:
            changes = "; ".join(f"{key} was {before.get(key)!r}, is {settings.get(key)!r}" for key in other)
            raise DataError(f"{self.path} was made with other settings: {changes}. Give another file, or delete it")

    def write(self, predictions: Iterable[Prediction]) -> None:
        """Appends a line each, and has the system write them."""
        with open(self.path, "a", encoding="utf-8") as file:
            for prediction in predictions:
                file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def drop_torn_line(path: Path) -> None:
    """Cuts off what a run that was killed left after the last whole line."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def read_predictions(path: str | os.PathLike) -> list[Prediction]:
    """The lines of a predictions file: each an ``id`` with a ``text``, an ``answer``, or both.

    A line that tells of a ``problem`` is replaced by a later one: the picture was tried again.

    Raises:
        DataError: for a file that is not there, a broken line, or an id that occurs twice.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # some editors put a mark in front
    except FileNotFoundError:
        raise DataError(f"there is no predictions file {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; wanted a predictions file") from None
    found: dict[str, Prediction] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is no valid JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict) or "id" not in row or not ({"text", "answer"} & row.keys()):
            raise DataError(
                f'{path}, line {number}: wanted {{"id": ..., "text": ...}} or with "answer", got {line[:60]}'
            )
        for name, kind in _KINDS.items():
            if row.get(name) is not None and not isinstance(row[name], kind):
                kinds = "a text" if name in ("text", "answer", "problem") else "a number"
                raise DataError(f"{path}, line {number}: {name!r} should be {kinds} or null, it is {row[name]!r:.60}")
        one = Prediction(str(row["id"]), *(row.get(name) for name in _KINDS))
        if one.id in found and found[one.id].problem is None:
            raise DataError(f"{path}, line {number}: {one.id!r} was answered before")
        found[one.id] = one
    return list(found.values())
