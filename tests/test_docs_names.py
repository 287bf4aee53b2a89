"""What README and docs name in backticks is there: modules, their attributes, files."""

import importlib
import itertools
import re
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "iared2_jax"
ROOMS = [path.name for path in PACKAGE.iterdir() if path.is_dir()]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]
# Each decision names what there was when it was made.
PAGES.remove(ROOT / "docs" / "decisions.md")


def is_there(name: str) -> bool:
    """Whether a name in backticks, if it is one of ours, names something."""
    name = name.partition("(")[0].rstrip(".")
    if re.fullmatch(r"iared2_jax(\.\w+)+", name):
        return _resolves(name)
    room, _, rest = name.partition("/")
    if room in ROOMS and re.fullmatch(r"[\w/]+\.py", rest):  # `training/step.py`
        return (PACKAGE / name).is_file()
    if room in ROOMS and re.fullmatch(r"[\w/]+\.\w+(\.\w+)?", rest):  # `models/taps.tap`
        return _resolves(f"iared2_jax.{name.replace('/', '.')}")
    if re.fullmatch(r"(configs|launch|benchmarks|docs|tests)/[\w/]+\.\w+", name):
        return (ROOT / name).is_file()
    return True


def _resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            fields = {**getattr(value, "__annotations__", {}), **vars(value)}
            if not hasattr(value, name) and name not in fields:
                return False
            value = getattr(value, name, None)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    missing = [name for name in re.findall(r"`([^`\s]+)`", text) if not is_there(name)]
    assert not missing, f"{page.name} names what is not there: {missing}"


def test_what_is_not_there_is_found():
    assert is_there("training/step.TrainState")
    wrong = ("models/layers.Backbone", "iared2_jax.models.layers.Backbone", "training/steps.py")
    assert not any(is_there(name) for name in wrong)


# Tables 1 and 5 of the paper: pixel accuracy, mAcc, mIoU. The row of all background is computed.
PAPER = {
    "**ours, group 2**": "70.4 / 64.9 / 49.4",
    "raw attention block 0": "68.3 / 50.5 / 37.1",
    "raw attention block 1": "67.9 / 61.8 / 46.4",
    "raw attention block 2": "71.9 / 55.7 / 42.6",
    "gradcam": "65.9 / 55.0 / 41.3",
    "lrp": "50.7 / 50.6 / 32.6",
    "lime": "67.3 / 47.8 / 33.9",
    "all background": "(70.7 / 50.0 / 35.4)",
}


def test_the_papers_figures_in_the_readme_are_the_papers():
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| map | pixel acc."))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    head, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    column = next(i for i, name in enumerate(head) if name.startswith("paper's"))
    assert len(rows) > len(PAPER)
    assert {row[0]: row[column] for row in rows if row[column]} == PAPER
