"""Many changed copies of images, run through the dense model a batch at a time."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from iared2_jax.attribution.targets import class_probability
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array


@functools.partial(jax.jit, static_argnums=0)
def dense_logits(
    module: IARed2, variables: Mapping[str, Any], inputs: Float[Array, "b ..."]
) -> Float[Array, "b classes"]:
    """The answers of the dense backbone; compiled once per model and batch size."""
    return module.apply(variables, inputs, execution="dense")[0]


def pixels_of_patches(spec: InputSpec, values: Shaped[Array, "... n"]) -> Shaped[Array, "..."]:
    """A value per patch, repeated over its pixels: [.., H, W], of clips [.., T, H, W]."""
    grid = spec.on_grid(values)
    return grid.repeat(spec.patch[0], axis=-2).repeat(spec.patch[1], axis=-1)


def probability_of_copies(
    module: IARed2,
    variables: Mapping[str, Any],
    make: Callable[[Array], Float[Array, "b ..."]],
    classes: Int[Array, " b"],
    each: int,
    batch_size: int,
) -> Float[Array, "b each"]:
    """The dense model's probability of each image's class, on `each` copies of the image.

    The loop is not compiled: inside a compiled one XLA's CPU backend is several times slower.

    Args:
      make: jitted; numbers of copies to normalised inputs. Number k is of image k // each.
      batch_size: copies that run at a time, whichever images they are of.
    """
    count = len(classes) * each
    batch_size = min(batch_size, count)
    parts = []
    for start in range(0, count, batch_size):
        numbers = np.minimum(np.arange(start, start + batch_size), count - 1)
        logits = dense_logits(module, variables, make(numbers))
        parts.append(_probability(logits, classes, numbers // each))
    return jnp.concatenate(parts)[:count].reshape(len(classes), each)


@jax.jit
def _probability(logits: Array, classes: Array, images: Array) -> Array:
    return class_probability(logits, classes[images])
