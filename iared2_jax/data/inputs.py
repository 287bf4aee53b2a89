"""What users hand in as images: arrays, PIL images and files, made into a model's inputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from iared2_jax.data.images import eval_transform, open_image, to_rgb, with_channels
from iared2_jax.data.videos import is_video, read_video
from iared2_jax.errors import UsageError, few
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.typing import Array

# One of these, or a list of them.
Images = Any


def as_inputs(images: Images, spec: InputSpec, upright: bool = True) -> Float[Array, "b ..."]:
    """A batch of normalised inputs from whatever shows images.

    Args:
      images: a batch of normalised inputs (floats), which is returned as it is, or one input;
        pixels 0..255 (uint8), a PIL image, or the path of a JPEG or PNG file, which are cropped and
        resized as the model's weights expect where they are of another size, and normalised; or a
        list of any of these. For a model of clips, a path is a video's, of which the start is
        taken, at TimeSformer's rate (`data.videos.read_video` takes others).
      spec: the model's.
      upright: turn files and PIL images by their EXIF orientation, as a person sees them.

    Raises:
      UsageError: something else, an empty list, or an array of another shape or kind.
      BadImage, BadVideo: a file cannot be read as an image, or as a video.

    Example:
      >>> from iared2_jax.models.input_spec import images
      >>> as_inputs([np.zeros((48, 64, 3), np.uint8), np.zeros((32, 32, 3))], images(32)).shape
      (2, 32, 32, 3)
    """
    if isinstance(images, list | tuple):
        if not images:
            raise UsageError("there are no images: the list is empty")
        return jnp.concatenate([as_inputs(image, spec, upright) for image in images])
    if isinstance(images, str | Path) and spec.is_clip and is_video(images):
        return _normalised(read_video(images, spec)[None], spec)
    if isinstance(images, str | Path):
        return _normalised(_picture(open_image(images, exif_rotation=upright), spec, images), spec)
    if isinstance(images, Image.Image):
        image = ImageOps.exif_transpose(images) if upright else images
        return _normalised(_picture(to_rgb(image), spec, "the PIL image"), spec)
    if not hasattr(images, "shape") or not hasattr(images, "dtype"):
        raise UsageError(
            f"images are {type(images).__name__}: give an array, PIL images, paths, or a list"
        )
    return _from_array(images, spec)


def _from_array(array: Array, spec: InputSpec) -> Float[Array, "b ..."]:
    if array.dtype == np.uint8:
        return _normalised(_pixels(array, spec), spec)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UsageError(
            f"images are {array.dtype}: give uint8 pixels 0..255, or floats that are normalised"
        )
    if tuple(array.shape) == spec.shape:
        array = array[None]
    if tuple(array.shape[1:]) != spec.shape or not array.shape[0]:
        raise UsageError(
            f"{spec.kind} are {list(array.shape)}, but the model takes {spec.batch_shape}, at least"
            " one"
        )
    return array


def _pixels(array: UInt8[Array, "..."], spec: InputSpec) -> UInt8[np.ndarray, "b ..."]:
    """Pixels of the model's size; colour pictures of another are cropped and resized."""
    pixels = np.asarray(array)
    if pixels.shape == spec.shape:
        return pixels[None]
    if pixels.shape[1:] == spec.shape and len(pixels):
        return pixels
    if spec.is_clip or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3 or not pixels.size:
        raise UsageError(
            f"pixels are {list(pixels.shape)}, but the model takes {spec.batch_shape}"
            f"{'' if spec.is_clip else ', or colour images of any size'}"
        )
    pictures = pixels[None] if pixels.ndim == 3 else pixels
    made = [_picture(Image.fromarray(picture), spec, "the array") for picture in pictures]
    return np.concatenate(made)


def _picture(image: Image.Image, spec: InputSpec, name: object) -> UInt8[np.ndarray, "1 h w c"]:
    if spec.is_clip:
        raise UsageError(f"{name} is a picture, but the model takes clips of {spec.frames} frames")
    pixels = eval_transform(image, spec.size, spec.crop_pct, name=str(name))
    return with_channels(pixels, spec.channels)[None]


def _normalised(pixels: UInt8[np.ndarray, "b ..."], spec: InputSpec) -> Float[Array, "b ..."]:
    return spec.normalize(pixels)


def refuse_non_finite(inputs: Float[Array, "b ..."]) -> None:
    """Refuses inputs with NaN or infinite values.

    Raises:
      UsageError: names the first of them.
    """
    bad = [i for i, x in enumerate(np.asarray(inputs)) if not np.isfinite(x).all()]
    if bad:
        raise UsageError(
            f"images {few(bad)} have values that are not finite: leave them out, or mend them"
        )


def is_traced(images: Images) -> bool:
    """Whether this is no array yet, but a place for one in a function that is being compiled."""
    return isinstance(images, jax.core.Tracer)


def check_labels(labels: Sequence[int] | Array, count: int, num_classes: int) -> np.ndarray:
    """Labels as an array, one class from 0 on for each of `count` images.

    Raises:
      UsageError: other shapes, kinds or classes.
    """
    values = np.asarray(labels)
    if values.ndim != 1 or len(values) != count:
        raise UsageError(
            f"labels are {list(values.shape)}, but there are {count} images: one class each"
        )
    if not np.issubdtype(values.dtype, np.integer):
        raise UsageError(f"labels are {values.dtype}, but must be whole numbers: the classes")
    if values.min() < 0 or values.max() >= num_classes:
        raise UsageError(
            f"labels go from {values.min()} to {values.max()}, but the model's classes from 0 to "
            f"{num_classes - 1}: are they counted from 1?"
        )
    return values
