"""Links between the notebooks, written from the folder: what comes before and after each, and the list of all.

    python -m eas_kit.navigation                  writes them (`make navigation`; `make format` does so too)
    python -m eas_kit.navigation --check          says what is stale, with exit code 1, and writes nothing

The notebooks are the folder's own, in the order of their numbers, so that one that is added, renamed or removed needs
this command and nothing else. Written are the last cell of each (previous, contents, next), the Binder badge of its
opening, and in the first one the table between CONTENTS_MARKS.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from .errors import RunError
from .notebooks import find_folder, read_notebook

BINDER = "https://mybinder.org/v2/gh/eas-kit/eas_kit/HEAD?urlpath=lab/tree/notebooks/"
BADGE = "[![Binder](https://mybinder.org/badge_logo.svg)]({url})"
CONTENTS_MARKS = ("<!-- contents -->", "<!-- /contents -->")
NOTEBOOK_ONLY = "notebook-only"  # the tag of cells that an app made of the notebook leaves out, see README
_BADGES = re.compile(re.escape(BADGE).replace(r"\{url\}", r"[^)\s]*"))
_LINKS = re.compile(r"(previous|contents|next): \[")


def links_of(names: Sequence[str], place: int) -> str:
    """The last cell of the notebook at this place; names are in reading order, without ``.ipynb``."""
    near = {"previous": place - 1, "contents": 0 if place else -1, "next": place + 1}
    chosen = {word: names[number] for word, number in near.items() if 0 <= number < len(names)}
    return " · ".join(f"{word}: [{name}]({name}.ipynb)" for word, name in chosen.items())


def contents_of(titles: dict[str, str]) -> str:
    """The table of all notebooks, from titles by name."""
    rows = [f"| [{name}]({name}.ipynb) | {title} | [open]({BINDER}{name}.ipynb) |" for name, title in titles.items()]
    return "\n".join(["| notebook | the question | on Binder |", "| --- | --- | --- |", *rows])


def linked(folder: Path) -> dict[Path, str]:
    """Every notebook of the folder as it should be: its file's text by path.

    Raises:
        RunError: a notebook cannot be read, or the first one has no place for the contents.
    """
    paths = sorted(folder.glob("*.ipynb"))
    names = [path.stem for path in paths]
    titles = {path.stem: read_notebook(path).title for path in paths}
    texts = {}
    for place, path in enumerate(paths):
        notebook = nbformat.read(path, as_version=4)
        _write_links(notebook, links_of(names, place))
        for cell in notebook.cells[:2]:
            if cell.cell_type == "markdown":
                cell.source = _BADGES.sub(BADGE.format(url=f"{BINDER}{path.name}"), cell.source)
        if place == 0:
            _write_contents(notebook, path, contents_of(titles))
        texts[path] = nbformat.writes(notebook) + "\n"
    return texts


def _write_links(notebook: NotebookNode, links: str) -> None:
    last = notebook.cells[-1] if notebook.cells else None
    if last is None or last.cell_type != "markdown" or not _LINKS.match(last.source):
        last = nbformat.v4.new_markdown_cell(id="navigation")  # the same id whenever it is made
        notebook.cells.append(last)
    last.source = links
    last.metadata["tags"] = [NOTEBOOK_ONLY]


def _write_contents(notebook: NotebookNode, path: Path, table: str) -> None:
    begin, end = CONTENTS_MARKS
    marked = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    cells = [cell for cell in notebook.cells if cell.cell_type == "markdown" and marked.search(cell.source)]
    if len(cells) != 1:
        raise RunError(
            f"{path.name}: {len(cells)} cells with {begin} and {end}, wanted one: "
            "the first notebook lists all of them between these two lines"
        )
    cells[0].source = marked.sub(lambda _: f"{begin}\n\n{table}\n\n{end}", cells[0].source)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eas_kit.navigation", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="of the notebooks; default: ./notebooks")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something is stale")
    chosen = parser.parse_args(arguments)
    try:
        texts = linked(find_folder(chosen.folder))
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    stale = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not chosen.check:
            path.write_text(texts[path], encoding="utf-8", newline="\n")
        print(f"{path.name}: {'stale; run python -m eas_kit.navigation' if chosen.check else 'links written'}")
    return int(chosen.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
