"""Selection by a map from outside: each patch's mean, in every execution, on the host or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
