"""A run's HTML page in one file: tables, an explorer of its images, figures; no network."""

import base64
import dataclasses
import functools
import json
import mimetypes
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from iared2_jax.files import write_json, writing
from iared2_jax.report import tables
from iared2_jax.report.explorer import ExplorerData

PAGE = "report.html"
OF_THE_MODEL = {  # figures below figures/, and their captions
    "heatmaps.png": "What the model looked at (Figure 3)",
    "hierarchy.png": "What each group still sees (Figure 4)",
    "clips.gif": "Clips, the scores of the first group, and what it keeps",
}
FIGURES = {
    **OF_THE_MODEL,
    "maps.png": "Every map of the same inputs",
    "perturbation.png": "What is left of the answer when pixels are taken away",
}

# As report.html.j2 writes it; the JSON inside has no "<".
_EXPLORER = re.compile(r'<script id="explorer-data" type="application/json">([^<]*)</script>')


class _Figure(NamedTuple):
    caption: str
    source: str


def write_page(
    path: Path,
    results: dict[str, Any],
    figures: Iterable[Path],
    explorer: ExplorerData | None = None,
) -> None:
    """Writes the page of `results`, its figures embedded.

    Args:
      figures: files; those that are named in `FIGURES` are shown.
    """
    _write_report(path, results, figures, _as_json(explorer))


def write_explanations(
    path: Path, explorer: ExplorerData, title: str, versions: Mapping[str, str]
) -> None:
    """Writes a page with nothing but the explorer: what mode=explain makes of pictures.

    Args:
      versions: of the packages, by name, for the foot of the page.
    """
    _render(path, title, versions, _as_json(explorer))


def write_results(results: dict[str, Any], workdir: Path) -> None:
    """Writes results.json, and prints the tables."""
    write_json(workdir / "results.json", results)
    print("\n\n".join(map(tables.as_text, tables.tables(results))), flush=True)


def write_again(results: dict[str, Any], workdir: Path) -> None:
    """Writes results that have grown since the evaluation, and their page.

    The figures are those in the workdir, the explorer is the one that the page already has.
    """
    explorer = _explorer_of(workdir / PAGE)
    with writing(workdir / PAGE) as draft:
        _write_report(draft, results, (workdir / "figures").glob("*.*"), explorer)
    write_results(results, workdir)


def _write_report(
    path: Path,
    results: dict[str, Any],
    figures: Iterable[Path],
    explorer: dict[str, Any] | None,
) -> None:
    there = {figure.name: figure for figure in figures}
    shown = [
        _Figure(caption, _data_uri(there[name]))
        for name, caption in FIGURES.items()
        if name in there
    ]
    title = f"IA-RED²: {results['run']}"
    _render(path, title, results["versions"], explorer, tables.tables(results), shown)


def _render(
    path: Path,
    title: str,
    versions: Mapping[str, str],
    explorer: dict[str, Any] | None,
    shown: list[tables.Table] | None = None,
    figures: Iterable[_Figure] = (),
) -> None:
    page = _template().render(
        title=title,
        tables=shown or [],
        figures=list(figures),
        explorer=explorer,
        versions=versions,
    )
    path.write_text(page, encoding="utf-8", errors="replace")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("iared2_jax", "report/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Not a number is no JSON: a browser would refuse the whole page.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("report.html.j2")


def _as_json(explorer: ExplorerData | None) -> dict[str, Any] | None:
    return None if explorer is None else dataclasses.asdict(explorer)


def _explorer_of(page: Path) -> dict[str, Any] | None:
    """The explorer's data of a page that is there; None: there is none."""
    if not page.exists():
        return None
    found = _EXPLORER.search(page.read_text(encoding="utf-8"))
    return json.loads(found.group(1)) if found else None


def _data_uri(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
