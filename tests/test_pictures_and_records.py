"""Pictures opened when they are asked for, and records of owners' files: every fault by its name, nothing else lost."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from eas_kit.errors import DataError, TaskError
from eas_kit.tasks.pictures import MAX_PIXELS, PictureCell, PictureFile, Pictures, open_picture
from eas_kit.tasks.records import Intake, Problem, field, read_json, read_json_lines


def png_header(width: int, height: int) -> bytes:
    """A PNG of some bytes that claims to be of this size, one bit a pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


def save(path, size=(3, 2), colour=(9, 99, 199), **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **settings)
    return path


def at(root, place: str) -> PictureFile:
    return PictureFile(str(root), place, "7")


# ---------------------------------------------------------------------- pictures that cannot be opened
def test_broken_files_are_named_with_their_record(tmp_path):
    whole = save(tmp_path / "whole.jpg", (64, 48)).read_bytes()
    for name, data in {"half.jpg": whole[: len(whole) // 2], "empty.png": b"", "text.png": b"no picture"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"record 7: the picture .*{name} cannot be opened, it is truncated or no"):
            open_picture(at(tmp_path, name))
    with pytest.raises(DataError, match=r"record 7: the picture .*gone.png does not exist$"):
        open_picture(at(tmp_path, "gone.png"))
    with pytest.raises(DataError, match="record 7: the picture .* cannot be opened"):
        open_picture(at(tmp_path, "."))  # a folder
    assert open_picture(at(tmp_path, "whole.jpg")).size == (64, 48)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data")
def test_whatever_is_wrong_in_a_file_is_a_data_error():
    """Pillow raises OSError, SyntaxError, struct.error, TypeError ... for damaged files: all come out as one."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "of a camera"
    picture, rng, opened, refused = Image.effect_noise((20, 15), 50).convert("RGB"), random.Random(0), 0, 0
    for kind, settings in {"JPEG": {"exif": exif}, "PNG": {"exif": exif}, "GIF": {}, "DDS": {}, "WEBP": {}}.items():
        file = io.BytesIO()
        picture.save(file, kind, **settings)
        for _ in range(150):
            data = bytearray(file.getvalue())
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(min(len(data), rng.choice([40, 200, 9999])))] = rng.randrange(256)
            try:
                opened += open_picture(PictureCell([{"c": {"bytes": bytes(data)}}], 0, "c", "n")).mode == "RGB"
            except DataError as error:
                refused += str(error).startswith("record n: the picture in column 'c' of row 0 ")
    assert opened > 100 and refused > 100 and opened + refused == 750


def test_decompression_bombs_are_refused_before_they_unpack(tmp_path):
    (tmp_path / "huge.png").write_bytes(png_header(100_000, 100_000))  # more than twice the limit: Pillow refuses
    (tmp_path / "large.png").write_bytes(png_header(11_000, 10_000))  # less than twice: Pillow only warns
    assert MAX_PIXELS < 11_000 * 10_000 < 2 * MAX_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="record 7.*huge.png has far more than the 89,478,485 allowed.*bomb"):
            open_picture(at(tmp_path, "huge.png"))
        with pytest.raises(DataError, match="large.png has 11000 x 10000 pixels, more than the 89,478,485.*bomb"):
            open_picture(at(tmp_path, "large.png"))


# ---------------------------------------------------------------------- where they lie
@pytest.mark.parametrize("place", ["../a.png", "b/../../a.png", "/etc/a.png", r"..\a.png", r"C:\a.png", r"\a.png"])
def test_a_place_outside_of_the_folder_is_refused(tmp_path, place):
    with pytest.raises(DataError, match="the picture .*a.png' lies outside of the folder of pictures, /"):
        at(tmp_path, place)


def test_places_inside(tmp_path):
    save(tmp_path / "imgs" / "a.png")
    save(tmp_path / "imgs" / "..b" / "c:d.png")
    for place in ("imgs/a.png", "imgs/x/../a.png", r"imgs\a.png", "./imgs//a.png", r"imgs\..b\c:d.png"):
        assert open_picture(at(tmp_path, place.replace("/x/..", ""))).size == (3, 2)
    with pytest.raises(DataError, match="'a\\\\x00.png' holds a NUL character"):
        at(tmp_path, "a\0.png")


def test_links_lead_anywhere_inside_but_not_out(tmp_path):
    secret, root = save(tmp_path / "secret.png"), tmp_path / "root"
    save(root / "real" / "a.png")
    save(tmp_path / "disk" / "b.png")
    (tmp_path / "disk" / "deep.png").symlink_to(secret)
    (root / "train").symlink_to(tmp_path / "disk")  # a whole folder of pictures, on another disk
    (root / "real" / "outer").symlink_to(tmp_path)
    (root / "inside.png").symlink_to(root / "real" / "a.png")
    (root / "out.png").symlink_to(secret)
    (root / "circle.png").symlink_to(root / "circle.png")
    (tmp_path / "elsewhere").symlink_to(root)
    for folder in (root, tmp_path / "elsewhere"):  # the folder itself may be a link
        assert open_picture(at(folder, "inside.png")).size == (3, 2)
        assert open_picture(at(folder, "train/b.png")).size == (3, 2)
        for place in ("out.png", "train/deep.png", "real/outer/secret.png"):
            with pytest.raises(DataError, match="record 7: the picture .* is a link that leads out .*by image_dir"):
                open_picture(at(folder, place))
        with pytest.raises(DataError, match="record 7: the picture .*circle.png cannot be opened"):
            open_picture(at(folder, "circle.png"))


# ---------------------------------------------------------------------- what comes out
def test_every_mode_becomes_rgb(tmp_path):
    red = Image.new("RGB", (3, 2), (255, 0, 0))
    palette = red.quantize(4)
    palette.info["transparency"] = b"\x80\xff"
    for name, picture, colour in [
        ("palette.png", palette, (255, 0, 0)),
        ("alpha.png", Image.new("RGBA", (3, 2), (255, 0, 0, 10)), (255, 0, 0)),
        ("grey.png", Image.new("L", (3, 2), 77), (77, 77, 77)),
        ("grey alpha.png", Image.new("LA", (3, 2), (77, 9)), (77, 77, 77)),
        ("one bit.png", Image.new("1", (3, 2), 1), (255, 255, 255)),
        ("cmyk.tif", Image.new("CMYK", (3, 2), (0, 255, 255, 0)), (255, 0, 0)),
    ]:
        picture.save(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = open_picture(at(tmp_path, name))
        assert opened.mode == "RGB" and opened.getpixel((2, 1)) == colour, name


def test_grey_of_sixteen_bits_is_scaled_not_cut_off(tmp_path):
    values = np.array([[0, 256, 257], [32768, 65280, 65535]], dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.asarray(open_picture(at(tmp_path, name)))[..., 1].tolist() == [[0, 1, 1], [128, 255, 255]]
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="float.tif has values from 0 to 65535 in 32 bits.*save it with 8 or 16 bits"):
        open_picture(at(tmp_path, "float.tif"))
    Image.fromarray(np.array([[0, 7, 255]], dtype=np.int32)).save(tmp_path / "small.tif")
    assert np.asarray(open_picture(at(tmp_path, "small.tif")))[..., 2].tolist() == [[0, 7, 255]]


def test_exif_orientation_is_applied(tmp_path):
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    a, b, c, d, e, f = stored.ravel().tolist()
    upright = {  # by the EXIF standard: where the stored row 0 and column 0 are to be seen
        1: [[a, b, c], [d, e, f]],
        2: [[c, b, a], [f, e, d]],
        3: [[f, e, d], [c, b, a]],
        4: [[d, e, f], [a, b, c]],
        5: [[a, d], [b, e], [c, f]],
        6: [[d, a], [e, b], [f, c]],
        7: [[f, c], [e, b], [d, a]],
        8: [[c, f], [b, e], [a, d]],
        99: [[a, b, c], [d, e, f]],
    }
    for orientation, wanted in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        # (TIFF: Pillow turns by itself; 13.0 mixes up the rows of small uncompressed ones of 5 to 8)
        for name in ("a.png", "a.tif") if orientation < 5 else ("a.png",):
            Image.fromarray(stored).save(tmp_path / name, exif=exif)
            assert np.asarray(open_picture(at(tmp_path, name)))[..., 0].tolist() == wanted, (name, orientation)


def test_pictures_are_opened_anew_and_closed_again(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", (i + 1, 2))
    many = [Pictures(at(tmp_path, f"{i % 4}.png")) for i in range(2_000)]
    before = len(os.listdir("/proc/self/fd"))
    kept = [pictures[0].size for pictures in many]
    assert kept[:5] == [(1, 2), (2, 2), (3, 2), (4, 2), (1, 2)] and len(os.listdir("/proc/self/fd")) == before
    two = pickle.loads(pickle.dumps(Pictures(at(tmp_path, "0.png"), at(tmp_path, "3.png"))))
    assert len(two) == 2 and [p.size for p in two[-1:]] == [(4, 2)] and two[1] is not two[1]
    assert repr(two) == f"Pictures({tmp_path}/0.png, {tmp_path}/3.png)"


def test_a_cell_without_a_picture():
    for cell in (None, {"bytes": None, "path": None}):
        with pytest.raises(DataError, match="^record n: the picture in column 'image' of row 0 is empty$"):
            open_picture(PictureCell([{"image": cell}], 0, "image", "n"))


# ---------------------------------------------------------------------- records
@pytest.mark.parametrize(
    "data,message",
    [
        (
            b'[{"a": 1}, {"a"',
            "is no valid JSON: Expecting ':' delimiter at line 1, column 16; a download that broke off",
        ),
        (b"", "is no valid JSON: Expecting value at line 1, column 1"),
        (b'["caf\xe9"]', "is not text in UTF-8: invalid continuation byte at byte 5"),
        ('["a"]'.encode("utf-16"), "is not text in UTF-8: invalid start byte at byte 0"),
        (b'{"a": []}', "wanted a list of records, the file holds dict {'a': \\[\\]}"),
        (b"null", "wanted a list of records, the file holds NoneType None"),
        (b"NaN", "NaN is no value of JSON"),
        (b'{"a": 1, "a": 2}', "the name 'a' occurs twice in one object"),
        (b"[" * 100_000, "no records: objects or lists are nested too deeply"),
        (b"[" + b"9" * 5_000 + b"]", "no records: Exceeds the limit"),
    ],
)
def test_files_that_are_no_list_of_records(tmp_path, data, message):
    path = tmp_path / "data.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"data\.json:? {message}") as caught:
        read_json(path, list)
    assert str(caught.value).count("data.json") == 1


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"^there is no file .*gone\.json$"):
        read_json(tmp_path / "gone.json", dict)
    with pytest.raises(DataError, match=rf"^{tmp_path} cannot be read: Is a directory$"):
        read_json(tmp_path, dict)
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}')
    assert read_json(tmp_path / "bom.json", dict) == {"a": "\u2028"}


def test_a_fault_inside_costs_its_record_alone(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"a": "x", "b": {"c": [1, {"d": 1, "d": 2}]}}, {"a": "y"}, {"a": "z", "b": [-Infinity]}]')
    found = read_json(path, list)
    assert field(found[1], "a") == "y"
    with pytest.raises(DataError, match="^the name 'd' occurs twice in one object$"):
        field(found[0], "a")
    with pytest.raises(DataError, match="^-Infinity is no value of JSON$"):
        field(found[2], "a")
    with pytest.raises(DataError, match="^-Infinity is no value of JSON$"):
        field({"list": found[2]}, "list", dict)


def test_json_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = ['{"q": "a\u2028b\x85c"}', "", '{"q": ', "[1]", '{"q": NaN}', '{"q": 1, "q": 2}', "  ", '{"q": "last"}']
    path.write_bytes("\r\n".join(lines).encode())
    skipping = Intake("t", "skip")
    assert list(read_json_lines(path, skipping)) == [(1, {"q": "a\u2028b\x85c"}), (8, {"q": "last"})]
    assert [str(p) for p in skipping.problems] == [
        "data.jsonl, record line 3: no valid JSON: Expecting value at column 7",
        "data.jsonl, record line 4: wanted an object, got list [1]",
        "data.jsonl, record line 5: NaN is no value of JSON",
        "data.jsonl, record line 6: the name 'q' occurs twice in one object",
    ]
    with pytest.raises(DataError, match=r"^t: data.jsonl, record line 3: no valid .*: on_error='skip'$"):
        list(read_json_lines(path, Intake("t", "raise")))


@pytest.mark.parametrize(
    "record,kind,message",
    [
        ({}, str, "^there is no field 'a'$"),
        ({"a": None}, str, "^field 'a' should be str, it is NoneType None$"),
        ({"a": 3}, str, "^field 'a' should be str, it is int 3$"),
        ({"a": True}, int, "^field 'a' should be int, it is bool True$"),
        ({"a": False}, (int, str), "^field 'a' should be int or str, it is bool False$"),
        ({"a": "x" * 99}, list, "^field 'a' should be list, it is str 'x{56}\\.\\.\\.$"),
        (["a"], str, r"^wanted an object with named fields, got list \['a'\]$"),
        (None, str, "^wanted an object with named fields, got NoneType None$"),
    ],
)
def test_fields(record, kind, message):
    with pytest.raises(DataError, match=message):
        field(record, "a", kind)


def test_fields_that_may_be_missing():
    assert field({"a": 0}, "a", int) == 0 and field({"a": True}, "a", bool) is True
    assert [field(r, "a", str, default="") for r in ({}, {"a": None}, {"a": "b"})] == ["", "", "b"]
    with pytest.raises(DataError, match="field 'a' should be str, it is int 0"):
        field({"a": 0}, "a", str, default="")


def test_on_error():
    with pytest.raises(TaskError, match="^t: on_error is one of raise, skip, not 'ignore'$"):
        Intake("t", "ignore")
    intake = Intake("t", "skip")
    with intake.record("f.json", 3):
        raise DataError("broken")
    assert intake.problems == [Problem("f.json", "3", "broken")]
    with pytest.raises(KeyError), intake.record("f.json", 4):  # a fault of ours is no fault of the record
        raise KeyError("bug")
    with pytest.raises(DataError, match="^t: f.json, record 3: broken. Mend it, or leave such records out"):
        Intake("t", "raise").note(Problem("f.json", "3", json.loads('"broken"')))
