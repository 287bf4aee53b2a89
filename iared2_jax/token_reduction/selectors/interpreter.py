"""The paper's selector: the group's multi-head interpreter (Eq. 1)."""

import dataclasses
from typing import Any

from jaxtyping import Float

from iared2_jax.token_reduction import policy
from iared2_jax.token_reduction.selectors.base import Evidence, Selector
from iared2_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class ByInterpreter(Selector):
    """Informative scores of the group's own interpreter."""

    probabilities = True

    def token_scores(
        self,
        group: int,
        x: Float[Array, "s t d"],
        attention: Float[Array, "s h n"] | None,
        model: Any,
    ) -> Evidence:
        """The group's informative scores, and the logits they are made of."""
        logits = model.interpret(group, x)
        return Evidence(policy.informative_scores(logits), logits)
