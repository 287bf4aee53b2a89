"""GradCAM on attention: the last block's CLS attention, heads weighted by their gradients."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Float

from iared2_jax.attribution.attention_flow import answer_rows, require_attention
from iared2_jax.attribution.targets import Target, class_logit
from iared2_jax.models.taps import tap_gradients
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array


@functools.partial(jax.jit, static_argnums=0)
def gradcam(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    target: Target = None,
) -> Float[Array, "b n"]:
    """ReLU(mean over heads h of A_h * w_h), with w_h the mean over patches of d logit / d A_h.

    A is the CLS row of the last attention layer. This is the convention of Chefer et al. (2021) and
    of the paper's table; `gradcam_tokens` is the other one.

    Args:
      target: the class that is explained; None: the predicted one.

    Raises:
      UsageError: the model shows no attention of a CLS token.
    """
    objective = class_logit(target)
    *_, taps, gradients = tap_gradients(module, variables, inputs, objective, execution="dense")
    require_attention(module, taps.attention)
    rows, slopes = (answer_rows(module, x.attention[-1]) for x in (taps, gradients))
    return jax.nn.relu((rows * slopes.mean(axis=-1, keepdims=True)).mean(axis=(1, 2)))
