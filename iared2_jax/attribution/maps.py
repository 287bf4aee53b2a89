"""Maps over an image: per-patch values, and the heatmaps they are shown and judged as."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from iared2_jax.data.images import eval_transform, open_image
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.token_reduction.model import IARed2, Thresholds
from iared2_jax.typing import Array


def to_heatmaps(values: Float[Array, "b n"], spec: InputSpec) -> Float[Array, "b ..."]:
    """Per-patch values on their grid, bilinearly enlarged: [B, H, W], of clips [B, T, H, W].

    Raises:
      ValueError: not as many values as the inputs have patches.
    """
    grid = spec.on_grid(jnp.asarray(values))
    return jax.image.resize(grid, (*grid.shape[:-2], *spec.size), "bilinear")


def read_images(module: IARed2, paths: Sequence[str | Path]) -> Float[Array, "b height width 3"]:
    """Image files as the model's weights expect them: cropped, resized, normalised.

    Raises:
      BadImage: a file cannot be read as an image.
      ValueError: the module does not say how; those of `create_model` and `load_model` do.
    """
    spec = module.input_spec
    pixels = [
        eval_transform(open_image(path), spec.size, spec.crop_pct, name=str(path)) for path in paths
    ]
    return normalized(module, np.stack(pixels))


def normalized(
    module: IARed2, pixels: UInt8[Array, "b height width 3"]
) -> Float[Array, "b height width 3"]:
    """Pixels 0..255 as the model's weights expect them.

    Raises:
      ValueError: the module does not say how; those of `create_model` and `load_model` do.
    """
    return module.input_spec.normalize(pixels)


def explain(
    module: IARed2,
    variables: Mapping[str, Any],
    images: Float[Array, "b height width 3"] | str | Path | Sequence[str | Path],
    group: int = 2,
    thresholds: Thresholds = 0.5,
) -> Float[Array, "b height width"]:
    """Where the model looked: the informative scores of one group, as heatmaps in [0, 1].

    A patch that an earlier group dropped scores 0. The paper shows the second group (Fig. 3). The
    model's weights are used as they are: no gradient, no second model.

    Args:
      images: normalised, at the model's size; or JPEG and PNG files, which are cropped, resized and
        normalised as the model's weights expect.
      group: from 1 to D.
      thresholds: keep iff score > threshold; one for all groups or one each.

    Raises:
      ValueError: if there is no such group.
      BadImage: a file cannot be read as an image.

    Example:
      >>> import jax.numpy as jnp, iared2_jax
      >>> module, variables = iared2_jax.create_model("vit_micro")
      >>> iared2_jax.explain(module, variables, jnp.zeros([2, 64, 64, 3])).shape
      (2, 64, 64)
    """
    if not 1 <= group <= module.num_groups:
        raise ValueError(f"group must be in 1..{module.num_groups}, got {group}")
    if isinstance(images, str | Path):
        images = [images]
    if not hasattr(images, "shape"):
        images = read_images(module, images)

    out = _masked(module, variables, images, jnp.asarray(thresholds, jnp.float32))
    return to_heatmaps(out["scores"][group - 1], module.input_spec)


def keep_masks(
    module: IARed2,
    variables: Mapping[str, Any],
    images: Float[Array, "b height width 3"],
    thresholds: Thresholds = 0.5,
) -> tuple[Bool[Array, "b n"], ...]:
    """Which patches each group's blocks see."""
    return _masked(module, variables, images, jnp.asarray(thresholds, jnp.float32))["keep"]


@functools.partial(jax.jit, static_argnums=0)  # compiled once per model, not once per picture
def _masked(module: IARed2, variables, images, thresholds):
    out = module.apply(variables, images, thresholds)[1]
    return {"scores": out.scores, "keep": out.keep}


@functools.partial(jax.jit, static_argnums=0)
def _raw_attention(module: IARed2, variables, images):
    _, out = module.apply(variables, images, execution="dense")
    return [maps.mean(axis=1) for maps in out.attention]


def raw_attention(
    module: IARed2, variables: Mapping[str, Any], images: Float[Array, "b height width 3"]
) -> list[Float[Array, "b n"]]:
    """CLS-to-patch attention, mean over heads, of every block of the dense backbone.

    The paper's "raw attention" is entry 1 (Block_1, counted from 0).
    """
    return _raw_attention(module, variables, images)
