"""Selectors that are not learned: the baselines an interpreter has to beat."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, PRNGKeyArray

from iared2_jax.typing import Array


def random_like(
    key: PRNGKeyArray, counts: Sequence[Int[Array, " b"]], num_patches: int
) -> list[Bool[Array, "b n"]]:
    """Nested random masks with the given number of kept tokens per image and group.

    Each image gets one random order of its patches; group j keeps the first `counts[j]` of it, so
    that a token kept in a group was kept in every group before.
    """
    order = jax.random.uniform(key, (len(counts[0]), num_patches))
    rank = jnp.argsort(jnp.argsort(order, axis=-1), axis=-1)
    return [rank < count[:, None] for count in counts]
