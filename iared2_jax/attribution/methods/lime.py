"""LIME (Ribeiro et al. 2016): a linear model of the answer over segments that are there or not."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from iared2_jax.attribution.batched_forward import (
    dense_logits,
    pixels_of_patches,
    probability_of_copies,
)
from iared2_jax.attribution.targets import Target
from iared2_jax.errors import UsageError
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array

# As the `lime` package has it.
_KERNEL_WIDTH = 0.25
_RIDGE = 1.0

Segments = str | Callable[[np.ndarray], np.ndarray] | Int[Array, "b ..."]


def lime(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    target: Target = None,
    segments: Segments = "patches",
    samples: int = 1000,
    fill: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Float[Array, "b ..."]:
    """Weights of segments in a ridge regression of the class's probability.

    Samples leave out each segment with a chance of 1/2; they count by their likeness to the whole
    image, sqrt(exp(-d^2 / 0.25^2)) with d the cosine distance, as in the `lime` package.

    Args:
      target: the class that is explained; None: the predicted one.
      segments: "patches"; integers as large as the images; or a function from an image
        [H, W, C] (a clip [T, H, W, C]) in [0, 1] to such, e.g. `skimage.segmentation.slic`.
      samples: forward passes per image, the whole image included.
      fill: the normalised value of what is left out; None: each segment's own mean colour.
      batch_size: samples that run at a time.

    Returns:
      Values per patch, or per pixel for other segments.

    Raises:
      UsageError: segments that do not fit the images, or too few samples.
    """
    if samples < 2:
        raise UsageError(f"LIME needs at least 2 samples, got {samples}")
    if isinstance(segments, str) and segments != "patches":
        raise UsageError(f'segments must be "patches", integers or a function, got {segments!r}')
    of_patches = isinstance(segments, str)
    if of_patches:
        n = module.input_spec.num_patches
        places = pixels_of_patches(module.input_spec, jnp.arange(n))
        places = jnp.broadcast_to(places, inputs.shape[:-1])
    else:
        places, n = _segmented(module, inputs, segments)
    logits = dense_logits(module, variables, inputs)
    classes = logits.argmax(axis=-1) if target is None else target
    rows = draw_rows(jax.random.key(seed), samples, n)
    blanks = _mean_colours(inputs, places, n) if fill is None else jnp.full_like(inputs, fill)
    show = functools.partial(_left_out, inputs, blanks, places, rows)
    answers = probability_of_copies(module, variables, show, classes, samples, batch_size)
    weights = _fit(rows, places, answers)
    if of_patches:
        return weights
    return jnp.take_along_axis(weights, places.reshape(len(places), -1), axis=1).reshape(
        places.shape
    )


def _segmented(module: IARed2, inputs: Array, segments: Any) -> tuple[Array, int]:
    """Segments counted from 0 in every image, and the greatest number of them."""
    if callable(segments):
        mean, std = (np.asarray(part) for part in module.input_spec.norm)
        colours = module.input_spec.without_map(np.asarray(inputs))
        pixels = np.clip(colours * std + mean, 0, 1)
        segments = np.stack([segments(image) for image in pixels])
    segments = np.asarray(segments)
    if segments.shape != inputs.shape[:-1] or segments.dtype.kind not in "iu":
        raise UsageError(
            f"segments must be integers {list(inputs.shape[:-1])}, got {segments.dtype} "
            f"{list(segments.shape)}"
        )
    counted = [np.unique(image, return_inverse=True)[1].reshape(image.shape) for image in segments]
    return jnp.asarray(np.stack(counted), jnp.int32), 1 + max(int(x.max()) for x in counted)


@jax.jit
def _left_out(inputs: Array, blanks: Array, places: Array, rows: Array, numbers: Array) -> Array:
    """Copies of images: number k is image k // S; segments that row k % S does not show are blank.

    S is the number of rows.
    """
    image, row = numbers // len(rows), numbers % len(rows)
    place = places[image]
    shown = jnp.take_along_axis(rows[row], place.reshape(len(numbers), -1), axis=1)
    return jnp.where(shown.reshape(place.shape)[..., None], inputs[image], blanks[image])


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def _fit(rows: Array, place: Array, answers: Array) -> Array:
    """Segment weights of one image by `fit_segments`; columns that it has no segment for get 0."""
    has_segment = jnp.zeros(rows.shape[1], bool).at[place].set(True)
    return fit_segments(rows & has_segment, answers)


def draw_rows(key: Array, samples: int, segments: int) -> Bool[Array, "samples segments"]:
    """Which segments each sample shows: all in the first, half of them in the others."""
    return jax.random.bernoulli(key, 0.5, (samples, segments)).at[0].set(True)


def fit_segments(
    rows: Bool[Array, "samples segments"], y: Float[Array, " samples"]
) -> Float[Array, " segments"]:
    """Ridge regression with an intercept, samples weighted by their likeness to the first one."""
    x = rows.astype(jnp.float32)
    whole = x[0].sum()
    cosine = x.sum(axis=1) / jnp.sqrt(jnp.maximum(x.sum(axis=1), 1) * whole)
    weight = jnp.sqrt(jnp.exp(-((1 - cosine) ** 2) / _KERNEL_WIDTH**2))
    share = weight / weight.sum()
    x, y = x - share @ x, y - share @ y
    gram = (x * weight[:, None]).T @ x + _RIDGE * jnp.eye(x.shape[1])
    return jax.scipy.linalg.solve(gram, x.T @ (weight * y), assume_a="pos")


@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jax.vmap, in_axes=(0, 0, None))
def _mean_colours(image: Array, place: Array, segments: int) -> Array:
    """The image, every segment in its mean colour."""
    flat, colours = place.reshape(-1), image.reshape(-1, image.shape[-1])
    total = jax.ops.segment_sum(colours, flat, segments)
    count = jax.ops.segment_sum(jnp.ones(len(flat)), flat, segments)
    return (total / jnp.maximum(count, 1)[:, None])[place]
