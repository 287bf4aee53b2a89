"""ToMe's reducer: tokens that are not kept are merged into the one they resemble most."""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from iared2_jax.token_reduction.compaction import take_tokens
from iared2_jax.token_reduction.matching import bipartite_match, list_order
from iared2_jax.token_reduction.reducers.base import Reducer
from iared2_jax.token_reduction.selectors.budgets import top_k
from iared2_jax.token_reduction.state import TokenState
from iared2_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Merge(Reducer):
    """A target becomes the mean of itself and what is merged into it, weighted by their sizes.

    Bolya et al. 2023, section 3. The list of tokens is then what may have been merged and was not,
    followed by the targets, each in the old order: which of them are targets next hangs on it.
    Attention counts each key by its size.
    """

    needs_keys = True

    def in_place(
        self, state: TokenState, keep: Bool[Array, "b k"], scores: Float[Array, "b k"], prefix: int
    ) -> TokenState:
        x, sizes, order = self._merged(state, keep, prefix)
        return state._replace(x=x, alive=keep, sizes=sizes, order=order)

    def compacted(
        self,
        state: TokenState,
        keep: Bool[Array, "b k"],
        scores: Float[Array, "b k"] | None,
        prefix: int,
        capacity: int,
    ) -> TokenState:
        """Kept tokens in the order of the list, in `capacity` slots; others are overflow."""
        capacity = min(capacity, keep.shape[1])
        held = keep if scores is None else top_k(scores, keep, capacity)
        x, sizes, order = self._merged(state, keep, prefix)
        # The list's order becomes that of the slots.
        by_order = jnp.argsort(jnp.where(held, order, keep.shape[1]), axis=1)[:, :capacity]
        alive = jnp.take_along_axis(held, by_order, axis=1)
        return TokenState(
            x=jnp.concatenate([x[:, :prefix], take_tokens(x[:, prefix:], by_order)], axis=1),
            alive=alive,
            origin=jnp.take_along_axis(state.origin, by_order, axis=1),
            overflow=keep.sum(axis=1) - alive.sum(axis=1),
            sizes=jnp.take_along_axis(sizes, by_order, axis=1),
        )

    def _merged(
        self, state: TokenState, keep: Bool[Array, "b k"], prefix: int
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b k"], Int[Array, "b k"]]:
        """Tokens, sizes and the order of the list, after the merging, each in its old place."""
        match, rows = bipartite_match(state, prefix, keep), jnp.arange(keep.shape[0])[:, None]
        # What lies in dead places may be anything, NaN included.
        patches = jnp.where(state.alive[..., None], state.x[:, prefix:], 0)
        sizes = jnp.ones(keep.shape, jnp.float32) if state.sizes is None else state.sizes
        goes = state.alive & ~keep & match.is_target.any(axis=1, keepdims=True)
        given = jnp.where(goes, sizes, 0)
        total = sizes.at[rows, match.partner].add(given)
        # Each token's share in its partner, and what a target keeps of itself.
        share = given / jnp.take_along_axis(total, match.partner, axis=1)
        moved, stays = (part.astype(patches.dtype)[..., None] for part in (share, sizes / total))
        merged = (stays * patches).at[rows, match.partner].add(moved * patches)
        x = jnp.concatenate([state.x[:, :prefix], merged], axis=1)

        old, others = list_order(state), keep & ~match.is_target
        rank = _rank_in_place if state.order is None else functools.partial(_rank, old)
        behind = others.sum(axis=1, keepdims=True) + rank(match.is_target)
        order = jnp.where(match.is_target, behind, rank(others))
        # ToMe leaves the list alone where nothing is merged.
        order = jnp.where(goes.any(axis=1, keepdims=True), order, old)
        return x, jnp.where(keep, total, 1.0), order


def _rank_in_place(among: Bool[Array, "b k"]) -> Int[Array, "b k"]:
    """How many of those `among` come before each token, where places are in order."""
    return jnp.cumsum(among, axis=1) - 1


def _rank(order: Int[Array, "b k"], among: Bool[Array, "b k"]) -> Int[Array, "b k"]:
    """How many of those `among` come before each token in the order."""
    before = order[:, None, :] < order[:, :, None]
    return (before & among[:, None, :]).sum(axis=-1)
