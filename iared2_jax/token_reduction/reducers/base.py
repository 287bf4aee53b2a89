"""The contract of a reducer."""

from jaxtyping import Bool, Float

from iared2_jax.token_reduction.state import TokenState
from iared2_jax.typing import Array


class Reducer:
    """What becomes of the tokens that a group does not keep; a frozen dataclass.

    Compiled ragged execution moves kept tokens itself: it drops the others.

    Attributes:
      extra_tokens: how many tokens it makes of those that a group does not keep.
      needs_keys: whether it compares the attention's keys, so that it can only follow a selector
        that looks behind the attention.
    """

    extra_tokens: int = 0
    needs_keys: bool = False

    def reduce(
        self, state: TokenState, keep: Bool[Array, "b k"], scores: Float[Array, "b k"], prefix: int
    ) -> TokenState:
        """The state after the reduction, in arrays of the same shape: what is `alive` goes on.

        Masked execution goes on from there, gathered execution moves what is alive together.

        Args:
          prefix: how many tokens of `state.x` come before the patches.
        """
        raise TypeError(f"{type(self).__name__} does not say how it reduces")
