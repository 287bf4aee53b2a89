"""The paper's reducer: tokens that are not kept are gone for good."""

import dataclasses

from jaxtyping import Bool, Float

from iared2_jax.token_reduction.reducers.base import Reducer
from iared2_jax.token_reduction.state import TokenState
from iared2_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Drop(Reducer):
    """Drops what is not kept."""

    def reduce(
        self, state: TokenState, keep: Bool[Array, "b k"], scores: Float[Array, "b k"], prefix: int
    ) -> TokenState:
        """The state with only the kept tokens alive."""
        return state._replace(alive=keep)
