"""Selectors as baselines: trained by the same loop, charged for their scoring, all in one run."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import load_config

import iared2_jax
from iared2_jax import main
from iared2_jax.config.checks import validate
from iared2_jax.data import moving_mnist
from iared2_jax.errors import UsageError
from iared2_jax.experiment import compare
from iared2_jax.experiment.build import build_module, build_phases, load_initial
from iared2_jax.experiment.run import train_and_evaluate
from iared2_jax.report import results as run_results
from iared2_jax.report import tables
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.training.optimizers import part_of
from iared2_jax.training.phases import PhaseContext
from iared2_jax.training.step import _gradients, fitting_gradients
from iared2_jax.weights.save import save_weights


@pytest.fixture
def config(clip_config):
    """Two steps under temporal difference."""
    config = clip_config
    config.curriculum = "selector"
    config.reduction.selector, config.reduction.keep_ratios = "temporal_difference", (0.4,)
    config.backbone.batch_size, config.backbone.epochs, config.backbone.steps = 4, 0.0, 2
    return config


# -- Training under a selector.


def test_the_loss_is_that_of_the_tokens_the_selector_keeps(config):
    """Gathered in the phase, masked here: the same cross-entropy and gradient, no token lost."""
    module = build_module(config)
    (phase,) = build_phases(config, module)
    variables = init_variables(module, 0)
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((4, *module.input_spec.shape)), jnp.float32)
    batch = {"input": inputs, "label": jnp.arange(4)}
    grads, metrics = jax.jit(
        lambda p: _gradients(PhaseContext(module, phase), p, batch, jax.random.key(0))
    )(variables["params"])

    def masked(params):
        logits, _ = module.apply(
            {"params": params}, inputs, keep_ratios=(0.4,), selector="temporal_difference"
        )
        return -jax.nn.log_softmax(logits)[jnp.arange(4), batch["label"]].mean()

    loss, expected = jax.jit(jax.value_and_grad(masked))(variables["params"])
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["keep_rate"], 13 / 32)  # ceil(0.4 * 32)
    assert metrics["overflow"] == 0
    block = expected["backbone"]["block_0"]["attn"]["qkv"]["kernel"]
    np.testing.assert_allclose(grads["backbone/block_0/attn/qkv/kernel"], block, atol=1e-6)
    # All blocks move, and nothing else: as where our own interpreter's tokens are kept.
    assert {part_of(path, module) for path in grads} == {("blocks", 1)}


@pytest.mark.slow
def test_interpreters_as_they_are_may_choose_too(config):
    """By thresholds counts differ: where slots do not suffice, the step is masked execution's."""
    config.reduction.selector, config.reduction.keep_ratios = "interpreter", ()
    module = build_module(config)
    (phase,) = build_phases(config, module)
    params = init_variables(module, 0)["params"]
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((4, *module.input_spec.shape)), jnp.float32)
    batch = {"input": inputs, "label": jnp.arange(4)}
    (masked, figures), (gathered, lost) = (
        jax.jit(
            lambda p, slots=slots: fitting_gradients(
                PhaseContext(module, phase, slots), p, batch, jax.random.key(0)
            )
        )(params)
        for slots in (None, (1,))
    )
    assert 0 < figures["keep_rate"] < 1
    assert figures["overflow"] == 0 < lost["overflow"]
    np.testing.assert_allclose(lost["loss"], figures["loss"], rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, gathered, masked)


def test_a_baseline_is_refused_where_it_makes_no_sense(config):
    config.curriculum = "iared2"
    with pytest.raises(UsageError, match=r"--config\.curriculum=selector"):
        validate(config, 1)
    config.curriculum, config.reduction.selector = "selector", "temporal"
    with pytest.raises(UsageError, match=r"config\.reduction\.selector='temporal' is unknown"):
        validate(config, 1)
    config.reduction.selector, config.reduction.keep_ratios = "random", ()
    with pytest.raises(UsageError, match=r"config\.reduction: .* needs keep_ratios"):
        build_module(config)
    config.reduction.keep_ratios = (0.5, 0.5)
    with pytest.raises(UsageError, match=r"config\.reduction: keep_ratios must be 1 shares"):
        build_module(config)
    pictures = load_config("cluttered_mnist", "runlocal")
    pictures.compare.selectors = ("temporal_difference",)
    with pytest.raises(UsageError, match=r"config\.compare\.selectors has .*needs clips"):
        compare.check_comparison(pictures)
    pictures.compare.selectors = ("magic",)
    with pytest.raises(UsageError, match=r"config\.compare\.selectors has 'magic'"):
        validate(pictures, 1)
    pictures.compare.selectors, pictures.curriculum = ("dense",), "interpreters"
    with pytest.raises(UsageError, match=r"has 'dense', the original fine-tuned .* leaves"):
        compare.check_comparison(pictures)
    pictures.compare.selectors, pictures.curriculum = ("random",), "supervised"
    with pytest.raises(UsageError, match=r"config\.compare\.selectors sets baselines"):
        validate(pictures, 1)


# -- What scoring costs.


def test_two_passes_are_charged_for_both():
    """Block 0 whole, and of block 1 the qkv of all tokens and one row of the attention."""
    name, kept, d, tokens = "timesformer_jointst_b", 549, 768, 1569
    free = count_flops(name, (kept,), selector="random")
    two = count_flops(name, (kept,), selector="attention_block_1")
    block = iared2_jax.create_model("vit_micro")[0].backbone.clone(embed_dim=d, mlp_ratio=4)
    block = block.block_flops(tokens)
    assert two.linear - free.linear == block.linear + 3 * tokens * d**2
    assert two.full - free.full == block.full + 3 * tokens * d**2 + tokens * d
    # Scores that cost next to nothing: no more than the blocks with fewer tokens.
    assert free == count_flops(name, (kept,), interpreters=False)
    assert count_flops(name, (kept,), selector="temporal_difference") == free
    # The block before the group has its attention anyway.
    assert count_flops("deit_s", (196, 98), selector="attention") == count_flops(
        "deit_s", (196, 98), interpreters=False
    )


# -- The comparison.


def test_the_table_of_a_comparison():
    def found(top1, video, kept, scores):
        return {
            "top1": top1,
            "video": {"top1": video},
            "kept": kept,
            "flops": {"linear": 1e6, "full": 2e6},
        } | scores

    segmentation = {"group_1": {"mean_iou": 0.4}, "random_group_1": {"mean_iou": 0.2}}
    ours = {
        "dense": found(0.9, 0.95, [1.0], {}),
        "iared2": found(0.8, 0.85, [0.35], {}),
        "segmentation": segmentation,
    }
    random = {"reduced": found(0.7, 0.75, [0.36], {}), "segmentation": segmentation}
    attention = {"reduced": found(0.7, 0.75, [0.36], {})}
    found_ones = {"random": random, "attention_block_1": attention, "dense": random}
    rows = compare.methods(ours, found_ones, clips=True)
    assert "mean_iou" not in rows.pop("original_fine_tuned")
    # As in Table 3, whose attention is that of block 1.
    assert list(rows) == ["original", "random", "attention", "iared2"]
    assert list(compare.methods(ours, {"attention_block_0": attention}, True))[1] == (
        "attention_block_0"
    )
    assert rows["original"]["kept"] == 1
    assert "mean_iou" not in rows["original"]
    np.testing.assert_allclose(rows["random"]["clip1_error"], 30)
    np.testing.assert_allclose(rows["iared2"]["video1_error"], 15)
    assert rows["iared2"]["mean_iou"] == 0.4
    _, cells = tables._methods({"methods": rows})
    assert cells[0] == [
        "method", "clip-1 error", "video-1 error", "kept", "MMACs linear", "MMACs full", "mIoU"
    ]  # fmt: skip
    assert cells[3][0] == "attention of block 1"
    assert cells[4] == ["IA-RED2", "20.00%", "15.00%", "0.350", "1.0", "2.0", "40.0"]


def test_a_baseline_has_the_runs_own_recipe(config):
    config.curriculum, config.reduction.selector = "iared2", "interpreter"
    config.model.groups, config.reduction.keep_ratios = 2, ()
    config.interpreter.epochs, config.interpreter.steps = 0.0, 7
    baseline = compare.baseline_config(config, "random", (0.5, 0.4))
    validate(baseline, 1)
    own = [p for p in build_phases(config, build_module(config)) if p.kind.section == "backbone"]
    (phase,) = build_phases(baseline, build_module(baseline))
    assert phase.steps == sum(p.steps for p in own) == 4
    for option in ("learning_rate", "batch_size", "optimizer", "label_smoothing"):
        assert phase.options[option] == own[0].options[option]
    assert (phase.selector, phase.keep_ratios) == ("random", (0.5, 0.4))
    # Of its maps, only its scores are compared.
    assert (baseline.eval.maps, baseline.eval.perturbation) == (("interpreter",), False)
    config.eval.maps = ()
    assert compare.baseline_config(config, "random", (0.5, 0.4)).eval.maps == ()
    assert compare.kept_shares({"iared2": {"kept": [0.3501, 0.2]}}) == (0.351, 0.2)
    # Before the first block there is no attention to choose by.
    before = compare.baseline_config(config, "attention", (0.5, 0.4))
    validate(before, 1)
    build_module(before)
    assert before.reduction.keep_ratios == (1.0, 0.4)


def test_evit_and_tome_have_groups_of_their_own(tmp_path):
    """Weights of another grouping start them, and their steps are those of the run."""
    config = load_config("cluttered_mnist", "runlocal")
    config.curriculum, config.model.groups, config.model.group_sizes = "iared2", 2, ()
    three, weights = create_module("vit_micro", groups=3), tmp_path / "weights.safetensors"
    variables = init_variables(three, 1)
    save_weights(variables, weights, {"create_model": {"name": "vit_micro", "groups": 3}})
    for selector, groups in (("evit", 3), ("tome", 6)):
        peer = compare.baseline_config(config, selector, (0.8, 0.7), str(weights))
        validate(peer, 1)
        module = build_module(peer)
        assert module.num_groups == groups == len(peer.reduction.keep_ratios)
        assert [p.steps for p in build_phases(peer, module)] == [2 * config.backbone.steps]
        loaded = load_initial(peer, module, peer.weights)["params"]["backbone"]
        jax.tree.map(np.testing.assert_array_equal, loaded, variables["params"]["backbone"])


def test_what_fine_tuning_does_by_itself(config):
    config.curriculum, config.reduction.selector = "iared2", "interpreter"
    config.model.groups, config.reduction.keep_ratios = 2, ()
    dense = compare.baseline_config(config, "dense", (0.5, 0.4))
    validate(dense, 1)
    build_module(dense)
    assert (dense.reduction.selector, dense.reduction.keep_ratios) == ("random", (1.0, 1.0))
    assert [p.steps for p in build_phases(dense, build_module(dense))] == [4]


def test_a_baseline_is_fine_tuned_only_if_the_run_is(config):
    config.reduction.selector, config.reduction.keep_ratios = "interpreter", ()
    for curriculum, mode in (
        ("iared2", "train"),
        ("supervised+iared2", "train"),
        ("interpreters", "eval"),
        ("supervised+interpreters", "eval"),  # that one trains what both start from
    ):
        config.curriculum = curriculum
        assert compare.baseline_config(config, "random", (0.5,)).mode == mode


@pytest.mark.slow
def test_baselines_of_a_run_whose_backbone_stays_as_it_was(tmp_path, tiny_config, monkeypatch):
    """The same backbone chooses by other scores: nothing but the kept tokens differs."""
    measured, dense = [], run_results._dense
    monkeypatch.setattr(
        run_results, "_dense", lambda comparison: measured.append(comparison) or dense(comparison)
    )
    tiny_config.curriculum = "interpreters"
    tiny_config.eval.speed_batch = tiny_config.eval.figures = 0
    tiny_config.eval.maps = ()
    tiny_config.eval.agreement = False
    tiny_config.compare.selectors = ("random", "tome")
    train_and_evaluate(tiny_config, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["methods"]) == ["original", "random", "tome", "iared2"]
    assert "agreement" not in results
    assert len(measured) == 1  # all start from the same dense model
    for key in ("top1", "top5"):
        assert results["random"][f"original_backbone_{key}"] == results["random"][key]
    assert not (tmp_path / "baselines" / "random" / "checkpoints").exists()
    ours, theirs = (
        safetensors.numpy.load_file(folder / "weights.safetensors")
        for folder in (tmp_path, tmp_path / "baselines" / "random")
    )
    backbone = [name for name in ours if not name.startswith("interpreters")]
    assert backbone
    for name in backbone:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert results["methods"]["random"]["kept"] >= results["methods"]["iared2"]["kept"]
    # ToMe reduces in every block, for the same cost.
    module, _ = iared2_jax.load_model(tmp_path / "baselines" / "tome" / "weights.safetensors")
    assert module.group_sizes == (1,) * module.backbone.depth
    costs = {name: row["flops"]["linear"] for name, row in results["methods"].items()}
    assert abs(costs["tome"] - costs["iared2"]) < 0.02 * costs["original"]


@pytest.mark.slow
def test_a_run_with_a_baseline_beside_it(tmp_path, monkeypatch):
    """The whole way; given once more, the command finds what is there and trains nothing."""
    arguments = [
        "--config=configs/timesformer_micro.py:runlocal",
        f"--workdir={tmp_path}",
        "--config.curriculum=iared2",
        "--config.weights=scratch",
        "--config.model.groups=1",
        "--config.model.num_frames=2",
        "--config.model.patch_size=16,16",
        *(f"--config.{phase}.epochs=0" for phase in ("interpreter", "backbone")),
        *(f"--config.{phase}.steps=1" for phase in ("interpreter", "backbone")),
        *(f"--config.{phase}.batch_size=8" for phase in ("interpreter", "backbone")),
        "--config.eval.speed_batch=0",
        "--config.eval.figures=1",
        "--config.compare.selectors='temporal_difference'",
    ]
    assert main.run(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["methods"]) == ["original", "temporal_difference", "iared2"]
    for row in results["methods"].values():
        assert 0 <= row["clip1_error"] <= 100
        assert 0 <= row["video1_error"] <= 100
    baseline = json.loads((tmp_path / "baselines/temporal_difference/results.json").read_text())
    assert baseline["selector"] == "temporal_difference"
    n = 32
    assert baseline["reduced"]["kept"][0] * n >= results["iared2"]["kept"][0] * n
    assert results["examples"] == 16
    assert {"group_1", "raw_attention_block_1", "random"} <= results["segmentation"].keys()
    assert (tmp_path / "figures" / "heatmaps.png").stat().st_size > 5_000
    module, variables = iared2_jax.load_model(tmp_path / "weights.safetensors")
    assert (module.input_spec.size, module.input_spec.frames) == ((64, 64), 2)
    shown = moving_mnist.load("test", 2, frames=2)[0][..., 8:72, :]
    assert iared2_jax.explain(module, variables, shown, group=1).shape == (2, 2, 64, 64)
    page = (tmp_path / "report.html").read_text()
    assert "Beside the baselines" in page
    assert 'src="data:image/gif;base64,' in page
    assert (tmp_path / "figures" / "clips.gif").read_bytes().startswith(b"GIF89a")

    def refuse(*args, **options):
        raise AssertionError("there is nothing left to evaluate here")

    monkeypatch.setattr("iared2_jax.training.loop.make_train_step", refuse)
    assert main.run(arguments) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["methods"] == results["methods"]
