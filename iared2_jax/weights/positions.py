"""Position embeddings for another grid of patches."""

import math

import jax
import numpy as np
from jaxtyping import Float

from iared2_jax.errors import UsageError
from iared2_jax.models.input_spec import InputSpec


def resize_positions(
    positions: Float[np.ndarray, "1 t d"],
    spec: InputSpec,
    num_prefix: int = 0,
    joined: bool = True,
    source: object = "the file",
) -> Float[np.ndarray, "1 u d"]:
    """Position embeddings for a model's grid: bicubic with antialiasing, prefix tokens kept.

    The frames of a clip share them.

    A file does not say how its grid lies: one of as many patches as the model's is taken to lie as
    the model's does, and any other must be a square.

    Args:
      positions: of `num_prefix` tokens and a grid; or of the grid alone, where the prefix then
        gets zeros (joined=False, as big_vision has it).
      spec: the model's inputs.
      num_prefix: the model's.
      source: what errors name.

    Returns:
      [1, num_prefix + h w, d].

    Raises:
      UsageError: the file's grid is not the model's, and no square.
    """
    width, there = positions.shape[-1], num_prefix if joined else 0
    grid, prefix = positions[:, there:], np.zeros((1, num_prefix, width), np.float32)
    if joined:
        prefix = positions[:, :there]
    count, side = grid.shape[1], round(grid.shape[1] ** 0.5)
    if count != math.prod(spec.frame_grid):
        if side * side != count:
            shape = " x ".join(map(str, spec.frame_grid))
            raise UsageError(
                f"{source} has positions for {count} patches, which are not the model's {shape}"
                " and no square: build the model at the size that the weights were trained at "
                "(image_size=(height, width))"
            )
        square = grid.reshape(1, side, side, width)
        with jax.ensure_compile_time_eval():  # the caller may be tracing
            resized = jax.image.resize(square, (1, *spec.frame_grid, width), "cubic")
        grid = np.asarray(resized).reshape(1, -1, width)
    return np.concatenate([prefix, grid], axis=1)


def resize_times(times: Float[np.ndarray, "1 t d"], frames: int) -> Float[np.ndarray, "1 u d"]:
    """Time embeddings for another number of frames: the nearest one, as TimeSformer does it.

    Example:
      >>> resize_times(np.array([[[0.0], [1.0]]]), 4).ravel().tolist()
      [0.0, 0.0, 1.0, 1.0]
    """
    return times[:, np.arange(frames) * times.shape[1] // frames]
