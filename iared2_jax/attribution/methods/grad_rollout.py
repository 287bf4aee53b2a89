"""Gradient-weighted rollout: what Chefer et al. put in the place of LRP (2021, "Generic ..")."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Float

from iared2_jax.attribution.attention_flow import flow, require_attention
from iared2_jax.attribution.targets import Target, class_logit
from iared2_jax.models.taps import tap_gradients
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array


@functools.partial(jax.jit, static_argnums=0, static_argnames="start_block")
def grad_rollout(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    target: Target = None,
    start_block: int = 0,
) -> Float[Array, "b n"]:
    """CLS row of the product of I + mean over heads of (d logit / d A_b * A_b)^+.

    Args:
      target: the class that is explained; None: the predicted one.
      start_block: the first block that counts, from 0.

    Raises:
      UsageError: no such block, or no attention of a CLS token.
    """
    objective = class_logit(target)
    *_, taps, gradients = tap_gradients(module, variables, inputs, objective, execution="dense")
    require_attention(module, taps.attention)
    weighted = [
        jax.nn.relu(slopes * weights).mean(axis=1)
        for weights, slopes in zip(taps.attention, gradients.attention, strict=True)
    ]
    return flow(module, weighted, start_block=start_block)
