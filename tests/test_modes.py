"""`--config.mode=eval` and `explain`, and the two lines of Python that explain a photograph."""

import json

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

import iared2_jax
from iared2_jax import main
from iared2_jax.report.pictures import pictures_in
from iared2_jax.token_reduction.create import create_module, init_variables


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A short DeiT-Ti with random weights, as someone else might have saved it."""
    path = tmp_path_factory.mktemp("weights") / "deit_tiny.safetensors"
    variables = init_variables(create_module("deit_3_blocks", num_classes=3), seed=2)
    iared2_jax.save_weights(variables, path, interpreters=False)
    return path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(photographs.astronaut()).save(folder / "astronaut.jpg")
    Image.fromarray(photographs.chelsea()).save(folder / "cat.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    return folder


def test_two_lines_explain_a_photograph(checkpoint, pictures):
    module, variables = iared2_jax.load_model(checkpoint, "deit_3_blocks")
    heatmaps = iared2_jax.explain(module, variables, pictures / "astronaut.jpg")
    assert heatmaps.shape == (1, 224, 224)
    assert 0 <= float(heatmaps.min()) < float(heatmaps.max()) <= 1
    both = iared2_jax.explain(module, variables, [pictures / "cat.png", pictures / "astronaut.jpg"])
    np.testing.assert_allclose(both[1], heatmaps[0], atol=1e-5)


def explain(*arguments):
    return main.run(
        ["--config=configs/folder.py:model=deit_3_blocks", "--config.mode=explain", *arguments]
    )


@pytest.mark.slow
def test_explain_writes_next_to_the_pictures(checkpoint, pictures, caplog):
    arguments = [f"--config.weights={checkpoint}", f"--config.data.path={pictures}"]
    assert explain(*arguments) == 0
    written = {path.name for path in pictures.iterdir()} - {"broken.jpg"}
    assert written == {
        *("astronaut.jpg", "astronaut.jpg.heatmap.png", "astronaut.jpg.hierarchy.png"),
        *("cat.png", "cat.png.heatmap.png", "cat.png.hierarchy.png"),
        "iared2_report.html",
    }
    page = (pictures / "iared2_report.html").read_text()
    assert "astronaut.jpg" in page
    assert "transformer attribution" in page
    assert "left out:" in caplog.text
    assert "has no interpreters: they are fresh, and their scores mean nothing" in caplog.text
    assert "broken.jpg is damaged" in caplog.text
    with Image.open(pictures / "cat.png.heatmap.png") as image:
        assert np.asarray(image).std() > 10
    # A second call explains the same pictures, not what the first one wrote.
    assert [path.name for path in pictures_in(pictures)] == [
        "astronaut.jpg",
        "broken.jpg",
        "cat.png",
    ]


def test_explain_without_pictures_says_so(checkpoint, tmp_path, capsys):
    weights = f"--config.weights={checkpoint}"
    assert explain(weights, f"--config.data.path={tmp_path}/none") == 2
    assert "must be a folder of pictures" in capsys.readouterr().err
    assert explain(weights, f"--config.data.path={tmp_path}") == 2
    assert "holds no pictures" in capsys.readouterr().err
    (tmp_path / "x.jpg").write_text("no picture")
    assert explain(weights, f"--config.data.path={tmp_path}") == 65
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "none of the 1 pictures" in error
    assert explain(f"--config.data.path={tmp_path}") == 2
    assert "config.mode=explain needs config.weights" in capsys.readouterr().err


def test_eval_prints_accuracy_cost_and_confusions(tmp_path, capsys):
    arguments = ["--config=configs/cluttered_mnist.py:runlocal", f"--workdir={tmp_path}/run"]
    arguments += [
        "--config.mode=eval",
        "--config.data.eval_size=200",
        "--config.eval.speed_batch=0",
        "--config.eval.agreement=False",
        "--config.eval.figures=0",
        "--config.eval.page_images=0",
        "--config.eval.maps=()",
    ]
    assert main.run(arguments) == 0
    out = capsys.readouterr().out
    assert "Accuracy and cost, 200 images" in out
    assert "What is taken for what, most often" in out
    results = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())
    assert results["dense"]["top1"] > 0.9  # the shipped weights, not random ones
    wrong = sum(pair["images"] for pair in results["dense"]["confusions"])
    assert 0 < wrong <= 200 * (1 - results["dense"]["top1"]) + 1e-6
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["eval"]
    assert not (tmp_path / "run" / "eval" / "weights.safetensors").exists()
