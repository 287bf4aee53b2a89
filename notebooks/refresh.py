"""Executes the notebooks, and writes what they show into their files.

    python notebooks/refresh.py

Training comes first: the other two show the weights that it leaves. All of it takes some ten
minutes on two free CPU cores, in a folder of its own that is gone in the end. Speeds are measured,
too: let nothing else run.
"""

import base64
import io
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
NAMES = ("train_cluttered_mnist", "explain", "accelerate")
COLOURS = 96  # of a committed figure: a quarter of the bytes, and hardly to be seen


def execute(
    name: str, folder: Path, parameters: str = "", timeout: int = 1800
) -> nbformat.NotebookNode:
    """A notebook with its outputs, executed in `folder`.

    Args:
      parameters: code that runs after the cell tagged "parameters", and sets some of them anew.
      timeout: seconds that a cell may take.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    if parameters:
        cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(1 + parameters_cell(notebook), cell)
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # else every line is an output of its own
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    # What the kernel says of itself is this machine's.
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def parameters_cell(notebook: nbformat.NotebookNode) -> int:
    """The place of the one cell that is tagged "parameters", as papermill has it.

    Raises:
      ValueError: there is none, or more than one.
    """
    places = [i for i, cell in enumerate(notebook.cells) if "parameters" in tags(cell)]
    if len(places) != 1:
        raise ValueError(f"{len(places)} cells are tagged parameters, but there must be one")
    return places[0]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def shrink_figures(notebook: nbformat.NotebookNode) -> None:
    """Reduces the figures of a notebook to a few colours each, in place."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if figure := output.get("data", {}).get("image/png"):
                output.data["image/png"] = _in_few_colours(figure)


def _in_few_colours(figure: str) -> str:
    """A PNG in base64 as a smaller one."""
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB")
    picture.quantize(COLOURS).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main(names: list[str]) -> None:
    """Executes the notebooks of these names, or all of them."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names or NAMES:
            print(name, flush=True)
            notebook = execute(name, Path(folder))
            shrink_figures(notebook)
            nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
