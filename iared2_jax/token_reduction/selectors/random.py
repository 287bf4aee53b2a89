"""Selection at random: the baseline that any other has to beat."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from iared2_jax.token_reduction.selectors.base import Selector
from iared2_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Random(Selector):
    """A random order of the patches, a pure function of the seed and of what the image shows.

    So every execution, batch and device keeps the same tokens of an image. The groups share the
    order: a token that a later group keeps was among the first's.
    """

    seed: int = 0

    def input_scores(
        self, inputs: Float[Array, "b ..."], tokens: Float[Array, "b t d"], model: Any
    ) -> Float[Array, "b n"]:
        """The uniform numbers that order an image's patches."""
        return random_order(jax.random.key(self.seed), inputs, model.input_spec.num_patches)


def random_order(
    key: PRNGKeyArray, inputs: Float[Array, "b ..."], num_patches: int
) -> Float[Array, "b n"]:
    """Uniform numbers for the patches of each image, whichever batch it is in."""

    def of(image: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, fingerprint(image)), (num_patches,))

    return jax.vmap(of)(inputs)


def fingerprint(image: Float[Array, "..."]) -> Array:
    """A number that differs between images: rounded values, each times a number of its own, summed.

    Rounded, because compiled programs differ in the last bit of a normalised pixel. No pixel of
    8 bits lies near a border between two integers, with any of the usual means and deviations.
    """
    levels = jnp.round(jnp.clip(jnp.nan_to_num(image), -1e6, 1e6)).ravel()
    values = levels.astype(jnp.int32).astype(jnp.uint32)
    return (values * _scrambled(jnp.arange(values.size, dtype=jnp.uint32))).sum(dtype=jnp.uint32)


def _scrambled(places: Array) -> Array:
    """32 bits for each place that look like chance: twice multiplied and folded."""
    for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13)):
        places = (places + jnp.uint32(1)) * jnp.uint32(factor)
        places = places ^ (places >> shift)
    return places
