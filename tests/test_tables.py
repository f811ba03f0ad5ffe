"""The paper's tables as data, and measured beside published, on numbers worked out by hand."""

from __future__ import annotations

import copy
import json
import math
import statistics
from pathlib import Path

import pandas as pd
import pytest

from eas_kit import paper, tables
from eas_kit.errors import ConfigError
from eas_kit.tables import beside, to_frame, to_markdown

FILE = Path(__file__).parents[1] / "data" / "paper_tables.json"


@pytest.fixture
def content():
    return json.loads(FILE.read_text())


@pytest.fixture
def table():
    def cell(value):
        return None if value is None else {"value": value, "source": "seen"}

    def row(name, method, *cells, **more):
        names = ("Avg", "SOC", "MACs", "more", "speed")
        return {
            "row": name,
            "arm": {"method": method},
            "cells": dict(zip(names, map(cell, cells), strict=True)),
            **more,
        }

    columns = [
        {"column": "Avg", "unit": "%", "measured": "test_accuracy", "scale": 100},
        {"column": "SOC", "unit": "%", "measured": "test_columns.SOC", "scale": 100},
        {"column": "MACs", "unit": "G", "measured": "final_macs", "scale": 1e-9},
        {"column": "more", "unit": "G", "measured": "macs_more", "scale": 1e-9},
        {"column": "speed", "unit": "x", "measured": "speed", "scale": 1},
    ]
    rows = [
        row("dense", "full", 90.0, None, None, None, None),
        row("EAS", "pia", 91.5, None, 700.0, -7.0, None),
        row("before", "pia", None, None, None, None, None, unmerged=True),
        row("not run", "lora", 88.0, None, None, None, None),
    ]
    return {"table": "1", "sites": 31, "reference": "dense", "columns": columns, "rows": rows, "paper": {"rank": 256}}


@pytest.fixture
def frame():
    common = {"table": "1", "macs": 17e9, "merged_macs": None, "merged_decode_seconds": None}
    eas = {"macs": 19e9, "merged_macs": 13e9, "decode_seconds": 0.7, "merged_decode_seconds": 0.3}
    rows = [
        {**common, "row": "dense", "test_accuracy": 0.93, "test_columns": {"SOC": 0.5}, "decode_seconds": 0.6},
        {**common, "row": "dense", "test_accuracy": 0.97, "test_columns": {"SOC": 0.7}, "decode_seconds": 0.6},
        {**common, **eas, "row": "EAS", "test_accuracy": 0.89, "test_columns": {"SOC": 0.3}},
        {**common, **eas, "row": "before", "test_accuracy": 0.81, "test_columns": None},
        {**common, **eas, "row": "EAS", "table": "2", "test_accuracy": 0.01, "test_columns": {"SOC": 0.01}},
    ]
    return pd.DataFrame(rows)


def test_measured_published_difference_and_spread(table, frame):
    found = beside(table, frame).set_index(["row", "column"])
    dense = found.loc["dense", "Avg"]
    assert dense["measured"] == pytest.approx(95.0)
    assert dense["sd"] == pytest.approx(statistics.stdev([93, 97]))
    assert (dense["runs"], dense["published"], dense["source"]) == (2, 90.0, "seen")
    assert dense["difference"] == pytest.approx(5.0)
    eas = found.loc["EAS"]
    assert eas["measured"].to_dict() == pytest.approx({"Avg": 89, "SOC": 30, "MACs": 13, "more": -4, "speed": 2})
    assert eas.loc["MACs", "difference"] == pytest.approx(13 - 700)
    assert math.isnan(eas.loc["Avg", "sd"])
    assert math.isnan(eas.loc["SOC", "published"])
    assert math.isnan(eas.loc["SOC", "difference"])
    before = found.loc["before"]["measured"].to_dict()  # the same run, before its adapters are folded
    assert before == pytest.approx({"Avg": 81, "SOC": math.nan, "MACs": 19, "more": 2, "speed": 6 / 7}, nan_ok=True)
    assert found.loc["not run"]["runs"].sum() == 0
    assert found.loc[("not run", "Avg"), "published"] == 88.0


def test_what_was_measured_apart_fills_what_is_open_and_no_more(table, frame):
    times = frame.assign(test_accuracy=0.5)
    found = beside(table, frame.drop(columns=["decode_seconds", "merged_decode_seconds"]), times)
    found = found.set_index(["row", "column"])["measured"]
    assert found["EAS", "speed"] == pytest.approx(2)
    assert found["EAS", "Avg"] == pytest.approx(89)


def test_a_column_of_one_task_reads_the_runs_of_that_task(table, frame):
    table["columns"][0]["task"] = "pairs"
    tasks = frame[frame["row"] == "dense"].assign(task=["pairs", "vqa"])
    found = beside(table, tasks).set_index(["row", "column"])
    assert found.loc["dense", "Avg"][["measured", "runs"]].tolist() == pytest.approx([93, 1])
    assert found.loc["dense", "SOC"]["runs"] == 2


def test_the_table_to_read(table, frame):
    found = beside(table, frame)
    shown = to_frame(found)
    assert list(shown["row"]) == ["dense", "EAS", "before", "not run"]
    assert "SOC, paper" not in shown  # none of the column is known: said once, by leaving it out
    assert shown.loc[0, "Avg (%)"] == "95.0 ± 2.83"
    assert shown.loc[2, "Avg, paper"] == "not known to us"
    assert shown.loc[2, "Avg, difference"] == ""
    assert shown.loc[3, "Avg (%)"] == "not measured"
    assert shown.loc[1, "Avg, difference"] == "-2.50"
    text = to_markdown(found, ["Avg"])
    assert text.splitlines()[:3] == [
        "| row | runs | Avg (%) | Avg, paper | Avg, difference |",
        "| --- | --- | --- | --- | --- |",
        "| dense | 2 | 95.0 ± 2.83 | 90.0 | +5.00 |",
    ]
    here = to_frame(beside(table, frame.assign(k=frame["row"].map({"dense": 0, "EAS": 3, "before": 3}))))
    assert here["skipped here"].tolist() == ["0", "3", "3", ""]
    with pytest.raises(ConfigError, match="table 1 has no column 'Average'; it has Avg, SOC"):
        to_frame(found, ["Average"])


def test_rows_and_frames_that_do_not_fit(table, frame):
    with pytest.raises(ConfigError, match="table 1 has no row 'EAS9'; its rows are 'dense', 'EAS'"):
        beside(table, frame.replace({"row": {"EAS": "EAS9"}}))
    with pytest.raises(ConfigError, match="wanted a frame with a column 'row'"):
        beside(table, frame.drop(columns="row"))
    assert beside(table, pd.DataFrame())["measured"].isna().all()


def test_arms_keep_the_share_of_sites_and_the_ratio_of_ranks():
    found = paper.read_tables()
    wanted = {(0, 12): 0, (4, 12): 2, (8, 12): 3, (12, 12): 4, (16, 12): 6, (8, 32): 8, (4, 3): 1}
    for (k, sites), expected in wanted.items():
        assert paper.scaled_arm(found["7"], str(k), sites, 64).get("k", 0) == expected, (k, sites)
    ranks = {row: paper.scaled_arm(found["8"], row, 12, 64)["settings"] for row in ("64", "256", "512")}
    assert ranks["64"] == {"skip_rank": 16, "adapt_rank": 8}
    assert ranks["256"] == {"skip_rank": 64, "adapt_rank": 32}
    assert ranks["512"] == {"skip_rank": 128, "adapt_rank": 64}
    assert paper.scaled_arm(found["8"], "64", 12, 4)["settings"] == {"skip_rank": 2, "adapt_rank": 2}
    assert found["8"]["rows"][0]["arm"]["settings"] == {"skip_rank": 64, "adapt_rank": 32}  # left as it was
    for table in found.values():
        for row in table["rows"]:
            paper.make_arm(paper.scaled_arm(table, row["row"], 12, 64))


def test_the_file_is_whole_and_says_what_is_known(capsys):
    assert tables.main(["check"]) == 0
    said = capsys.readouterr().out
    assert said.count("Table ") == 8
    known = {number: paper.known_cells(table)[0] for number, table in paper.read_tables().items()}
    assert known["1"] == 5
    assert sum(known.values()) >= 10
    for number, seen in known.items():
        assert f"Table {number} " in said
        assert f" {seen} of " in said


def test_figures_are_those_that_are_counted_again_elsewhere():
    """The one other place that states the paper's figures."""
    sizes = json.loads((FILE.parents[1] / "benchmarks" / "results" / "paper_sizes.json").read_text())
    stated = {row["published"] for row in [*sizes["operations"], *sizes["shares"]] if row["published"] is not None}
    for number in ("1", "2"):
        for row in paper.read_tables()[number]["rows"]:
            for cell in row["cells"].values():
                if cell is not None and cell["source"] == "description":
                    assert cell["value"] in stated, (number, row["row"], cell)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=2), "wanted an object with format 1"),
        (lambda c: c.pop("sources"), "no 'sources'"),
        (lambda c: c["paper"].pop("version"), "paper: no 'version'"),
        (lambda c: c["tables"].pop(), "wanted tables 1, 2, 3, 4, 5, 6, 7, 8 in this order"),
        (lambda c: c["tables"][0].pop("sites"), "table 1: no sites"),
        (lambda c: c["tables"][0]["stand_ins"][0].pop("task"), "table 1: stand_ins is a list of {model, task}"),
        (lambda c: c["tables"][0].update(reference="x"), "table 1: its reference, 'x', is none of its rows"),
        (lambda c: c["tables"][0]["columns"][0].pop("unit"), "table 1: column {"),
        (lambda c: c["tables"][0]["rows"][1].update(row="zero-shot"), "table 1: two rows 'zero-shot'"),
        (lambda c: c["tables"][4]["rows"][0].pop("arm"), "table 5, row 'MHA': has ['cells', 'row']"),
        (lambda c: c["tables"][4]["rows"][0]["cells"].pop("Avg"), "row 'MHA': its cells are trained, MACs; wanted"),
        (lambda c: c["tables"][4]["rows"][0]["cells"].update(Avg=95.0), "Avg: wanted null or"),
        (lambda c: c["tables"][4]["rows"][0]["cells"].update(Avg={"value": "95"}), "Avg: wanted null or"),
        (lambda c: c["tables"][4]["rows"][0]["cells"].update(Avg={"value": 95, "source": "memory"}), "source 'memory'"),
        (lambda c: c["tables"][4]["rows"][0].update(arm={"method": "magic"}), "row 'MHA': no arm: Arm.method"),
        (lambda c: c["tables"][4]["rows"][0].update(arm={"methode": "pia"}), "an arm has method, k, chosen_by"),
        (lambda c: c["tables"][0]["stated"][0].pop("value"), "table 1, stated wanted null or {value"),
    ],
)  # fmt: skip
def test_every_fault_of_the_file_is_named(content, tmp_path, capsys, change, message):
    assert paper.find_faults(copy.deepcopy(content)) == []
    change(content)
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(content))
    assert tables.main(["check", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_read_and_words_that_make_no_sense(tmp_path, capsys):
    with pytest.raises(ConfigError, match="the paper's tables, .*nowhere.json, cannot be read"):
        paper.read_tables(tmp_path / "nowhere.json")
    assert tables.main(["chekc"]) == 2
    assert "usage: python -m eas_kit.tables check" in capsys.readouterr().err


def test_a_figure_that_is_filled_in_stands_beside_the_measured_one(content, tmp_path, frame):
    content["tables"][6]["rows"][2]["cells"]["Avg"] = {"value": 95.5, "source": "paper"}
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(content))
    seven = paper.read_tables(path)["7"]
    found = beside(seven, pd.DataFrame([{"row": "8", "test_accuracy": 0.9}]))
    assert "| 8 | 1 | 90.0 | 95.5 | -5.50 |" in to_markdown(found, ["Avg"])
