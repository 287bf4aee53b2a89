"""A run's HTML page: its tables and figures, with no need of a network."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from iared2_jax.files import write_json, writing
from iared2_jax.report import tables

PAGE = "report.html"
FIGURES = {  # below figures/, and their captions
    "heatmaps.png": "What the model looked at (Figure 3)",
    "hierarchy.png": "What each group still sees (Figure 4)",
    "clips.gif": "Clips, the scores of the first group, and what it keeps",
}

_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto }
  table { border-collapse: collapse; margin: 0 0 2rem }
  th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ccc }
  th:first-child, td:first-child { text-align: left }
  img { max-width: 100% }
  footer { color: #555; font-size: .85rem }
</style>
<h1>$title</h1>
$body
<footer>$footer</footer>
</html>
""")


def write_page(path: Path, results: dict[str, Any], figures: Iterable[str]) -> None:
    """Writes the page of `results`.

    Args:
      figures: those of `FIGURES` that are there.
    """
    parts = []
    for caption, rows in tables.tables(results):
        header, *body = rows
        parts.append(f"<h2>{html.escape(caption)}</h2>\n<table>")
        parts.append(_html_row(header, "th"))
        parts += [_html_row(row, "td") for row in body]
        parts.append("</table>")
    for name in (name for name in FIGURES if name in set(figures)):
        caption = html.escape(FIGURES[name])
        parts.append(f'<h2>{caption}</h2>\n<img src="figures/{name}" alt="{caption}">')
    footer = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    page = _PAGE.substitute(
        title=html.escape(f"IA-RED²: {results['run']}"),
        body="\n".join(parts),
        footer=html.escape(footer),
    )
    path.write_text(page, encoding="utf-8", errors="replace")


def write_results(results: dict[str, Any], workdir: Path) -> None:
    """Writes results.json, and prints the tables."""
    write_json(workdir / "results.json", results)
    print("\n\n".join(map(tables.as_text, tables.tables(results))), flush=True)


def write_again(results: dict[str, Any], workdir: Path) -> None:
    """Writes results that have grown since the evaluation, and their page, around its figures."""
    with writing(workdir / PAGE) as draft:
        write_page(draft, results, [path.name for path in (workdir / "figures").glob("*.*")])
    write_results(results, workdir)


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
