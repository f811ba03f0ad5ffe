"""The conformance table: every property on every family of models, from the results of tests/test_conformance.py.

    python benchmarks/conformance.py --out benchmarks/results/conformance.json    run the tests, print the table
    python benchmarks/conformance.py --xml FILE                                   a run of pytest --junitxml=FILE

Nothing is checked here; pytest is run and its report read. A cell is "ok", "refused" (by eas_kit, by name, as wanted),
"n.a." (transformers' own model of that family has not got the property either), "known" (an expected failure) or
"FAILED"; the reasons stand below the table. The exit code is pytest's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch
import transformers

ROOT = Path(__file__).parents[1]
SUITE = "tests/test_conformance.py"
# test -> heading of its column, in the order of the table
PROPERTIES = {
    "test_describe": "described",
    "test_refused_by_name": "described",
    "test_adapters_matter": "adapters matter",
    "test_formula": "formula",
    "test_no_leak": "no leak",
    "test_uncached": "cached = uncached",
    "test_teacher_forcing": "= labelled forward",
    "test_static_cache": "= static cache",
    "test_one_static_cache_in_turn": "= own static cache",
    "test_single_example": "batch = single",
    "test_beams": "beams",
    "test_prompt_lookup": "prompt lookup",
    "test_assisted": "assisted",
    "test_merge": "merged",
    "test_merge_batch": "batch merged",
    "test_detach_bit_for_bit": "detach",
    "test_hidden_states": "hidden states",
    "test_gradient_checkpointing": "checkpointing",
    "test_save_and_load": "save, load",
    "test_half_precision": "half precision",
}
COLUMNS = list(dict.fromkeys(PROPERTIES.values()))


def run_tests(xml: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-q", SUITE, f"--junitxml={xml}"]
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def read(xml: Path) -> dict[str, dict[str, dict]]:
    """Family -> heading -> {"result", "reason", "seconds"}; of several tests in a cell the worst says."""
    order = ["ok", "refused", "n.a.", "known", "FAILED"]
    found: dict[str, dict[str, dict]] = {}
    for case in ElementTree.parse(xml).getroot().iter("testcase"):
        match = re.fullmatch(r"(\w+)\[([\w.]+)(?:-\w+)?\]", case.get("name", ""))
        if match is None or match[1] not in PROPERTIES:
            continue
        result, reason = _outcome(case)
        cell = found.setdefault(match[2], {}).setdefault(
            PROPERTIES[match[1]], {"result": result, "reason": reason, "seconds": 0.0}
        )
        if order.index(result) > order.index(cell["result"]):
            cell["result"], cell["reason"] = result, reason
        cell["seconds"] = round(cell["seconds"] + float(case.get("time", 0)), 3)
    return found


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    """The result of one test and its reason, from pytest's report."""
    skipped = case.find("skipped")
    if skipped is not None:
        known = skipped.get("type") == "pytest.xfail"
        return ("known" if known else "n.a."), skipped.get("message", "").removeprefix("Skipped: ")
    for failure in (case.find("failure"), case.find("error")):
        if failure is not None:
            return "FAILED", failure.get("message", "").splitlines()[0]
    said = [p.get("value", "") for p in case.iterfind("properties/property") if p.get("name") == "outcome"]
    return ("refused", said[0].removeprefix("refused: ")) if said else ("ok", "")


def table(families: dict[str, dict[str, dict]], expected: dict[str, str]) -> str:
    """Markdown: a row a family, a column a property, a note for every reason."""
    notes: dict[str, int] = {}
    lines = ["| family | kind | " + " | ".join(COLUMNS) + " | s |", "| --- " * (len(COLUMNS) + 3) + "|"]
    for name, cells in families.items():
        row = [name, expected.get(name, "")]
        for column in COLUMNS:
            cell = cells.get(column)
            text = cell["result"] if cell else ""
            if cell and cell["reason"]:
                text += f" [{notes.setdefault(cell['reason'], len(notes) + 1)}]"
            row.append(text)
        seconds = sum(cell["seconds"] for cell in cells.values())
        lines.append("| " + " | ".join([*row, f"{seconds:.1f}"]) + " |")
    return "\n".join([*lines, "", *(f"[{number}] {reason}" for reason, number in notes.items())])


def expectations() -> dict[str, str]:
    """Family -> what its row in tests/families.py expects."""
    sys.path.insert(0, str(ROOT / "tests"))
    from families import FAMILIES

    return {family.name: family.expect for family in FAMILIES}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xml", type=Path, help="read this report instead of running the tests")
    parser.add_argument("--out", type=Path, help="JSON file, and the table beside it as .md (default: only printed)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        xml, code = args.xml, 0
        if xml is None:
            xml = Path(folder) / "report.xml"
            code = run_tests(xml)
        if not xml.is_file():
            print(f"error: no report {xml}; wanted a file of pytest --junitxml", file=sys.stderr)
            return 1
        families = read(xml)
    expected = expectations()
    families = {name: families[name] for name in expected if name in families}
    seconds = sum(cell["seconds"] for cells in families.values() for cell in cells.values())
    text = f"{table(families, expected)}\n\n{len(families)} families, {seconds:.0f} s"
    print(text)
    record = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "seconds": round(seconds, 1),
        "families": {name: {"expect": expected[name], "properties": cells} for name, cells in families.items()},
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(f"# Conformance, family by property\n\n{text}\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
