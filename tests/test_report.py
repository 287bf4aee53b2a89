"""The evaluation of a run, end to end, and what it writes."""

import json

import jax
import numpy as np
import pytest
from conftest import ROOT, load_config
from PIL import Image

from iared2_jax import load_model
from iared2_jax.attribution.segmentation import METRICS
from iared2_jax.config.checks import validate
from iared2_jax.errors import Interrupted
from iared2_jax.evaluation.agreement import SHOWN
from iared2_jax.evaluation.evaluators import accuracy, collect, cost, kept_tokens, top_classes
from iared2_jax.evaluation.pruning import SHARES
from iared2_jax.experiment.build import build_model, dataset_of, model_options
from iared2_jax.report import results as run_results
from iared2_jax.report.results import evaluate_run
from iared2_jax.report.tables import as_text, tables
from iared2_jax.signals import Stop
from iared2_jax.token_reduction.create import create_module
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.token_reduction.selectors import random_like
from iared2_jax.training.phases import PHASES
from iared2_jax.training.step import data_mesh
from iared2_jax.weights.files import read_tensors

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_and_is_valid(name):
    config = load_config(name, "runlocal")
    validate(config, device_count=1)
    assert config.name == name
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"--config=configs/{name}.py" in text


@pytest.mark.parametrize("arg", ["", "runlocal"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_phase_of_every_config_has_steps_or_epochs(name, arg):
    """Those, too, that its own curriculum does not read: a user may ask for another one."""
    config = load_config(name, arg)
    for section in {kind.section for kind in PHASES.values()}:
        assert (config[section].steps > 0) != (config[section].epochs > 0), section


def evaluated_into(config, workdir, stop=None):
    module, variables = build_model(config)
    dataset, options = dataset_of(config), model_options(config)
    return evaluate_run(
        config, workdir, module, variables["params"], variables, dataset, stop, options
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An untrained model of three blocks, evaluated."""
    config = load_config("cluttered_mnist", "runlocal")
    config.model.name, config.model.group_sizes, config.weights = "vit_3_blocks", (), ""
    config.data.eval_size = 20  # not a multiple of the batch: the last one is padded
    config.eval.pruning = 1
    workdir = tmp_path_factory.mktemp("run")
    return config, workdir, evaluated_into(config, workdir)


def test_both_models_of_an_evaluation_share_compiled_programs(tmp_path, monkeypatch):
    """A compiled program is for one placement; training's is a mesh."""
    config = load_config("cluttered_mnist", "runlocal")
    module, variables = build_model(config)
    mesh = jax.sharding.NamedSharding(data_mesh(jax.devices()[:2]), jax.sharding.PartitionSpec())
    seen = []

    def measure(comparison, dataset, dense):
        seen.append(comparison)
        raise Interrupted("seen")

    monkeypatch.setattr(run_results, "_measure", measure)
    with pytest.raises(Interrupted, match="seen"):
        evaluate_run(
            config,
            tmp_path,
            module,
            jax.device_put(variables["params"], mesh),
            variables,
            dataset_of(config),
        )
    forward = jax.jit(lambda variables: variables["params"]["backbone"]["head"]["bias"] + 1)
    for model in (seen[0].trained, seen[0].original):
        forward(model)
    assert forward._cache_size() == 1


def test_results_have_the_promised_keys(evaluated):
    _, workdir, results = evaluated
    assert json.loads((workdir / "results.json").read_text()) == results
    assert results["examples"] == 20
    for model in ("dense", "iared2"):
        assert 0 <= results[model]["top1"] <= results[model]["top5"] <= 1
        assert set(results[model]["flops"]) == {"linear", "full"}
    assert len(results["iared2"]["kept"]) == 3
    assert results["dense"]["flops"]["full"] == count_flops("vit_3_blocks").full
    assert "top1" in results["random"]
    maps = {f"group_{g}" for g in (1, 2, 3)} | {f"raw_attention_block_{b}" for b in range(3)}
    floor = {"random", "center", "all_background"}
    assert set(results["segmentation"]) == maps | floor
    for scores in results["segmentation"].values():
        assert set(scores["interval"]) == set(METRICS) < set(scores)
    assert results["map_images"] == 20
    assert results["agreement"]["as_trained"]["top1"] == results["iared2"]["top1"]
    assert set(results["agreement"]) == set(SHOWN)
    curves = results["pruning"]
    assert {kind: len(points) for kind, points in curves.items()} == {
        "tokens": 2, "weights": 1 + len(SHARES), "both": 2 + len(SHARES)
    }  # fmt: skip
    for points in curves.values():  # all begin with everything
        assert points[0]["accuracy"] == results["dense"]["top1"]
        assert points[0]["linear"] == results["dense"]["flops"]["linear"]
        assert points[-1]["linear"] < points[0]["linear"]
    speed = results["images_per_second"]
    assert speed["inputs"] == "images"
    assert {"dense", "masked", "ragged"} < set(speed["executions"])
    assert speed["baseline"] in speed["executions"]
    assert speed["baseline"].startswith("dense")
    assert speed["ragged_error"] < 1e-4
    assert "attention by einsum" in speed["plan"][0]


def test_figures_and_page_are_written(evaluated):
    _, workdir, results = evaluated
    for name in ("heatmaps", "hierarchy"):
        picture = np.asarray(Image.open(workdir / "figures" / f"{name}.png").convert("RGB"))
        assert picture.std() > 10  # something is drawn
    page = (workdir / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3  # heatmaps, hierarchy, maps
    assert f"{100 * results['iared2']['top1']:.2f}%" in page
    assert "http:" not in page  # needs no network
    assert "https:" not in page
    assert 'id="explorer-data"' in page


def test_written_weights_are_the_evaluated_ones(evaluated):
    config, workdir, _ = evaluated
    _, variables = build_model(config)
    tensors, metadata = read_tensors(workdir / "weights.safetensors")
    assert metadata["create_model"]["name"] == "vit_3_blocks"
    kernel = variables["params"]["interpreter_2"]["k"]["kernel"]
    np.testing.assert_array_equal(tensors["interpreters.2.k.weight"].T, kernel)


def test_a_written_model_comes_back_as_it_was(evaluated):
    config, workdir, _ = evaluated
    module, variables = load_model(workdir / "weights.safetensors")
    trained, original = build_model(config)
    assert module == trained  # groups, heads and bias included, without being told
    for mine, theirs in zip(*map(jax.tree.leaves, (variables, original)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_an_evaluation_that_is_stopped_writes_nothing(evaluated, tmp_path):
    config, _, _ = evaluated
    stop = Stop()
    stop.request()
    with pytest.raises(Interrupted, match="nothing was written"):
        evaluated_into(config, tmp_path, stop)
    assert not list(tmp_path.iterdir())


def test_collect_cuts_the_padding_off():
    seen = collect(lambda batch: {"twice": 2 * batch["x"]}, {"x": np.arange(7)}, batch_size=4)
    np.testing.assert_array_equal(seen["twice"], 2 * np.arange(7))


def test_accuracy_by_hand():
    logits = np.array([[0, 1, 2, 3, 4, 5.0], [9, 1, 2, 3, 4, 5.0]])
    figures = dict(accuracy(np.asarray(top_classes(logits)), np.array([5, 1])))
    assert figures == {"top1": 0.5, "top5": 0.5}
    assert dict(accuracy(np.asarray(top_classes(logits)), np.array([1, 2])))["top5"] == 1.0


def test_cost_is_a_mean_over_images_not_of_the_mean_image():
    module = create_module("vit_micro")
    counts = np.array([[64] * 3, [0] * 3])
    figures = dict(cost(module, counts))
    each = [count_flops(module, (n, n, n)).full for n in (64, 0)]
    assert figures["flops"]["full"] == pytest.approx(np.mean(each))
    assert figures["flops"]["full"] != pytest.approx(count_flops(module, (32, 32, 32)).full)
    assert dict(kept_tokens(counts, 64))["kept"] == [0.5, 0.5, 0.5]


def test_random_masks_are_nested_and_keep_the_counts():
    counts = [np.array([60, 10]), np.array([30, 10]), np.array([30, 0])]
    masks = random_like(jax.random.key(0), counts, 64)
    for mask, count in zip(masks, counts, strict=True):
        np.testing.assert_array_equal(mask.sum(-1), count)
    assert not bool((masks[1] & ~masks[0]).any() | (masks[2] & ~masks[1]).any())


@pytest.mark.parametrize(("found", "unit"), [({"inputs": "clips"}, "clips/s"), ({}, "images/s")])
def test_rates_are_of_what_was_timed(found, unit):
    """Results of version 0.1 do not say it: they are of images."""
    speed = {
        "executions": {"dense": {"median": 5.0, "p25": 4.0, "p75": 6.0}},
        "baseline": "dense",
        "batch": 2,
        "dtype": "float32",
        "device": "cpu x 1",
        **found,
    }
    dense = {"top1": 0.5, "top5": 1.0, "flops": {"linear": 1e6, "full": 2e6}}
    (*_, (title, rows)) = tables({"examples": 2, "dense": dense, "images_per_second": speed})
    assert title == "Throughput, batch 2, float32, cpu x 1"
    assert rows == [
        ["execution", unit, "quartiles", "over dense"],
        ["dense", "5", "4 .. 6", "1.00x"],
    ]


def test_a_table_lines_up():
    text = as_text(("title", [["name", "x"], ["a", "1.00"], ["longer", "12.00"]]))
    assert text.splitlines()[0] == "title"
    assert len({len(line) for line in text.splitlines()[1:]}) == 1
