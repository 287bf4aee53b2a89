"""Every page renders as it was meant: tables are whole, links and anchors lead somewhere."""

import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
PAGES = [ROOT / name for name in LISTED.stdout.split()] or sorted(ROOT.glob("*/*.md"))


def broken_tables(text: str) -> list[str]:
    """The first row of every table that lacks a head, and rows with other cells than the head."""
    wrong, table = [], []
    for line in [*without_code(text).splitlines(), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        if table and not (len(table) > 2 and re.fullmatch(r"[|:\- ]+", table[1])):
            wrong.append(table[0])
        wrong += [row for row in table if _cells(row) != _cells(table[0])]
        table = []
    return wrong


def _cells(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Of every headline: lower case, without punctuation, hyphens for spaces."""
    headlines = re.findall(r"^#+ +(.*)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in headlines}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links to files that are not there, and anchors that no headline has."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_renders(page: Path):
    text = page.read_text()
    assert not broken_tables(text), f"{page.name}: rows that render as text, or lack cells"
    assert not broken_links(page, text), f"{page.name}: links that lead nowhere"


def test_what_does_not_render_is_found():
    head = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert not broken_tables(head)
    assert not broken_tables(f"```\n| 1 |\n```\n{head}")
    assert broken_tables(f"{head}\n| 3 | 4 |\n") == ["| 3 | 4 |"]  # a blank line ends a table
    assert broken_tables(f"{head}| 3 |\n") == ["| 3 |"]
    page = ROOT / "README.md"
    assert not broken_links(page, "[1](#on-photographs) [2](docs/maps.md) [3](https://a.b/c#d)")
    links = ["docs/map.md", "#there", "docs/maps.md#there"]
    assert broken_links(page, " ".join(f"[x]({link})" for link in links)) == links
