"""Makes small notebooks for the tests of the runner."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = (
    'seed = 3  # which draw\nrate = 0.5  # per step\nmodel = "tiny"  # a name\nrun_dir = "runs/manual"  # where'
)


def make_book(
    folder: Path, name: str, *cells: str, parameters: str | None = PARAMETERS, title: str = "A title"
) -> Path:
    """A title, a parameters cell (None: an untagged one) and code cells (those that begin with # are markdown)."""
    tagged = new_code_cell(parameters if parameters is not None else "seed = 3")
    if parameters is not None:
        tagged.metadata["tags"] = ["parameters"]
    body = [new_markdown_cell(c) if c.startswith("#") else new_code_cell(c) for c in cells]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {title}"), tagged, *body]), path)
    return path
