"""Large JSON files are read item by item, and say what is wrong with them."""

from __future__ import annotations

import json

import pytest

from eas_kit.errors import DataError
from eas_kit.tasks.records import read_json_items


def test_large_json_is_read_item_by_item(tmp_path):
    items = [12, 'q"]}', {"é": None, "n": [1, {"deep": 2}]}, [], -4.5e300, 7.25, True]
    found = {"a": [1, {"list": ["x,]"]}], "n": 123, "list": items, "z": [3]}
    path = tmp_path / "x.json"
    for indent in (None, 1):
        path.write_text("\ufeff" + json.dumps(found, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert list(read_json_items(path, "list")) == items and list(read_json_items(path, "z")) == [3]
    assert [type(item) for item in read_json_items(path, "list")][-3:] == [float, float, bool]


def test_it_stops_where_a_file_is_broken(tmp_path):
    path = tmp_path / "x.json"
    text = json.dumps({"list": [{"a": 1}, {"a": 2}], "end": 3})
    for end in (0, 5, text.index("2"), len(text) - 1):
        path.write_text(text[:end])
        with pytest.raises(DataError, match="x.json is no valid JSON: .*; a download that broke off looks like this$"):
            list(read_json_items(path, "list"))
    path.write_text(text[: text.index("}, ") + 3])
    reading = read_json_items(path, "list")
    assert next(reading) == {"a": 1}  # what comes before is there
    for broken in ('{"list": [1,]}', '{"list": [1 2]}', '{"list": [NaN]}'):
        path.write_text(broken)
        with pytest.raises(DataError, match="x.json is no valid JSON"):
            list(read_json_items(path, "list"))
    path.write_bytes(('{"list": [' + "1, " * 90 + '"é"]}').encode("latin-1"))
    with pytest.raises(DataError, match="x.json is no valid JSON: .*UTF-?8"):
        list(read_json_items(path, "list"))


def test_files_without_the_list(tmp_path):
    path = tmp_path / "x.json"
    for text in ('{"list": {"a": 1}}', '{"list": []}', '{"b": 1}', "[1]", "{}"):
        path.write_text(text)
        with pytest.raises(DataError, match="x.json: wanted a list 'list' of records, there is none, or nothing in it"):
            list(read_json_items(path, "list"))
    with pytest.raises(DataError, match="there is no file .*none.json"):
        list(read_json_items(tmp_path / "none.json", "list"))
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        list(read_json_items(tmp_path, "list"))
