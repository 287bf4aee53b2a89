"""The paper's map: the informative scores by which a group drops patches."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from iared2_jax.errors import UsageError
from iared2_jax.token_reduction.model import IARed2, Thresholds
from iared2_jax.token_reduction.output import Output
from iared2_jax.typing import Array


def interpreter(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    group: int | None = None,
    thresholds: Thresholds = 0.5,
) -> Float[Array, "b n"]:
    """Informative scores of one group, in [0, 1]; 0 where an earlier group dropped the patch.

    Args:
      group: from 1 to D; None: the second, as the paper shows, or the only one.
      thresholds: keep iff score > threshold.

    Raises:
      UsageError: there is no such group.
    """
    if group is None:
        group = min(2, module.num_groups)
    if not 1 <= group <= module.num_groups:
        raise UsageError(f"group must be in 1..{module.num_groups}, got {group}")
    return masked_pass(module, variables, inputs, thresholds).scores[group - 1]


def masked_pass(
    module: IARed2, variables: Mapping[str, Any], inputs: Float[Array, "b ..."], thresholds
) -> Output:
    """The scores and keep masks of masked execution; compiled once per model."""
    return _masked_pass(module, variables, inputs, jnp.asarray(thresholds, jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _masked_pass(module: IARed2, variables, inputs, thresholds) -> Output:
    out = module.apply(variables, inputs, thresholds)[1]
    return Output(scores=out.scores, keep=out.keep)
