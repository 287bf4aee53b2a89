"""The published architectures, at full size, against the real thing (`make parity`)."""

import gc

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers
from iared2_jax import create_model, load_weights, save_weights
from iared2_jax.models import input_spec
from iared2_jax.models.variants import VARIANTS
from iared2_jax.token_reduction.create import create_module
from iared2_jax.token_reduction.model import KEEP_ALL
from iared2_jax.weights.positions import resize_positions
from tests import oracles
from tests.test_weights import answers, assert_close, shortened

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
if peers.missing():
    pytest.skip(peers.missing(), allow_module_level=True)


@pytest.mark.parametrize("family", oracles.FAMILIES, ids=lambda family: family.name)
def test_logits_and_every_block_agree(family, tmp_path):
    if family.by_transformers:
        pytest.importorskip("transformers")
    backbone = VARIANTS[family.variant].backbone
    images = family.inputs
    oracle = oracles.build(family, backbone.depth)
    expected, their_blocks = oracle.run(images)
    module = shortened(family.variant, backbone.depth, size=family.size)
    variables = load_weights(module, oracle.save(tmp_path))
    logits, blocks = answers(module, variables, images, family.headless)
    assert_close(logits, expected)
    assert len(blocks) == len(their_blocks) == backbone.depth
    for block, theirs in zip(blocks, their_blocks, strict=True):
        assert_close(block, theirs)
    half = shortened(family.variant, backbone.depth, jnp.bfloat16, family.size)
    rounded, _ = answers(half, variables, images, family.headless)
    first, second = -np.sort(-expected, axis=-1)[:, :2].T
    clear = first - second > 0.1 * expected.std()
    np.testing.assert_array_equal(np.argmax(rounded, -1)[clear], expected.argmax(-1)[clear])
    gc.collect()  # a 384 px base model is 350 MB, several times


@pytest.mark.skipif(not oracles.PUBLISHED.is_file(), reason="the published weights are not here")
def test_the_published_dinov2_agrees_at_every_block_and_size(tmp_path):
    pytest.importorskip("transformers")
    model = oracles.published_model(tmp_path)
    for size in oracles.PUBLISHED_SIZES:
        images = oracles.images_for(size)
        tokens, expected = oracles.published_answers(model, images)
        module = create_module("dinov2_s14", num_classes=10, image_size=size)
        variables = load_weights(module, oracles.PUBLISHED)
        _, blocks = answers(module, variables, images)
        assert len(blocks) == len(expected) == 12
        for block, theirs in zip(blocks, expected, strict=True):
            assert_close(block, theirs)
        _, out = module.apply(variables, images, execution="dense")
        assert_close(out.features[:, :384], tokens[:, 0])
        assert_close(out.features[:, 384:], tokens[:, 1:].mean(axis=1))


def test_stored_answers_are_what_they_answer_now():
    """The fixtures are not older than the oracles."""
    for family in oracles.FAMILIES:
        if family.variant not in ("deit_ti", "deit_ti_distilled"):
            continue
        depth = family.stored_depth or VARIANTS[family.variant].backbone.depth
        kept = oracles.stored()[family.name]
        oracle = oracles.build(family, depth)
        assert oracle.shapes == kept["shapes"]
        assert_close(oracle.run(oracles.images_for(224))[0], kept["logits"], 1e-5)


@pytest.mark.parametrize(
    "name", ["deit_ti", "deit_ti_distilled", "cait_xxs24", "vit_s16", "deit3_s16"]
)
def test_timm_loads_what_we_save(name, tmp_path):
    """Strictly without the interpreters; with them, they are all that it does not know."""
    from safetensors.torch import load_file

    module, variables = create_model(name, seed=3)
    images = oracles.images_for(224)
    model = peers.timm().create_model(VARIANTS[name].timm, pretrained=False).eval()
    save_weights(variables, tmp_path / "backbone.safetensors", interpreters=False)
    model.load_state_dict(load_file(tmp_path / "backbone.safetensors"), strict=True)
    with torch.inference_mode():
        theirs = model(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    ours, _ = module.apply(variables, images, KEEP_ALL)
    assert_close(ours, theirs)

    save_weights(variables, tmp_path / "all.safetensors")
    report = model.load_state_dict(load_file(tmp_path / "all.safetensors"), strict=False)
    assert not report.missing_keys
    assert all(key.startswith("interpreters.") for key in report.unexpected_keys)


@pytest.mark.parametrize(("have", "want"), [(37, 16), (37, 8), (16, 24)])
def test_positions_are_resized_as_dinov2s_authors_and_transformers_do(have, want):
    """Of the authors' code: interpolate by a scale, not to a size, the grid taken 0.1 larger."""
    positions = np.random.default_rng(0).standard_normal((1, 1 + have**2, 5), np.float32)
    grid = torch.tensor(positions[:, 1:]).reshape(1, have, have, 5).permute(0, 3, 1, 2)
    scale = (want + 0.1) / have
    for interpolation, how in (
        ("plain", {"size": (want, want)}),
        ("offset", {"scale_factor": (scale, scale)}),
    ):
        theirs = torch.nn.functional.interpolate(grid, mode="bicubic", **how)
        theirs = theirs.permute(0, 2, 3, 1).reshape(1, -1, 5).numpy()
        spec = input_spec.images(want, 1)
        ours = resize_positions(positions, spec, 1, interpolation=interpolation)
        np.testing.assert_allclose(ours[:, 1:], theirs, atol=2e-5)
        np.testing.assert_array_equal(ours[:, :1], positions[:, :1])


def test_positions_are_resized_as_timm_does():
    with peers._torchvision():
        from timm.layers import resample_abs_pos_embed
    rng = np.random.default_rng(0)
    for have, want, prefix in ((14, 24, 1), (24, 14, 2), (14, 7, 0)):
        positions = rng.standard_normal((1, prefix + have**2, 5), np.float32)
        theirs = resample_abs_pos_embed(
            torch.tensor(positions), [want, want], num_prefix_tokens=prefix
        )
        ours = resize_positions(positions, input_spec.images(want, 1), prefix)
        np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)
