"""A student taught by a teacher: the losses by hand, and a run from its start to its weights."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from conftest import load_config

import iared2_jax
from iared2_jax import main
from iared2_jax.config.checks import validate
from iared2_jax.errors import UsageError
from iared2_jax.experiment.build import build_module, build_phases
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.training.phases import DistillationPhase, PhaseContext
from iared2_jax.training.phases.distillation import distillation_loss
from iared2_jax.weights.save import save_weights


def options(**changes):
    return ml_collections.ConfigDict({**DistillationPhase().options(), **changes})


def test_the_paper_student_has_two_thirds_of_the_cost():
    """Eight blocks of twelve: 67.1% of DeiT-S, linear and full alike."""
    dense, student = count_flops("deit_s"), count_flops(create_module("deit_s", depth=8, groups=4))
    for ours, theirs in zip(student, dense, strict=True):
        assert round(100 * ours / theirs, 1) == 67.1


@pytest.mark.parametrize("head", ["", ",token"])
def test_the_config_of_the_papers_student(head):
    config = load_config("deit_s", f"student{head}")
    config.distillation.teacher, config.data.path = "teacher.pth", "imagenet"
    validate(config, 1)
    backbone = create_module(config.model.name, depth=config.model.depth, groups=4).backbone
    assert backbone.depth == 8
    assert backbone.distilled == (config.distillation.head == "token")


def test_the_losses_by_hand():
    student = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    teacher = np.array([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]])

    def loss(**changes):
        return float(
            distillation_loss(jnp.asarray(student), jnp.asarray(teacher), options(**changes))
        )

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    expected = -np.log(softmax(student)[[0, 1], [1, 0]]).mean()
    assert loss(kind="hard") == pytest.approx(expected)
    p, q = softmax(student / 2), softmax(teacher / 2)
    soft = 4 * (q * np.log(q / p)).sum(-1).mean()
    assert loss(kind="soft", temperature=2.0) == pytest.approx(soft)
    assert loss(kind="soft", temperature=2.0, per_class=True) == pytest.approx(soft / 3)
    assert float(distillation_loss(teacher, teacher, options(kind="soft"))) == pytest.approx(0)


@pytest.fixture
def config(tmp_path):
    """A student of two blocks, taught by three."""
    teacher = create_module("vit_3_blocks", num_classes=10, groups=3)
    path = tmp_path / "teacher.safetensors"
    made = {"create_model": {"name": "vit_3_blocks", "num_classes": 10, "groups": 3}}
    save_weights(init_variables(teacher, 5), path, made)
    config = load_config("cluttered_mnist", "runlocal")
    config.curriculum, config.weights = "distillation", ""
    config.model.name, config.model.depth, config.model.groups = "vit_3_blocks", 2, 2
    config.model.group_sizes = ()
    config.distillation.teacher = str(path)
    config.distillation.epochs, config.distillation.steps = 0.0, 2
    config.distillation.batch_size = 4
    return config


@pytest.mark.parametrize(("kind", "alpha"), [("hard", 0.5), ("soft", 0.9), ("soft", 0.0)])
def test_the_loss_is_the_weighted_sum(config, kind, alpha):
    config.distillation.kind, config.distillation.alpha = kind, alpha
    module = build_module(config)
    (phase,) = build_phases(config, module)
    params = init_variables(module, 1)["params"]
    rng = np.random.default_rng(0)
    batch = {
        "input": jnp.asarray(rng.standard_normal((4, 64, 64, 3)), jnp.float32),
        "label": jnp.arange(4),
        "teacher": jnp.asarray(rng.standard_normal((4, 10)), jnp.float32),
    }
    loss, metrics = phase.kind.loss(PhaseContext(module, phase), params, batch, jax.random.key(0))
    logits, _ = module.apply({"params": params}, batch["input"], execution="dense")
    labels = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    taught = distillation_loss(logits, batch["teacher"], phase.options)
    np.testing.assert_allclose(loss, (1 - alpha) * labels + alpha * taught, rtol=1e-6)
    np.testing.assert_allclose(metrics["distillation"], taught)


def test_the_token_learns_from_the_teacher_and_cls_from_the_labels(config):
    module = create_module("vit_3_blocks", num_classes=10, groups=3)
    module = module.clone(backbone=module.backbone.clone(distilled=True))
    (phase,) = build_phases(config, build_module(config))
    phase = dataclasses.replace(phase, options=options(head="token", alpha=0.5))
    params = init_variables(module, 1)["params"]
    rng = np.random.default_rng(0)
    batch = {
        "input": jnp.asarray(rng.standard_normal((2, 64, 64, 3)), jnp.float32),
        "label": jnp.arange(2),
        "teacher": jnp.asarray(rng.standard_normal((2, 10)), jnp.float32),
    }

    def gradients(alpha):
        asked = dataclasses.replace(phase, options=options(head="token", alpha=alpha))
        context = PhaseContext(module, asked)
        loss = lambda p: phase.kind.loss(context, p, batch, jax.random.key(0))[0]  # noqa: E731
        return jax.jit(jax.grad(loss))(params)["backbone"]

    labels, teacher = gradients(0.0), gradients(1.0)
    assert not np.any(labels["head_dist"]["kernel"])
    assert np.any(labels["head"]["kernel"])
    assert not np.any(teacher["head"]["kernel"])
    assert np.any(teacher["head_dist"]["kernel"])
    # At inference both heads are averaged.
    heads = lambda p, x: module.apply({"params": p}, x, method="dense_heads")  # noqa: E731
    dense = lambda p, x: module.apply({"params": p}, x, execution="dense")  # noqa: E731
    both, (logits, _) = (jax.jit(fn)(params, batch["input"]) for fn in (heads, dense))
    np.testing.assert_allclose(logits, sum(both) / 2, atol=1e-6)


def test_the_teacher_sees_the_very_same_images(config):
    """Its answers are those of its own dense model; nothing of it is trained or saved."""
    module = build_module(config)
    (phase,) = build_phases(config, module)
    context, rng = PhaseContext(module, phase), np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 4, 64, 64, 3), np.uint8)
    asked = []

    def batches(example):
        asked.append(example)
        return ({"input": jnp.asarray(x), "label": jnp.arange(4)} for x in images)

    stream = list(phase.kind.stream(context, {}, batches, 5))
    assert asked == [phase.first_example + 5 * 4]
    teacher, variables = iared2_jax.load_model(config.distillation.teacher)
    for batch, pixels in zip(stream, images, strict=True):
        inputs = teacher.input_spec.normalize(jnp.asarray(pixels))
        expected, _ = teacher.apply(variables, inputs, execution="dense")
        np.testing.assert_allclose(batch["teacher"], expected, atol=1e-5)


@pytest.mark.slow
def test_a_student_is_trained_from_its_config(config, tmp_path):
    """The command, twice: the second goes on from what is there, and trains nothing."""
    arguments = [
        "--config=configs/cluttered_mnist.py:runlocal",
        f"--workdir={tmp_path / 'run'}",
        "--config.curriculum=distillation",
        "--config.weights=",
        "--config.model.name=vit_3_blocks",
        "--config.model.depth=2",
        "--config.model.groups=2",
        "--config.model.group_sizes=()",
        f"--config.distillation.teacher={config.distillation.teacher}",
        "--config.distillation.kind=soft",
        "--config.distillation.epochs=0",
        "--config.distillation.steps=2",
        "--config.distillation.batch_size=8",
        "--config.eval.figures=0",
        "--config.eval.speed_batch=0",
        "--config.eval.page_images=0",
        "--config.data.eval_size=16",
        "--config.eval.agreement=False",
        "--config.eval.maps=()",
    ]
    assert main.run(arguments) == 0
    module, _ = iared2_jax.load_model(tmp_path / "run" / "weights.safetensors")
    assert module.backbone.depth == 2
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"distillation"' in metrics
    assert '"agreement"' in metrics


def started(config):
    """What happens before a run's first step."""
    validate(config, 1)
    module = build_module(config)
    (phase,) = build_phases(config, module)
    phase.kind.stream(PhaseContext(module, phase), {}, iter, 0)


def test_bad_teachers_are_named(config):
    def refused(match, **changes):
        asked = config.copy_and_resolve_references()
        for key, value in changes.items():
            section, _, name = key.partition("__")
            asked[section][name] = value
        with pytest.raises(UsageError, match=match):
            started(asked)

    refused(r"distillation\.teacher is empty", distillation__teacher="")
    refused(r"distillation\.kind='firm' is unknown", distillation__kind="firm")
    refused(r"distillation\.head='both' is unknown", distillation__head="both")
    refused(r"distillation\.alpha=1\.5 must be at most 1", distillation__alpha=1.5)
    refused(r"distillation\.temperature=0\.0 must be above 0", distillation__temperature=0.0)
    refused(
        r"has 3 blocks, fewer than the student's 6",
        model__name="vit_micro", model__depth=0,
    )  # fmt: skip
    refused(r"knows 10 classes, the student 7", model__num_classes=7)
    refused(r"takes inputs of \(64, 64, 3\)", model__image_size=(32, 32))
    refused(r"needs a student with a distillation token", distillation__head="token")
    with pytest.raises(UsageError, match="depth=0"):
        create_module("vit_micro", depth=0)
