"""A copy of a data set on the hub, or in a folder of the same form, read through ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from eas_kit.errors import DataError
from eas_kit.tasks.pictures import PictureCell, Pictures


class HubCopy:
    """Tables of a hub copy; loaded once, when the first is asked for. All its splits are fetched then.

    Args:
        name: "owner/name", or a folder that ``datasets.load_dataset`` reads.
        task: who reads it, for errors.
        otherwise: what to do where it cannot be loaded.
    """

    def __init__(self, name: str, task: str, otherwise: str):
        self.name, self.task, self.otherwise = name, task, otherwise

    @cached_property
    def tables(self) -> Mapping[str, Any]:
        import datasets

        try:
            return datasets.load_dataset(self.name)
        except Exception as error:  # of many libraries: not found, gated, offline, no data in it
            why = f"{type(error).__name__}: {error.__cause__ or error}"
            raise DataError(
                f"{self.task}: the hub copy {self.name!r} cannot be loaded: {why}. Check the name and the network,"
                f" {self.otherwise}"
            ) from error

    def split(self, *splits: str) -> str | None:
        """The first of `splits` that the copy has, or None."""
        return next((s for s in splits if s in self.tables), None)

    def rows(self, *splits: str, columns: Sequence[str] = ()) -> Any:
        """The ``datasets.Dataset`` of the first of `splits` that the copy has, pictures not decoded."""
        import datasets

        copy, split = self.tables, self.split(*splits)
        if split is None:
            raise DataError(
                f"{self.task}: the copy {self.name!r} has no split {' or '.join(splits)}, but {', '.join(copy)}"
            )
        rows = copy[split]
        missing = [c for c in columns if c not in rows.column_names]
        if missing:
            raise DataError(
                f"{self.task}: split {split} of {self.name!r} has no column {', '.join(missing)}; it has"
                f" {', '.join(rows.column_names)}"
            )
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        return rows

    def records(self, rows: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows with their numbers, without the bytes of their pictures."""
        import datasets

        texts = rows.select_columns([c for c, f in rows.features.items() if not isinstance(f, datasets.Image)])
        return enumerate(texts)

    def archive(self, name: str) -> Path:
        """The folder that an archive of the hub copy was unpacked to, once, beside it in the cache."""
        if (Path(self.name) / name).is_file():
            archive = Path(self.name) / name
        else:
            from huggingface_hub import hf_hub_download

            try:
                archive = Path(hf_hub_download(self.name, name, repo_type="dataset"))
            except Exception as error:
                raise DataError(
                    f"{self.task}: {name} of {self.name!r} cannot be loaded: {error}; give image_dir"
                ) from error
        import datasets

        # the library refuses members that lead out of the folder, and unpacks every archive once
        return Path(datasets.DownloadManager().extract(str(archive)))

    def has_pictures(self, rows: Any, column: str) -> list[bool]:
        """Which rows have a picture, by their bytes' or path's presence alone."""
        import datasets

        if not isinstance(rows.features[column], datasets.Image):
            raise DataError(
                f"{self.task}: column {column!r} of {self.name!r} holds no pictures, but {rows.features[column]}"
            )
        found: list[bool] = []
        for chunk in rows.data.column(column).chunks:
            parts = (chunk, chunk.field("bytes"), chunk.field("path"))
            valid = (part.is_valid().to_pylist() for part in parts)
            found += [cell and (data or path) for cell, data, path in zip(*valid)]
        return found

    def paths(self, rows: Any, column: str) -> list[str | None]:
        """The names that the pictures had as files, where the copy has kept them."""
        self.has_pictures(rows, column)
        return [path for chunk in rows.data.column(column).chunks for path in chunk.field("path").to_pylist()]

    @staticmethod
    def picture(rows: Any, row: int, column: str, record: str) -> Pictures:
        return Pictures(PictureCell(rows, row, column, record))
