"""`explain`: values per patch as heatmaps over the images, and what each group keeps."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from iared2_jax.attribution.methods import Method, attribute
from iared2_jax.attribution.methods.interpreter import masked_pass
from iared2_jax.attribution.methods.raw_attention import attention_of_blocks
from iared2_jax.data.inputs import Images, as_inputs, refuse_non_finite
from iared2_jax.models import input_spec
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.token_reduction.model import IARed2, Thresholds
from iared2_jax.typing import Array


def to_heatmaps(values: Float[Array, "b ..."], spec: InputSpec) -> Float[Array, "b ..."]:
    """Per-patch values on their grid, bilinearly enlarged: [B, H, W], of clips [B, T, H, W].

    Values per pixel are heatmaps already, and stay as they are.

    Raises:
      ValueError: not as many values as the inputs have patches or pixels.
    """
    if values.shape[1:] == spec.shape[:-1]:
        return jnp.asarray(values)
    grid = spec.on_grid(jnp.asarray(values))
    return jax.image.resize(grid, (*grid.shape[:-2], *spec.size), "bilinear")


def to_heatmap(values: Float[Array, "b n"], size: int) -> Float[Array, "b size size"]:
    """Values on a square grid as heatmaps of `size` px; deprecated, see `to_heatmaps`.

    Raises:
      ValueError: the number of values is no square.
    """
    warnings.warn(
        "to_heatmap(values, size) goes with the next release: use "
        "to_heatmaps(values, module.input_spec)",
        DeprecationWarning,
        stacklevel=2,
    )
    side = round(values.shape[-1] ** 0.5)
    grid = input_spec.images(side, 1).on_grid(jnp.asarray(values))
    return jax.image.resize(grid, (*grid.shape[:-2], size, size), "bilinear")


def explain(
    module: IARed2,
    variables: Mapping[str, Any],
    images: Images,
    group: int | None = None,
    thresholds: Thresholds | None = None,
    *,
    method: str | Method = "interpreter",
    target: Any = None,
    upright: bool = True,
    **options: Any,
) -> Float[Array, "b ..."]:
    """Where the model looked, as heatmaps [B, H, W] (of clips [B, T, H, W]).

    By default the informative scores of the second group (the paper's Fig. 3), in [0, 1]; a patch
    that an earlier group dropped scores 0. The model's weights are used as they are: no gradient,
    no second model. All other methods of `attribution.METHODS` explain the dense backbone.

    All images run at once: hand many of them in by parts.

    Args:
      images: see `data.inputs.as_inputs`: normalised arrays, uint8 pixels, PIL images, JPEG and PNG
        files, or a list of these.
      group, thresholds: options of the method "interpreter": which group's scores, from 1 to D;
        keep iff score > threshold, one for all groups or one each.
      method: a name of `attribution.METHODS`, or a function of your own.
      target: of methods that explain a class, which: one, or one for each image; by default the
        class that each image is taken for.
      upright: turn pictures by their EXIF orientation; the heatmap is of the upright picture.
      **options: the method's own.

    Raises:
      UsageError: images that cannot be used or are not finite; no such method, class, group or
        option; a method that has no meaning for this backbone.
      BadImage: a file cannot be read as an image.

    Example:
      >>> import jax.numpy as jnp, iared2_jax
      >>> module, variables = iared2_jax.create_model("vit_micro")
      >>> iared2_jax.explain(module, variables, jnp.zeros([2, 64, 64, 3])).shape
      (2, 64, 64)
    """
    given = {"group": group, "thresholds": thresholds}
    options |= {name: value for name, value in given.items() if value is not None}
    inputs = as_inputs(images, module.input_spec, upright)
    refuse_non_finite(inputs)
    values = attribute(method, module, variables, inputs, target=target, **options)
    return to_heatmaps(values, module.input_spec)


def keep_masks(
    module: IARed2,
    variables: Mapping[str, Any],
    images: Images,
    thresholds: Thresholds = 0.5,
) -> tuple[Bool[Array, "b n"], ...]:
    """Which patches each group's blocks see."""
    inputs = as_inputs(images, module.input_spec)
    return masked_pass(module, variables, inputs, thresholds).keep


def raw_attention(
    module: IARed2, variables: Mapping[str, Any], images: Images
) -> list[Float[Array, "b n"]]:
    """CLS-to-patch attention, mean over heads, of every block of the dense backbone.

    The paper's "raw attention" is entry 1 (Block_1, counted from 0).
    """
    return attention_of_blocks(module, variables, as_inputs(images, module.input_spec))


def read_images(module: IARed2, paths: Sequence[str | Path]) -> Float[Array, "b h w c"]:
    """Image files as the model's weights expect them: cropped, resized, normalised.

    Raises:
      BadImage: a file cannot be read as an image.
    """
    return as_inputs(list(paths), module.input_spec)
