"""Transformer attribution (Chefer et al. 2021): gradients times relevance, multiplied up."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Float

from iared2_jax.attribution.attention_flow import flow, require_attention
from iared2_jax.attribution.relevance import propagate_relevance
from iared2_jax.attribution.targets import Target, class_logit
from iared2_jax.models.taps import tap_gradients
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array


@functools.partial(jax.jit, static_argnums=0, static_argnames="start_block")
def transformer_attribution(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    target: Target = None,
    start_block: int = 1,
) -> Float[Array, "b n"]:
    """CLS row of the product of I + mean over heads of (G_b * R_b)^+.

    G_b is the gradient of the class's logit with respect to block b's attention weights, R_b their
    relevance (`attribution.relevance`).

    Args:
      target: the class that is explained; None: the predicted one.
      start_block: the first block that counts, from 0; the published evaluation leaves out one.

    Raises:
      UsageError: no such block, or a backbone without rules for its layers, or without CLS.
    """
    objective = class_logit(target)
    relevance = propagate_relevance(module, variables, inputs, objective)
    *_, slopes = tap_gradients(module, variables, inputs, objective, execution="dense")
    require_attention(module, relevance.attention)
    weighted = [
        jax.nn.relu(slope * share).mean(axis=1)
        for slope, share in zip(slopes.attention, relevance.attention, strict=True)
    ]
    return flow(module, weighted, start_block=start_block)
