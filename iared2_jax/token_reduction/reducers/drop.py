"""The paper's reducer: tokens that are not kept are gone for good."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Bool, Float

from iared2_jax.token_reduction.compaction import kept_first, take_patches
from iared2_jax.token_reduction.reducers.base import Reducer
from iared2_jax.token_reduction.selectors.budgets import top_k
from iared2_jax.token_reduction.state import TokenState
from iared2_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Drop(Reducer):
    """Drops what is not kept: as masked keys in place, or by moving the others together."""

    def in_place(
        self, state: TokenState, keep: Bool[Array, "b k"], scores: Float[Array, "b k"], prefix: int
    ) -> TokenState:
        return state._replace(alive=keep)

    def compacted(
        self,
        state: TokenState,
        keep: Bool[Array, "b k"],
        scores: Float[Array, "b k"] | None,
        prefix: int,
        capacity: int,
    ) -> TokenState:
        """Kept tokens in image order, in `capacity` slots; what finds none is counted as overflow.

        scores: too many tokens lose the lowest; None: the last, for a caller that computes such a
          batch again.
        """
        capacity = min(capacity, keep.shape[1])
        held = keep if scores is None else top_k(scores, keep, capacity)
        slots = kept_first(held)[0][:, :capacity]
        alive = jnp.take_along_axis(held, slots, axis=1)
        return TokenState(
            x=take_patches(state.x, slots, prefix),
            alive=alive,
            origin=jnp.take_along_axis(state.origin, slots, axis=1),
            overflow=keep.sum(axis=1) - alive.sum(axis=1),
            attention=None,
        )
