"""Attention rollout (Abnar and Zuidema 2020): attention multiplied up through the blocks."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from iared2_jax.attribution.attention_flow import flow, require_attention
from iared2_jax.models.taps import apply_with_taps
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array


@functools.partial(jax.jit, static_argnums=0, static_argnames="start_block")
def rollout(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    start_block: int = 1,
) -> Float[Array, "b n"]:
    """CLS row of the product of A_b + I, heads averaged and rows normalised; of no class.

    Talking heads (CaiT) may weigh below zero; such weights count as 0.

    Args:
      start_block: the first block that counts, from 0; the published evaluation leaves out one.

    Raises:
      UsageError: no such block, or no attention of a CLS token.
    """
    *_, taps = apply_with_taps(module, variables, inputs, execution="dense")
    require_attention(module, taps.attention)
    mean = [jnp.maximum(weights.mean(axis=1), 0) for weights in taps.attention]
    return flow(module, mean, start_block=start_block, normalise=True)
