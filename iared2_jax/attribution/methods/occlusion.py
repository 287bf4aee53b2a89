"""Occlusion (Zeiler and Fergus 2014): what the answer loses when a window is covered."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from iared2_jax.attribution.batched_forward import (
    dense_logits,
    pixels_of_patches,
    probability_of_copies,
)
from iared2_jax.attribution.targets import Target, class_probability
from iared2_jax.errors import UsageError
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array


def occlusion(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    target: Target = None,
    window: int = 1,
    fill: float = 0.0,
    batch_size: int = 64,
) -> Float[Array, "b n"]:
    """The loss of the class's probability when `window` x `window` patches around one are covered.

    N + 1 forward passes per image.

    Args:
      target: the class that is explained; None: the predicted one.
      window: patches, odd. fill: the normalised value of covered pixels; 0 is the mean colour.
      batch_size: covered images that run at a time.

    Raises:
      UsageError: the window is not odd.
    """
    if window < 1 or window % 2 == 0:
        raise UsageError(f"window must be an odd number of patches, got {window}")
    n, spec = module.input_spec.num_patches, module.input_spec
    covers = pixels_of_patches(spec, _windows(spec, window))
    logits = dense_logits(module, variables, inputs)
    classes = logits.argmax(axis=-1) if target is None else target

    def covered(numbers: Array) -> Array:
        return _covered(inputs, covers, fill, numbers)

    left = probability_of_copies(module, variables, covered, classes, n, batch_size)
    return class_probability(logits, classes)[:, None] - left


@jax.jit
def _covered(inputs: Array, covers: Array, fill: ArrayLike, numbers: Array) -> Array:
    """Copies of images: number k is image k // N without the window of patch k % N."""
    n = len(covers)
    return jnp.where(covers[numbers % n][..., None], fill, inputs[numbers // n])


def _windows(spec: InputSpec, window: int) -> Bool[Array, "n n"]:
    """For every patch, which patches are covered with it; in clips those of its frame."""
    axes = map(jnp.arange, (*spec.frame_grid, spec.frames or 1))  # the order of tokens
    row, column, frame = (place.reshape(-1) for place in jnp.meshgrid(*axes, indexing="ij"))

    def apart(place: Array) -> Array:
        return jnp.abs(place[:, None] - place[None, :])

    near = jnp.maximum(apart(row), apart(column)) <= window // 2
    return near & (apart(frame) == 0)
