"""The contract of a reducer."""

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float

from iared2_jax.token_reduction.state import TokenState
from iared2_jax.typing import Array


@runtime_checkable
class Reducer(Protocol):
    """What becomes of the tokens that a group does not keep; a frozen dataclass.

    Both methods must lead to the same logits, as long as no token overflows.
    Compiled ragged execution moves kept tokens itself: it drops the others.

    Attributes:
      extra_tokens: how many tokens it makes of those that a group does not keep.
      needs_keys: whether it compares the attention's keys, so that it can only follow a selector
        that looks behind the attention.
    """

    extra_tokens: int = 0
    needs_keys: bool = False

    def in_place(
        self, state: TokenState, keep: Bool[Array, "b k"], scores: Float[Array, "b k"], prefix: int
    ) -> TokenState:
        """The state after the reduction, in arrays of the same shape (masked execution)."""

    def compacted(
        self,
        state: TokenState,
        keep: Bool[Array, "b k"],
        scores: Float[Array, "b k"] | None,
        prefix: int,
        capacity: int,
    ) -> TokenState:
        """The state after the reduction, in `capacity` slots (gathered execution).

        scores: too many tokens lose the lowest; None: the last ones, for a caller that looks at the
          overflow and computes such a batch again.
        """
