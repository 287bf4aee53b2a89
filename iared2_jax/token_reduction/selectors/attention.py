"""Selection by attention: the CLS query's weights in the block before, which need no training."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jaxtyping import Float

from iared2_jax.token_reduction.selectors.base import Evidence, Selector
from iared2_jax.typing import Array

if TYPE_CHECKING:
    from iared2_jax.token_reduction.model import IARed2


@dataclasses.dataclass(frozen=True)
class Attention(Selector):
    """Mean over heads of the CLS query's attention in the last block before the group."""

    def token_scores(
        self,
        group: int,
        x: Float[Array, "s t d"],
        attention: Float[Array, "s h n"] | None,
        model: Any,
    ) -> Evidence:
        """The mean over heads of what the CLS query attended to; before any block, all alike."""
        if attention is None:  # nothing has been attended to: all tokens score alike
            return Evidence(jnp.ones((x.shape[0], x.shape[1] - model.num_prefix)))
        return Evidence(attention.mean(axis=1))

    def check(self, module: "IARed2", keep_ratios: Sequence[float] | None) -> None:
        """Refuses models without CLS, and budgets that drop before anything was attended to."""
        if not module.num_prefix:
            raise ValueError(
                'selector="attention" needs a CLS token in the blocks; this backbone has none there'
            )
        if keep_ratios is None or keep_ratios[0] != 1:
            raise ValueError(
                'selector="attention" needs keep_ratios that start with 1: before the first block '
                f"nothing has been attended to; got {keep_ratios}"
            )
