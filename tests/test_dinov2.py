"""DINOv2 and DeiT-III: layer scale, registers, positions of patches alone, the mean of patches."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

from iared2_jax import create_model, load_weights, save_weights
from iared2_jax.errors import UsageError
from iared2_jax.models.backbones.vit import ViT
from iared2_jax.models.input_spec import images
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.weights.load import load_model
from iared2_jax.weights.positions import resize_positions
from iared2_jax.weights.save import timm_tensors
from tests import oracles
from tests.test_weights import answers, assert_close

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SIZES = dict(embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, num_classes=5)
SPEC = images(16, 4)  # 16 patches


def module_of(**options):
    return IARed2(ViT(SPEC, **SIZES, **options), (1, 1), interpreter_heads=3)


def drawn(module, seed=0):
    """Variables that are all random: zeros and small layer scales would hide mistakes."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_variables(module))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)


def some_images(count=3):
    return np.random.default_rng(1).standard_normal((count, 16, 16, 3), np.float32)


# -- The published model.


@pytest.mark.skipif(not oracles.PUBLISHED.is_file(), reason="the published weights are not here")
@pytest.mark.parametrize("size", oracles.PUBLISHED_SIZES[1:])  # `make parity` has its own
def test_the_published_model_answers_as_transformers_did(size, caplog):
    module = create_module("dinov2_s14", num_classes=10, image_size=size)
    variables = load_weights(module, oracles.PUBLISHED)
    assert "has no head" in caplog.text
    inputs = oracles.images_for(size)[:1]
    cls, blocks = answers(module, variables, inputs, headless=True)
    features = jax.jit(lambda v, x: module.apply(v, x, execution="dense")[1].features)
    with np.load(oracles.PUBLISHED_FIXTURES) as stored:
        assert_close(cls, stored[f"{size}: cls"])
        assert len(blocks) == 12
        for block, expected in zip(blocks, stored[f"{size}: blocks"], strict=True):
            assert_close(oracles.probe(block), expected)
        if size == 112:
            expected = [stored["112: cls"], stored["112: mean"]]
            assert_close(features(variables, inputs), np.concatenate(expected, axis=1))


# -- What the options mean.


def test_registers_follow_cls_and_have_no_positions():
    """[cls + position 0, registers, patches + their positions]."""
    module = module_of(registers=2)
    variables = drawn(module)
    params = variables["params"]["backbone"]
    assert params["pos_embed"].shape == (1, 17, 24)
    tokens = module.apply(variables, some_images(), method="embed")
    assert tokens.shape == (3, 3 + 16, 24)
    positions = np.asarray(params["pos_embed"])
    first = params["cls_token"] + positions[:, :1]
    np.testing.assert_array_equal(tokens[:, :1], np.broadcast_to(first, (3, 1, 24)))
    registers = np.broadcast_to(params["reg_token"], (3, 2, 24))
    np.testing.assert_array_equal(tokens[:, 1:3], registers)
    without = {
        "params": {**variables["params"], "backbone": {**params, "pos_embed": 0 * positions}}
    }
    bare = module.apply(without, some_images(), method="embed")
    np.testing.assert_allclose(
        tokens[:, 3:] - bare[:, 3:], np.broadcast_to(positions[:, 1:], (3, 16, 24)), atol=1e-6
    )


@pytest.mark.parametrize("registers", [0, 2])
def test_positions_of_patches_alone_are_those_with_zeros_for_cls(registers):
    short, full = (
        module_of(registers=registers, prefix_positions=there) for there in (False, True)
    )
    variables = drawn(short)
    backbone = dict(variables["params"]["backbone"])
    positions = backbone["pos_embed"]
    assert positions.shape == (1, 16, 24)
    backbone["pos_embed"] = jnp.concatenate([jnp.zeros((1, 1, 24)), positions], axis=1)
    filled = {"params": {**variables["params"], "backbone": backbone}}
    np.testing.assert_array_equal(
        short.apply(variables, some_images(), method="embed"),
        full.apply(filled, some_images(), method="embed"),
    )


def test_layer_scale_multiplies_what_each_half_adds():
    """By 0 a block adds nothing; by 1 it is the block without."""
    scaled, plain = module_of(layer_scale=0.5), module_of()
    variables = drawn(scaled)

    def with_gamma(value):
        def put(path, x):
            return jnp.full_like(x, value) if path[-1].key == "gamma" else x

        return jax.tree_util.tree_map_with_path(put, variables)

    def without_gamma(tree):
        return {
            key: without_gamma(value) if isinstance(value, dict) else value
            for key, value in tree.items()
            if key not in ("ls1", "ls2")
        }

    def block(module, variables):
        x = jnp.asarray(some_images().reshape(3, 32, 24))
        backbone = {"params": variables["params"]["backbone"]}
        return x, module.backbone.apply(backbone, 0, x, method="run_block")[0]

    x, nothing_added = block(scaled, with_gamma(0.0))
    np.testing.assert_array_equal(nothing_added, x)
    _, as_one = block(scaled, with_gamma(1.0))
    _, expected = block(plain, without_gamma(variables))
    np.testing.assert_allclose(as_one, expected, rtol=1e-5, atol=1e-5)


def test_the_mean_is_of_the_survivors_and_features_start_with_cls():
    module = module_of(registers=2, layer_scale=0.5, pool="cls_mean")
    variables = drawn(module)
    keep = np.random.default_rng(0).random((2, 16)) < 0.5
    keep[1] = False  # of nothing the mean is 0
    logits, out = jax.jit(module.apply)(variables, some_images(2), keep=[jnp.asarray(keep)] * 2)
    assert out.features.shape == (2, 48)

    # By hand: the blocks over the tokens that are left, then LayerNorm.
    params = variables["params"]["backbone"]
    tokens = module.apply(variables, some_images(2), method="embed")
    norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)
    for image in range(2):
        x = tokens[image][None, np.concatenate([[True] * 3, keep[image]])]
        for index in range(2):
            x, _ = module.backbone.apply({"params": params}, index, x, method="run_block")
        x = np.asarray(norm.apply({"params": params["norm"]}, x))[0]
        mean = x[3:].mean(axis=0) if keep[image].any() else np.zeros(24)
        expected = np.concatenate([x[0], mean])
        np.testing.assert_allclose(out.features[image], expected, rtol=1e-4, atol=1e-4)
        head = expected @ params["head"]["kernel"] + params["head"]["bias"]
        np.testing.assert_allclose(logits[image], head, rtol=1e-4, atol=1e-4)


def test_the_head_costs_what_it_reads():
    narrow, wide = module_of(), module_of(pool="cls_mean")
    kept = (16, 16)
    more = count_flops(wide, kept=kept).full - count_flops(narrow, kept=kept).full
    assert more == 24 * 5  # once more embed_dim times the classes


@pytest.mark.parametrize("options", [{"pool": "mean"}, {"pool": "cls_mean", "distilled": True}])
def test_a_pool_that_there_is_not(options):
    with pytest.raises(ValueError, match="pool="):
        init_variables(module_of(**options))


# -- Files.


@pytest.mark.parametrize("name", ["dinov2_s14_reg", "deit3_s16"])
def test_weights_round_trip_and_say_which_model(name, tmp_path):
    options = {"num_classes": 3, "image_size": 56 if name == "dinov2_s14_reg" else 64}
    module, variables = create_model(name, **options, seed=1)
    known = {"create_model": {"name": name, **options}}
    save_weights(variables, tmp_path / "w.safetensors", known)
    again, loaded = load_model(tmp_path / "w.safetensors")
    assert again == module
    for mine, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_another_number_of_registers_is_another_model(tmp_path):
    """Published files in each of three layouts, both ways."""
    plain = create_module("dinov2_s14", num_classes=2)
    registers = create_module("dinov2_s14_reg", num_classes=2)
    stored = oracles.stored()

    def save_without_blocks(family):
        named = stored[family]["shapes"].items()
        shapes = {k: v for k, v in named if not re.search(r"\.(mlp|attn|attention)\.", k)}
        save_file(oracles.weights_for(shapes), tmp_path / "w.safetensors")

    for name in ("dinov2_s14_reg, timm", "dinov2_s14_reg, facebook",
                 "dinov2_s14_reg, dinov2_with_registers"):  # fmt: skip
        save_without_blocks(name)
        with pytest.raises(UsageError, match="has 4 register tokens, this model none: use a "):
            load_weights(plain, tmp_path / "w.safetensors")
    save_without_blocks("dinov2_s14, timm")
    with pytest.raises(UsageError, match="has no register tokens, this model 4: use a variant wit"):
        load_weights(registers, tmp_path / "w.safetensors")


def test_a_head_of_cls_alone_is_another_head(tmp_path):
    """timm's DINOv2 with a classifier reads CLS; ours reads the mean of the patches, too."""
    module, variables = create_model("dinov2_s14", num_classes=2, image_size=28)
    tensors = timm_tensors(variables, interpreters=False)
    tensors["head.weight"] = tensors["head.weight"][:, :384]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"head.weight makes \[384, 2\] .* this model's is \[768"):
        load_weights(module, tmp_path / "w.safetensors")


# What torch.nn.functional.interpolate makes of 0, 1, 4 .. 49 in bicubic mode: to a size of 3,
# by a scale of 3.1 / 8, and to a size of 3 with an antialiasing filter.
SQUARES = {
    "plain": (0.59606, 12.125, 38.8206),
    "offset": (0.5197, 11.45752, 35.16993),
    "antialiased": (1.03579, 12.71856, 37.48528),
}


@pytest.mark.parametrize("interpolation", SQUARES)
def test_positions_are_resized_as_pytorch_does(interpolation):
    """Along each axis: squares down, squares across, and a constant."""
    place = np.arange(8.0) ** 2
    grid = np.stack([*np.meshgrid(place, place, indexing="ij"), np.ones((8, 8))], axis=-1)
    positions = grid.reshape(1, 64, 3).astype(np.float32)
    resized = resize_positions(positions, images(3, 1), 0, interpolation=interpolation)
    down, across, ones = np.moveaxis(resized.reshape(3, 3, 3), -1, 0)
    expected = np.array(SQUARES[interpolation])
    np.testing.assert_allclose(down, np.stack([expected] * 3, axis=1), rtol=1e-5)
    np.testing.assert_allclose(across, np.stack([expected] * 3), rtol=1e-5)
    np.testing.assert_allclose(ones, 1, rtol=1e-5)
