"""DynamicViT: its predictor and losses by hand, relaxed masks against masked ones, and a run."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from scipy import special

import iared2_jax
from iared2_jax import main
from iared2_jax.config.checks import validate
from iared2_jax.config.loading import load
from iared2_jax.errors import UsageError
from iared2_jax.experiment.build import build_module, build_phases
from iared2_jax.fast_inference import GroupPlan, Plan
from iared2_jax.models.attention import attend
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.token_reduction.predictor import Predictor
from iared2_jax.training import optimizers
from iared2_jax.training.phases import DynamicViTPhase, Phase, PhaseContext
from iared2_jax.training.phases.dynamicvit import divergence, gumbel_keep, token_difference
from iared2_jax.weights.save import save_weights

N, SIZES = 64, (1, 1, 1)
RATIOS = (0.8, 0.5, 0.25)


@functools.cache
def model(kind: str = "dynamicvit", pool: str = "cls"):
    """A small ViT with every parameter random, its scores on both sides of a half."""
    module = create_module("vit_3_blocks", groups=SIZES, interpreter_kind=kind)
    module = module.clone(backbone=module.backbone.clone(pool=pool))
    rng = np.random.default_rng(0)
    noise = lambda x: 3 * x + 0.05 * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    return module, jax.tree.map(noise, init_variables(module))


@functools.cache
def images(count: int = 3):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((count, 64, 64, 3)), jnp.float32)


def options(**changes):
    return ml_collections.ConfigDict({**DynamicViTPhase().options(), **changes})


def phase_of(module, steps=10, **changes) -> Phase:
    kind, given = DynamicViTPhase(), options(keep_target=RATIOS, **changes)
    groups = module.num_groups
    trains, thresholds = kind.trains(given, groups, groups), (0.5,) * groups
    return Phase(kind, groups, trains, thresholds, 0, steps, 0, given)


def test_the_predictor_by_hand():
    """Rao et al., Eq. 1 to 4: LayerNorm, GELU layers, and the mean of those that are there."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 5, 8)).astype(np.float32)  # CLS and four patches
    alive = np.array([[True, False, True, True]])
    predictor = Predictor(init_bias=0.5)
    variables = predictor.init(jax.random.key(0), x, 1)
    variables = jax.tree.map(
        lambda p: np.asarray(p) + 0.3 * rng.standard_normal(p.shape).astype(np.float32), variables
    )
    p = variables["params"]

    def gelu(y):
        return y * 0.5 * (1 + special.erf(y / np.sqrt(2)))

    def layer(name, y):
        return y @ p[name]["kernel"] + p[name]["bias"]

    y = x[0, 1:]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = gelu(layer("embed", y * p["norm"]["scale"] + p["norm"]["bias"]))
    mean = (y[0, 4:] + y[2, 4:] + y[3, 4:]) / 3
    y = np.concatenate([y[:, :4], np.tile(mean, (4, 1))], axis=1)
    y = layer("fc3", gelu(layer("fc2", gelu(layer("fc1", y)))))
    expected = y[:, 0] - y[:, 1] + 0.5
    found = predictor.apply(variables, x, 1, alive)
    np.testing.assert_allclose(found[0, :, 0], expected, atol=2e-6)
    shares = alive.astype(np.float32)
    np.testing.assert_array_equal(found, predictor.apply(variables, x, 1, shares))


def test_its_cost_by_hand():
    """Four layers per token, of widths d, d / 2, d / 4 and 2, of what is handed to each group."""
    module = create_module("vit_3_blocks", groups=SIZES, interpreter_kind="dynamicvit")
    d, kept = module.backbone.embed_dim, (40, 20, 10)
    per_token = d * d + d * d // 2 + d * d // 8 + d // 2
    plain = count_flops(module, kept, interpreters=False)
    cost = count_flops(module, kept)
    assert cost.full - plain.full == (N + 40 + 20) * per_token
    assert cost.linear == plain.linear
    deit = create_module("deit_s", groups=4, interpreter_kind="dynamicvit")
    # The published DeiT-S at rho = 0.7: 2.9 G of 4.6 G. Its three predictors are ours 2 to 4.
    kept = [round(0.7**stage * 196) for stage in range(4)]
    assert round(count_flops(deit, kept, interpreters=False).full / 1e9, 1) == 2.9


def thresholds_between(scores_of) -> tuple[float, ...]:
    """A threshold for each group that about two thirds of its tokens pass."""
    found = ()
    for group in range(3):
        scores = np.asarray(scores_of((*found, 0.0, 0.0, 0.0)[:3])[group])
        scores = np.sort(scores[scores > 0])
        some = scores[len(scores) // 4 : len(scores) // 2]
        widest = np.diff(some).argmax()  # where no rounding can make a difference
        found += (float(some[widest : widest + 2].mean()),)
    return found


@pytest.mark.parametrize(
    "given", ["thresholds", pytest.param("keep_ratios", marks=pytest.mark.slow)]
)
def test_masked_gathered_and_ragged_agree(given):
    """The mean over the tokens that are there is the same, wherever they lie."""
    module, variables = model()
    run = jax.jit(lambda v, x, t: module.apply(v, x, t))
    if given == "keep_ratios":
        budget = {"keep_ratios": RATIOS}
    else:
        scores_of = lambda t: run(variables, images(), jnp.asarray(t))[1].scores  # noqa: E731
        budget = {"thresholds": thresholds_between(scores_of)}
    masked, out = jax.jit(lambda v, x: module.apply(v, x, **budget))(variables, images())
    counts = np.asarray([keep.sum(-1) for keep in out.keep])
    assert (counts > 0).all()
    assert counts[-1].max() < N
    capacities = tuple(int(c) for c in counts.max(1))
    gathered, _ = jax.jit(
        lambda v, x: module.apply(v, x, execution="gathered", capacities=capacities, **budget)
    )(variables, images())
    np.testing.assert_allclose(gathered, masked, atol=2e-5)
    # Lists with padding between the images, pinned: nothing has to be timed.
    most = module.keep_counts(budget.get("keep_ratios")) or (N, N, N)
    kind = "padded" if given == "keep_ratios" else "packed"
    groups = [GroupPlan(kind, 3, ((3 * (m + 1), m + 1),)) for m in most]
    plan = Plan(3, tuple(groups))
    run = iared2_jax.accelerate(module, variables, 3, cache_dir=None, plan=plan, **budget)
    ragged, _ = run(images())
    np.testing.assert_allclose(ragged, masked, atol=2e-5)


@pytest.mark.parametrize("pool", ["cls", "cls_mean"])
def test_relaxed_masks_of_zeros_and_ones_are_masked_execution(pool):
    module, variables = model(pool=pool)
    rng = np.random.default_rng(2)
    keep = [jnp.asarray(rng.random((3, N)) < share) for share in RATIOS]
    masked, out = module.apply(variables, images(), keep=keep)
    logits, _, kept = module.apply(
        variables, images(), lambda group, _: keep[group - 1].astype(float), method="relaxed"
    )
    np.testing.assert_allclose(logits, masked, atol=2e-5)
    for ours, theirs in zip(kept, out.keep, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    dense, _ = module.apply(variables, images(), execution="dense")
    whole, tokens, _ = module.apply(
        variables, images(), lambda *_: jnp.ones((3, N)), method="relaxed"
    )
    np.testing.assert_allclose(whole, dense, atol=2e-5)
    logits, expected = module.apply(variables, images(), method="dense_tokens")
    np.testing.assert_allclose(logits, dense, atol=2e-5)
    np.testing.assert_allclose(tokens, expected, atol=2e-5)


def test_dropped_tokens_never_leak_and_see_themselves():
    module, variables = model()
    x = module.apply(variables, images(), method="embed")
    shares = jnp.asarray(np.random.default_rng(3).random((3, N)) < 0.5, jnp.float32)
    dropped = np.pad(np.asarray(shares) == 0, ((0, 0), (1, 0)))
    other = jnp.where(dropped[..., None], 100 * x[::-1], x)
    counts = jnp.pad(shares, ((0, 0), (1, 0)), constant_values=1.0)[:, None]
    sizes = counts * (1 - jnp.eye(N + 1)) + jnp.eye(N + 1)
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 2, N + 1, 4)), jnp.float32) for _ in range(3))
    y, _ = attend(q, k, v, None, sizes=sizes)
    logits = np.einsum("bhqe,bhke->bhqk", q, k) / 2
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * np.asarray(sizes)[:, None]
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(y, np.einsum("bhqk,bhke->bhqe", weights, v), atol=1e-5)
    scores = [module.apply(variables, 2, z, shares, method="interpret") for z in (x, other)]
    there = np.asarray(shares) == 1
    np.testing.assert_allclose(scores[0][there], scores[1][there], atol=1e-5)


def test_the_draws_are_the_scores_and_the_gradient_the_sigmoids():
    logits = jnp.asarray([[-2.0, 0.0, 1.5]])[..., None]
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: gumbel_keep(key, logits))(keys)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    np.testing.assert_allclose(drawn.mean(0), jax.nn.sigmoid(logits[..., 0]), atol=0.03)
    key, temperature = jax.random.key(1), 0.7
    noise = jax.random.logistic(key, (1, 3))
    found = jax.grad(lambda z: gumbel_keep(key, z, temperature).sum())(logits)
    soft = jax.nn.sigmoid((logits[..., 0] + noise) / temperature)
    np.testing.assert_allclose(found[..., 0], soft * (1 - soft) / temperature, rtol=1e-5)
    # Of several heads, the mean of their sigmoids.
    heads = jnp.asarray([[[-1.0, 2.0], [0.5, 0.5]]])
    drawn = jax.vmap(lambda key: gumbel_keep(key, heads))(keys)
    np.testing.assert_allclose(drawn.mean(0), jax.nn.sigmoid(heads).mean(-1), atol=0.03)


def test_the_losses_by_hand():
    logits, dense = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [0.0, 3.0]])
    p, q = special.softmax(logits, -1), special.softmax(dense, -1)
    expected = (q * np.log(q / p)).sum(-1).mean()
    assert float(divergence(logits, dense)) == pytest.approx(expected, rel=1e-5)
    tokens = np.zeros((1, 3, 2), np.float32)
    teacher = np.array([[[9.0, 9.0], [1.0, 3.0], [5.0, 5.0]]], np.float32)
    kept = np.array([[1.0, 0.0]], np.float32)
    assert float(token_difference(tokens, teacher, kept, 1)) == pytest.approx((1 + 9) / 2)
    assert float(token_difference(tokens, teacher, 0 * kept, 1)) == 0.0


def batch():
    return {"input": images(), "label": jnp.arange(3)}


@pytest.mark.parametrize("kind", ["dynamicvit", "attention"])
def test_the_loss_is_the_weighted_sum_and_every_part_learns(kind):
    module, variables = model(kind)
    phase = phase_of(module)
    extra = phase.kind.initial_extra(module, variables["params"])
    context = PhaseContext(module, phase, extra=extra)
    fn = jax.value_and_grad(
        lambda p: phase.kind.loss(context, p, batch(), jax.random.key(0)), has_aux=True
    )
    (loss, metrics), gradient = jax.jit(fn)(variables["params"])
    shares = np.array([metrics[f"keep_rate_{j}"] for j in (1, 2, 3)])
    assert (np.diff(shares) <= 0).all()
    rest = 2 * metrics["ratio"] + 0.5 * metrics["distillation"] + 0.5 * metrics["tokens"]
    logits, _, kept = module.apply(
        {"params": variables["params"]},
        images(),
        lambda group, z: gumbel_keep(jax.random.fold_in(jax.random.key(0), group), z),
        method="relaxed",
    )
    labels = -np.asarray(jax.nn.log_softmax(logits))[range(3), range(3)].mean()
    assert float(loss) == pytest.approx(float(labels + rest), rel=1e-4)
    missed = [(np.asarray(keep.mean(1)) - t) ** 2 for keep, t in zip(kept, RATIOS, strict=True)]
    assert float(metrics["ratio"]) == pytest.approx(np.mean(missed), rel=1e-4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
    for group in (1, 2, 3):
        parts = jax.tree.leaves(gradient[f"interpreter_{group}"])
        assert any(np.abs(leaf).max() > 0 for leaf in parts)
    assert np.abs(gradient["backbone"]["block_0"]["attn"]["qkv"]["kernel"]).max() > 0


def test_at_its_own_answers_distillation_costs_nothing():
    module, variables = model()
    sure = module.clone(init_bias=50.0)  # keeps all
    phase = phase_of(sure)
    extra = phase.kind.initial_extra(sure, variables["params"])
    context = PhaseContext(sure, phase, extra=extra)
    _, metrics = phase.kind.loss(context, variables["params"], batch(), jax.random.key(0))
    assert float(metrics["distillation"]) == pytest.approx(0, abs=1e-5)
    assert float(metrics["tokens"]) == pytest.approx(0, abs=1e-8)
    assert float(metrics["ratio"]) == pytest.approx(np.mean([(1 - t) ** 2 for t in RATIOS]))


def test_the_backbone_rests_and_then_learns_slowly():
    """Its learning rate is 0 for the first steps, then a hundredth of the interpreters' peak."""
    module, variables = model()
    phase = phase_of(module, steps=6, backbone_rest=1 / 3, optimizer="sgd", momentum=0.0)
    made = optimizers.make_optimizer(phase.options, phase.steps, module, phase.kind.rate)
    plain = optimizers.make_optimizer(phase.options, phase.steps, module)
    params, _ = optimizers.split_trainable(variables["params"], phase.trains, module)
    grads = jax.tree.map(jnp.ones_like, params)
    state, other = made.init(params), plain.init(params)
    for step in range(6):
        updates, state = made.update(grads, state, params)
        expected, other = plain.update(grads, other, params)
        for path, update in updates.items():
            cosine = 0.5 * (1 + np.cos(np.pi * step / 6))
            slow = 0.0 if step < 2 else min(0.01 / cosine, 1.0)  # so .01 of the peak, or the cosine
            factor = 1.0 if path.startswith("interpreter") else slow
            np.testing.assert_allclose(update, factor * expected[path], rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_what_wakes_takes_no_larger_steps_than_its_learning_rate(clip_norm):
    """Adam's means have followed its gradients; those of zeros would wake it with a leap."""
    module, variables = model()
    phase = phase_of(module, steps=60, backbone_rest=2 / 3, optimizer="adam")
    phase.options.weight_decay, phase.options.clip_norm = 0.0, clip_norm
    made = optimizers.make_optimizer(phase.options, phase.steps, module, phase.kind.rate)
    path = "backbone/cls_token"
    params = {path: variables["params"]["backbone"]["cls_token"]}
    state, step = made.init(params), jax.jit(made.update)
    for count in range(60):
        updates, state = step({path: jnp.ones_like(params[path])}, state, params)
        cosine = 0.5 * (1 + np.cos(np.pi * count / 60))
        rate = phase.options.learning_rate * min(phase.options.backbone_rate, cosine)
        expected = -rate if count >= 40 else 0.0
        np.testing.assert_allclose(updates[path], expected, rtol=0.05, atol=1e-12)


def test_a_file_says_which_interpreters_it_has(tmp_path):
    options = {"name": "vit_3_blocks", "groups": 3, "interpreter_kind": "dynamicvit"}
    module, variables = iared2_jax.create_model(**options, seed=3)
    path = tmp_path / "weights.safetensors"
    save_weights(variables, path, {"create_model": options})
    loaded, same = iared2_jax.load_model(path)
    assert loaded == module
    for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(ours, theirs)


FLAGS = {
    "curriculum": "dynamicvit",
    "model.name": "vit_3_blocks",
    "model.groups": "3",
    "model.group_sizes": "()",
    "model.interpreter_kind": "dynamicvit",
    "weights": "",
    "dynamicvit.keep_target": "(1.0,0.6,0.4)",
    "dynamicvit.epochs": "0",
    "dynamicvit.steps": "4",
    "dynamicvit.batch_size": "8",
    "reduction.keep_ratios": "(1.0,0.6,0.4)",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dynamicvit.keep_target": "(1.0,0.5)"}, "has 2 values for 3 groups"),
        ({"dynamicvit.keep_target": "(1.0,0.5,0.0)"}, "must be shares"),
        ({"dynamicvit.temperature": "0.0"}, "must be above 0"),
        ({"dynamicvit.backbone_rest": "1.0"}, r"in \[0, 1\)"),
        ({"model.interpreter_kind": "dynamic"}, "use one of attention, dynamicvit"),
    ],
)
def test_bad_options_are_refused_in_words(change, words):
    config = load("configs/cluttered_mnist.py:runlocal", {**FLAGS, **change})
    with pytest.raises(UsageError, match=words):  # noqa: PT012
        validate(config, 1)
        build_module(config)


def test_a_backbone_without_last_tokens_is_refused():
    module = create_module("cait_xxs24", policy_token="learned")
    with pytest.raises(UsageError, match="final_tokens"):
        DynamicViTPhase().check_module(module)
    other = load(
        "configs/cluttered_mnist.py:runlocal",
        {**FLAGS, "model.attention": "linformer", "model.attention_size": "8"},
    )
    with pytest.raises(UsageError, match='attention="linformer" has none'):
        build_phases(other, build_module(other))


def test_what_rests_has_no_part_in_the_clipped_norm():
    """Else a large gradient of a backbone that does not move would stop the interpreters."""
    module, variables = model()
    phase = phase_of(module, steps=6, backbone_rest=1 / 3, optimizer="sgd", momentum=0.0)
    phase.options.clip_norm = 1.0
    made = optimizers.make_optimizer(phase.options, phase.steps, module, phase.kind.rate)
    params, _ = optimizers.split_trainable(variables["params"], phase.trains, module)
    scale = lambda path: 1e-3 if path.startswith("interpreter") else 1e3  # noqa: E731
    grads = {path: jnp.full_like(value, scale(path)) for path, value in params.items()}
    updates, _ = made.update(grads, made.init(params), params)
    moved = {path: update for path, update in updates.items() if path.startswith("interpreter")}
    for update in moved.values():
        np.testing.assert_allclose(update, -phase.options.learning_rate * 1e-3, rtol=1e-5)


def test_a_group_whose_target_is_one_keeps_all_and_its_interpreter_stays():
    """The published first group has no predictor; the ratio is a mean over the others."""
    module, variables = model()
    phase = phase_of(module)
    phase.options.keep_target = (1.0, 0.5, 0.25)
    trains = phase.kind.trains(phase.options, 3, 3)
    assert {part for part in trains if part[0] == "interpreter"} == {
        ("interpreter", 2),
        ("interpreter", 3),
    }
    extra = phase.kind.initial_extra(module, variables["params"])
    context = PhaseContext(module, phase, extra=extra)
    _, metrics = phase.kind.loss(context, variables["params"], batch(), jax.random.key(0))
    assert float(metrics["keep_rate_1"]) == 1.0
    _, _, kept = module.apply(
        {"params": variables["params"]},
        images(),
        lambda group, z: (
            jnp.ones((3, N))
            if group == 1
            else gumbel_keep(jax.random.fold_in(jax.random.key(0), group), z)
        ),
        method="relaxed",
    )
    missed = [
        (np.asarray(keep.mean(1)) - t) ** 2 for keep, t in zip(kept[1:], (0.5, 0.25), strict=True)
    ]
    assert float(metrics["ratio"]) == pytest.approx(np.mean(missed), rel=1e-4)


@pytest.mark.slow
def test_a_run_trains_and_evaluates(tmp_path):
    """From its start to results.json, under the budget that it was trained for."""
    quiet = {
        "eval.figures": "0",
        "eval.speed_batch": "0",
        "eval.page_images": "0",
        "eval.agreement": "False",
        "eval.maps": "()",
        "data.eval_size": "16",
    }
    flags = [f"--config.{key}={text}" for key, text in {**FLAGS, **quiet}.items()]
    run = tmp_path / "run"
    command = ["--config=configs/cluttered_mnist.py:runlocal", f"--workdir={run}", *flags]
    assert main.run(command) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["iared2"]["kept"] == pytest.approx([1.0, 0.61, 0.41], abs=0.01)
    module, _ = iared2_jax.load_model(run / "weights.safetensors")
    assert module.interpreter_kind == "dynamicvit"


def test_a_dropped_key_that_attention_was_on_has_a_bounded_gradient():
    """A share of 0 is no key, however large its logit; what the share would do stays bounded."""
    q, v = jnp.ones((1, 1, 1, 4)), jnp.asarray([[[[1.0] * 4, [2.0] * 4, [3.0] * 4]]])
    k = jnp.asarray([[[[0.0] * 4, [80.0] * 4, [0.5] * 4]]])  # logits 0, 160, 1

    def answer(share):
        sizes = jnp.asarray([[1.0, 0.0, 1.0]]).at[0, 1].set(share)
        return attend(q, k, v, None, sizes=sizes)[0].mean()

    kept = np.exp([0.0, 1.0])
    assert float(answer(0.0)) == pytest.approx((kept * [1, 3]).sum() / kept.sum(), rel=1e-5)
    assert float(answer(1.0)) == pytest.approx(2.0)
    slope = float(jax.grad(answer)(0.0))
    assert 0 < abs(slope) < 3


@pytest.mark.parametrize("shape", [(2, 7), (2, 5, 7)])
def test_gradients_with_sizes_are_those_without_and_finite_differences(shape):
    """Sizes of 1 are no sizes; of others the gradient is what a small step makes of the answer."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 3, n, 4)), jnp.float32) for n in (5, 7, 7))
    loss = lambda q, k, v, sizes: (attend(q, k, v, None, sizes=sizes)[0] ** 2).sum()  # noqa: E731
    gradients = jax.grad(loss, (0, 1, 2))
    for ours, theirs in zip(
        gradients(q, k, v, jnp.ones(shape)), gradients(q, k, v, None), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    sizes = jnp.asarray(rng.uniform(0.5, 3, shape), jnp.float32)
    arguments = (q, k, v, sizes)
    for place, found in enumerate(jax.grad(loss, (0, 1, 2, 3))(*arguments)):
        step = jnp.asarray(rng.standard_normal(found.shape), jnp.float32)
        at = [loss(*(x + s * 1e-2 * step if i == place else x for i, x in enumerate(arguments)))
              for s in (1, -1)]  # fmt: skip
        expected = (at[0] - at[1]) / 2e-2
        assert float((found * step).sum()) == pytest.approx(float(expected), rel=2e-2, abs=1e-2)
