"""Results that are computed once: one JSON file each, named after what determines it, shared between processes."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HELD: set[Path] = set()  # claims that this process holds
_WRITTEN_WITHIN = 10.0  # seconds between making a claim and writing its holder into it


class Busy(Exception):
    """Another process is computing this result just now."""


def cached(folder: str | Path, name: str, key: dict[str, Any], compute: Callable[[], dict]) -> dict:
    """The result for `key` from its file in `folder`, or computed now and written there.

    The file holds {"key": ..., "result": ...}; its name is `name` and a digest of the key. While it computes, the
    process holds a claim; Busy is raised in any other that asks. The claim of a process that died is taken over.
    """
    text = json.dumps(key, sort_keys=True)
    path = _path(folder, name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    claim = path.with_name(f"{path.name.removesuffix('.json')}.claim")
    found = _read(path)
    if found is not None:
        return found
    _take(claim)
    try:
        found = _read(path)  # the one who held the claim may have finished in between
        if found is not None:
            return found
        result = json.loads(json.dumps(compute()))  # what a reader of the file will get
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"key": json.loads(text), "result": result}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
        return result
    finally:
        claim.unlink(missing_ok=True)
        _HELD.discard(claim.absolute())


def find_cached(folder: str | Path, name: str, key: dict[str, Any]) -> dict | None:
    """The result for `key` if its file is in `folder`; nothing is computed or claimed."""
    return _read(_path(folder, name, json.dumps(key, sort_keys=True)))


def _path(folder: str | Path, name: str, text: str) -> Path:
    return Path(folder) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8"))["result"] if path.is_file() else None


def _take(claim: Path) -> None:
    holder = f"{socket.gethostname()} {os.getpid()}"
    for _ in range(2):
        try:
            with open(claim, "x", encoding="utf-8") as file:
                _HELD.add(claim.absolute())
                file.write(holder)
            return
        except FileExistsError:
            if not _abandoned(claim):
                raise Busy(claim.name) from None
            claim.unlink(missing_ok=True)
    raise Busy(claim.name)


def _abandoned(claim: Path) -> bool:
    """True if the claim was made on this machine by a process that is no more, or by none that could say so."""
    try:
        written = claim.read_text(encoding="utf-8").split()
        age = time.time() - claim.stat().st_mtime
    except FileNotFoundError:
        return False
    if len(written) != 2:  # killed between making it and writing into it, or about to write
        return age > _WRITTEN_WITHIN
    host, pid = written
    if host != socket.gethostname():
        return False
    if int(pid) == os.getpid():  # restarted containers give the same names and numbers again
        return claim.absolute() not in _HELD
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
