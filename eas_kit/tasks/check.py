"""Is a download whole? Reads a data set as a task would, opens pictures, and says what is missing or wrong."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from eas_kit.errors import TaskError
from eas_kit.tasks import load_task
from eas_kit.tasks.base import ROLES
from eas_kit.tasks.data_set import DataSetTask
from eas_kit.tasks.pictures import PictureError, Pictures, open_picture
from eas_kit.tasks.records import Problem

SHOWN = 10


@dataclass
class Findings:
    """What ``check_data`` saw. ``ok``: records and opened pictures are fine, and as many as the owner says."""

    task: str
    where: str
    counts: dict[str, int]  # by owner's split: good records
    wanted: dict[str, int]  # the same as published
    roles: dict[str, tuple[int, str]]  # role -> examples, where they come from
    columns: dict[str, int]
    pictures: int  # files or cells that records refer to
    opened: int
    as_published: dict[str, int] = field(default_factory=dict)  # records left out that are the owner's own, by split
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems and not self.other_counts

    @property
    def other_counts(self) -> list[str]:
        read = {split: self.counts.get(split, 0) + self.as_published.get(split, 0) for split in self.wanted}
        return [split for split, wanted in self.wanted.items() if read[split] != wanted]

    def text(self) -> str:
        """The report, for people."""
        lines = [f"{self.task}: {self.where}", "", "owner's splits (good records; published)"]
        for split in {**self.wanted, **self.counts}:
            wanted = f"{self.wanted[split]:>9,}" if split in self.wanted else "        -"
            mark = "   DIFFERENT" if split in self.other_counts else ""
            own = self.as_published.get(split, 0)
            mark += f"   and {own:,} left out, published so" if own else ""
            lines.append(f"  {split:<12}{self.counts.get(split, 0):>9,}{wanted}{mark}")
        lines += ["", "roles"]
        lines += [f"  {role:<12}{count:>9,}   {source}" for role, (count, source) in self.roles.items()]
        if self.columns:
            shown = ", ".join(f"{name} {count:,}" for name, count in list(self.columns.items())[:12])
            lines += ["", f"columns       {shown}{' ...' if len(self.columns) > 12 else ''}"]
        lines += [f"pictures      {self.pictures:,}, of which {self.opened:,} were opened"]
        if self.problems:
            lines += ["", f"{len(self.problems):,} problem{'s' * (len(self.problems) > 1)}"]
            lines += [f"  {problem}" for problem in self.problems[:SHOWN]]
            lines += [f"  ... and {len(self.problems) - SHOWN:,} more"] * (len(self.problems) > SHOWN)
        verdict = "ok" if self.ok else "NOT as published" if not self.problems else "NOT ok"
        return "\n".join([*lines, "", verdict])


def check_data(
    name: str,
    data_dir: str | None = None,
    hub: bool | str = False,
    open_pictures: int | None = 500,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> Findings:
    """Reads all records of a data set and opens so many of its pictures, drawn by ``seed`` (None: all).

    Raises:
        DataError: where nothing can be read at all; every other fault is in the findings.
        TaskError: for a task that is no data set.
    """
    if "on_error" in settings:
        raise TaskError(f"{name}: a check goes through all records, so on_error cannot be set for it")
    task = load_task(name, None, data_dir=data_dir, hub=hub, on_error="skip", seed=seed, **settings)
    if not isinstance(task, DataSetTask):
        raise TaskError(f"{name} is no data set that can be checked")
    examples = [e for role in ROLES for e in getattr(task, role)]
    sources = _pictures(examples)
    chosen = sources if open_pictures is None else random.Random(seed).sample(sources, min(open_pictures, len(sources)))
    problems = [p for p in task.skipped if p not in (known for _, known in task.as_published)]
    if progress:
        from tqdm.auto import tqdm

        chosen = tqdm(chosen, desc="pictures", leave=False)
    for source in chosen:
        try:
            open_picture(source)
        except PictureError as error:
            problems.append(Problem("pictures", source.record, error.problem))
    columns = Counter(category for e in examples for category in e.categories)
    return Findings(
        task=task.card.title,
        where=str(task.hub or task.folder),
        counts=task.owner_counts,
        wanted=dict(task.published()),
        roles={role: (len(getattr(task, role)), task.sources.get(role, "nothing")) for role in ROLES},
        columns=dict(sorted(columns.items())),
        pictures=len(sources),
        opened=len(chosen),
        as_published=dict(Counter(split for split, _ in task.as_published)),
        problems=problems,
    )


def _pictures(examples: Iterable[Any]) -> list[Any]:
    """Every picture once, though many examples may refer to it."""
    sources = (s for e in examples if isinstance(e.images, Pictures) for s in e.images.sources)
    # rows of a hub copy are numbered from 0 in every split
    found = {(id(getattr(s, "rows", None)), s.name): s for s in sources}
    return list(found.values())
