"""The run folder as web pages: each executed notebook as HTML, and ``index.html`` with every figure and number.

Everything is in the files themselves, so they open from a disk without a network: pictures are embedded, formulas
become MathML (which browsers draw), and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert as to_mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from . import report

MAX_ROWS = 60  # of a table on the index page; results.json has them all
MAX_FIGURES = 12
# what nbconvert's template would fetch from elsewhere: require.js, MathJax, mermaid
_REMOTE_SCRIPT = re.compile(
    r"<script[^>]*\bsrc=\"https?://[^>]*>\s*</script>|<script type=\"module\">.*?</script>", re.S
)
_NOTEBOOK_LINK = re.compile(r'href="(\d\d_\w+)\.ipynb')


def write_pages(out: Path) -> Path:
    """Make the HTML of every executed copy in ``out`` and ``index.html``; returns the latter's path."""
    record = report.read_json(out / "run.json")
    figures = {}
    for entry in record["notebooks"]:
        executed = out / entry["path"]
        if executed.exists():
            notebook = nbformat.read(executed, as_version=4)
            page = executed.with_suffix(".html")
            # a notebook that was kept has its page already
            if not page.exists() or page.stat().st_mtime < executed.stat().st_mtime:
                page.write_text(notebook_page(notebook, entry["title"]), encoding="utf-8")
            figures[entry["notebook"]] = list(notebook_figures(notebook))
    results = {}
    for entry in record["notebooks"]:
        if (out / entry["notebook"] / "results.json").exists():
            results[entry["notebook"]] = report.read_results(out, entry["notebook"])
    index = out / "index.html"
    index.write_text(index_page(record, results, figures), encoding="utf-8")
    return index


class _OfflineRenderer(IPythonRenderer):
    """Markdown with formulas as MathML instead of text that waits for MathJax."""

    def block_math(self, body: str) -> str:
        return f"<p>{_formula(body, 'block')}</p>"

    def inline_math(self, body: str) -> str:
        return _formula(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")


def _formula(latex: str, display: str) -> str:
    try:
        # without its namespace, which HTML does not need and nbconvert's headings would turn into prefixes
        return to_mathml(latex, display=display).replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
    except Exception:  # a formula it cannot read is still readable as it was typed
        return f"<code>{html.escape(latex)}</code>"


class OfflineExporter(HTMLExporter):
    """nbconvert's page without anything that is fetched from elsewhere."""

    def default_filters(self) -> Iterable[tuple[str, Any]]:
        yield from super().default_filters()
        yield "markdown2html", lambda source: MarkdownWithMath(renderer=_OfflineRenderer(escape=False)).render(source)


def notebook_page(notebook: nbformat.NotebookNode, title: str) -> str:
    """An executed notebook as one HTML file."""
    body, _ = OfflineExporter(embed_images=True).from_notebook_node(notebook, {"metadata": {"name": title}})
    # previous / next lead to the next page, not to a file that a browser would download
    body = _NOTEBOOK_LINK.sub(r'href="\1.html', body)
    return _REMOTE_SCRIPT.sub("", body)


def notebook_figures(notebook: nbformat.NotebookNode) -> Iterable[str]:
    """The PNG pictures of a notebook's outputs, base64."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if picture:
                yield "".join(picture).replace("\n", "")


def index_page(record: Mapping[str, Any], results: Mapping[str, Any], figures: Mapping[str, list[str]]) -> str:
    """The page that shows a whole run.

    Args:
        record: run.json.
        results: results.json by notebook, for those that have one.
        figures: base64 PNGs by notebook.
    """
    entries = record["notebooks"]
    minutes = sum(entry["seconds"] for entry in entries) / 60
    peak = max((entry["peak_mb"] for entry in entries), default=0)
    failed = sum(entry["status"] != "done" for entry in entries)
    state = "every notebook done" if not failed else f"{failed} of {len(entries)} notebooks not done"
    device = next((r["device"] for r in results.values()), "")
    facts = [state, f"{minutes:.1f} minutes", f"peak {peak:.0f} MB", device, record["written"][:16].replace("T", " ")]
    rows = "".join(
        f"<tr><td><a href='#{e['notebook']}'>{e['notebook']}</a></td><td>{badge(e['status'])}</td>"
        f"<td class=n>{e['seconds']:.0f}</td><td class=n>{e['peak_mb']:.0f}</td><td>{_links(e, results)}</td></tr>"
        for e in entries
    )
    cards = "".join(_card(e, results.get(e["notebook"]), figures.get(e["notebook"], [])) for e in entries)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    head = "<tr><th>notebook<th>status<th class=n>seconds<th class=n>peak MB<th>open</tr>"
    table = f"<div class=scroll><table><thead>{head}</thead>\n<tbody>{rows}</tbody></table></div>"
    return whole_page(f"run {record['name']}", facts, f"{table}\n{cards}", versions)


def whole_page(name: str, facts: Iterable[str], body: str, footer: str) -> str:
    """A page in the common style. `name` is two words, such as "run demo"; `body` is HTML, the rest is text."""
    what, _, which = name.partition(" ")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>eas_kit {html.escape(name)}</title>
<style>{_STYLE}</style>
<main>
<h1>Effective Attention Skipping <small>{html.escape(what)} <code>{html.escape(which)}</code></small></h1>
<p class="facts">{"".join(f"<span>{html.escape(fact)}</span>" for fact in facts if fact)}</p>
{body}
<footer>{html.escape(footer)}</footer>
</main></html>
"""


def _card(entry: Mapping[str, Any], results: Mapping[str, Any] | None, figures: list[str]) -> str:
    parts = [
        f"<section id='{entry['notebook']}'><h2>{html.escape(entry['title'])} {badge(entry['status'])}</h2>"
        f"<p class=links>{_links(entry, {entry['notebook']: results} if results else {})}</p>"
    ]
    if entry["error"]:
        where = f"code cell {entry['cell']} of {entry['cells']}: {entry['error']}"
        parts.append(f"<p class=error>{html.escape(where)}</p><pre>{html.escape(entry['traceback'])}</pre>")
    if results:
        summary = results.get("summary") or []
        parts += [f"<p>{html.escape(line)}</p>" for line in ([summary] if isinstance(summary, str) else summary)]
    pictures = "".join(f"<img src='data:image/png;base64,{png}' alt='figure'>" for png in figures[:MAX_FIGURES])
    parts.append(f"<div class=figures>{pictures}</div>" if pictures else "")
    if results:
        numbers = render_metrics(results["metrics"])
        is_open = " open" if numbers.count("<tr>") < 25 else ""
        parts.append(f"<details{is_open}><summary>numbers</summary>{numbers}</details>")
    if results:
        used = {**results["parameters"], "seed": results["seed"], "device": results["device"]}
        parts.append(f"<details><summary>parameters</summary>{_pairs(used)}</details>")
    return "".join([*parts, "</section>"])


def render_metrics(metrics: Mapping[str, Any]) -> str:
    """Single values as one table of pairs; lists and dicts of rows as tables; deeper dicts by dotted names."""
    single, tables = {}, []
    for name, value in _flat(metrics):
        if _is_rows(value):
            tables.append(f"<h3>{html.escape(name)}</h3>{render_rows(value)}")
        else:
            single[name] = value
    return (_pairs(single) if single else "") + "".join(tables)


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in metrics.items():
        if isinstance(value, dict) and len(value) > 1 and _is_rows(list(value.values())):
            yield f"{prefix}{name}", [{"": key, **row} for key, row in value.items()]
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_rows(value: Any) -> bool:
    """A list of dicts that hold no further dicts or rows."""
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return False
    return not any(isinstance(item, dict) or _is_rows(item) for row in value for item in row.values())


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{_cell(value)}</td></tr>" for name, value in values.items()
    )
    return f"<div class=scroll><table class=pairs>{rows}</table></div>"


def render_rows(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {c for c in columns if all(isinstance(r.get(c), (int, float, type(None))) for r in rows)}
    mark = {c: " class=n" if c in numeric else "" for c in columns}
    head = "".join(f"<th{mark[c]}>{html.escape(c)}</th>" for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{mark[c]}>{_cell(row.get(c))}</td>" for c in columns) + "</tr>" for row in rows[:MAX_ROWS]
    )
    more = f"<p class=more>and {len(rows) - MAX_ROWS} more rows in results.json</p>" if len(rows) > MAX_ROWS else ""
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return html.escape("[" + ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value[:40])) + (
            ", …]" if len(value) > 40 else "]"
        )
    return html.escape(str(value))


def badge(status: str) -> str:
    return f"<span class='badge {'good' if status == 'done' else 'bad'}'>{html.escape(status)}</span>"


def _links(entry: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    name = entry["notebook"]
    links = [f"<a href='{name}.html'>read</a>", f"<a href='{name}.ipynb'>notebook</a>"]
    if name in results:
        links.append(f"<a href='{name}/results.json'>numbers</a>")
    return " · ".join(links)


_STYLE = """
:root{--ink:#1d2330;--soft:#5f6b7d;--line:#e2e6ec;--card:#fff;--page:#f5f6f8;--link:#2456b8}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,Roboto,"DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px}
h1{font-size:26px;margin:0 0 6px}h1 small{font-weight:400;color:var(--soft);font-size:16px;margin-left:8px}
h2{font-size:19px;margin:0 0 4px}h3{font-size:14px;margin:18px 0 6px;color:var(--soft)}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
.facts span{display:inline-block;margin-right:18px;color:var(--soft)}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:20px 22px;margin:22px 0}
.links{margin:0 0 10px;font-size:14px}
table{border-collapse:collapse;font-size:14px;background:var(--card)}
th,td{padding:5px 14px 5px 10px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{font-weight:600;color:var(--soft)}.n{text-align:right;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}.more{color:var(--soft);font-size:13px}
.badge{font-size:12px;font-weight:600;padding:1px 9px;border-radius:10px;vertical-align:middle}
.good{background:#ddf3e4;color:#17683a}.bad{background:#fbe0de;color:#a1231b}
.figures{display:flex;flex-wrap:wrap;gap:12px;margin-top:14px}
.figures img{max-width:100%;height:auto;border:1px solid var(--line);border-radius:6px}
.error{color:#a1231b;font-weight:600}pre{background:#f7f7f9;padding:12px;overflow-x:auto;font-size:12.5px}
details{margin-top:14px}summary{cursor:pointer;color:var(--soft)}
footer{color:var(--soft);font-size:13px;margin-top:26px}
"""
