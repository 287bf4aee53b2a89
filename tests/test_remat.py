"""Gradient checkpointing changes memory, not numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iared2_jax
from iared2_jax.token_reduction.create import create_module

MODELS = {
    "vit_micro": {},
    "timesformer_micro": {"num_frames": 2},
    "cait_xxs24": {"image_size": 32, "num_classes": 4},
}


@pytest.mark.parametrize("name", MODELS)
def test_less_is_kept_for_the_same_gradient(name):
    plain, variables = iared2_jax.create_model(name, groups=2, **MODELS[name])
    remat = create_module(name, groups=2, remat=True, **MODELS[name])
    x = jax.random.normal(jax.random.key(0), (1, *plain.input_spec.shape))

    def loss(module, params):
        return jnp.square(module.apply({"params": params}, x)[0]).sum()

    def kept_for_the_gradient(module):
        """Values: what a derivative keeps are its leaves, the parameters among them."""
        derivative = jax.eval_shape(
            lambda p: jax.vjp(functools.partial(loss, module), p)[1], variables["params"]
        )
        return sum(leaf.size for leaf in jax.tree.leaves(derivative))

    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables))
    before, after = (kept_for_the_gradient(module) - parameters for module in (plain, remat))
    assert after < before / 3
    if name == "timesformer_micro":  # the numbers once, for what compiles quickest
        values = [
            jax.jit(jax.value_and_grad(lambda p, m=module: loss(m, p)))(variables["params"])
            for module in (plain, remat)
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *values)
