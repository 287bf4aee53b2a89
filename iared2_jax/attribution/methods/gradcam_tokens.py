"""GradCAM on tokens: the last layer's normalised tokens, channels weighted by their gradients."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from iared2_jax.attribution.targets import Target, class_logit
from iared2_jax.errors import UsageError
from iared2_jax.models.taps import tap_gradients
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array


@functools.partial(jax.jit, static_argnums=0)
def gradcam_tokens(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    target: Target = None,
) -> Float[Array, "b n"]:
    """ReLU(sum over channels c of x_c * w_c), with w_c the mean over patches of d logit / d x_c.

    x is what enters the last attention layer, after its LayerNorm: the convention of
    pytorch-grad-cam (the output of the last block has no gradient but at CLS).

    Args:
      target: the class that is explained; None: the predicted one.

    Raises:
      UsageError: the model does not show what enters its attention.
    """
    objective = class_logit(target)
    *_, taps, gradients = tap_gradients(module, variables, inputs, objective, execution="dense")
    if not taps.attention_inputs:
        raise UsageError(
            f"{type(module.backbone).__name__} does not show what enters its attention: its layers "
            "must call models.taps.tap with ATTENTION_INPUT"
        )
    tokens, slopes = (
        x.attention_inputs[-1][:, -module.input_spec.num_patches :] for x in (taps, gradients)
    )
    products = (tokens * slopes.mean(axis=1, keepdims=True)).astype(jnp.float32)
    return jax.nn.relu(products.sum(axis=-1))
