"""Pictures that are opened when they are asked for, and checked then: inside of their folder, whole, of sane size."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from eas_kit.errors import DataError

# A file of some kB can unpack to gigabytes; from this many pixels on Pillow itself warns.
MAX_PIXELS = 89_478_485
_TURN = Image.Transpose
# EXIF orientation -> what makes the picture upright
_UPRIGHT = {
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture of a folder. ``place`` is relative to ``root``; ``record`` is the name of who refers to it.

    Records written on Windows part folders by backslashes; these are read as slashes everywhere.
    """

    root: str
    place: str
    record: str = ""

    def __post_init__(self):
        if "\0" in self.place:
            raise DataError(f"the name of the picture {self.place!r} holds a NUL character, which no file has")
        if re.match(r"[A-Za-z]:[\\/]|[\\/]", self.place) or os.path.isabs(self.place):
            inside = False  # absolute here, or where the record was written
        else:
            object.__setattr__(self, "place", self.place.replace("\\", "/"))
            inside = os.path.normpath(self.place).split(os.sep)[0] != os.pardir
        if not inside:
            raise DataError(f"the picture {self.place!r} lies outside of the folder of pictures, {self.root}")

    @property
    def path(self) -> str:
        return os.path.join(self.root, self.place)

    @property
    def name(self) -> str:
        return self.path

    def read(self) -> Any:
        """What Pillow opens: the path. Of links, only a folder of the root may lead out, to another disk."""
        real = Path(os.path.realpath(self.path))  # Path.resolve fails on links that go round in a circle
        top = os.path.join(self.root, os.path.normpath(self.place).split(os.sep)[0])
        inside = [self.root, top] if os.path.isdir(top) else [self.root]
        if not any(real.is_relative_to(os.path.realpath(place)) for place in inside):
            raise PictureError(
                self,
                f"is a link that leads out of the folder of pictures, to {real}; copy it into the folder, or name the"
                " other folder by image_dir",
            )
        return real


@dataclass(frozen=True, slots=True)
class PictureCell:
    """A picture in a column of a ``datasets.Dataset`` whose Image features are not decoded."""

    rows: Any
    row: int
    column: str
    record: str = ""

    @property
    def name(self) -> str:
        return f"in column {self.column!r} of row {self.row}"

    def read(self) -> Any:
        cell = self.rows[self.row][self.column]
        data, path = (cell or {}).get("bytes"), (cell or {}).get("path")
        if data is None and path is None:
            raise PictureError(self, "is empty")
        return io.BytesIO(data) if data is not None else path

    def digest(self) -> str:
        """The same for the same picture in another row."""
        cell = self.rows[self.row][self.column] or {}
        return hashlib.sha256(cell.get("bytes") or str(cell.get("path")).encode()).hexdigest()


class Pictures(Sequence):
    """The pictures of an example: a sequence of RGB ``PIL.Image``, each opened anew whenever it is asked for.

    Raises:
        DataError: on opening one that is missing, truncated, no picture, too large, or outside of its folder; the
            message names the file and the record.
    """

    __slots__ = ("sources",)

    def __init__(self, *sources: PictureFile | PictureCell):
        self.sources = sources

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return tuple(open_picture(s) for s in self.sources[i])
        return open_picture(self.sources[i])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pictures) and self.sources == other.sources

    def __hash__(self) -> int:
        return hash(self.sources)

    def __repr__(self) -> str:
        return f"Pictures({', '.join(s.name for s in self.sources)})"


class PictureError(DataError):
    """A picture that cannot be opened. ``problem`` says which and why; the message also names the record."""

    def __init__(self, source: PictureFile | PictureCell, why: str):
        self.problem = f"the picture {source.name} {why}"
        super().__init__(f"record {source.record}: {self.problem}")


def open_picture(source: PictureFile | PictureCell) -> Image.Image:
    """The picture in RGB, upright by its EXIF orientation. Raises PictureError, naming file and record."""
    bomb = f"more than the {MAX_PIXELS:,} allowed: a decompression bomb, or a picture to be scaled down first"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error below
            warnings.filterwarnings("ignore", "Palette images with Transparency")  # which goes in RGB
            with Image.open(source.read()) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise PictureError(source, f"has {picture.width} x {picture.height} pixels, {bomb}")
                picture.load()
                return _upright(picture, _eight_bits(picture, source)).convert("RGB")
    except (PictureError, MemoryError):
        raise
    except FileNotFoundError:
        raise PictureError(source, "does not exist") from None
    except Image.DecompressionBombError:
        raise PictureError(source, f"has far {bomb}") from None
    except Exception as error:  # for broken files Pillow raises OSError, SyntaxError, struct.error and more
        raise PictureError(source, f"cannot be opened, it is truncated or no picture: {error}") from None


def _eight_bits(picture: Image.Image, source: PictureFile | PictureCell) -> Image.Image:
    """A grey picture of more bits scaled to eight: Pillow's own conversion cuts off at 255, and leaves white."""
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return picture
    low, high = picture.getextrema()
    if picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM"):  # these know no more than 16 bits
        return picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if low < 0 or high > 255:
        raise PictureError(
            source,
            f"has values from {low:g} to {high:g} in 32 bits, of which it is not known what is black and what white;"
            " save it with 8 or 16 bits",
        )
    return picture


def _upright(file: Image.Image, pixels: Image.Image) -> Image.Image:
    """The pixels turned as the file's EXIF part says."""
    try:
        orientation = file.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a broken EXIF part says nothing of the pixels
        orientation = None
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return pixels if turn is None else pixels.transpose(turn)
