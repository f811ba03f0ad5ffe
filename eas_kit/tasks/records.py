"""Reading owners' files: every fault is named by file and record, and raised, or noted and the record left out."""

from __future__ import annotations

import codecs
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
        self.as_published: list[tuple[str, Problem]] = []  # those of them that are no fault of the copy, by split

    def note(self, problem: Problem) -> None:
        """Raises DataError, or remembers."""
        if self.on_error == "raise":
            raise DataError(
                f"{self.task}: {problem}. Mend it, or leave such records out and have them counted: on_error='skip'"
            )
        self.problems.append(problem)

    def leave_out(self, split: str, problem: Problem) -> None:
        """Remembers one that its owners published like this, so that nobody can mend it."""
        self.problems.append(problem)
        self.as_published.append((split, problem))

    @contextmanager
    def record(self, file: str, record: Any) -> Iterator[None]:
        """Around the reading of one record: a DataError inside becomes a problem of this file and record."""
        try:
            yield
        except DataError as error:
            self.note(Problem(file, str(record), str(error)))


def field(record: Any, name: str, kind: type | tuple[type, ...] = str, default: Any = ...) -> Any:
    """``record[name]``, of the kind that is wanted; DataError where it is missing (without a default) or another.

    With a default, null is the same as missing. True and False are no numbers.
    """
    if isinstance(record, Fault):
        raise DataError(record.problem)
    if not isinstance(record, dict):
        raise DataError(f"wanted an object with named fields, got {_short(record)}")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    value = record.get(name, default)
    if value is ...:
        raise DataError(f"there is no field {name!r}")
    if isinstance(value, Fault):
        raise DataError(value.problem)
    if value is default or (value is None and default is not ...):
        return default
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return value
    raise DataError(f"field {name!r} should be {' or '.join(k.__name__ for k in kinds)}, it is {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


@dataclass(frozen=True, slots=True)
class Fault:
    """Stands in a parsed file for a record that JSON parsers read without a word and that yet is no valid one."""

    problem: str


class _Decoder:
    """As json's, but a name twice in an object, and NaN, become a Fault; ``faults`` says whether there was one."""

    def __init__(self):
        self.faults: list[Fault] = []
        self._json = json.JSONDecoder(object_pairs_hook=self._unique, parse_constant=self._constant)

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any] | Fault:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        return self._fault(f"the name {twice!r} occurs twice in one object")

    def _constant(self, name: str) -> Fault:
        return self._fault(f"{name} is no value of JSON")

    def _fault(self, problem: str) -> Fault:
        self.faults.append(Fault(problem))
        return self.faults[-1]

    def __call__(self, text: str) -> Any:
        """The value of the text. Raises JSONDecodeError, or DataError where no parser gets to the end."""
        try:
            return self._json.decode(text)
        except RecursionError:
            raise DataError("no records: objects or lists are nested too deeply") from None
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # a whole number of thousands of digits
            raise DataError(f"no records: {error}") from None


def _parse(text: str) -> Any:
    """JSON with a Fault in place of every item of the outermost list or object that has one inside."""
    decode = _Decoder()
    found = decode(text)
    if decode.faults and isinstance(found, dict | list):
        for key, item in list(found.items() if isinstance(found, dict) else enumerate(found)):
            found[key] = _fault_in(item) or item
    return found


def _fault_in(value: Any) -> Fault | None:
    if isinstance(value, Fault):
        return value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_fault_in, inside)), None)


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose outermost value is of ``kind`` (dict or list); DataError naming file and place else."""
    text = _text(path)
    try:
        found = _parse(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is no valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; a download that broke"
            " off looks like this"
        ) from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if isinstance(found, Fault):
        raise DataError(f"{path}: {found.problem}")
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
                found = _parse(line)
            except json.JSONDecodeError as error:
                raise DataError(f"no valid JSON: {error.msg} at column {error.colno}") from None
            if fault := _fault_in(found):
                raise DataError(fault.problem)
            if not isinstance(found, dict):
                raise DataError(f"wanted an object, got {_short(found)}")
            yield number, found


def read_json_items(path: Path, name: str) -> Iterator[Any]:
    """The items of the list ``name`` in a JSON file whose outermost value is an object, one by one.

    The file is never held as a whole: hundreds of MB take some. DataError for a file that is not there, that is no
    valid JSON (as soon as the place is reached), or where that list is missing or empty.
    """
    import ijson

    empty = True
    with _readable(path), open(path, "rb") as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        try:
            for item in ijson.items(file, f"{name}.item", use_float=True):
                empty = False
                yield item
        except ijson.JSONError as error:
            why = " ".join(str(error).split())
            raise DataError(f"{path} is no valid JSON: {why}; a download that broke off looks like this") from None
    if empty:
        raise DataError(f"{path}: wanted a list {name!r} of records, there is none, or nothing in it")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _text(path: Path) -> str:
    with _readable(path):
        return path.read_text(encoding="utf-8-sig")
