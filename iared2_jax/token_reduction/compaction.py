"""Compaction under static shapes: kept tokens move into a shorter array, in order."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from iared2_jax.token_reduction.selectors.budgets import top_k
from iared2_jax.token_reduction.state import TokenState
from iared2_jax.typing import Array


def compacted(
    state: TokenState, scores: Float[Array, "b k"] | None, capacity: int, prefix: int
) -> TokenState:
    """The alive tokens in `capacity` slots, in the order of their list; what finds none overflows.

    Args:
      scores: of too many tokens the lowest find no slot; None: the last, for a caller that looks at
        the overflow and computes such a batch again.
    """
    alive, capacity = state.alive, min(capacity, state.alive.shape[1])
    held = alive if scores is None else top_k(scores, alive, capacity)
    if state.order is None:
        slots = kept_first(held)[0]
    else:
        slots = jnp.argsort(jnp.where(held, state.order, held.shape[1]), axis=1)
    slots = slots[:, :capacity]
    there, origin = (jnp.take_along_axis(x, slots, axis=1) for x in (held, state.origin))
    return TokenState(
        x=take_patches(state.x, slots, prefix),
        alive=there,
        origin=origin,
        overflow=alive.sum(axis=1) - there.sum(axis=1),
        sizes=None if state.sizes is None else jnp.take_along_axis(state.sizes, slots, axis=1),
    )


def kept_first(keep: Bool[Array, "b n"]) -> tuple[Int[Array, "b n"], Int[Array, "b n"]]:
    """The order of kept tokens first, then the dropped, both in image order; it needs no sort.

    Returns:
      slots: which token comes first, second, ..; a permutation, so no two slots share a token.
      places: its inverse, where each token went.
    """
    kept = jnp.cumsum(keep, axis=1, dtype=jnp.int32)
    dropped = jnp.cumsum(~keep, axis=1, dtype=jnp.int32)
    places = jnp.where(keep, kept, kept[:, -1:] + dropped) - 1
    rows = jnp.arange(keep.shape[0])[:, None]
    columns = jnp.broadcast_to(jnp.arange(keep.shape[1], dtype=jnp.int32), keep.shape)
    slots = jnp.zeros_like(places).at[rows, places].set(columns, unique_indices=True)
    return slots, places


def take_patches(
    x: Float[Array, "b t d"], slots: Int[Array, "b k"], prefix: int
) -> Float[Array, "b c d"]:
    """The `prefix` first tokens, and the patch tokens behind them at `slots`."""
    return jnp.concatenate([x[:, :prefix], take_tokens(x[:, prefix:], slots)], axis=1)


@jax.custom_vjp
def take_tokens(tokens: Float[Array, "b n d"], slots: Int[Array, "b k"]) -> Float[Array, "b k d"]:
    """The tokens at `slots`, image by image; the slots of an image must be distinct.

    Its gradient is a gather, too: the transpose JAX would derive adds into rows one by one, which
    GPUs do slowly.
    """
    return jnp.take_along_axis(tokens, slots[..., None], axis=1)


def _take_forward(tokens, slots):
    # An array without elements carries n, which must stay static.
    return take_tokens(tokens, slots), (slots, jnp.zeros((tokens.shape[1], 0)))


def _take_backward(residuals, gradient):
    slots, shape = residuals
    (b, k), n = slots.shape, len(shape)
    columns = jnp.broadcast_to(jnp.arange(k, dtype=slots.dtype), slots.shape)
    where = jnp.full((b, n), k, slots.dtype)
    where = where.at[jnp.arange(b)[:, None], slots].set(columns, unique_indices=True)
    taken = jnp.take_along_axis(gradient, jnp.minimum(where, k - 1)[..., None], axis=1)
    return jnp.where((where < k)[..., None], taken, 0), None


take_tokens.defvjp(_take_forward, _take_backward)


def to_grid(values: Array, origin: Int[Array, "b k"], num_patches: int) -> Array:
    """Per-token values [B, .., k] back on the original patches [B, .., N]; 0 elsewhere."""

    def one_image(values, origin):
        grid = jnp.zeros((*values.shape[:-1], num_patches), values.dtype)
        return grid.at[..., origin].set(values, unique_indices=True)

    return jax.vmap(one_image)(values, origin)
