"""Selectors that are not learned: fixed budgets, and baselines an interpreter has to beat."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

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


def top_k(scores: Float[Array, "b n"], alive: Bool[Array, "b n"], count: int) -> Bool[Array, "b n"]:
    """The `count` best-scoring alive tokens of each image, or all of them if they are fewer.

    Ties go to the lower index, as in `token_reduction.compaction.top_k_slots`.
    """
    if count >= alive.shape[1]:
        return alive
    priority = jnp.where(alive, scores.astype(jnp.float32), -jnp.inf)
    _, best = jax.lax.top_k(priority, count)
    rows = jnp.arange(len(scores))[:, None]
    chosen = jnp.zeros(alive.shape, bool).at[rows, best].set(True, unique_indices=True)
    return chosen & alive
