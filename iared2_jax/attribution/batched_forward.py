"""Many changed copies of images, run through the dense model a batch at a time."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

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


def logits_of_copies(
    module: IARed2,
    variables: Mapping[str, Any],
    make: Callable[[Array], Float[Array, "b ..."]],
    count: int,
    batch_size: int,
) -> Float[Array, "count classes"]:
    """The dense logits of copies 0 .. count - 1, `batch_size` at a time.

    The loop is not compiled: inside a compiled one XLA's CPU backend is several times slower.

    Args:
      make: jitted; numbers of copies [b] to normalised inputs.
    """
    batch_size = min(batch_size, count)
    parts = []
    for start in range(0, count, batch_size):
        numbers = np.minimum(np.arange(start, start + batch_size), count - 1)
        parts.append(dense_logits(module, variables, make(numbers)))
    return jnp.concatenate(parts)[:count]
