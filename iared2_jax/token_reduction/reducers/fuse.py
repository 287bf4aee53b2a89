"""EViT's reducer: tokens that are not kept become one, their sum weighted by their scores."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Bool, Float

from iared2_jax.token_reduction.reducers.base import Reducer
from iared2_jax.token_reduction.state import TokenState
from iared2_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Fuse(Reducer):
    """x_fused = sum over dropped tokens of score x (Liang et al. 2022, Eq. 4), a token more.

    It lies where the best-scoring of them was, counts as kept there, and is a token like any other
    from then on. An image that keeps all has none.
    """

    extra_tokens = 1

    def reduce(
        self, state: TokenState, keep: Bool[Array, "b k"], scores: Float[Array, "b k"], prefix: int
    ) -> TokenState:
        """The state with the fused token in the place of the best that is not kept."""
        dropped = state.alive & ~keep
        weights = jnp.where(dropped, scores, 0).astype(state.x.dtype)
        # What lies in dead places may be anything, NaN included.
        patches = jnp.where(state.alive[..., None], state.x[:, prefix:], 0)
        fused = jnp.einsum("bk,bkd->bd", weights, patches)
        best = jnp.where(dropped, scores, -jnp.inf).argmax(axis=1)
        here = (jnp.arange(keep.shape[1]) == best[:, None]) & dropped
        patches = jnp.where(here[..., None], fused[:, None], state.x[:, prefix:])
        x = jnp.concatenate([state.x[:, :prefix], patches], axis=1)
        return state._replace(x=x, alive=keep | here)
