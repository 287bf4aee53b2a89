"""Budgets: how many of a group's tokens stay, by a threshold, a share, or counts that are given."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from iared2_jax.typing import Array


def within_budget(
    group: int,
    scores: Float[Array, "b n"],
    alive: Bool[Array, "b n"],
    thresholds: Float[Array, "... D"],
    counts: Sequence[int] | None,
) -> Bool[Array, "b n"]:
    """The alive tokens a group keeps: its `counts` best, or those above its threshold.

    Args:
      group: from 1.
      thresholds: one per group, or one each per image [b, D].
      counts: tokens per group, the same for every image (`keep_counts`).
    """
    if counts is None:
        return alive & (scores > thresholds[..., group - 1, None])
    return top_k(scores, alive, counts[group - 1])


def keep_counts(
    keep_ratios: Sequence[float], num_patches: int, extra_tokens: int = 0
) -> tuple[int, ...]:
    """Tokens that each group keeps: ceil(ratio * N), or all that it is handed, if that is no more.

    Args:
      extra_tokens: what the reducer makes of the others, for the next group to be handed.

    Example:
      >>> keep_counts((1, 0.7, 0.9), 196), keep_counts((1, 0.7, 0.9), 196, extra_tokens=1)
      ((196, 138, 138), (196, 138, 139))
    """
    counts, alive = [], num_patches
    for ratio in keep_ratios:
        count = math.ceil(round(ratio * num_patches, 6))
        fewer = count + extra_tokens < alive
        counts.append(count if fewer else alive)
        alive = count + extra_tokens if fewer else alive
    return tuple(counts)


def alive_counts(
    keep_ratios: Sequence[float], num_patches: int, extra_tokens: int = 0
) -> tuple[int, ...]:
    """Tokens that each group's blocks see: what it keeps, and what is made of the others.

    Example:
      >>> alive_counts((1, 0.7, 0.5), 196), alive_counts((1, 0.7, 0.5), 196, extra_tokens=1)
      ((196, 138, 98), (196, 139, 99))
    """
    alive, counts = num_patches, []
    for count in keep_counts(keep_ratios, num_patches, extra_tokens):
        alive = count + extra_tokens if count < alive else alive
        counts.append(alive)
    return tuple(counts)


def top_k(scores: Float[Array, "b n"], alive: Bool[Array, "b n"], count: int) -> Bool[Array, "b n"]:
    """The `count` best-scoring alive tokens of each image, or all of them if they are fewer.

    Ties go to the lower index.
    """
    if count >= alive.shape[1]:
        return alive
    priority = jnp.where(alive, scores.astype(jnp.float32), -jnp.inf)
    _, best = jax.lax.top_k(priority, count)
    rows = jnp.arange(len(scores))[:, None]
    chosen = jnp.zeros(alive.shape, bool).at[rows, best].set(True, unique_indices=True)
    return chosen & alive


def random_like(
    key: PRNGKeyArray, counts: Sequence[Int[Array, " b"]], num_patches: int
) -> list[Bool[Array, "b n"]]:
    """Nested random masks with the given number of kept tokens per image and group.

    Each image gets one random order of its patches; group j keeps the first `counts[j]` of it, so
    that a token kept in a group was kept in every group before.
    """
    order = jax.random.uniform(key, (len(counts[0]), num_patches))
    return [first_in_order(order, count) for count in counts]


def first_in_order(order: Float[Array, "b n"], counts: Int[Array, " b"]) -> Bool[Array, "b n"]:
    """The `counts` patches of each image whose numbers in `order` are lowest."""
    rank = jnp.argsort(jnp.argsort(order, axis=-1), axis=-1)
    return rank < counts[:, None]
