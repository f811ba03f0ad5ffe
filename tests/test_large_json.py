"""Large JSON files are read item by item: the same as all at once, wherever what is read at once ends."""

from __future__ import annotations

import json

import pytest

from eas_kit.errors import DataError
from eas_kit.tasks.records import field, read_json_items


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 22])
def test_large_json_is_read_item_by_item(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("eas_kit.tasks.records.CHUNK", chunk)
    items = [12, 'q"]}', {"é": None}, [], -4.5e300, 1.5e-300, 7.25, True]
    found = {"a": [1, {"b": ["x,]"]}], "n": 123, "list": items, "z": []}
    path = tmp_path / "x.json"
    for indent in (None, 1):
        path.write_text("\ufeff" + json.dumps(found, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert list(read_json_items(path, "list")) == found["list"] and list(read_json_items(path, "z")) == []
    text = json.dumps(found)
    for end in range(len(text)):
        path.write_text(text[:end])
        with pytest.raises(DataError, match="x.json: no valid JSON: .* at character .*a download that broke off"):
            list(read_json_items(path, "list"))
    wrong = {
        '{"list": [1,]}': "Expecting value at character 13",
        '{"list": [1 2]}': "wanted , or ] at character 13",
        '{"list": {"a": 1}}': "field 'list' should be list, it is dict {'a': 1}",
        '{"list": [], "list": []}': "wanted a new name in quotes, got str 'list'",
        '{"b": 1}': "there is no field 'list'",
        "[1]": "wanted { at character 1",
        "{}": "there is no field 'list'",
    }
    for text, message in wrong.items():
        path.write_text(text)
        with pytest.raises(DataError) as error:
            list(read_json_items(path, "list"))
        assert message in str(error.value) and "x.json" in str(error.value)
    path.write_text('{"list": [{"a": 1}, {"b": [{"a": 1, "a": 2}]}, {"a": NaN}, {"a": 3}]}')
    first, twice, nan, last = read_json_items(path, "list")  # what is wrong in one item is that item's fault
    assert (first, last) == ({"a": 1}, {"a": 3})
    with pytest.raises(DataError, match="^the name 'a' occurs twice in one object$"):
        field(twice, "a", int)
    with pytest.raises(DataError, match="^NaN is no value of JSON$"):
        field(nan, "a", int)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="there is no file .*none.json"):
        list(read_json_items(tmp_path / "none.json", "list"))
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        list(read_json_items(tmp_path, "list"))
    path = tmp_path / "latin.json"
    monkeypatch.setattr("eas_kit.tasks.records.CHUNK", 100)
    path.write_bytes(('{"list": [' + "1, " * 9000 + '"é"]}').encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.json is not text in UTF-8: .* behind character 2\d,\d\d\d$"):
        list(read_json_items(path, "list"))
