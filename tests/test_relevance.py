"""Relevance propagation: the rules by hand, and what no layer may add or lose."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.tree_util import tree_map_with_path

from iared2_jax.attribution import relevance as rules
from iared2_jax.attribution.relevance import RULE_SETS, RULES, propagate_relevance
from iared2_jax.attribution.targets import class_logit
from iared2_jax.errors import UsageError
from iared2_jax.models import taps
from iared2_jax.models.attention import Similarity, WeightedSum
from iared2_jax.models.backbones.cait import CaiT, ClassBlock, HeadMix
from iared2_jax.models.backbones.vit import ViT
from iared2_jax.models.input_spec import clips, images
from iared2_jax.models.layers import Add, Gelu, Scale, TokenDense
from iared2_jax.token_reduction.create import init_variables
from iared2_jax.token_reduction.model import IARed2

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def assert_close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)


# -- The rules, by hand.

share_out = jax.jit(rules.share_out, static_argnums=0)


def by_rule(layer, rule_set, *arrays):
    """The relevance of each operand: arrays are the relevance of the output, and the operands."""
    return jax.jit(RULES[layer], static_argnums=0)(rule_set, *arrays)


def test_relevance_is_shared_by_what_each_input_contributed():
    """y = (1 * 1 + 2 * 3, 1 * -1 + 2 * 1) = (7, 1): of 14 and 2, each contribution is worth 2."""
    x, kernel = jnp.array([1.0, 2.0]), jnp.array([[1.0, -1.0], [3.0, 1.0]])
    (shares,) = share_out(lambda x: x @ kernel, jnp.array([14.0, 2.0]), x)
    assert_close(shares, [2 * 1 + 2 * -1, 2 * 6 + 2 * 2])
    of_x, of_kernel = share_out(jnp.matmul, jnp.array([14.0, 2.0]), x, kernel)
    assert_close(of_x, shares)
    assert_close(of_kernel, 2 * x[:, None] * kernel)


def test_what_is_zero_gets_none_and_gives_none():
    (shares,) = share_out(lambda x: x, jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, -1e-12, 4.0]))
    assert_close(shares[0], 0)
    assert_close(shares[2], 3)
    assert np.isfinite(shares).all()
    assert 0 <= shares[1] < 0.01 * 2  # moved away from 0, on its own side


def test_a_linear_layer_gives_to_what_speaks_for_its_output():
    """x = (1, -2, 1), W = (1, -1, -3): x+ W+ = 1 and x- W- = 2 speak for it, 1 * -3 does not."""
    x, kernel = jnp.array([[[1.0, -2.0, 1.0]]]), jnp.array([[1.0], [-1.0], [-3.0]])
    relevance = jnp.array([[[6.0]]])
    for layer in (TokenDense, nn.Dense):
        shares, of_kernel = by_rule(layer, "conserving", relevance, x, kernel)
        assert_close(shares, [[[2, 4, 0]]])  # a third, two thirds
        shares, _ = by_rule(layer, "plain", relevance, x, kernel)
        assert_close(shares, [[[6, 6, 0]]])  # each sign by itself: what came in, twice
        assert_close(of_kernel, jnp.zeros_like(kernel))


def test_mixing_heads_shares_in_proportion_whatever_the_sign():
    """z_g = sum_h maps_h W_hg; head h has maps_h W_hg / z_g of what came to g. Nothing is lost."""
    rng = np.random.default_rng(0)
    maps, relevance = rng.uniform(0.5, 2, size=(2, 2, 3, 4, 4)).astype(np.float32)
    kernel = rng.uniform(0.1, 1, size=(3, 3)).astype(np.float32)
    for sign in (1, -1):  # of logits that are all negative, too
        parts = sign * maps[:, :, None] * kernel[None, :, :, None, None]  # [s, h, g, q, k]
        expected = (parts / parts.sum(axis=1, keepdims=True) * relevance[:, None]).sum(axis=2)
        for rule_set in RULE_SETS:
            found, of_kernel = by_rule(HeadMix, rule_set, relevance, sign * maps, kernel)
            assert_close(found, expected, atol=1e-4)
            assert_close(found.sum(axis=1), relevance.sum(axis=1), atol=1e-4)
            assert_close(of_kernel, jnp.zeros_like(kernel))


def test_where_branches_meet_their_sums_are_kept():
    """x = (3, 1), y = (-1, 1): in proportion (3, .5) and (-1, .5), 3.5 and -.5 in all."""
    x, y = jnp.array([[3.0, 1.0]]), jnp.array([[-1.0, 1.0]])
    relevance = jnp.array([[2.0, 1.0]])
    one, other = by_rule(Add, "plain", relevance, x, y)
    assert_close(one, [[3, 0.5]])
    assert_close(other, [[-1, 0.5]])
    # Each branch has as much of the 3 in all as its size says: 3.5 and .5 of 4.
    one, other = by_rule(Add, "conserving", relevance, x, y)
    assert_close(one, one / one.sum() * 3 * 3.5 / 4)
    assert_close(one[0, 0] / one[0, 1], 6)
    assert_close([one.sum(), other.sum()], [3 * 3.5 / 4, 3 * 0.5 / 4])
    assert_close(other[0, 0] / other[0, 1], -2)


def test_where_branches_meet_every_image_is_rescaled_by_itself():
    rng = np.random.default_rng(0)
    relevance, x, y = rng.normal(size=(3, 2, 4, 5)).astype(np.float32)
    together = by_rule(Add, "conserving", relevance, x, y)
    for i in range(2):
        alone = by_rule(Add, "conserving", *(array[i : i + 1] for array in (relevance, x, y)))
        for part, of_all in zip(alone, together, strict=True):
            assert_close(part[0], of_all[i], atol=1e-4)
    assert_close(sum(together).sum(axis=(1, 2)), relevance.sum(axis=(1, 2)), atol=1e-3)


def test_products_give_half_to_each_operand():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 2, 4, 3)).astype(np.float32)
    weights = rng.random((1, 2, 4, 4)).astype(np.float32)
    operands = {Similarity: (q, k), WeightedSum: (weights, v)}
    for layer, (x, y) in operands.items():
        z = layer().apply({}, x, y)
        relevance = z * rng.random(z.shape).astype(np.float32)
        of_x, of_y = by_rule(layer, "conserving", relevance, x, y)
        assert (of_x.shape, of_y.shape) == (x.shape, y.shape)
        assert_close([of_x.sum(), of_y.sum()], [relevance.sum() / 2] * 2, atol=1e-4)
    # Of weights: a_ij * sum over e of v_je R_ie / z_ie, and half of it.
    ratio = relevance / z
    assert_close(of_x, weights * np.einsum("shje,shie->shij", v, ratio) / 2, atol=1e-4)


def test_elementwise_layers_pass_everything_on():
    relevance = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    for layer in (Gelu, Scale, nn.LayerNorm):
        for rule_set in RULE_SETS:
            (passed,) = by_rule(layer, rule_set, relevance, np.ones((2, 3), np.float32))
            np.testing.assert_array_equal(passed, relevance)


# -- Whole models.

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "num_classes": 5}
BACKBONES = {
    "vit": ViT(images(16, 8), **SMALL),
    "distilled, of clips": ViT(clips((8, 16), frames=2, patch=8), **SMALL, distilled=True),
    "cait": CaiT(images(16, 8), **SMALL, class_depth=2),
    "registers, mean of patches": ViT(
        images(16, 8), **SMALL, registers=2, layer_scale=1e-5, pool="cls_mean"
    ),
}


def module_of(backbone):
    policy = "cls" if backbone.num_prefix else "learned"
    return IARed2(backbone, (1, 1), policy, interpreter_heads=3)


def random_variables(module):
    """Weights that do something: all of them drawn, biases, too; layer scales are about 0.6."""

    def enlarged(path, x):
        name = path[-1].key
        rng = np.random.default_rng(list(str(path).encode()))
        noise = rng.standard_normal(x.shape, np.float32)
        if "gamma" in name or name == "scale":
            return 0.6 + 0.1 * noise
        return x + 0.2 * noise

    return tree_map_with_path(enlarged, init_variables(module))


def show_more(function, args, kwargs, context):
    """Two more taps: tokens before positions are added, and what CaiT's class blocks get as CLS."""
    module, (value, *others) = context.module, args or (None,)
    adds_positions = type(module) is Add and module.name == "add" and value.ndim == 3
    if context.method_name == "__call__" and (adds_positions or type(module) is ClassBlock):
        value = taps.tap(module, f"{taps.BLOCK_INPUT}_0", value)
    return function(value, *others, **kwargs) if args else function(**kwargs)


class Shares(NamedTuple):
    """Relevance [B, ..]: of tokens without positions, of CLS where it is apart, of block inputs."""

    tokens: np.ndarray
    cls: tuple[np.ndarray, ...]
    blocks: tuple[np.ndarray, ...]
    pixels: np.ndarray


@pytest.fixture(scope="module", params=BACKBONES)
def model(request):
    """A module, and its relevance for variables and inputs, each image's own class."""
    module = module_of(BACKBONES[request.param])

    def relevance(variables, inputs, target):
        with nn.intercept_methods(show_more):
            found = propagate_relevance(module, variables, inputs, class_logit(target))
        tokens, *cls, first, second = found.block_inputs  # in the order of their modules' names
        return Shares(tokens, tuple(cls), (first, second), found.inputs)

    return module, jax.jit(relevance), request.param


@pytest.fixture(scope="module")
def inputs(model):
    module, *_ = model
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, *module.input_spec.shape), np.float32), np.array([1, 4, 0])


def total(relevance):
    return np.asarray(relevance.sum(axis=tuple(range(1, relevance.ndim))))


def test_every_block_hands_on_all_relevance(model, inputs):
    """1 in all among the tokens that enter each block; of CaiT, CLS is apart and has the rest."""
    module, relevance, name = model
    found = relevance(random_variables(module), *inputs)
    first, second = map(total, found.blocks)
    if name != "cait":
        assert not found.cls
        assert_close([first, second], np.ones((2, 3)), atol=1e-5)
        return
    cls, later = map(total, found.cls)
    assert_close(cls + second, np.ones(3), atol=1e-5)
    assert_close(first, second, atol=1e-5)
    for share in (cls, second):
        assert ((share > 0.05) & (share < 0.95)).all()  # by this layer scale both have a part
    assert (later > cls).all()  # not yet handed to the patches


def test_pixels_have_what_positions_and_prefix_tokens_left(model, inputs):
    module, relevance, name = model
    found = relevance(random_variables(module), *inputs)
    positioned = getattr(module.backbone, "num_prefix_positions", module.num_prefix)
    assert_close(total(found.pixels), total(found.tokens[:, positioned:]), atol=1e-4)
    registers = found.blocks[0][:, positioned : module.num_prefix]  # these come later
    entered, tokens = total(found.blocks[0]) - total(registers), total(found.tokens)
    if name != "registers, mean of patches":  # there shares have either sign
        assert ((tokens > 0) & (tokens < entered)).all()  # positions took one of the same sign

    def without_positions(path, x):
        return 0 * x if path[-1].key in ("pos_embed", "time_embed") else x

    found = relevance(tree_map_with_path(without_positions, random_variables(module)), *inputs)
    registers = found.blocks[0][:, positioned : module.num_prefix]
    assert_close(total(found.tokens), total(found.blocks[0]) - total(registers))
    if name == "cait":
        assert_close(total(found.pixels), total(found.blocks[0]))  # there is no prefix


def test_an_images_relevance_is_its_own_in_any_batch(model, inputs):
    """The published code normalises over the whole batch, and so explains one image at a time."""
    module, relevance, _ = model
    variables, (x, target) = random_variables(module), inputs
    together = relevance(variables, x, target)
    for image in range(3):
        alone = relevance(variables, x[[image] * 3], target[[image] * 3])
        for of_all, of_one in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            largest = np.abs(of_all[image]).max()
            assert_close(of_one[0] / largest, of_all[image] / largest, atol=1e-4)
    other = relevance(variables, x, (target + 1) % 5)
    largest = np.abs(together.pixels).max()
    assert np.abs(other.pixels - together.pixels).max() > 0.01 * largest


@pytest.mark.parametrize("model", ["cait"], indirect=True)
def test_by_caits_own_layer_scale_nearly_all_relevance_stays_with_cls(model, inputs):
    module, relevance, _ = model

    def as_published(path, x):
        return 1e-5 * jnp.ones_like(x) if "gamma" in path[-1].key else x

    variables = tree_map_with_path(as_published, random_variables(module))
    found = relevance(variables, *inputs)
    assert_close(total(found.cls[0]), np.ones(3), atol=1e-3)
    assert (np.abs(total(found.blocks[0])) < 1e-3).all()


# -- What it needs of a model.

IMAGE = np.zeros((1, 16, 16, 3), np.float32)


def test_relevance_is_in_float32_whatever_the_models_dtype():
    """And of models with gradient checkpointing."""
    module = module_of(BACKBONES["vit"].clone(dtype=jnp.bfloat16)).clone(remat=True)
    variables = jax.eval_shape(lambda: init_variables(module))
    found = jax.eval_shape(
        lambda v: propagate_relevance(module, v, IMAGE, class_logit(None)), variables
    )
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert [len(part) for part in found[:3]] == [2, 2, 2]


class Unruly(ViT):
    """A backbone that does not say that its layers have rules."""

    propagates_relevance = False


@pytest.mark.parametrize(
    ("backbone", "rule_set", "sentence"),
    [
        (Unruly(images(16, 8), **SMALL), "plain", "relevance cannot be propagated through Unruly"),
        (BACKBONES["vit"], "plane", r"there are no rules 'plane' \(did you mean 'plain'\?\)"),
        (BACKBONES["vit"], "z", "there are no rules 'z'; there is conserving, plain"),
    ],
)
def test_relevance_is_refused_in_words(backbone, rule_set, sentence):
    with pytest.raises(UsageError, match=sentence):
        propagate_relevance(module_of(backbone), {}, IMAGE, class_logit(None), rule_set)
