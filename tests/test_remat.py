"""Gradient checkpointing changes memory, not numbers."""

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
def test_the_gradient_recomputes_every_block_and_is_the_same(name):
    plain, variables = iared2_jax.create_model(name, groups=2, **MODELS[name])
    remat = create_module(name, groups=2, remat=True, **MODELS[name])
    x = jax.random.normal(jax.random.key(0), (1, *plain.input_spec.shape))

    def loss(module, params):
        return jnp.square(module.apply({"params": params}, x)[0]).sum()

    programs = [
        jax.make_jaxpr(jax.grad(loss, argnums=1), static_argnums=0)(module, variables["params"])
        for module in (plain, remat)
    ]
    checkpointed = [str(program).count("checkpoint") for program in programs]
    assert checkpointed[0] == 0 < plain.backbone.depth <= checkpointed[1]
    if name == "timesformer_micro":  # the numbers once, for what compiles quickest
        values = [
            jax.jit(jax.value_and_grad(lambda p, m=module: loss(m, p)))(variables["params"])
            for module in (plain, remat)
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *values)
