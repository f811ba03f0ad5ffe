"""What the real data sets share: owners' files or a hub copy in, four roles of checked examples out."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from eas_kit.errors import DataError, TaskError
from eas_kit.tasks.base import ROLES, Example, Task
from eas_kit.tasks.evaluation import answers_in
from eas_kit.tasks.hub_copy import HubCopy
from eas_kit.tasks.pictures import PictureFile
from eas_kit.tasks.records import Intake, Problem
from eas_kit.tasks.splits import apart, hold_out, sound


@dataclass(frozen=True)
class Card:
    """What is known of a data set. ``published``: records by owner's split, as their owners count them."""

    title: str
    page: str  # where its owners give it away
    licence: str
    hub: str | None  # the hub copy that hub=True reads
    published: Mapping[str, int]


class DataSetTask(Task):
    """Base of the tasks on data that others own.

    Args:
        processor: of the model, as ``eas.load_model`` returns it; None where only answers are scored.
        data_dir: the folder with the owner's files, laid out as on the data set's page under data/.
        hub: True reads the hub copy named on that page instead, through ``datasets``; a text names another one, or a
            folder, of the same columns.
        sizes: at most so many examples by role, e.g. ``{"test": 200}``: drawn at random by ``seed``, in file order.
        seed: of every random choice: which examples are held out, and of ``sizes``.
        held_out: shares of the owner's training split that become "search" and, where the owner has no validation
            split, "val"; by whole groups, so that no picture is in two roles. Default 0.05 each; 0 leaves a role empty.
        on_error: "raise" stops at the first faulty record, "skip" leaves such records out: ``skipped`` has them.
        image_dir: the folder that records name their pictures in, where it is not one of the usual places.
        check_images: whether it is looked up for every picture, at once, that its file exists.

    Attributes:
        train, search, val, test: lists of Example; a role that the data set has nothing for is empty.
        sources: by role, which of the owner's splits it is or was held out of.
        skipped: list of Problem, the records left out so far: on loading, and as their pictures were opened.

    Raises:
        DataError: for missing or broken files and records, by name.
    """

    card: ClassVar[Card]
    roles: ClassVar[Mapping[str, str]] = {"train": "train", "val": "val", "test": "test"}  # to the owner's splits
    can_hold_out: ClassVar[Sequence[str]] = ("search", "val")  # roles taken from train where the owner has no split
    image_dirs: ClassVar[Sequence[str]] = ("images", ".")  # usual places of pictures in data_dir
    form = "owner's files"  # what was found in data_dir, for results

    def __init__(
        self,
        processor,
        data_dir: str | os.PathLike | None = None,
        hub: bool | str = False,
        *,
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
        held_out: Mapping[str, float] | None = None,
        on_error: str = "raise",
        image_dir: str | os.PathLike | None = None,
        check_images: bool = True,
    ):
        super().__init__(processor)
        if (data_dir is None) == (not hub):
            wanted = "data_dir='the folder with the data'"
            if self.card.hub is not None:
                wanted = f"either {wanted}, or hub=True for a hub copy"
            raise TaskError(f"{self.name}: give {wanted}; {self._where_to_get_it()}")
        self._intake, self.on_error = Intake(self.name, on_error), on_error
        self._inside: Path | None = None
        self.seed, self.check_images = seed, check_images
        self.image_dir = None if image_dir is None else Path(image_dir).expanduser()
        self._held_out, self._asked = self._checked_shares(held_out), tuple(held_out or ())
        if self.image_dir is not None and not self.image_dir.is_dir():  # no fault of records, to be skipped
            raise DataError(f"{self.name}: image_dir {self.image_dir} is not a folder")
        self._check_sizes(sizes)  # before minutes of reading
        if hub:
            self.folder, self.hub = None, (self._hub_name() if hub is True else str(hub))
            self.hub_copy = HubCopy(self.hub, self.name, f"or give data_dir. {self._where_to_get_it()}")
            found = self.read_hub()
        else:
            self.folder, self.hub = self._checked_folder(data_dir), None
            found = self.read_folder()
        found = {split: sound(f"split {split}", examples, self._intake) for split, examples in found.items()}
        found = apart(found, self._intake)
        self.owner_counts = {split: len(examples) for split, examples in found.items()}
        self._deal(found)
        self._check_pictures()
        self._cut(sizes)
        self._skipped_on_loading = len(self.skipped)

    # ------------------------------------------------------------------ what a data set defines
    def read_folder(self) -> dict[str, list[Example]]:
        """Examples by the owner's split, from ``self.folder``."""
        raise TaskError(f"{self.name}: cannot be read from a folder; use hub=True")

    def read_hub(self) -> dict[str, list[Example]]:
        """Examples by the owner's split, from ``self.hub_copy.rows(split)``."""
        raise TaskError(f"{self.name}: no hub copy can be read; give data_dir. {self._where_to_get_it()}")

    def published(self) -> Mapping[str, int]:
        """Records by the owner's split, as published, in the form that was read."""
        return self.card.published

    def official_predictions(self, answers: Mapping[str, str | None]) -> Any:
        """What the owners' own evaluation reads, from answers (None: unparsed) by example's id; JSON, or text."""
        raise TaskError(f"{self.name}: its owners give no evaluation that reads a file")

    # ------------------------------------------------------------------ tools for them
    def choose_splits(self, splits: str | Sequence[str] | None) -> None:
        """To be called before the data are read: only these keys of ``roles`` are; None: all of them."""
        if splits is None:
            return
        splits = (splits,) if isinstance(splits, str) else tuple(splits)
        wrong = [split for split in splits if split not in self.roles]
        if wrong or not splits:
            came = ", ".join(map(str, wrong)) or "none"
            raise TaskError(f"{self.name}: splits names what is read, of {', '.join(self.roles)}; got {came}")
        self.roles = {role: split for role, split in self.roles.items() if role in splits}

    def folder_of(self, *names: str) -> Path | None:
        """The first folder of these names in ``image_dir``, or else in the usual places; None where there is none."""
        folders = dict.fromkeys([self.folder, self._inside or self.folder])  # where the files were may be further down
        usual = [folder / place for folder in folders for place in (*self.image_dirs, ".")]
        bases = [self.image_dir] if self.image_dir else usual
        return next((p for base in bases for name in names if (p := base / name).is_dir()), None)

    @property
    def skipped(self) -> list[Problem]:
        return self._intake.problems

    @property
    def as_published(self) -> list[tuple[str, Problem]]:
        """Those of the skipped that are like this at their owners', with the owner's split."""
        return self._intake.as_published

    def reading(self, file: str | Path, record: Any):
        """Around the reading of one record: a DataError inside is raised with its name, or the record is left out."""
        return self._intake.record(os.path.basename(file), record)

    def file(self, *names: str) -> Path:
        """The first of the files that the folder has, also one folder further down; DataError else."""
        for name in names:
            for folder in (self.folder, *self._further_down):
                if (folder / name).is_file():
                    self._inside = self._inside or folder
                    return folder / name
        there = sorted(p.name + "/" * p.is_dir() for p in self.folder.iterdir())
        shown = ", ".join(there[:8]) + (" ..." if len(there) > 8 else "") if there else "nothing"
        raise DataError(
            f"{self.name}: wanted {' or '.join(names)} in {self.folder}, which holds {shown}. {self._where_to_get_it()}"
        )

    def has(self, name: str) -> bool:
        """Whether ``file(name)`` finds one."""
        return any((folder / name).is_file() for folder in (self.folder, *self._further_down))

    @cached_property
    def _further_down(self) -> list[Path]:
        """Read once, by what the listing says: asking each of 100,000 pictures takes minutes on a network's disk."""
        with os.scandir(self.folder) as entries:
            return sorted(self.folder / entry.name for entry in entries if entry.is_dir())

    @cached_property
    def image_root(self) -> Path:
        """Where the records' picture names start: ``image_dir``, or the first of the usual places that exists.

        These are looked for in the folder where the first file was found, then in data_dir.
        """
        if self.image_dir is not None:
            return self.image_dir
        folders = [self._inside or self.folder, self.folder]
        places = [
            folder / name
            for name in (*self.image_dirs, ".")
            for folder in (folders if name != "." else folders[1:])  # the file's own folder is one of texts, mostly
        ]
        return next(filter(Path.is_dir, places))

    def picture(self, record: str, *places: str, root: Path | None = None) -> PictureFile:
        """The picture at the first of `places` (relative to the root) that exists; DataError if none does."""
        root = root or self.image_root
        found = [PictureFile(str(root), place, record) for place in places]  # refuses those that lead out
        if not self.check_images:
            return found[0]
        for one in found:
            if os.path.isfile(one.path):
                return one
        raise DataError(
            f"the picture {' or '.join(one.path for one in found)} does not exist; are all pictures unpacked, or do"
            " they lie elsewhere (image_dir)?"
        )

    def export_predictions(self, predictions: str | os.PathLike, out: str | os.PathLike, split: str = "test") -> int:
        """Writes a predictions file in the shape of the owners' evaluation, and returns how many answers it has.

        Raises:
            DataError: where the file does not answer every example of the split.
            TaskError: where there is no such evaluation.
        """
        answers = answers_in(self, predictions, split)
        official = self.official_predictions(answers)
        text = official if isinstance(official, str) else json.dumps(official, indent=1, ensure_ascii=False) + "\n"
        Path(out).write_text(text, encoding="utf-8")
        return len(answers)

    # ------------------------------------------------------------------ from splits to roles
    def _deal(self, found: dict[str, list[Example]]) -> None:
        self.sources: dict[str, str] = {}
        for role in ROLES:
            setattr(self, role, [])
        for role, split in self.roles.items():
            if split in found:
                setattr(self, role, found[split])
                self.sources[role] = split
        if not self.train:
            return
        useless = [role for role in self._asked if role in self.sources and self._held_out[role]]
        if useless:
            raise TaskError(
                f"{self.name}: {useless[0]} is the owners' split {self.sources[useless[0]]!r}, not held out of train;"
                " leave it out of held_out"
            )
        wanted = {role: share for role, share in self._held_out.items() if role not in self.sources}
        if sum(wanted.values()) >= 1:
            raise TaskError(
                f"{self.name}: the shares held out are {', '.join(f'{r} {s:g}' for r, s in wanted.items())}, which"
                f" leaves nothing of {self.sources['train']} to train on; together they are below 1"
            )
        rest = self.train
        for role, share in wanted.items():
            count = max(1, round(share * len(self.train))) if share else 0
            taken, rest = hold_out(rest, count, random.Random(f"{self.seed} {role}"))
            setattr(self, role, taken)
            self.sources[role] = f"held out of {self.sources['train']} (share {share:g}, seed {self.seed})"
        if len(rest) < len(self.train):
            self.train = rest
            self.sources["train"] += ", what is left"

    def _cut(self, sizes: Mapping[str, int] | None) -> None:
        self._check_sizes(sizes)
        for role, size in (sizes or {}).items():
            examples = getattr(self, role)
            if size < len(examples):
                setattr(self, role, self._drawn(role, examples, size))
                self.sources[role] += f", {size} of {len(examples)} (seed {self.seed})"

    def _drawn(self, role: str, examples: Sequence[Example], size: int) -> list[Example]:
        """So many at random, in file order: owners sort their files by class or picture. Those of 10 are among 20."""
        order = random.Random(f"{self.seed} {role} {len(examples)}").sample(range(len(examples)), len(examples))
        return [examples[i] for i in sorted(order[:size])]

    def split(self, role: str, limit: int | None = None) -> Sequence[Example]:
        """``limit`` examples of a role drawn by ``seed``, or all; TaskError for a role that is unknown or empty."""
        super().split(role, limit)
        examples = getattr(self, role)
        return examples if limit is None or limit >= len(examples) else self._drawn(role, examples, limit)

    def _checked_shares(self, given: Mapping[str, float] | None) -> dict[str, float]:
        if not isinstance(given or {}, Mapping):
            raise TaskError(f"{self.name}: held_out is by role, as {{{self.can_hold_out[0]!r}: 0.1}}, not {given!r}")
        shares = dict.fromkeys(self.can_hold_out, 0.05) | dict(given or {})
        wrong = [role for role in shares if role not in self.can_hold_out]
        if wrong:
            known = " and ".join(self.can_hold_out)
            raise TaskError(f"{self.name}: held_out has shares for {known}; there is no {', '.join(wrong)}")
        for role, share in shares.items():
            if not isinstance(share, int | float) or not 0 <= share < 0.5:
                raise TaskError(f"{self.name}: the share held out for {role} is from 0 to below 0.5, not {share!r}")
        return shares

    def left_out(self, problems: Sequence[Problem]) -> None:
        """``skipped`` also has the examples whose pictures could not be opened, each once."""
        if not problems:  # with thousands skipped, looking at them for every example takes longer than opening it
            return
        known = set(self.skipped)
        self.skipped.extend(p for p in dict.fromkeys(problems) if p not in known)

    # ------------------------------------------------------------------ checks
    def _check_pictures(self) -> None:
        if self.processor is None or self._reads_pictures:
            return
        seeing = next((e for role in ROLES for e in getattr(self, role) if e.images), None)
        if seeing is not None:
            raise TaskError(
                f"{self.name}: example {seeing.id} has a picture, and this processor"
                f" ({type(self.processor).__name__}) has no part for them; take a model that reads pictures"
            )

    def _checked_folder(self, data_dir: Any) -> Path:
        folder = Path(data_dir).expanduser()
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise DataError(f"{self.name}: data_dir {folder} {what}; wanted a folder. {self._where_to_get_it()}")
        return folder

    def _hub_name(self) -> str:
        if self.card.hub is None:
            raise TaskError(f"{self.name}: no hub copy is known; give hub='owner/name', or data_dir")
        return self.card.hub

    def _where_to_get_it(self) -> str:
        return f"data/{self.name}.md says which files, in which folders ({self.card.page})"

    def about(self) -> dict[str, Any]:
        return super().about() | {
            "data": f"hub copy {self.hub}" if self.hub else self.form,
            "sources": dict(self.sources),
            "skipped_on_loading": self._skipped_on_loading,
        }
