"""The photographer's prior: what matters is in the middle."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array


def center(
    module: IARed2, variables: Mapping[str, Any], inputs: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """1 in the middle of every picture, falling to 0 at its corners with the distance."""
    height, width = module.input_spec.size
    y, x = ((jnp.arange(side) + 0.5) / side - 0.5 for side in (height, width))
    distance = jnp.hypot(y[:, None] * height, x[None, :] * width)
    return jnp.broadcast_to(1 - distance / distance.max(), inputs.shape[:-1])
