"""The models: exact sizes, and the invariant that every execution gives the same logits."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iared2_jax import create_model
from iared2_jax.errors import UsageError
from iared2_jax.models import attention
from iared2_jax.models.backbones.cait import CaiT
from iared2_jax.models.backbones.vit import ViT
from iared2_jax.models.input_spec import images
from iared2_jax.models.layers import gelu
from iared2_jax.models.variants import VARIANTS
from iared2_jax.token_reduction.create import create_module, init_variables, split_into_groups
from iared2_jax.token_reduction.interpreter import Interpreter
from iared2_jax.token_reduction.model import KEEP_ALL, IARed2
from iared2_jax.token_reduction.policy import informative_scores


@functools.cache
def tiny_module(groups=(1, 1, 2), policy_token="cls", distilled=False, cait=False, dino=False):
    sizes = dict(input_spec=images(16, 4), embed_dim=24, depth=4, num_heads=3, num_classes=5)
    backbone = CaiT(**sizes) if cait else ViT(**sizes, distilled=distilled)
    if dino:
        options = dict(registers=2, prefix_positions=False, layer_scale=1e-5, pool="cls_mean")
        backbone = ViT(**sizes, **options)
    return IARed2(backbone, groups, policy_token, interpreter_heads=3)


@functools.cache
def _compiled(module, execution, capacities):
    apply = functools.partial(module.apply, execution=execution, capacities=capacities)
    return jax.jit(lambda v, images, thresholds, keep: apply(v, images, thresholds, keep=keep))


def run(module, variables, images, thresholds=0.5, execution="masked", capacities=None, keep=None):
    """module.apply, compiled once per module, execution and capacities."""
    thresholds = jnp.broadcast_to(jnp.asarray(thresholds, jnp.float32), (3,))
    return _compiled(module, execution, capacities)(variables, images, thresholds, keep)


@functools.cache
def shapes_of(module):
    return jax.eval_shape(lambda: init_variables(module))


def random_variables(module, seed):
    """Random parameters, the interpreters' so large that scores fall on both sides of 0.5."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        scale = 0.5 if "interpreter" in str(path[1]) else 0.2
        return jnp.asarray(rng.normal(scale=scale, size=shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(module))


def tiny_model(seed=0, **options):
    module = tiny_module(**options)
    return module, random_variables(module, seed)


def images_for(module, seed, batch=3):
    shape = (batch, *module.input_spec.shape)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_are_exact(name):
    variant = VARIANTS[name]
    module = create_module(name)
    params = jax.eval_shape(lambda: init_variables(module))["params"]

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    assert count(params["backbone"]) == variant.parameters
    width = variant.backbone.embed_dim
    policy = 0 if variant.backbone.num_prefix else width  # CaiT's policy token is learned
    assert count(params["interpreter_1"]) == 2 * (width * width + width) + policy
    assert sorted(params) == ["backbone", "interpreter_1", "interpreter_2", "interpreter_3"]


@hypothesis.given(
    seed=st.integers(0, 10_000),
    thresholds=st.tuples(*[st.floats(0.05, 0.95)] * 3),
    kind=st.sampled_from(
        [
            ((1, 1, 2), "cls", False),
            ((1, 1, 2), "learned", True),
            ((2, 1, 1), "cls", True),
            ((1, 1, 2), "learned", False, True),  # CaiT
            ((1, 1, 2), "cls", False, False, True),  # DINOv2 with registers
        ]
    ),
)
def test_masked_equals_gathered(seed, thresholds, kind):
    module = tiny_module(*kind)
    variables, images = random_variables(module, seed), images_for(module, seed + 1)
    masked, out = run(module, variables, images, thresholds)
    # Capacities that suffice; only two choices, so that few programs are compiled.
    most = [int(keep.sum(1).max()) for keep in out.keep]
    tight = (14, 10, 5)
    fits = all(count <= capacity for count, capacity in zip(most, tight, strict=True))
    capacities = tight if fits else (16, 16, 16)
    gathered, packed = run(module, variables, images, thresholds, "gathered", capacities)
    np.testing.assert_allclose(gathered, masked, rtol=1e-4, atol=1e-5)
    assert all(int(overflow.sum()) == 0 for overflow in packed.overflow)
    for group in range(3):
        np.testing.assert_array_equal(out.keep[group], packed.keep[group])
        # Scores of dropped tokens are 0 in both, the others agree, all on the original grid.
        np.testing.assert_allclose(out.scores[group], packed.scores[group], atol=1e-5)
    for block, packed_block in zip(out.attention, packed.attention, strict=True):
        np.testing.assert_allclose(block, packed_block, atol=1e-5)


def test_dropped_tokens_do_not_leak_through_talking_heads():
    """Their biases would give every dropped key a weight, were it not masked after each mixing."""
    module, variables = tiny_model(policy_token="learned", cait=True)
    images = images_for(module, 1)
    keep = [jnp.asarray(np.random.default_rng(0).random((3, 16)) < 0.5)] * 3
    masked, out = run(module, variables, images, keep=keep)
    gathered, _ = run(module, variables, images, 0.5, "gathered", (16, 16, 16), keep)
    scale = float(jnp.abs(masked).max())
    np.testing.assert_allclose(gathered, masked, rtol=0, atol=1e-5 * scale)
    # What the dropped patches show does not matter, although the biases are large.
    pixels = jnp.repeat(jnp.repeat(keep[0].reshape(3, 4, 4), 4, 1), 4, 2)[..., None]
    other, _ = run(module, variables, jnp.where(pixels, images, 7.0), keep=keep)
    np.testing.assert_allclose(other, masked, rtol=0, atol=1e-5 * scale)
    bias = variables["params"]["backbone"]["block_0"]["attn"]["proj_w"]["bias"]
    assert float(jnp.abs(bias).max()) > 0.1
    # CLS sees the patches in the class-attention blocks alone: two rows, nothing for the dropped.
    assert [row.shape for row in out.attention] == [(3, 3, 16)] * 2
    assert float(jnp.where(keep[0][:, None], 0, out.attention[0]).max()) == 0


@pytest.mark.parametrize("execution", ["masked", "gathered"])
def test_images_that_keep_nothing_run_on_their_prefix_tokens(execution):
    module, variables = tiny_model()
    images = images_for(module, 1)
    none = jnp.zeros((3, 16), bool)
    capacities = (16, 16, 16) if execution == "gathered" else None
    logits, out = run(module, variables, images, 0.5, execution, capacities, keep=[none] * 3)
    assert bool(jnp.isfinite(logits).all())
    assert not any(bool(keep.any()) for keep in out.keep)

    def cls_only(backbone):
        x = backbone.embed(images)[:, :1]
        for index in range(backbone.depth):
            x, _ = backbone.run_block(index, x)
        return backbone.classify(x)[0]

    backbone = {"params": variables["params"]["backbone"]}
    alone = jax.jit(lambda v: module.backbone.apply(v, method=cls_only))(backbone)
    np.testing.assert_allclose(logits, alone, rtol=1e-5, atol=1e-6)


@hypothesis.given(seed=st.integers(0, 10_000), distilled=st.booleans())
def test_keeping_all_is_the_plain_backbone(seed, distilled):
    module = tiny_module(distilled=distilled)
    variables, images = random_variables(module, seed), images_for(module, seed)
    plain = plain_backbone(module)({"params": variables["params"]["backbone"]}, images)
    for execution in ("dense", "masked", "gathered"):
        capacities = (16, 16, 16) if execution == "gathered" else None
        logits, _ = run(module, variables, images, KEEP_ALL, execution, capacities)
        np.testing.assert_allclose(logits, plain, rtol=1e-4, atol=1e-5)


@functools.cache
def plain_backbone(module):
    return jax.jit(module.backbone.apply)


def test_dropped_tokens_cannot_be_seen():
    module, variables = tiny_model()
    images = images_for(module, 2, batch=1)
    keep = np.arange(16)[None] % 2 == 0
    masks = [jnp.asarray(keep)] * 3
    # Other pixels under the dropped patches: nothing may change.
    patch_is_dropped = np.kron(~keep.reshape(4, 4), np.ones((4, 4), bool))[None, :, :, None]
    other = jnp.where(patch_is_dropped, 100.0, images)
    before, _ = run(module, variables, images, keep=masks)
    after, _ = run(module, variables, other, keep=masks)
    np.testing.assert_array_equal(before, after)


def test_too_small_a_capacity_is_seen_and_keeps_the_best():
    module, variables = tiny_model()
    images = images_for(module, 3)
    _, full = run(module, variables, images, KEEP_ALL)
    _, out = run(module, variables, images, KEEP_ALL, "gathered", (10, 10, 4))
    np.testing.assert_array_equal(out.overflow[0], [6, 6, 6])
    np.testing.assert_array_equal(out.overflow[2], [6, 6, 6])
    best = jax.lax.top_k(full.scores[0], 10)[1]
    for row in range(3):
        np.testing.assert_array_equal(
            np.flatnonzero(out.keep[0][row]), np.sort(np.asarray(best[row]))
        )


def test_groups_only_ever_drop():
    module, variables = tiny_model(5)
    _, out = run(module, variables, images_for(module, 5))
    first, second, third = out.keep
    assert not bool((second & ~first).any() | (third & ~second).any())
    # A token that was dropped before scores 0.
    assert bool((jnp.where(first, 0.0, out.scores[1]) == 0).all())
    assert 0 < int(third.sum()) < int(first.sum())


def test_rollouts_from_the_middle_equal_the_whole():
    module, variables = tiny_model(7)
    images = images_for(module, 7)
    logits, out = run(module, variables, images)
    for group in (1, 2, 3):
        up_to = functools.partial(module.apply, method="up_to")
        onward = functools.partial(module.apply, method="onward")
        state = jax.jit(up_to, static_argnums=1)(variables, group, images)
        assert int(state.overflow.sum()) == 0
        if group > 1:
            np.testing.assert_array_equal(state.alive, out.keep[group - 2])
        keep = out.keep[group - 1]
        again = jax.jit(onward, static_argnums=1)(variables, group, state.x, keep)
        np.testing.assert_allclose(again, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy_token", ["cls", "learned"])
def test_interpreter_is_equation_1(policy_token):
    heads, width = 3, 12
    interpreter = Interpreter(heads, policy_token, scale=True, init_bias=0.25)
    prefix = 2 if policy_token == "cls" else 0
    tokens = jax.random.normal(jax.random.key(0), (2, prefix + 5, width))
    cls, patches = tokens[:, 0], tokens[:, prefix:]
    variables = interpreter.init(jax.random.key(2), tokens, prefix)
    params = variables["params"]
    params["k"]["bias"] = jax.random.normal(jax.random.key(3), (width,))
    scores = informative_scores(interpreter.apply(variables, tokens, prefix))

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    policy = params["policy_token"][0] if policy_token == "learned" else cls[0]
    q = norm(np.asarray(policy)) @ params["q"]["kernel"] + params["q"]["bias"]
    k = norm(np.asarray(patches[0])) @ params["k"]["kernel"] + params["k"]["bias"]
    logits = (k.reshape(5, heads, -1) * q.reshape(heads, -1)).sum(-1) / np.sqrt(width / heads)
    expected = (1 / (1 + np.exp(-(logits + 0.25)))).mean(-1)
    np.testing.assert_allclose(scores[0], expected, rtol=1e-4)


def test_host_initialisation_has_the_modules_distributions():
    module = IARed2(ViT(images(32, 4), depth=1, distilled=True), (1,), "learned", 6)
    ours = init_variables(module, seed=1)
    theirs = jax.jit(lambda key: module.init(key, jnp.zeros((1, 32, 32, 3))))(jax.random.key(1))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)

    def compare(path, mine, linens):
        assert (mine.shape, mine.dtype) == (linens.shape, linens.dtype), path
        error = 6 * float(linens.std()) / mine.size**0.5
        assert abs(float(mine.mean() - linens.mean())) <= 2 * error, path
        assert abs(float(mine.std() - linens.std())) <= 2 * error, path
        assert float(jnp.abs(mine).max()) <= 1.3 * float(jnp.abs(linens).max()), path

    jax.tree_util.tree_map_with_path(compare, ours, theirs)
    again, other = init_variables(module, seed=1), init_variables(module, seed=2)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), ours, again)))
    kernel = ours["params"]["interpreter_1"]["k"]["kernel"]
    assert not bool((kernel == other["params"]["interpreter_1"]["k"]["kernel"]).all())


def test_gelu_is_exact():
    x = jnp.linspace(-6, 6, 101)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    assert float(jnp.abs(gelu(x) - jax.nn.gelu(x)).max()) > 1e-4  # not the tanh form


def test_attention_in_tiles_is_the_same(monkeypatch):
    """Few queries at a time, the last tile padded: outputs, CLS row and gradient."""
    rng = np.random.default_rng(0)
    q, k, v = jnp.asarray(rng.standard_normal((3, 2, 3, 23, 8)), jnp.float32)
    valid = jnp.asarray(rng.random((2, 23)) < 0.6).at[:, 0].set(True)

    def answers(tile_bytes, valid):
        def loss(q, k, v):
            y, first = attention.attend(q, k, v, valid)
            return jnp.sin(y).sum() + (first**2).sum(), (y, first)

        monkeypatch.setattr(attention, "TILE_BYTES", tile_bytes)
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    for keys in (None, valid):
        whole, tiled = (answers(size, keys) for size in (1 << 30, 4 * 3 * 23 * 5))
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, tiled, whole)
    assert attention._queries_at_a_time(2, 3, 23, 23) == 8  # of 23: tiles of 8, not 2
    assert attention._queries_at_a_time(64, 1, 1, 23) == 1  # one query is no more than itself


def test_bfloat16_computes_close_to_float32():
    module, variables = tiny_model(1)
    images = images_for(module, 1)
    masks = [jnp.arange(16)[None].repeat(3, 0) < count for count in (12, 8, 4)]
    half = module.clone(backbone=module.backbone.clone(dtype=jnp.bfloat16))
    exact, _ = run(module, variables, images, keep=masks)
    rough, _ = run(half, variables, images, keep=masks)
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.02)
    assert float(jnp.abs(rough - exact).max()) > 0


def test_groups_must_fit_the_depth():
    assert split_into_groups(12, 4) == (3, 3, 3, 3)
    assert split_into_groups(12, [2, 4, 6]) == (2, 4, 6)
    for groups in (5, 0, (4, 4), (6, 6, 0)):
        with pytest.raises(UsageError, match="12"):
            split_into_groups(12, groups)


def test_bad_arguments_are_named():
    with pytest.raises(UsageError, match="deit_s"):
        create_model("deit_small")
    with pytest.raises(UsageError, match="policy_token"):
        create_model("vit_micro", policy_token="mean")
    with pytest.raises(UsageError, match="init_bias"):
        create_model("vit_micro", initbias=1.0)
    module, variables = tiny_model()
    images = images_for(module, 0)
    with pytest.raises(ValueError, match="execution"):
        module.apply(variables, images, execution="sparse")
    with pytest.raises(ValueError, match="capacities"):
        module.apply(variables, images, execution="gathered")
    with pytest.raises(ValueError, match=r"1\.\.16"):
        module.apply(variables, images, execution="gathered", capacities=(17, 4, 4))
    with pytest.raises(ValueError, match="images must be"):
        module.apply(variables, images[:, :8])
