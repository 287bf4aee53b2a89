"""The paper's selector: the group's multi-head interpreter (Eq. 1)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from iared2_jax.models.backbones.protocol import Backbone
from iared2_jax.token_reduction import policy
from iared2_jax.token_reduction.predictor import predictor_flops
from iared2_jax.token_reduction.selectors.base import Evidence, Selector
from iared2_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class ByInterpreter(Selector):
    """Informative scores of the group's own interpreter.

    kind: the model's `interpreter_kind`, for the cost.
    """

    kind: str = "attention"

    probabilities = True

    def token_scores(
        self,
        group: int,
        x: Float[Array, "s t d"],
        attention: Float[Array, "s h n"] | None,
        alive: Bool[Array, "s n"] | None,
        model: Any,
    ) -> Evidence:
        """The group's informative scores, and the logits they are made of."""
        logits = model.interpret(group, x, alive)
        return Evidence(policy.informative_scores(logits), logits)

    def flops(
        self, backbone: Backbone, entering: Sequence[ArrayLike]
    ) -> tuple[ArrayLike, ArrayLike]:
        """The interpreters' cost, in `full` only: (m + 1) d^2 + m d for a group handed m patches.

        Ours needs less, see `token_reduction.interpreter.Keys`. Of DynamicViT's predictors, see
        `token_reduction.predictor.predictor_flops`.
        """
        d = backbone.embed_dim
        if self.kind == "dynamicvit":
            return 0.0, sum(predictor_flops(m, d) for m in entering)
        return 0.0, sum((m + 1) * d**2 + m * d for m in entering)
