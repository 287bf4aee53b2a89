"""Full LRP: relevance propagated to the pixels."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Float

from iared2_jax.attribution.relevance import propagate_relevance
from iared2_jax.attribution.targets import Target, class_logit
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array


@functools.partial(jax.jit, static_argnums=0, static_argnames="rules")
def lrp(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    target: Target = None,
    rules: str = "conserving",
) -> Float[Array, "b ..."]:
    """The relevance of every pixel, its channels added up: as large as the inputs.

    Args:
      target: the class that is explained; None: the predicted one.
      rules: "conserving", or "plain" as in the published tables (`attribution.relevance`).

    Raises:
      UsageError: no such rules, or a backbone without rules for its layers.
    """
    relevance = propagate_relevance(module, variables, inputs, class_logit(target), rules)
    return relevance.inputs.sum(axis=-1)
