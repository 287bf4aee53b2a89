"""The tokens of a batch on their way through the groups."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from iared2_jax.typing import Array


class TokenState(NamedTuple):
    """The tokens between two groups.

    x [b, P+k, d]: tokens, prefix first. alive [b, k]: which patch tokens are still there. origin
    [b, k]: which patch each of them is. overflow [b]: kept tokens that found no slot when they were
    moved last. attention [b, h, k]: the CLS query's weights in the last block; None: there is none.

    Where tokens are merged, also: keys [b, k, e], of the attention that ran last, the mean over its
    heads. sizes [b, k]: how many patches each token stands for; None: one each. order [b, k]: where
    in the list of alive tokens each of them comes; None: in the order of their places.
    """

    x: Float[Array, "b t d"]
    alive: Bool[Array, "b k"]
    origin: Int[Array, "b k"]
    overflow: Int[Array, " b"]
    attention: Float[Array, "b h k"] | None = None
    keys: Float[Array, "b k e"] | None = None
    sizes: Float[Array, "b k"] | None = None
    order: Int[Array, "b k"] | None = None


def all_alive(x: Float[Array, "b t d"], num_patches: int) -> TokenState:
    """The state before the first group: every patch at its place."""
    alive = jnp.ones((x.shape[0], num_patches), bool)
    origin = jnp.broadcast_to(jnp.arange(num_patches), alive.shape)
    return TokenState(x, alive, origin, jnp.zeros(x.shape[0], jnp.int32))
