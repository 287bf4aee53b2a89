"""ToMe's reducer: tokens that are not kept are merged into the one they resemble most."""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from iared2_jax.token_reduction.matching import bipartite_match, list_order
from iared2_jax.token_reduction.reducers.base import Reducer
from iared2_jax.token_reduction.state import TokenState
from iared2_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Merge(Reducer):
    """A target becomes the mean of itself and what is merged into it, weighted by their sizes.

    Bolya et al. 2023, section 3. The list of tokens is then what may have been merged and was not,
    followed by the targets, each in the old order: which of them are targets next hangs on it.
    Attention counts each key by its size. What resembles a token that is not kept is lost.
    """

    needs_keys = True

    def reduce(
        self, state: TokenState, keep: Bool[Array, "b k"], scores: Float[Array, "b k"], prefix: int
    ) -> TokenState:
        """The state with every token that goes added to the target that it resembles most."""
        # The selector's own question, so compiled once.
        match, rows = bipartite_match(state, prefix), jnp.arange(keep.shape[0])[:, None]
        targets = match.is_target & keep
        goes = state.alive & ~keep & jnp.take_along_axis(targets, match.partner, axis=1)
        # What lies in dead places may be anything, NaN included.
        patches = jnp.where(state.alive[..., None], state.x[:, prefix:], 0)
        sizes = jnp.ones(keep.shape, jnp.float32) if state.sizes is None else state.sizes
        given = jnp.where(goes, sizes, 0)
        total = sizes.at[rows, match.partner].add(given)
        # Each token's share in its partner, and what a target keeps of itself.
        share = given / jnp.take_along_axis(total, match.partner, axis=1)
        moved, stays = (part.astype(patches.dtype)[..., None] for part in (share, sizes / total))
        merged = (stays * patches).at[rows, match.partner].add(moved * patches)

        old, others = list_order(state), keep & ~targets
        # Without `order`, before the first merge or just compacted, the list runs as the places do,
        # and a cumsum ranks it. After a merge in place it does not: all pairs are compared.
        rank = _rank_in_place if state.order is None else functools.partial(_rank, old)
        behind = others.sum(axis=1, keepdims=True) + rank(targets)
        order = jnp.where(targets, behind, rank(others))
        # ToMe leaves the list alone where nothing is merged.
        order = jnp.where(goes.any(axis=1, keepdims=True), order, old)
        x = jnp.concatenate([state.x[:, :prefix], merged], axis=1)
        return state._replace(x=x, alive=keep, sizes=jnp.where(keep, total, 1.0), order=order)


def _rank_in_place(among: Bool[Array, "b k"]) -> Int[Array, "b k"]:
    """How many of those `among` come before each of them, where places are in order."""
    return jnp.cumsum(among, axis=1) - 1


def _rank(order: Int[Array, "b k"], among: Bool[Array, "b k"]) -> Int[Array, "b k"]:
    """How many of those `among` come before each token in the order."""
    before = order[:, None, :] < order[:, :, None]
    return (before & among[:, None, :]).sum(axis=-1)
