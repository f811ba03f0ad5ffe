"""Executed copies of the notebooks, for reading where nothing runs: GitHub, nbviewer, a web page.

    python -m eas_kit.rendered runs/rendered notebooks/rendered      # the second half of `make notebooks`

A copy shows everything that its run showed, with a PNG beside every interactive figure, and is small: no widget state,
no bookkeeping of papermill, no line breaks inside the numbers of a figure.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat

from . import report
from .errors import RunError

MAX_BYTES = 300_000  # of a copy; GitHub shows larger ones, slowly
PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
_NOTEBOOK = re.compile(r"\d\d_\w+\.ipynb")
_BAR = re.compile(r"\d+%\|")
_LINK = re.compile(r"\]\((?![a-z]+:|#|/)([^)\s]+)\)")


def write_copies(run: str | Path, target: str | Path) -> list[Path]:
    """Copies of all notebooks that `run`, a folder of `eas-kit run`, holds, and a README.md that lists them.

    Copies of notebooks that are no longer in the run are removed from `target`.

    Raises:
        RunError: a notebook was not done, or a copy would not read well: a figure or widget without a picture, a cell
            without a number, a file of more than 300 kB. Nothing is written then.
    """
    run, target = Path(run), Path(target)
    if not (run / "run.json").exists():
        raise RunError(f"{run} is no folder of a run (it has no run.json); make one with: eas-kit run --out {run}")
    record = report.read_json(run / "run.json")
    texts, problems = {}, []
    for entry in record["notebooks"]:
        if entry["status"] != "done":
            problems.append(f"{entry['notebook']}: {entry['status']}, not done")
            continue
        notebook = slim(nbformat.read(run / entry["path"], as_version=4), entry["notebook"])
        text = dumps(notebook)
        problems += [f"{entry['notebook']}: {problem}" for problem in faults(notebook, len(text.encode()))]
        texts[entry["path"]] = text
    if problems:
        raise RunError("no copies were written:\n" + "\n".join(problems))
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.ipynb"):
        if old.name not in texts:
            old.unlink()
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8", newline="\n")
    (target / "README.md").write_text(listing(record), encoding="utf-8", newline="\n")
    return [target / name for name in texts]


def slim(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The notebook without what only a live session or a later run needs, and with a line that says what it is."""
    notebook.metadata = {
        key: notebook.metadata[key] for key in ("kernelspec", "language_info") if key in notebook.metadata
    }
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "markdown":
            cell.source = _LINK.sub(lambda m: m[0] if _NOTEBOOK.match(m[1]) else f"](../{m[1]})", cell.source)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output.get("data", {}))]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if WIDGET in data and len(data.keys() - {"text/plain"}) > 1:
                del data[WIDGET]  # its state lives in a kernel that is gone; the picture beside it stays
    title = notebook.cells[0]
    title.source = (
        f"{title.source.rstrip()}\n\n*An executed copy of [{name}](../{name}.ipynb), made by `make notebooks`.*"
    )
    return notebook


def _is_progress(data: dict) -> bool:
    """A bar of tqdm, as of loading weights: over when anybody reads the copy."""
    return WIDGET in data and bool(_BAR.search(data.get("text/plain", "")))


def faults(notebook: nbformat.NotebookNode, size: int) -> Iterator[str]:
    """What would make a copy read badly; `size` in bytes."""
    if size >= MAX_BYTES:
        yield f"{size / 1e3:.0f} kB, wanted below {MAX_BYTES / 1e3:.0f}: show fewer figures, or figures of fewer points"
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        if cell.source.strip() and not cell.execution_count:
            yield f"code cell {number} did not run"
        for output in cell.outputs:
            data = output.get("data", {})
            if PLOTLY in data and "image/png" not in data:
                yield f"code cell {number}: a figure without a PNG; show it with eas_kit.live.show, headless"
            if WIDGET in data:
                yield f"code cell {number}: a widget without a picture beside it, which shows nothing without a kernel"


def dumps(notebook: nbformat.NotebookNode) -> str:
    """The notebook as JSON, a line a cell: a quarter less than nbformat's line for every number of a figure."""
    plain = json.loads(nbformat.writes(notebook))
    cells = ",\n".join(_compact(cell) for cell in plain.pop("cells"))
    return f'{{"cells": [\n{cells}\n],\n{_compact(plain)[1:]}\n'


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def listing(record: dict) -> str:
    """README.md of the folder: a row a notebook."""
    rows = [
        f"| [{one['notebook']}]({one['path']}) | {one['title']} | {one['seconds']:.0f} s | {one['peak_mb']:.0f} MB |"
        for one in record["notebooks"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join(
        [
            "# The notebooks, executed",
            "",
            "Copies to read, with every figure and number; `make notebooks` makes them. The notebooks themselves, to",
            "run and to change, lie [one folder up](../).",
            "",
            "| notebook | | took | memory |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"Made {record['written'][:10]} with {versions}.",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """RUN TARGET; exit code 1 with the reason if no copies could be made."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 2:
        print("usage: python -m eas_kit.rendered RUN TARGET", file=sys.stderr)
        return 2
    try:
        written = write_copies(*given)
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    for path in written:
        print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
