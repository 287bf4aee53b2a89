"""Linformer, Sinkhorn and Routing: plain attention in a limit, hand-made cases, no leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iared2_jax
from iared2_jax.config import default_config
from iared2_jax.errors import UsageError
from iared2_jax.experiment.build import build_module, build_phases
from iared2_jax.fast_inference import GroupPlan, Plan
from iared2_jax.models.attention import attend
from iared2_jax.models.attention_variants import VARIANTS, Linformer, Routing, Sinkhorn
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.weights.save import save_weights

N, SIZES = 64, {"linformer": 24, "sinkhorn": 16, "routing": 16}
RATIOS = (0.8, 0.5, 0.3)


def heads(places: int, seed: int = 0, width: int = 8):
    """Queries, keys and values of two images in two heads, and CLS among the places."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((2, 2, places, width)), jnp.float32) for _ in range(3)]


def mixed(module, q, k, v, valid, prefix=1, **params):
    variables = module.init(jax.random.key(0), q, k, v, valid, prefix)
    if params:
        variables = {"params": params}
    return module.apply(variables, q, k, v, valid, prefix)


@functools.cache
def model(name: str):
    module = create_module("vit_3_blocks", attention=name, attention_size=SIZES[name])
    rng = np.random.default_rng(0)
    noise = lambda x: 2 * x + 0.05 * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    return module, jax.tree.map(noise, init_variables(module))


@functools.cache
def images(count: int = 3):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((count, 64, 64, 3)), jnp.float32)


def test_linformer_with_identities_is_plain_attention():
    q, k, v = heads(9)
    valid, one = jnp.ones((2, 9), bool), jnp.eye(9)
    found = mixed(Linformer(9), q, k, v, valid, e=one, f=one)
    np.testing.assert_allclose(found, attend(q, k, v, None)[0], atol=1e-6)


def test_linformer_by_hand():
    """Keys and values projected, rows of dropped places left out."""
    q, k, v = (np.asarray(x) for x in heads(5))
    rng = np.random.default_rng(3)
    e, f = rng.standard_normal((2, 5, 3)).astype(np.float32)
    valid = np.array([[True, True, False, True, True], [True, False, True, True, False]])
    keys = np.einsum("shce,ck->shke", k * valid[:, None, :, None], e)
    values = np.einsum("shce,ck->shke", v * valid[:, None, :, None], f)
    logits = np.einsum("shqe,shke->shqk", q, keys) / np.sqrt(8)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("shqk,shke->shqe", weights / weights.sum(-1, keepdims=True), values)
    np.testing.assert_allclose(mixed(Linformer(3), q, k, v, valid, e=e, f=f), expected, atol=2e-5)


@pytest.mark.parametrize("kind", [Sinkhorn, Routing])
@pytest.mark.parametrize("dropped", [False, True])
def test_one_window_is_plain_attention(kind, dropped):
    q, k, v = heads(9)
    valid = np.ones((2, 9), bool)
    if dropped:
        valid[:, [2, 5, 6]] = False
    found = mixed(kind(8), q, k, v, jnp.asarray(valid))
    expected, _ = attend(q, k, v, jnp.asarray(valid))
    np.testing.assert_allclose(
        np.asarray(found).transpose(0, 2, 1, 3)[valid],
        np.asarray(expected).transpose(0, 2, 1, 3)[valid],
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", [Sinkhorn, Routing])
def test_gradients_of_one_window_are_those_of_plain_attention(kind):
    x, valid = heads(9), jnp.ones((2, 9), bool)
    module = kind(8)
    of_window = jax.grad(lambda *x: (module.apply({}, *x, valid, 1) ** 2).sum(), (0, 1, 2))(*x)
    of_plain = jax.grad(lambda *x: (attend(*x, None)[0] ** 2).sum(), (0, 1, 2))(*x)
    for ours, theirs in zip(of_window, of_plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_sinkhorn_by_hand():
    """Two windows of two; every patch sees CLS twice, its window, and the mixture of both."""
    q, k, v = (np.asarray(x, np.float64) for x in heads(5))
    found = mixed(Sinkhorn(2), *heads(5), jnp.ones((2, 5), bool))
    windows = [x[:, :, 1:].reshape(2, 2, 2, 2, 8) for x in (q, k, v)]
    mean_q, mean_k = (x.mean(3) for x in windows[:2])
    mixing = np.exp(np.einsum("shue,shve->shuv", mean_q, mean_k) / np.sqrt(8) / 0.75)
    for _ in range(7):
        mixing = mixing / mixing.sum(-2, keepdims=True)
        mixing = mixing / mixing.sum(-1, keepdims=True)
    np.testing.assert_allclose(mixing.sum(-2), 1, atol=1e-3)  # doubly stochastic
    mixed_k, mixed_v = (np.einsum("shuv,shvwe->shuwe", mixing, x) for x in windows[1:])
    for image, head, window, place in np.ndindex(2, 2, 2, 2):
        cls_k, cls_v = k[image, head, :1], v[image, head, :1]
        keys = [cls_k, mixed_k[image, head, window], cls_k, windows[1][image, head, window]]
        values = [cls_v, mixed_v[image, head, window], cls_v, windows[2][image, head, window]]
        logits = np.concatenate(keys) @ windows[0][image, head, window, place] / np.sqrt(8)
        weights = np.exp(logits) / np.exp(logits).sum()
        expected = weights @ np.concatenate(values)
        np.testing.assert_allclose(found[image, head, 1 + 2 * window + place], expected, atol=1e-5)
    np.testing.assert_allclose(found[:, :, :1], attend(*heads(5), None)[0][:, :, :1], atol=1e-6)


def test_routing_by_hand():
    """Two far clusters: patches see CLS and their own cluster alone."""
    rng = np.random.default_rng(0)
    centre = np.zeros((2, 8))
    centre[0, 0] = centre[1, 1] = 5
    # Neighbours start in one cluster each, as they lie in the grid.
    of = np.array([0, 0, 0, 1, 1, 1])
    patches = centre[of] + 0.1 * rng.standard_normal((6, 8))
    cls = rng.standard_normal((1, 8))
    x = jnp.asarray(np.concatenate([cls, patches])[None, None], jnp.float32)
    v = jnp.asarray(rng.standard_normal((1, 1, 7, 8)), jnp.float32)
    found = mixed(Routing(3), x, x, v, jnp.ones((1, 7), bool))
    for patch in range(6):
        seen = [0, *(1 + np.flatnonzero(of == of[patch]))]
        logits = np.asarray(x)[0, 0, seen] @ np.asarray(x)[0, 0, 1 + patch] / np.sqrt(8)
        weights = np.exp(logits - logits.max())
        expected = weights / weights.sum() @ np.asarray(v)[0, 0, seen]
        np.testing.assert_allclose(found[0, 0, 1 + patch], expected, atol=1e-5)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_dropped_places_never_leak_and_gradients_are_finite(name):
    q, k, v = heads(N + 1)
    valid = np.random.default_rng(4).random((2, N + 1)) < 0.4
    valid[:, 0] = True
    valid[0, 1:17] = False  # a whole window
    holes = jnp.asarray(~valid)[:, None, :, None]
    other = [jnp.where(holes, 50 * x[::-1], x) for x in (q, k, v)]
    module = VARIANTS[name](SIZES[name])
    variables = module.init(jax.random.key(0), q, k, v, jnp.asarray(valid), 1)

    def answers(q, k, v):
        y = module.apply(variables, q, k, v, jnp.asarray(valid), 1)
        return jnp.where(holes, 0, y)

    np.testing.assert_allclose(answers(q, k, v), answers(*other), atol=1e-5)
    for gradient in jax.grad(lambda *x: (answers(*x) ** 2).sum(), (0, 1, 2))(q, k, v):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("name", list(VARIANTS))
def test_masked_is_gathered(name):
    """A token's place goes with it."""
    module, variables = model(name)
    masked, out = jax.jit(lambda v, x: module.apply(v, x, keep_ratios=RATIOS))(variables, images())
    assert out.attention == ()
    roomy, _ = jax.jit(
        lambda v, x: module.apply(
            v, x, execution="gathered", capacities=(N, N - 3, N - 5), keep_ratios=RATIOS
        )
    )(variables, images())
    np.testing.assert_allclose(roomy, masked, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    ["linformer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sinkhorn", "routing"))],
)
def test_accelerate_runs_it(name):
    """By its own program alone: another layout would not know the places."""
    module, variables = model(name)
    masked, _ = jax.jit(lambda v, x: module.apply(v, x, keep_ratios=RATIOS))(variables, images())
    # In as many slots as there are tokens. The plan is pinned: nothing has to be timed.
    plan = Plan(3, masked_rows=3, execution="gathered")
    fast = iared2_jax.accelerate(
        module, variables, 3, keep_ratios=RATIOS, plan=plan, cache_dir=None
    )
    np.testing.assert_allclose(fast(images())[0], masked, atol=2e-5)
    ragged = Plan(3, (GroupPlan("padded", 3, ((3 * (N + 1), N + 1),)),) * 3)
    with pytest.raises(UsageError, match="goes by their places"):
        iared2_jax.accelerate(module, variables, 3, keep_ratios=RATIOS, plan=ragged)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_costs_by_hand(name):
    module = create_module("vit_3_blocks", attention=name, attention_size=SIZES[name])
    d, blocks, n, size = module.backbone.embed_dim, module.backbone.depth, N + 1, SIZES[name]
    windows = N // size
    attention = {
        "linformer": 4 * n * size * d,
        "sinkhorn": 4 * n * size * d + 2 * windows * N * d,
        "routing": 2 * n * size * d + 10 * n * windows * d,
    }[name]
    cost = count_flops(module)
    assert cost.full - cost.linear == blocks * attention
    assert cost.linear == count_flops("vit_3_blocks").linear


def test_a_trained_vits_weights_fit(tmp_path, caplog):
    """Sinkhorn and Routing have no parameters; Linformer's projections start anew, and say so."""
    _, variables = iared2_jax.create_model("vit_3_blocks")
    save_weights(variables, tmp_path / "vit.safetensors")
    for name in ("sinkhorn", "linformer"):
        module = create_module("vit_3_blocks", attention=name, attention_size=SIZES[name])
        caplog.clear()
        loaded = iared2_jax.load_weights(module, tmp_path / "vit.safetensors")
        block = loaded["params"]["backbone"]["block_1"]["attn"]
        assert ("start anew" in caplog.text) == (name == "linformer")
        assert ("mix" in block) == (name == "linformer")
        np.testing.assert_array_equal(
            block["qkv"]["kernel"],
            variables["params"]["backbone"]["block_1"]["attn"]["qkv"]["kernel"],
        )


def test_ragged_training_of_an_attention_that_goes_by_places_is_refused():
    config = default_config()
    config.model.name, config.model.attention = "vit_3_blocks", "linformer"
    config.reduction.train_execution = "ragged"
    with pytest.raises(UsageError, match=r"train_execution='ragged' needs .* dense attention"):
        build_phases(config, build_module(config))


def test_a_file_says_which_attention_it_has(tmp_path):
    options = {"name": "vit_3_blocks", "attention": "linformer", "attention_size": 8}
    module, variables = iared2_jax.create_model(**options)
    save_weights(variables, tmp_path / "own.safetensors", {"create_model": options})
    loaded, same = iared2_jax.load_model(tmp_path / "own.safetensors")
    assert loaded == module
    for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_of_another_attention_are_refused(tmp_path):
    """Sinkhorn and Routing have no parameters: only the file can say what it was trained with."""
    options = {"name": "vit_3_blocks", "attention": "sinkhorn", "attention_size": 16}
    _, variables = iared2_jax.create_model(**options)
    save_weights(variables, tmp_path / "own.safetensors", {"create_model": options})
    for other in ({}, {"attention": "sinkhorn", "attention_size": 8}):
        with pytest.raises(UsageError, match=r"was trained with attention=.*sinkhorn"):
            iared2_jax.load_weights(
                create_module("vit_3_blocks", **other), tmp_path / "own.safetensors"
            )
    with pytest.raises(UsageError, match=r"was trained with attention=.*sinkhorn"):
        iared2_jax.load_model(tmp_path / "own.safetensors", attention="dense")


def test_relaxed_masks_need_dense_attention():
    module, variables = model("routing")
    with pytest.raises(ValueError, match='need attention="dense"'):
        module.apply(variables, images(), lambda *_: jnp.ones((3, N)), method="relaxed")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "linfomer"}, "linformer"),
        ({"attention": "linformer", "attention_size": 0}, "at least 1"),
        ({"attention": "sinkhorn", "attention_size": 48}, "use one of 2, 4, 8, 16, 32, 64"),
        ({"attention": "routing"}, "attention_size=49 does not divide the 64 patches"),
        ({"attention_size": 7}, 'goes with an attention but "dense"'),
    ],
)
def test_bad_options_are_refused_in_words(options, words):
    with pytest.raises(UsageError, match=words):
        create_module("vit_3_blocks", **options)


def test_what_asks_for_attention_weights_is_refused():
    module, variables = model("linformer")
    with pytest.raises(ValueError, match="has none"):
        module.apply(variables, images(), keep_ratios=(1.0, 0.5, 0.5), selector="attention")
    with pytest.raises(ValueError, match="has none"):
        module.apply(variables, images(), keep_ratios=RATIOS, selector="evit")
    with pytest.raises(UsageError, match="attention"):
        iared2_jax.explain(module, variables, images(), method="raw_attention")
    with pytest.raises(UsageError, match="cannot be chosen"):
        create_module("cait_xxs24", attention="linformer")
