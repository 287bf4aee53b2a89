"""Bipartite soft matching of tokens: which of them resembles which (Bolya et al. 2023, ToMe)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from iared2_jax.token_reduction.state import TokenState
from iared2_jax.typing import Array


class Match(NamedTuple):
    """What each patch token may be merged into.

    is_target [b, k]: whether others may be merged into it; it then stays itself. partner [b, k]:
    the target whose key is most like its own. similarity [b, k]: the cosine of the two.
    """

    is_target: Bool[Array, "b k"]
    partner: Int[Array, "b k"]
    similarity: Float[Array, "b k"]


def list_order(state: TokenState) -> Int[Array, "b k"]:
    """Where in the list of its image's alive tokens each comes, from 0; of others, anything."""
    if state.order is not None:
        return state.order
    return jnp.cumsum(state.alive, axis=1) - 1


def bipartite_match(state: TokenState, num_prefix: int) -> Match:
    """Every second token of the list, prefix included, is a target; prefix tokens take no part.

    In the list of CLS and the patches, the first patch is one, as in ToMe's own code.
    """
    is_target = state.alive & ((list_order(state) + num_prefix) % 2 == 1)
    keys = state.keys.astype(jnp.float32)
    keys = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    cosine = jnp.einsum("bke,bte->bkt", keys, keys)
    cosine = jnp.where(is_target[:, None], cosine, -jnp.inf)
    # Where there is no target, this is -1, and the partner means nothing.
    similarity = jnp.maximum(cosine.max(axis=-1), -1.0)
    return Match(is_target, cosine.argmax(axis=-1), similarity)
