"""The table of the conformance tests says what pytest said."""

from __future__ import annotations

import json

from test_benchmarks import load

REPORT = """<testsuites><testsuite>
<testcase name="test_merge[llama]" time="1.25" />
<testcase name="test_merge[mixtral]" time="0.5"><properties>
 <property name="outcome" value="refused: MixtralSparseMoeBlock" /></properties></testcase>
<testcase name="test_assisted[paligemma]" time="0.1"><skipped type="pytest.skip" message="both ways" /></testcase>
<testcase name="test_beams[llama]" time="0.1"><failure message="assert False&#10;more">trace</failure></testcase>
<testcase name="test_half_precision[llama-bf16]" time="0.25" />
<testcase name="test_half_precision[llama-fp16]" time="0.25"><failure message="too far">trace</failure></testcase>
<testcase name="test_refused_by_name[mllama]" time="0.1"><skipped type="pytest.xfail" message="open" /></testcase>
<testcase name="test_every_row_says_what_it_expects" time="0.1" />
</testsuite></testsuites>"""


def test_table_from_a_report(tmp_path, capsys):
    conformance = load("conformance")
    (tmp_path / "report.xml").write_text(REPORT)
    out = tmp_path / "new" / "conformance.json"
    assert conformance.main(["--xml", str(tmp_path / "report.xml"), "--out", str(out)]) == 0
    families = json.loads(out.read_text())["families"]
    seen = {
        (name, column): (cell["result"], cell["reason"], cell["seconds"])
        for name, family in families.items()
        for column, cell in family["properties"].items()
    }
    assert seen == {
        ("llama", "merged"): ("ok", "", 1.25),
        ("llama", "beams"): ("FAILED", "assert False", 0.1),
        ("llama", "half precision"): ("FAILED", "too far", 0.5),
        ("mixtral", "merged"): ("refused", "MixtralSparseMoeBlock", 0.5),
        ("paligemma", "assisted"): ("n.a.", "both ways", 0.1),
        ("mllama", "described"): ("known", "open", 0.1),
    }
    assert families["mixtral"]["expect"] == "moe"
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("| mixtral")).count("refused [") == 1
    assert "4 families, 3 s" in lines[-1]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_every_property_has_a_column():
    import test_conformance

    tests = {name for name in dir(test_conformance) if name.startswith("test_")}
    assert tests - {"test_every_row_says_what_it_expects"} == set(load("conformance").PROPERTIES)


def test_a_missing_report(tmp_path, capsys):
    assert load("conformance").main(["--xml", str(tmp_path / "none.xml")]) == 1
    assert "wanted a file of pytest --junitxml" in capsys.readouterr().err
