"""Selection by magnitude: how far a patch's embedding is from that of a patch of zeros."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from iared2_jax.token_reduction.selectors.base import Selector
from iared2_jax.token_reduction.selectors.pixels import of_pixels
from iared2_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Magnitude(Selector):
    """||e(n)||, the Euclidean length of what the pixels of patch n add to its token (`of_pixels`).

    Inputs are normalised, so a patch of the dataset's mean colour scores 0.
    """

    def input_scores(
        self, inputs: Float[Array, "b ..."], tokens: Float[Array, "b t d"], model: Any
    ) -> Float[Array, "b n"]:
        """The length of every patch's part."""
        return jnp.linalg.norm(of_pixels(inputs, tokens, model), axis=-1)
