"""Position embeddings for another grid of patches."""

import math

import jax
import numpy as np
from jaxtyping import Float

from iared2_jax.errors import UsageError
from iared2_jax.models.input_spec import InputSpec

# How positions are resized, as each project's own code does it. "antialiased": bicubic with an
# antialiasing filter (timm; DINOv2 with registers). "plain": without one (transformers' DINOv2).
# "offset": plain, and sampled as if the new grid were 0.1 larger (DINOv2's authors).
INTERPOLATIONS = ("antialiased", "plain", "offset")
_OFFSET = 0.1


def resize_positions(
    positions: Float[np.ndarray, "1 t d"],
    spec: InputSpec,
    num_prefix: int = 0,
    joined: bool = True,
    source: object = "the file",
    interpolation: str = "antialiased",
) -> Float[np.ndarray, "1 u d"]:
    """Position embeddings for a model's grid: bicubic, prefix tokens kept.

    The frames of a clip share them.

    A file does not say how its grid lies: one of as many patches as the model's is taken to lie as
    the model's does, and any other must be a square.

    Args:
      positions: of `num_prefix` tokens and a grid; or of the grid alone, where the prefix then
        gets zeros (joined=False, as big_vision has it).
      spec: the model's inputs.
      num_prefix: the model's tokens before the grid that have positions.
      source: what errors name.
      interpolation: one of `INTERPOLATIONS`.

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
        grid = _resized(square, spec.frame_grid, interpolation).reshape(1, -1, width)
    return np.concatenate([prefix, grid], axis=1)


def _resized(
    square: Float[np.ndarray, "1 s s d"], grid: tuple[int, int], interpolation: str
) -> Float[np.ndarray, "1 h w d"]:
    if interpolation == "antialiased":
        with jax.ensure_compile_time_eval():  # the caller may be tracing
            resized = jax.image.resize(square, (1, *grid, square.shape[-1]), "cubic")
        return np.asarray(resized)
    offset = _OFFSET if interpolation == "offset" else 0
    down, across = (_cubic_weights(square.shape[1], size, offset) for size in grid)
    return np.einsum("is,jt,bstd->bijd", down, across, square).astype(np.float32)


def _cubic_weights(have: int, want: int, offset: float) -> Float[np.ndarray, "want have"]:
    """PyTorch's bicubic interpolation along one axis, as a matrix: a = -0.75, edges repeated.

    offset: how much larger than `want` the new grid is taken to be, where its points are placed.
    """
    centers = (np.arange(want) + 0.5) * have / (want + offset) - 0.5
    weights = np.zeros((want, have))
    for step in (-1, 0, 1, 2):
        places = np.floor(centers).astype(int) + step
        near = np.clip(places, 0, have - 1)
        np.add.at(weights, (np.arange(want), near), _cubic(np.abs(centers - places)))
    return weights


def _cubic(distance: Float[np.ndarray, " n"], a: float = -0.75) -> Float[np.ndarray, " n"]:
    """Keys' kernel, which is 0 from a distance of 2 on."""
    inner = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    outer = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, inner, np.where(distance < 2, outer, 0))


def resize_times(times: Float[np.ndarray, "1 t d"], frames: int) -> Float[np.ndarray, "1 u d"]:
    """Time embeddings for another number of frames: the nearest one, as TimeSformer does it.

    Example:
      >>> resize_times(np.array([[[0.0], [1.0]]]), 4).ravel().tolist()
      [0.0, 0.0, 1.0, 1.0]
    """
    return times[:, np.arange(frames) * times.shape[1] // frames]
