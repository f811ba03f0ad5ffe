"""results.json and the pages made of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from eas_kit.errors import RunError
from eas_kit.pages import index_page, notebook_page, render_metrics
from eas_kit.report import machine, plain, read_json, read_results, write_results


def test_results_come_back_as_plain_values(tmp_path):
    metrics = {
        "accuracy": np.float32(0.5),
        "loss": torch.tensor([1.0, float("nan")]),
        "sites": (2, 5),
        "kinds": {"mha"},
        "table": pd.DataFrame({"k": [1, 2], "mean": [0.25, float("inf")]}),
        "indexed": pd.DataFrame({"mean": [3.0]}, index=pd.Index(["mha"], name="kind")),
        "counts": np.arange(3),
        "nested": {4: Path("x/y")},
    }
    path = write_results(tmp_path, "01_probe", metrics, {"trials": 5}, seed=7, summary="One sentence.")
    assert path == tmp_path / "01_probe" / "results.json"
    record = read_results(tmp_path, "01_probe")
    assert record["metrics"] == {
        "accuracy": 0.5,
        "loss": [1.0, None],
        "sites": [2, 5],
        "kinds": ["mha"],
        "table": [{"k": 1, "mean": 0.25}, {"k": 2, "mean": None}],
        "indexed": [{"kind": "mha", "mean": 3.0}],
        "counts": [0, 1, 2],
        "nested": {"4": "x/y"},
    }
    assert (record["seed"], record["parameters"], record["summary"]) == (7, {"trials": 5}, "One sentence.")
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_machine_is_named():
    found = machine("cpu")
    assert found["device"].startswith("cpu (")
    assert found["processor"]
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1


def test_what_json_cannot_hold_is_named_by_its_place():
    with pytest.raises(RunError, match=r"results\['a'\]\[1\] is a object, which JSON cannot hold"):
        plain({"a": [1, object()]}, "results")


def test_missing_results_name_those_that_are_there(tmp_path):
    with pytest.raises(RunError, match="no notebook has left results there"):
        read_results(tmp_path, "01_probe")
    write_results(tmp_path, "00_start", {}, device="cpu")
    with pytest.raises(RunError, match=r"there are results of 00_start\. Run it first: eas-kit run 01_probe --out"):
        read_results(tmp_path, "01_probe")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "results.json").write_text('{"a": ')
    with pytest.raises(RunError, match="cannot be read as JSON .*delete it and run again"):
        read_json(tmp_path / "results.json")


def test_metrics_as_tables():
    page = render_metrics({"a": 0.123456, "n": {"b": [1.0, 2.0], "c": None}, "rows": [{"k": 1, "<x>": 2.5}, {"k": 3}]})
    assert "<th>a</th><td>0.1235</td>" in page
    assert "<th>n.b</th><td>[1, 2]</td>" in page
    assert "<th>n.c</th><td>–</td>" in page
    assert "<h3>rows</h3>" in page
    assert "&lt;x&gt;" in page


def test_a_dict_of_rows_is_a_table_and_a_deeper_one_is_not():
    page = render_metrics({"skipped": {"nothing": {"loss": 0.5, "count": 3}, "mha 0": {"loss": 0.75}}})
    assert "<h3>skipped</h3>" in page
    assert "<td>nothing</td><td class=n>0.5</td><td class=n>3</td>" in page
    assert "<td>mha 0</td><td class=n>0.75</td><td class=n>–</td>" in page
    page = render_metrics({"a": {"b": {"c": {"d": 1}}, "e": {"f": [{"g": {"h": 2}}]}}})
    assert "<th>a.b.c.d</th><td>1</td>" in page
    assert "<th>a.e.f</th>" in page


def test_a_failed_notebook_shows_its_traceback():
    entry = {
        "notebook": "00_a", "title": "T <b>", "status": "FAILED", "seconds": 1.0, "peak_mb": 2.0, "error": "E: <no>",
        "cell": 2, "cells": 3, "traceback": "line <1>",
    }  # fmt: skip
    record = {"name": "x", "written": "2024-01-01T00:00:00", "versions": {"python": "3.11"}, "notebooks": [entry]}
    page = index_page(record, {}, {"00_a": ["QUJD"]})
    assert "1 of 1 notebooks not done" in page
    assert "code cell 2 of 3: E: &lt;no&gt;" in page
    assert "line &lt;1&gt;" in page
    assert "data:image/png;base64,QUJD" in page


def test_notebook_pages_need_no_network():
    import nbformat.v4 as v4

    text = (
        r"Inline $z = \tfrac12 C n$, block $$w = \mathrm{softmax}(R m / \tau)$$ and $\unfinished{$; [next](01_b.ipynb)"
    )
    book = v4.new_notebook(cells=[v4.new_markdown_cell(text), v4.new_code_cell("1 + 1")])
    page = notebook_page(book, "T")
    assert page.count("<math") >= 2
    assert 'href="01_b.html"' in page
    assert "<script src=" not in page
    assert 'src="http' not in page


def test_results_file_is_utf8_json(tmp_path):
    path = write_results(tmp_path, "00_a", {"name": "Ångström"}, device="cpu")
    assert json.loads(path.read_bytes().decode())["metrics"]["name"] == "Ångström"
