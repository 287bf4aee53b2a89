"""Compaction under static shapes: kept tokens move into a shorter array with a validity mask."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from iared2_jax.typing import Array


def top_k_slots(
    scores: Float[Array, "b n"], keep: Bool[Array, "b n"], capacity: int
) -> tuple[Int[Array, "b k"], Bool[Array, "b k"], Int[Array, " b"]]:
    """Which tokens go into `capacity` slots: the kept ones, the highest scores first.

    Returns:
      slots: indices into the token axis; distinct within an image, ties to the lowest index.
      valid: which slots hold a kept token; the others hold some dropped one, to be masked.
      overflow: how many kept tokens found no slot. Where it is above 0 the result differs from
        masked execution, and the batch belongs into a larger capacity.
    """
    priority = jnp.where(keep, scores.astype(jnp.float32), -1.0)
    _, slots = jax.lax.top_k(priority, capacity)
    valid = jnp.take_along_axis(keep, slots, axis=1)
    overflow = keep.sum(axis=1) - valid.sum(axis=1)
    return slots, valid, overflow


def take_tokens(tokens: Float[Array, "b n d"], slots: Int[Array, "b k"]) -> Float[Array, "b k d"]:
    """The tokens at `slots`, image by image."""
    return jnp.take_along_axis(tokens, slots[..., None], axis=1)


def to_grid(values: Array, slots: Int[Array, "b k"], num_patches: int) -> Array:
    """Puts per-slot values [B, ..., k] back on the original patches [B, ..., N]; 0 elsewhere."""

    def one_image(values, slots):
        grid = jnp.zeros((*values.shape[:-1], num_patches), values.dtype)
        return grid.at[..., slots].set(values, unique_indices=True)

    return jax.vmap(one_image)(values, slots)
