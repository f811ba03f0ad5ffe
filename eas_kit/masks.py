"""Skip masks: the sorted, zero-based list of skipped sites, the same in code, JSON, pictures and widgets."""

from __future__ import annotations

import json
import operator
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .config import is_int, read_json
from .errors import ConfigError

FORMAT = 1


def check_mask(mask: Iterable[int], num_sites: int) -> tuple[int, ...]:
    """The mask as a sorted tuple. Raises ConfigError for anything but distinct whole numbers in 0..num_sites-1."""
    if isinstance(mask, int | str):
        raise ConfigError(f"a mask is a list of site numbers, got {mask!r}; for one site write [{mask}]")
    sites = []
    for site in mask:
        try:
            if isinstance(site, bool):
                raise TypeError
            sites.append(operator.index(site))  # takes numpy and torch integers too
        except TypeError:
            raise ConfigError(
                f"a mask lists the numbers of the skipped sites, zero-based; got {site!r}"
                " (for a list of true and false, pass the positions that are true)"
            ) from None
    outside = [site for site in sites if not 0 <= site < num_sites]
    if outside:
        raise ConfigError(f"mask {sites}: sites are numbered 0 to {num_sites - 1}, so there is no {outside}")
    if len(set(sites)) < len(sites):
        raise ConfigError(f"mask {sites} names a site twice; name each once")
    return tuple(sorted(sites))


def save_mask(
    path: str | Path,
    mask: Iterable[int],
    *,
    num_sites: int,
    kind: str = "mha",
    model: str | None = None,
    made_by: str = "user",
    seed: int | None = None,
) -> None:
    """Write a mask as JSON: format, kind, num_sites, skipped, model, made_by, seed."""
    skipped = check_mask(mask, num_sites)
    record = {
        "format": FORMAT,
        "kind": kind,
        "num_sites": num_sites,
        "skipped": list(skipped),
        "model": model,
        "made_by": made_by,
        "seed": seed,
    }
    Path(path).write_text(json.dumps(record) + "\n", encoding="utf-8")


def read_mask(path: str | Path) -> dict[str, Any]:
    """The whole record that `save_mask` wrote, checked."""
    record = read_json(path, what="mask")
    missing = [key for key in ("format", "num_sites", "skipped") if key not in record]
    if missing:
        raise ConfigError(f"mask {path} has no {missing}; save it with eas_kit.masks.save_mask")
    if not is_int(record["format"], 1) or not is_int(record["num_sites"], 1) or not isinstance(record["skipped"], list):
        raise ConfigError(
            f"mask {path}: wanted whole numbers for format and num_sites and a list for skipped, got"
            f" {record['format']!r}, {record['num_sites']!r}, {record['skipped']!r}"
        )
    if record["format"] > FORMAT:
        warnings.warn(
            f"mask {path} has format {record['format']}, this version of eas_kit knows format {FORMAT}: only its"
            " skipped sites are read",
            stacklevel=3,
        )
    record["skipped"] = list(check_mask(record["skipped"], record["num_sites"]))
    return record


def load_mask(
    path: str | Path, *, num_sites: int | None = None, site_kinds: Sequence[str] | None = None
) -> tuple[int, ...]:
    """The skipped sites in `path`. With `num_sites`, ConfigError unless the mask was made for that many sites.

    `site_kinds`: the kind of every site here ("mha", "ffn"), numbered kind after kind. A mask of one kind is then taken
    for that kind's sites, and a mask of several kinds for one of them, if it skips nothing of the others.
    """
    record = read_mask(path)
    if site_kinds is not None:
        return _renumbered(path, record, list(site_kinds))
    if num_sites is not None and record["num_sites"] != num_sites:
        raise ConfigError(
            f"mask {path} was made for {record['num_sites']} sites ({record.get('model')}), this model has {num_sites}"
        )
    return tuple(record["skipped"])


def _renumbered(path: str | Path, record: dict[str, Any], here: list[str]) -> tuple[int, ...]:
    """The record's sites in the numbering of `here`, kind by kind."""
    kinds = str(record.get("kind") or here[0]).split("+")
    each, rest = divmod(record["num_sites"], len(kinds))
    counts = {kind: here.count(kind) for kind in dict.fromkeys(here)}
    fitting = {kind: count for kind, count in counts.items() if kind in kinds}
    if rest or not fitting or any(count != each for count in fitting.values()):
        known = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        raise ConfigError(
            f"mask {path} was made for {record['num_sites']} sites of {'+'.join(kinds)} ({record.get('model')}), here"
            f" are {known}"
        )
    sites = []
    for site in record["skipped"]:
        kind = kinds[site // each]
        if kind not in counts:
            raise ConfigError(f"mask {path} skips site {site}, a {kind}; here only {', '.join(counts)} can be skipped")
        sites.append(here.index(kind) + site % each)
    return tuple(sorted(sites))
