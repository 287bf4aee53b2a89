"""Training steps: what moves, with how many devices, and that all phases run."""

import collections
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from iared2_jax.data.pipeline import shard_batch
from iared2_jax.errors import UsageError
from iared2_jax.experiment.build import build_model
from iared2_jax.fast_inference.plan import even_plan
from iared2_jax.models.parameters import declared
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.estimators import ESTIMATORS
from iared2_jax.token_reduction.model import KEEP_ALL
from iared2_jax.training import optimizers
from iared2_jax.training.capacities import measure_capacities, recalled
from iared2_jax.training.curriculum import dense_phase, phase_at, phases, trains_dense_first
from iared2_jax.training.phases import PHASES, PhaseContext
from iared2_jax.training.ragged import RaggedParts
from iared2_jax.training.step import (
    data_mesh,
    enter_phase,
    initial_state,
    make_train_step,
    runs_ragged,
)

SIZES = (1, 1, 1)
MODULE = create_module("vit_3_blocks", groups=SIZES)
EPOCH = 50_000


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "input": rng.integers(0, 256, (8, 64, 64, 3), np.uint8),
        "label": rng.integers(0, 10, 8).astype(np.int32),
    }


def start(config, phase, params, mesh):
    state = initial_state(jax.tree.map(jnp.copy, params), phase, MODULE, config.ema_decay)
    return jax.device_put(state, NamedSharding(mesh, P()))


def run_step(config, phase, batch, devices=1, steps=1, capacities=None):
    """The state after some steps of one phase on the first `devices` devices, and before."""
    mesh = data_mesh(jax.devices()[:devices])
    module, variables = build_model(config)
    state = start(config, phase, variables["params"], mesh)
    step = make_train_step(module, phase, config, mesh, capacities)
    for _ in range(steps):
        state, metrics = step(state, shard_batch(batch, NamedSharding(mesh, P("data"))))
    return variables["params"], state, metrics


def flat(params):
    return traverse_util.flatten_dict(jax.device_get(params), sep="/")


def plan_of(config, curriculum):
    config.curriculum = curriculum
    return phases(config, SIZES, EPOCH)


@pytest.mark.parametrize("index", range(6))
def test_exactly_the_declared_parameters_move(tiny_config, batch, index):
    tiny_config.interpreter.learning_rate = tiny_config.backbone.learning_rate = 1e-2
    phase = plan_of(tiny_config, "iared2")[index]
    before, state, _ = run_step(tiny_config, phase, batch)
    before, after = flat(before), flat(state.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    group = index // 2 + 1
    if index % 2 == 0:
        declared = {path for path in before if path.startswith(f"interpreter_{group}/")}
        # In group 1 the policy token is the same for every image; all of q and k still train.
    else:
        blocks = [f"backbone/block_{b}/" for b in range(group - 1, 3)]
        declared = {path for path in before if path.startswith(tuple(blocks))}
    assert declared
    assert moved == declared


def test_supervised_training_moves_the_whole_backbone(tiny_config, batch):
    tiny_config.supervised.learning_rate = 1e-2
    (phase,) = plan_of(tiny_config, "supervised")
    before, state, _ = run_step(tiny_config, phase, batch)
    before, after = flat(before), flat(state.params)
    for path in before:
        assert np.array_equal(before[path], after[path]) == path.startswith("interpreter"), path


def test_a_head_on_a_frozen_trunk_moves_alone(tiny_config, batch):
    tiny_config.supervised.learning_rate = 1e-2
    tiny_config.supervised.train_trunk = False
    (phase,) = plan_of(tiny_config, "supervised")
    before, state, _ = run_step(tiny_config, phase, batch)
    before, after = flat(before), flat(state.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if path.startswith("backbone/head")}


def endless_batches(first):
    """Training batches of eight, from an example of the run on."""
    for index in itertools.count(first, 8):
        rng = np.random.default_rng(index)
        inputs = rng.integers(0, 256, (8, 64, 64, 3), np.uint8)
        yield {"input": inputs, "label": np.arange(index, index + 8) % 10}


def cached_head(config):
    """A phase that trains a head on the features of 24 examples, and its module and parameters."""
    config.supervised.train_trunk, config.supervised.cached_examples = False, 24
    config.supervised.batch_size = 8
    (phase,) = plan_of(config, "supervised")
    module, variables = build_model(config)
    return phase, PhaseContext(module, phase), variables["params"]


def test_a_head_learns_from_cached_features_what_it_learns_from_images(tiny_config):
    phase, context, params = cached_head(tiny_config)
    batch = next(endless_batches(phase.first_example))
    inputs = context.module.input_spec.normalize(batch["input"])
    features = context.module.apply({"params": params}, inputs, execution="dense")[1].features
    seen = {"label": batch["label"], "features": features}
    trainable, frozen = optimizers.split_trainable(params, phase.trains, context.module)

    def loss(trainable, batch):
        merged = optimizers.merge(trainable, frozen)
        return phase.kind.loss(context, merged, batch, jax.random.key(0))[0]

    whole = jax.grad(loss)(trainable, {**batch, "input": inputs})
    cached = jax.grad(loss)(trainable, seen)
    assert set(whole) == {"backbone/head/kernel", "backbone/head/bias"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, cached)


def test_every_epoch_shows_every_cached_example_once_in_another_order(tiny_config):
    phase, context, params = cached_head(tiny_config)

    def some(step, count):
        stream = phase.kind.stream(context, params, endless_batches, step)
        return [next(stream) for _ in range(count)]

    seen = some(0, 6)  # two epochs of three batches
    rows = [np.concatenate([b["features"] for b in seen[e : e + 3]]) for e in (0, 3)]
    assert not np.array_equal(*rows)
    np.testing.assert_array_equal(*(np.sort(part, axis=0) for part in rows))
    assert len(np.unique(rows[0][:, 0])) == 24
    # What a run that goes on at its fifth step sees is what it would have seen.
    jax.tree.map(np.testing.assert_array_equal, some(4, 2), seen[4:])


def test_features_are_cached_of_a_frozen_trunk_with_one_head(tiny_config):
    options = tiny_config.supervised
    options.cached_examples = 24
    with pytest.raises(UsageError, match=r"set --config\.supervised\.train_trunk=False"):
        PHASES["supervised"].check_options(options)
    options.train_trunk, options.batch_size = False, 32
    with pytest.raises(UsageError, match=r"at least one batch \(.*batch_size=32\)"):
        PHASES["supervised"].check_options(options)
    phase, context, params = cached_head(tiny_config)
    distilled = context.module.clone(backbone=context.module.backbone.clone(distilled=True))
    params = init_variables(distilled)["params"]
    with pytest.raises(UsageError, match=r"cached_examples=24: a distilled model has a second"):
        next(phase.kind.stream(PhaseContext(distilled, phase), params, endless_batches, 0))


def test_a_curriculum_of_two_names_does_one_after_the_other(tiny_config):
    plan = plan_of(tiny_config, "supervised+interpreters")
    names = ["supervised", *(f"interpreter {j}" for j in (1, 2, 3))]
    assert [phase.name for phase in plan] == names
    assert dense_phase(plan) is plan[0]
    assert dense_phase(plan_of(tiny_config, "interpreters")) is None
    assert dense_phase(plan_of(tiny_config, "supervised")) is None
    for name in ("supervised+iared2", "iared2", "supervised"):
        tiny_config.curriculum = name
        assert trains_dense_first(tiny_config) == (name == "supervised+iared2")


def test_train_head_adds_norm_and_head(tiny_config):
    tiny_config.backbone.train_head = True
    plan = plan_of(tiny_config, "iared2")
    assert ("classifier", 0) in plan[1].trains
    assert ("classifier", 0) not in plan[0].trains


def test_every_parameter_belongs_to_a_part(tiny_config):
    _, variables = build_model(tiny_config)
    parts = {optimizers.part_of(path, MODULE) for path in flat(variables["params"])}
    groups = {(kind, group) for kind in ("interpreter", "blocks") for group in (1, 2, 3)}
    assert parts == groups | {("embedding", 0), ("classifier", 0), ("head", 0)}
    with pytest.raises(ValueError, match="backbone/adapter"):
        optimizers.part_of("backbone/adapter/kernel", MODULE)


def test_partition_and_merge_are_inverse(tiny_config):
    _, variables = build_model(tiny_config)
    trainable, frozen = optimizers.split_trainable(variables["params"], {("blocks", 2)}, MODULE)
    assert set(trainable) | set(frozen) == set(flat(variables["params"]))
    merged = optimizers.merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(dict(variables["params"]))


@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(k, marks=pytest.mark.slow) for k in ("interpreter", "supervised")), "backbone"],
)
def test_8_devices_give_the_update_of_1(tiny_config, batch, kind):
    # Plain SGD: Adam's first step would make a rounding error of a zero gradient a whole step.
    for options in (tiny_config.interpreter, tiny_config.backbone, tiny_config.supervised):
        options.optimizer, options.learning_rate, options.clip_norm = "sgd", 0.1, 0.0
    curriculum = "supervised" if kind == "supervised" else "iared2"
    phase = next(p for p in plan_of(tiny_config, curriculum) if p.kind.section == kind)
    _, alone, metrics = run_step(tiny_config, phase, batch, devices=1)
    _, spread, metrics_8 = run_step(tiny_config, phase, batch, devices=8)
    for path, value in flat(alone.params).items():
        np.testing.assert_allclose(flat(spread.params)[path], value, atol=2e-6, err_msg=path)
    assert_same_metrics(metrics_8, metrics)


def assert_same_metrics(actual, desired):
    for name in desired.keys() - {"overflow"}:
        # An interpreter's loss is a sum of terms of up to tau log(1/pi) a token, which cancel.
        atol = 1e-3 if name == "loss" else 1e-5
        np.testing.assert_allclose(actual[name], desired[name], rtol=1e-4, atol=atol, err_msg=name)


def plain_sgd(config):
    for options in (config.interpreter, config.backbone):
        options.optimizer, options.learning_rate, options.clip_norm = "sgd", 0.1, 0.0


def assert_same_update(one, other):
    (before, state, metrics), (_, others, others_metrics) = one, other
    moved = flat(state.params)
    assert any(not np.array_equal(moved[path], value) for path, value in flat(before).items())
    for path, value in moved.items():
        np.testing.assert_allclose(flat(others.params)[path], value, atol=3e-6, err_msg=path)
    assert_same_metrics(others_metrics, metrics)


@pytest.mark.parametrize(
    ("index", "enough"),
    [
        (1, True), (4, False),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in ((2, True), (3, True), (4, True), (5, True), (3, False))),
    ],
)  # fmt: skip
def test_gathered_training_makes_the_update_of_masked(tiny_config, batch, index, enough):
    """Where the capacities suffice; and where they do not, and the step is computed again."""
    plain_sgd(tiny_config)
    tiny_config.model.init_bias = 0.05  # some go, most stay
    phase = plan_of(tiny_config, "iared2")[index]
    module, variables = build_model(tiny_config)
    images = MODULE.input_spec.normalize(batch["input"])
    logits, _ = module.apply(variables, images, phase.thresholds)
    batch["label"] = np.asarray(logits.argmax(-1), np.int32)  # right answers: rewards that differ
    fixed = phase.kind.fixed_groups(phase.group)
    capacities = ((64, 56, 48) if enough else (24, 8, 8))[:fixed]
    masked = run_step(tiny_config, phase, batch)
    gathered = run_step(tiny_config, phase, batch, capacities=capacities)
    assert (gathered[2]["overflow"] == 0) == enough
    assert masked[2]["overflow"] == 0
    assert_same_update(masked, gathered)


def matrix_products(program):
    """How many each computation of a compiled program has, by its name; the whole is ENTRY."""
    counts, name = collections.Counter(), ""
    for line in program.splitlines():
        if line.endswith("{") and " -> " in line:
            name = line.split()[0]
        counts[name] += " dot(" in line
    return counts


@pytest.mark.parametrize("index", [2, 3])
def test_a_step_that_fits_is_not_computed_again(tiny_config, batch, index):
    """XLA moves out of a loop what is the same in every turn, even of one that has no turn."""
    phase = plan_of(tiny_config, "iared2")[index]
    mesh = data_mesh(jax.devices()[:1])
    module, variables = build_model(tiny_config)
    state = enter_phase(start(tiny_config, phase, variables["params"], mesh), phase, module)

    def program(capacities):
        step = make_train_step(module, phase, tiny_config, mesh, capacities)
        return step.lower(state, batch).compile().as_text()

    masked = matrix_products(program(None))["ENTRY"]
    gathered = program((64,) * phase.kind.fixed_groups(phase.group))
    products = matrix_products(gathered)
    bodies = re.findall(r"body=(%[\w.-]+)", gathered)
    assert products["ENTRY"] == max(products[body] for body in bodies) == masked > 5


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_has_the_same_gradient_by_every_execution(tiny_config, batch, name):
    options = tiny_config.interpreter
    options.estimator, options.rollouts, options.answer = name, 2, "log_probability"
    options.log_prob_reduction, options.reward_denominator = "mean", "initial"
    tiny_config.model.init_bias = 0.05
    phase = plan_of(tiny_config, "interpreters")[1]
    module, variables = build_model(tiny_config)
    batch = {key: values[:2] for key, values in batch.items()}
    batch["input"] = MODULE.input_spec.normalize(batch["input"])
    trainable, frozen = optimizers.split_trainable(variables["params"], phase.trains, module)

    def gradient(**how):
        def loss(trainable):
            context = PhaseContext(module, phase, **how)
            params = optimizers.merge(trainable, frozen)
            return phase.kind.loss(context, params, batch, jax.random.key(0))

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)

    (value, metrics), masked = gradient()
    assert 0.1 < metrics["handed_rate"] < 0.95  # there is something to leave out
    assert ("accuracy" in metrics) == ESTIMATORS[name].greedy
    assert max(float(jnp.abs(g).max()) for g in masked.values()) > 1e-5
    ragged = RaggedParts(module, data_mesh(jax.devices()[:1]))
    for how in ({"capacities": (64,)}, {"ragged": ragged}):
        (same, others), gradients = gradient(**how)
        np.testing.assert_allclose(same, value, rtol=1e-4, atol=1e-4)
        assert_same_metrics(others, metrics)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), masked, gradients)


@pytest.mark.slow
def test_gathered_training_over_8_devices(tiny_config, batch):
    plain_sgd(tiny_config)
    phase = plan_of(tiny_config, "iared2")[3]
    masked = run_step(tiny_config, phase, batch)
    assert_same_update(masked, run_step(tiny_config, phase, batch, 8, capacities=(64, 64)))
    assert_same_update(masked, run_step(tiny_config, phase, batch, 8, capacities=(8, 8)))


@pytest.mark.parametrize(("index", "devices"), [(4, 1), pytest.param(2, 8, marks=pytest.mark.slow)])
def test_ragged_training_makes_the_update_of_masked(tiny_config, batch, index, devices):
    """Every device sorts its own rows, and no token is without a place."""
    plain_sgd(tiny_config)
    tiny_config.model.init_bias = 0.05  # some go, most stay
    phase = plan_of(tiny_config, "iared2")[index]
    masked = run_step(tiny_config, phase, batch)
    tiny_config.reduction.train_execution = "ragged"
    ragged = run_step(tiny_config, phase, batch, devices)
    assert ragged[2]["overflow"] == 0
    assert_same_update(masked, ragged)


def test_a_step_on_an_input_that_is_not_finite_is_not_applied_when_ragged(tiny_config, batch):
    """Also where the tokens that are not finite were dropped before anything saw them."""
    tiny_config.reduction.train_execution = "ragged"
    phase = plan_of(tiny_config, "iared2")[2]
    batch["input"] = MODULE.input_spec.normalize(batch["input"]).at[3, 0, 0].set(jnp.nan)
    before, state, metrics = run_step(tiny_config, phase, batch)
    assert metrics["bad_steps"] == 1
    jax.tree.map(np.testing.assert_array_equal, before, state.params)


def test_only_what_needs_no_gradient_runs_ragged(tiny_config):
    tiny_config.reduction.train_execution = "ragged"
    plan = plan_of(tiny_config, "supervised+iared2")
    ragged = [phase.name for phase in plan if runs_ragged(tiny_config, phase)]
    assert ragged == ["interpreter 1", "interpreter 2", "interpreter 3"]
    tiny_config.reduction.train_execution = "gathered"
    assert not any(runs_ragged(tiny_config, phase) for phase in plan)


@pytest.mark.parametrize("most", [5, 17, 65, 197, 257])
@pytest.mark.parametrize("batch_size", [1, 6, 48, 768])
def test_an_even_plan_holds_anything(batch_size, most):
    plan = even_plan(batch_size, (most, most))
    plan.check(batch_size, (most, most))
    rows, (smallest, *_) = plan.groups[0].rows, plan.groups[0].shapes
    assert -(-batch_size // rows) <= 8
    assert smallest[1] <= most / 4 + 1


def test_capacities_hold_the_sample_and_are_remembered(tiny_config, tmp_path, batch):
    module, variables = build_model(tiny_config)
    phases_ = plan_of(tiny_config, "iared2")

    def measure(phase):
        return measure_capacities(module, variables["params"], phase, itertools.repeat(batch))

    images = MODULE.input_spec.normalize(batch["input"])
    _, out = module.apply(variables, images, phases_[3].thresholds)
    most = [int(keep.sum(-1).max()) for keep in out.keep]
    found = measure(phases_[3])
    assert len(found) == 2
    assert all(m <= c <= min(64, 1.05 * m + 8) for m, c in zip(most, found, strict=False))
    assert len(measure(phases_[0])) == 0

    path = tmp_path / "capacities.json"
    assert recalled(path, phases_[3], lambda: found) == found
    assert recalled(path, phases_[2], lambda: (8,)) == (8,)
    assert recalled(path, phases_[3], lambda: pytest.fail("measured again")) == found
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UsageError, match=r"capacities\.json is damaged: delete it"):
        recalled(path, phases_[3], lambda: found)


def test_the_curriculum_is_the_papers(tiny_config):
    plan = plan_of(tiny_config, "iared2")
    assert [phase.name for phase in plan] == [
        "interpreter 1", "backbone 1", "interpreter 2", "backbone 2", "interpreter 3", "backbone 3"
    ]  # fmt: skip
    assert plan[2].thresholds == (0.5, 0.5, KEEP_ALL)
    assert plan[3].trains == {("blocks", 2), ("blocks", 3)}
    assert [phase.first_step for phase in plan] == [0, 2, 4, 6, 8, 10]
    # No example is seen twice, and none is left out.
    for earlier, later in itertools.pairwise(plan):
        seen = earlier.steps * earlier.options.batch_size
        assert later.first_example == earlier.first_example + seen
    assert phase_at(plan, 3) is plan[1]
    assert phase_at(plan, 4) is plan[2]
    assert phase_at(plan, 12) is None
    assert [p.kind.section for p in plan_of(tiny_config, "interpreters")] == ["interpreter"] * 3


def test_epochs_become_steps(tiny_config):
    tiny_config.interpreter.steps, tiny_config.interpreter.epochs = 0, 0.5
    phase = plan_of(tiny_config, "iared2")[0]
    assert phase.steps == round(0.5 * 50_000 / phase.options.batch_size)


def test_a_groups_phase_may_be_longer_than_the_others(tiny_config):
    tiny_config.interpreter.lengths = (2.5, 1.0, 0.1)
    plan = plan_of(tiny_config, "interpreters")
    assert [phase.steps for phase in plan] == [5, 2, 1]
    assert [phase.first_step for phase in plan] == [0, 5, 7]
    tiny_config.interpreter.tau = (1.0,)
    with pytest.raises(UsageError, match=r"lengths has 3 values for 2 groups: give 1 or 2"):
        PHASES["interpreter"].check(tiny_config.interpreter, 2)
    tiny_config.interpreter.lengths = (1.0, 0.0, 1.0)
    with pytest.raises(UsageError, match=r"lengths=\(1\.0, 0\.0, 1\.0\) must all be above 0"):
        PHASES["interpreter"].check_options(tiny_config.interpreter)


def test_the_interpreter_learns_to_drop_when_errors_are_free(tiny_config, batch):
    """Where no answer can be wrong, fewer tokens always pay: the policy must find that."""
    tiny_config.interpreter.tau = (0.0,)
    tiny_config.interpreter.learning_rate = 3e-2
    tiny_config.interpreter.steps = 60
    tiny_config.model.init_bias = 1.0
    # A batch that the frozen backbone always gets right, whatever it sees.
    phase = plan_of(tiny_config, "interpreters")[0]
    module, variables = build_model(tiny_config)
    head = variables["params"]["backbone"]["head"]
    head["kernel"], head["bias"] = jnp.zeros_like(head["kernel"]), jnp.eye(10)[3]
    batch["label"] = np.full(8, 3, np.int32)
    mesh = data_mesh(jax.devices()[:1])
    state = start(tiny_config, phase, variables["params"], mesh)
    step = make_train_step(module, phase, tiny_config, mesh)
    rates = []
    for _ in range(60):
        state, metrics = step(state, shard_batch(batch, NamedSharding(mesh, P("data"))))
        rates.append((float(metrics["keep_rate"]), float(metrics["keep_rate_sampled"])))
    (greedy_before, sampled_before), (greedy_after, sampled_after) = rates[0], rates[-1]
    assert greedy_before > 0.9
    assert greedy_after < 0.5
    assert sampled_after < 0.7 * sampled_before


@pytest.mark.parametrize("target", [0.2, 0.8])
def test_a_budget_pulls_by_its_distance_alone_where_no_mask_changes_the_answer(
    tiny_config, batch, target
):
    """w (k - t)^2 with k the share of all N tokens that the batch keeps, though some are dead;
    its derivative is the mean score's.
    """
    tiny_config.interpreter.update(
        estimator="rloo", rollouts=2, answer="probability", keep_target=(0.9, target, 0.1),
        target_weight=3.0, tau=(2.0,),
    )  # fmt: skip
    tiny_config.model.init_bias = 0.05
    phase = plan_of(tiny_config, "interpreters")[1]
    module, variables = build_model(tiny_config)
    head = variables["params"]["backbone"]["head"]
    head["kernel"] = jnp.zeros_like(head["kernel"])
    inputs = MODULE.input_spec.normalize(batch["input"])
    trainable, frozen = optimizers.split_trainable(variables["params"], phase.trains, module)
    entry = module.apply(variables, 2, inputs, phase.thresholds, method="up_to")
    assert 0.1 < entry.alive.mean() < 0.95

    scores = jax.nn.sigmoid(module.apply(variables, 2, entry.x, method="interpret")).mean(-1)
    kept = ((scores > 0.5) & entry.alive).mean()

    def loss(trainable):
        params = optimizers.merge(trainable, frozen)
        context = PhaseContext(module, phase)
        return phase.kind.loss(context, params, {**batch, "input": inputs}, jax.random.key(0))[0]

    def distance(trainable):
        params = optimizers.merge(trainable, frozen)
        scores = jax.nn.sigmoid(module.apply({"params": params}, 2, entry.x, method="interpret"))
        scores = jnp.where(entry.alive, scores.mean(-1), 0.0).sum(-1) / 64
        return (2 * 3.0 * (kept - target) * scores).mean()

    found, expected = (jax.jit(jax.grad(f))(trainable) for f in (loss, distance))
    assert max(np.abs(g).max() for g in jax.tree.leaves(expected)) > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_budgets_that_cannot_be_are_refused(tiny_config):
    options, kind = tiny_config.interpreter, PHASES["interpreter"]
    options.keep_target = (0.5, 1.2)
    with pytest.raises(UsageError, match=r"keep_target=\(0\.5, 1\.2\) must be shares"):
        kind.check_options(options)
    options.keep_target = (0.5, 0.4)
    with pytest.raises(UsageError, match=r"keep_target has 2 values for 3 groups: give 1 or 3"):
        kind.check(options, 3)
    options.keep_target = (0.9, 0.4, 0.5)
    with pytest.raises(UsageError, match=r"keep_target=\(0\.9, 0\.4, 0\.5\) must not rise"):
        kind.check_options(options)
    options.keep_target = (0.4,)
    options.exact_saving, options.reward_denominator = False, "initial"
    kind.check_options(options)
    kind.check(options, 3)
    for name, value in (("exact_saving", True), ("reward_denominator", "entering")):
        other = options.copy_and_resolve_references()
        other[name] = value
        with pytest.raises(
            UsageError, match=rf"{name}={value!r} has no meaning beside keep_target"
        ):
            kind.check_options(other)


def test_enter_phase_starts_a_fresh_optimizer(tiny_config):
    plan = plan_of(tiny_config, "iared2")
    _, variables = build_model(tiny_config)
    state = initial_state(variables["params"], plan[0], MODULE, 0.0)
    trained = set(jax.tree.leaves(jax.tree.map(id, state.opt_state)))
    later = enter_phase(state, plan[1], MODULE)
    assert trained.isdisjoint(jax.tree.leaves(jax.tree.map(id, later.opt_state)))
    assert enter_phase(state, None, MODULE).opt_state == ()


def test_decay_acts_on_weights_and_on_nothing_else():
    """Not on the learned policy token, a [1, d] that looks like a matrix; nor on CLS or gammas."""
    for name in ("vit_micro", "deit_ti_distilled", "cait_xxs24"):
        module = create_module(name, policy_token="learned")
        paths = declared(module, module.input_spec.shape)
        decaying = optimizers.weights_that_decay(module)
        assert decaying == {path for path in paths if path.endswith("kernel")}
        assert "interpreter_1/policy_token" in paths.keys() - decaying


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_a_policy_token_without_gradient_stays(tiny_config, optimizer):
    module = create_module("vit_3_blocks", groups=SIZES, policy_token="learned")
    options = tiny_config.interpreter
    options.optimizer, options.weight_decay, options.learning_rate = optimizer, 0.5, 0.1
    params = flat(init_variables(module)["params"])
    params = {path: value for path, value in params.items() if "interpreter_1" in path}
    made = optimizers.make_optimizer(options, 10, module)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = made.update(zeros, made.init(params), params)
    moved = {path for path, update in updates.items() if np.abs(update).max() > 0}
    assert moved == {f"interpreter_1/{name}/kernel" for name in ("q", "k")}


@pytest.mark.parametrize(
    ("name", "expected"), [("vit_micro", 10.251562608806436), ("cait_xxs24", 53.60819862704767)]
)
def test_host_initialisation_draws_what_version_0_1_drew(name, expected):
    """The first weights of a run from scratch: same numbers, parameter by parameter."""
    leaves = jax.tree.leaves(init_variables(create_module(name), seed=0))
    projections = [np.asarray(x, np.float64).ravel() @ np.cos(np.arange(x.size)) for x in leaves]
    assert sum(projections) == pytest.approx(expected, rel=1e-6)
