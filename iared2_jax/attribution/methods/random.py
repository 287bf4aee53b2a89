"""A map that knows nothing: a random number per patch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from iared2_jax.token_reduction.model import IARed2
from iared2_jax.token_reduction.selectors.random import fingerprint
from iared2_jax.typing import Array


def random(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    seed: int = 0,
) -> Float[Array, "b n"]:
    """Uniform in [0, 1), drawn from the image itself and the seed: the same in every batch."""
    tokens, key = module.input_spec.num_patches, jax.random.key(seed)

    def draw(image: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, fingerprint(image)), (tokens,))

    return jax.vmap(draw)(jnp.asarray(inputs))
