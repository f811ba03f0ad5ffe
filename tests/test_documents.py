"""docs/: the errors page quotes messages that the code still has, the glossary is in order, links lead somewhere."""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
GAP = "\0"  # where a message has what differs from case to case
# Their errors meet whoever runs a notebook or changes a cell of it, so every one of them stands on the page.
COMPLETE = ["notebooks.py", "runner.py", "report.py", "checkpoint.py", "loop.py", "navigation.py", "masks.py"]
COMPLETE += ["probe.py", "scorers.py", "stability.py", "playground.py", "widgets/state.py", "widgets/panel.py"]
COMPLETE += sorted(f"figures/{path.name}" for path in (ROOT / "eas_kit" / "figures").glob("*.py"))


def rows() -> list[tuple[str, str]]:
    """Section and first column of every table row of errors.md."""
    found, section = [], ""
    for line in (ROOT / "docs" / "errors.md").read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith(("| message", "| symptom", "| ---")):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 3, line
            found.append((section, cells[0]))
    return found


def quoted() -> list[str]:
    cells = [cell for section, cell in rows() if not section.startswith("Without")]
    return [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]


def literal(node: ast.AST) -> str:
    """The text of a string in the code, with a gap for each value put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return GAP


def texts_of(path: Path) -> list[str]:
    strings = ast.Constant | ast.JoinedStr | ast.BinOp
    return [literal(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, strings)]


@pytest.fixture(scope="module")
def code() -> list[str]:
    return [text for path in sorted((ROOT / "eas_kit").rglob("*.py")) for text in texts_of(path) if text.strip(GAP)]


def pattern(message: str) -> re.Pattern:
    """A quoted message as what to look for in the code's texts; "…" is a gap with or without words around it."""
    return re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)


def letters(message: str) -> int:
    return len(re.sub(r"[^a-z]", "", message))


def test_quoted_messages_are_those_of_the_code(code):
    assert len(quoted()) > 90
    gone = [message for message in quoted() if not any(pattern(message).search(text) for text in code)]
    assert not gone, f"docs/errors.md quotes what no text of the code says any more: {gone}"


def test_the_search_for_messages_would_miss_a_changed_one(code):
    for changed in ("… names a site twice; name it once", "unknown notebooks: …"):
        assert not any(pattern(changed).search(text) for text in code)


def test_quotes_say_enough_to_be_found():
    assert {message for message in quoted() if letters(message) < 9} == {"… is …, wanted …", "… is not JSON (…"}


@pytest.mark.parametrize("name", COMPLETE)
def test_every_error_of_a_run_is_on_the_page(name):
    patterns = [pattern(message) for message in quoted() if letters(message) >= 12]
    missing = []
    for node in ast.walk(ast.parse((ROOT / "eas_kit" / name).read_text())):
        kind = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        is_ours = kind.endswith("Error") and not hasattr(builtins, kind)
        text = literal(node.args[0]) if is_ours and node.args else ""
        if letters(text) > 12 and not any(one.search(text) for one in patterns):
            missing.append(text.replace(GAP, "…"))
    assert not missing, f"docs/errors.md lacks errors of {name}: {missing}"


def test_glossary_is_in_order_and_says_each_term_once():
    sections = re.split(r"^## ", (ROOT / "docs" / "glossary.md").read_text(), flags=re.MULTILINE)[1:]
    terms = [re.findall(r"^\*\*([^*]+)\.\*\* \S", section, re.MULTILINE) for section in sections]
    for of_section in terms:
        assert of_section == sorted(of_section, key=str.lower)
    flat = [term for of_section in terms for term in of_section]
    assert len(flat) == len(set(flat)) >= 45
    wanted = {"Site", "Mask", "PIA", "Rank", "Router", "Kept", "Skipped", "Preference", "Reward", "Prefill", "Decode"}
    wanted |= {"Merge", "Probe", "Scorer", "Arm", "Split, role", "Teacher forcing"}
    assert wanted <= set(flat)


@pytest.mark.parametrize("path", [*DOCS, ROOT / "README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text()
    for target in re.findall(r"(?:\]\(|src=\"|href=\")(?![a-z]+:)([^)\s\"]+)", text):
        file, _, heading = target.partition("#")
        assert (path.parent / file).exists(), f"{path.name} links to {target}"
        if heading and not file:
            titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_the_opening_of_the_readme():
    opening, _, _ = (ROOT / "README.md").read_text().partition("\n## The notebooks")
    assert "docs/overview.png" in opening
    assert "?urlpath=lab/tree/notebooks/00_start_here.ipynb" in opening
    assert "make demo" in opening and "make test" in opening
    assert "docs/glossary.md" in opening and "docs/errors.md" in opening
    start = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4)
    words = "\n".join(cell.source for cell in start.cells)
    assert "../docs/glossary.md" in words and "../docs/errors.md" in words


def test_the_picture_of_the_readme_is_small():
    data = (ROOT / "docs" / "overview.png").read_bytes()
    assert len(data) < 80_000
    assert Image.open(io.BytesIO(data)).size == (1484, 462)


def test_the_picture_can_be_drawn_anew(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    overview = importlib.import_module("draw_overview")
    assert Image.open(io.BytesIO(overview.draw())).size == (1484, 462)
    bars = [trace.name for trace in overview.accuracies().data if trace.type == "bar"]
    assert bars[0] == "full tuning"
    assert len(bars) == len(overview.ARMS)
    assert {row.count("×") for row in overview.preferences().data[0].text} == {4}, "four sites a seed"
