"""The notebooks run, with smaller settings; and what is committed of them is small and clean."""

import json
import re

import nbformat
import pytest
from conftest import ONE_DEVICE, ROOT, load_config

from iared2_jax.config import flatten
from notebooks.refresh import FOLDER, NAMES, execute, parameters_cell, tags

# The one place that says where the project is published: badges and install cells must agree.
REPOSITORY = "https://github.com/iared2-jax/iared2_jax"
COLAB = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
MOST_BYTES = 400_000

# One layout that is given, and as few shapes as there may be: tests/test_ragged.py has planning.
QUICK_PLANS = """
import functools

from iared2_jax.fast_inference import planner

planner.MAX_SHAPES["cpu"] = 6
planner.QUICK = planner.SECONDS = 0.0
planner.plan_groups = functools.partial(planner.uniform_plan, kind="padded", rows=1)
"""
SMALLER = {
    "train_cluttered_mnist": """
INTERPRETER_STEPS = BACKBONE_STEPS = 2
BATCH_SIZE = 8
LOG_EVERY = 1
EVAL_SIZE, MAPS_SIZE, SPEED_BATCH = 16, 8, 0
""",
    "explain": """
PHOTOGRAPH = "photograph.jpg"
METHODS = ("interpreter", "gradcam", "random")
SCENES = 4
""",
    "accelerate": QUICK_PLANS
    + """
BATCH_SIZE, HELD_OUT, ROUNDS, POINTS = 1, 8, 2, 4
""",
}
LEAVES = {
    "train_cluttered_mnist": ["runs/cluttered_mnist/report.html"],
    "explain": ["explanations.html", "hierarchy.png", "maps.png"],
    "accelerate": [],
}


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def said(notebook, stream):
    return "".join(o.text for o in outputs(notebook) if o.get("name") == stream)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a notebook runs: all that it and its kernel write stays below."""
    settings = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR")
    for name in (*settings, "XDG_CACHE_HOME"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE)
    work = tmp_path / "work"
    work.mkdir()
    return work


@pytest.fixture
def photograph(folder):
    from PIL import Image
    from skimage import data

    Image.fromarray(data.astronaut()).save(folder / "photograph.jpg")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, folder, photograph):
    done = execute(name, folder, SMALLER[name], timeout=240)
    assert not [output for output in outputs(done) if output.output_type == "error"]
    assert not said(done, "stderr")
    for path in LEAVES[name]:
        assert (folder / path).stat().st_size > 1000
    fresh = "interpreters: they are fresh" in said(done, "stdout")
    assert fresh == (name != NAMES[0])  # it says so where no trained weights are at hand


@pytest.mark.parametrize("name", NAMES)
def test_its_badge_and_its_first_cell_name_the_repository(name):
    title, install = read(name).cells[:2]
    assert f"]({COLAB}/blob/main/notebooks/{name}.ipynb)" in title.source
    assert re.findall(r'REPOSITORY = "(.*)"', install.source) == [REPOSITORY]
    assert "%pip install" in install.source.partition("if IN_COLAB:")[2]


@pytest.mark.parametrize("name", NAMES)
def test_its_parameters_are_those_that_the_tests_set(name):
    notebook = read(name)
    known, given = {}, {}
    exec(notebook.cells[parameters_cell(notebook)].source, known)
    exec(SMALLER[name].replace(QUICK_PLANS, ""), given)
    assert given.keys() <= known.keys()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_whole_small_and_of_no_machine(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not said(notebook, "stderr")
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(cell.metadata.keys() <= {"tags"} for cell in notebook.cells)
    for output in outputs(notebook):
        output.get("data", {}).pop("image/png", None)
    assert not re.findall(
        r"/(?:home|root|tmp|work|Users|usr|opt|mnt|content)/\S*", json.dumps(notebook)
    )


def test_the_training_notebook_has_the_demo_s_config():
    notebook, names = read("train_cluttered_mnist"), {}
    exec(notebook.cells[parameters_cell(notebook)].source, names)
    for cell in notebook.cells:
        if "config" in tags(cell):
            exec(cell.source, names)

    def trained(config):
        """What a run is, without what is evaluated of it."""
        return {k: v for k, v in flatten(config).items() if not k.startswith("eval.")}

    assert trained(names["config"]) == trained(load_config("cluttered_mnist"))
