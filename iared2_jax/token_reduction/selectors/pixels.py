"""What the pixels of a patch add to its token: the part that says something of the input."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from iared2_jax.typing import Array


def of_pixels(
    inputs: Float[Array, "b ..."], tokens: Float[Array, "b t d"], model: Any
) -> Float[Array, "b n d"]:
    """What the pixels add to the patch tokens, in float32: without bias, position and time.

    For a linear patch embedding, which all backbones here have, W x.

    Args:
      inputs: normalised. tokens: what the model embeds them as, prefix first.
    """
    constant = model.embed(jnp.zeros_like(inputs[:1])).astype(jnp.float32)
    return (tokens.astype(jnp.float32) - constant)[:, model.num_prefix :]
