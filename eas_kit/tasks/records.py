"""Reading owners' files: every fault is named by file and record, and raised, or noted and the record left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eas_kit.errors import DataError, TaskError

ON_ERROR = ("raise", "skip")


@dataclass(frozen=True)
class Problem:
    """What was wrong with a record that was left out."""

    file: str
    record: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}, record {self.record}: {self.problem}"


class Intake:
    """Decides on faulty records: raises, or leaves them out and remembers them in ``problems``."""

    def __init__(self, task: str, on_error: str):
        if on_error not in ON_ERROR:
            raise TaskError(f"{task}: on_error is one of {', '.join(ON_ERROR)}, not {on_error!r}")
        self.task, self.on_error = task, on_error
        self.problems: list[Problem] = []

    def note(self, problem: Problem) -> None:
        """Raises DataError, or remembers."""
        if self.on_error == "raise":
            raise DataError(
                f"{self.task}: {problem}. Mend it, or leave such records out and have them counted: on_error='skip'"
            )
        self.problems.append(problem)

    @contextmanager
    def record(self, file: str, record: Any) -> Iterator[None]:
        """Around the reading of one record: a DataError inside becomes a problem of this file and record."""
        try:
            yield
        except DataError as error:
            self.note(Problem(file, str(record), str(error)))


def field(record: Any, name: str, kind: type | tuple[type, ...] = str, default: Any = ...) -> Any:
    """``record[name]``, of the kind that is wanted; DataError where it is missing (without a default) or another."""
    if not isinstance(record, dict):
        raise DataError(f"wanted an object with named fields, got {_short(record)}")
    value = record.get(name, default)
    if value is ...:
        raise DataError(f"there is no field {name!r}")
    if value is default or (isinstance(value, kind) and not (isinstance(value, bool) and kind is int)):
        return value
    kinds = kind if isinstance(kind, tuple) else (kind,)
    raise DataError(f"field {name!r} should be {' or '.join(k.__name__ for k in kinds)}, it is {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise DataError(f"the name {twice!r} occurs twice in one object")
    return found


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose outermost value is of ``kind`` (dict or list); DataError naming file and place else."""
    try:
        found = json.loads(_text(path), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is no valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; a download that broke"
            " off looks like this"
        ) from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(found, kind):
        wanted = {dict: "an object", list: "a list"}[kind]
        raise DataError(f"{path}: wanted {wanted} of records, the file holds {_short(found)}")
    return found


def read_json_lines(path: Path, intake: Intake) -> Iterator[tuple[int, dict]]:
    """The objects of a file with one JSON object a line, with their line numbers from 1; blank lines are nothing."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        with intake.record(path.name, f"line {number}"):
            try:
                found = json.loads(line, object_pairs_hook=_no_duplicates)
            except json.JSONDecodeError as error:
                raise DataError(f"no valid JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(found, dict):
                raise DataError(f"wanted an object, got {_short(found)}")
            yield number, found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
