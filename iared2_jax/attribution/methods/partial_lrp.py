"""Partial LRP (Voita et al. 2019): the relevance of the last layer's attention."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Float

from iared2_jax.attribution.attention_flow import answer_rows, require_attention
from iared2_jax.attribution.relevance import propagate_relevance
from iared2_jax.attribution.targets import Target, class_logit
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array


@functools.partial(jax.jit, static_argnums=0, static_argnames="rules")
def partial_lrp(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    target: Target = None,
    rules: str = "conserving",
) -> Float[Array, "b n"]:
    """CLS row of the mean over heads of (R_A)^+, the relevance of the last attention's weights.

    Args:
      target: the class that is explained; None: the predicted one.
      rules: "conserving", or "plain" as in the published tables (`attribution.relevance`).

    Raises:
      UsageError: no such rules, or a backbone without rules for its layers, or without CLS.
    """
    relevance = propagate_relevance(module, variables, inputs, class_logit(target), rules)
    require_attention(module, relevance.attention)
    return jax.nn.relu(answer_rows(module, relevance.attention[-1])).mean(axis=(1, 2))
