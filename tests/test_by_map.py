"""Selection by a map from outside, made on the spot or carried behind the image's colours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iared2_jax.attribution.methods import attribute
from iared2_jax.evaluation.map_sources import map_sources
from iared2_jax.evaluation.perturbation import REPLACEMENTS, replacement_for
from iared2_jax.fast_inference.accelerate import accelerate
from iared2_jax.fast_inference.plan import GroupPlan, Plan
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.selectors import ByMap

RATIOS = (0.5, 0.4, 0.25)


@functools.cache
def model():
    module = create_module("vit_3_blocks", groups=3)
    return module, init_variables(module, 1)


IMAGES = np.random.default_rng(0).standard_normal((3, 64, 64, 3)).astype(np.float32)


def red(images):
    return images[..., 0]


def red_on_the_host(images):
    assert isinstance(images, np.ndarray)
    return images[..., 0].astype(np.float64)


def per_patch(maps):
    return maps.reshape(3, 8, 8, 8, 8).mean(axis=(2, 4)).reshape(3, 64)


@pytest.mark.parametrize("selector", [ByMap(red), ByMap(red_on_the_host, on_host=True)])
def test_the_patches_with_the_highest_means_stay(selector):
    module, variables = model()
    run = jax.jit(lambda v, x: module.apply(v, x, keep_ratios=RATIOS, selector=selector))
    _, out = run(variables, IMAGES)
    means = per_patch(IMAGES[..., 0])
    np.testing.assert_allclose(out.scores[0], means, atol=1e-6)
    for keep, count in zip(out.keep, (32, 26, 16), strict=True):
        best = np.argsort(-means, axis=1)[:, :count]
        assert (np.sort(np.nonzero(np.asarray(keep))[1].reshape(3, -1)) == np.sort(best)).all()


def test_maps_that_do_not_fit_are_named():
    module, variables = model()

    def ask(maps, **options):
        selector = ByMap(maps, **options)
        return module.apply(variables, jnp.asarray(IMAGES), keep_ratios=RATIOS, selector=selector)

    with pytest.raises(ValueError, match=r"must be \[3, 64, 64\], got \[3, 32, 64\]"):
        ask(lambda images: images[:, ::2, :, 0])
    with pytest.raises(Exception, match=r"must be \[3, 64, 64\], got \[3\]"):
        jax.block_until_ready(ask(lambda images: images.mean(axis=(1, 2, 3)), on_host=True))
    clips = create_module("timesformer_micro")
    with pytest.raises(ValueError, match="the model takes clips"):
        clips.check_budget((0.5, 0.5, 0.5), ByMap(red))


# -- A map that comes with the image.


@functools.cache
def model_with_maps():
    return create_module("vit_3_blocks", groups=3, map_channel=True)


MAPS = np.random.default_rng(1).random((3, 64, 64), np.float32)
WITH_MAPS = np.concatenate([IMAGES, MAPS[..., None]], axis=-1)


def test_only_selectors_see_the_map():
    module, variables = model()
    seeing = model_with_maps()
    assert seeing.input_spec.shape == (64, 64, 4)
    plain = module.apply(variables, IMAGES, execution="dense")[0]
    assert (seeing.apply(variables, WITH_MAPS, execution="dense")[0] == plain).all()
    with pytest.raises(ValueError, match=r"\[B, 64, 64, 4\], a map behind the colours, got"):
        seeing.apply(variables, IMAGES, execution="dense")


def test_pixels_are_normalised_and_maps_lie_between_0_and_1():
    spec = model_with_maps().input_spec
    pixels = np.random.default_rng(2).integers(256, size=(2, *spec.shape), dtype=np.uint8)
    found = np.asarray(spec.normalize(pixels))
    np.testing.assert_allclose(found[..., 3], pixels[..., 3] / 255, atol=1e-6)
    expected = model()[0].input_spec.normalize(pixels[..., :3])
    np.testing.assert_array_equal(found[..., :3], expected)


def test_memorability_keeps_what_its_map_says_in_every_execution():
    module, variables = model_with_maps(), model()[1]
    options = {"keep_ratios": RATIOS, "selector": "memorability"}
    masked, out = module.apply(variables, WITH_MAPS, execution="masked", **options)
    np.testing.assert_allclose(out.scores[0], per_patch(MAPS), atol=1e-6)
    gathered, _ = module.apply(
        variables, WITH_MAPS, execution="gathered", capacities=(32, 26, 16), **options
    )
    np.testing.assert_allclose(gathered, masked, atol=1e-5)
    same, _ = model()[0].apply(
        variables, IMAGES, keep_ratios=RATIOS, selector=ByMap(lambda images: jnp.asarray(MAPS))
    )
    np.testing.assert_allclose(masked, same, atol=1e-5)
    lengths = [1 + count for count in (32, 26, 16)]
    plan = Plan(3, tuple(GroupPlan("padded", 3, ((3 * k, k),)) for k in lengths))
    fast = accelerate(module, variables, batch_size=3, plan=plan, cache_dir=None, **options)
    np.testing.assert_allclose(fast(WITH_MAPS)[0], masked, atol=1e-5)


def test_a_model_without_maps_has_no_memorability():
    module, variables = model()
    with pytest.raises(ValueError, match=r"set config.data.maps, or create_model\(.., map_channel"):
        module.apply(variables, IMAGES, keep_ratios=RATIOS, selector="memorability")
    with pytest.raises(ValueError, match="maps go with images, but the model takes clips"):
        create_module("timesformer_micro", map_channel=True)


def test_maps_that_come_with_the_images_are_one_of_all_maps():
    module, variables = model_with_maps(), model()[1]
    assert "memorability" in map_sources(module)
    assert "memorability" not in map_sources(model()[0])
    np.testing.assert_array_equal(attribute("memorability", module, variables, WITH_MAPS), MAPS)


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_what_stands_for_pixels_that_are_gone_has_a_map_too(kind):
    spec = model_with_maps().input_spec
    assert replacement_for(jnp.asarray(WITH_MAPS), spec, kind).shape == WITH_MAPS.shape
