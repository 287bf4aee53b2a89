"""A map from outside: any scorer of pictures, or maps that are there already (MemNet's place)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from iared2_jax.errors import UsageError
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array

Scorer = Callable[[Float[np.ndarray, "b h w c"]], Float[np.ndarray, " b"]]


def memorability(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    scorer: Scorer | None = None,
    maps: Float[Array, "b h w"] | None = None,
    window: int | None = None,
    stride: int | None = None,
) -> Float[Array, "b h w"]:
    """What somebody else's model finds memorable, or whatever it scores, per pixel.

    The paper's baseline is MemNet, whose weights are not to be had. Give what you have: `maps`, cut
    and resized as the images were; or a `scorer` of whole pictures, which is slid over the image:
    a pixel's value is the mean score of the windows that cover it. By default, the inputs' own
    map, if they have one (`InputSpec.map_channel`).

    Args:
      scorer: windows [b, window, window, C] of normalised pixels to a number each.
      window, stride: px; by default a quarter of the shorter side, and half the window.

    Raises:
      UsageError: not exactly one of scorer and maps, or they do not fit the images.
    """
    if scorer is None and maps is None and module.input_spec.map_channel:
        maps = inputs[..., -1]
    if (scorer is None) == (maps is None):
        raise UsageError(
            "memorability needs a scorer=.. of pictures or maps=.. that are there already"
        )
    spec = module.input_spec
    if spec.is_clip:
        raise UsageError("memorability is of images, but the model takes clips")
    if maps is not None:
        given = np.asarray(maps, np.float32)
        if given.shape != inputs.shape[:-1]:
            raise UsageError(f"maps must be {list(inputs.shape[:-1])}, got {list(given.shape)}")
        return given
    window = window or min(spec.size) // 4
    stride = stride or max(1, window // 2)
    if not 1 <= window <= min(spec.size) or stride < 1:
        raise UsageError(f"window={window} and stride={stride} px do not fit images of {spec.size}")
    return _slide(np.asarray(spec.without_map(inputs)), scorer, window, stride)


def _slide(
    images: Float[np.ndarray, "b h w c"], scorer: Scorer, window: int, stride: int
) -> Float[np.ndarray, "b h w"]:
    """The mean score of the windows over every pixel; the last windows touch the border."""
    total = np.zeros(images.shape[:3], np.float32)
    count = np.zeros(images.shape[1:3], np.float32)
    starts = [sorted({*range(0, n - window, stride), n - window}) for n in images.shape[1:3]]
    for top in starts[0]:
        for left in starts[1]:
            here = (slice(top, top + window), slice(left, left + window))
            scores = np.asarray(scorer(images[:, here[0], here[1]]), np.float32)
            if scores.shape != (len(images),):
                raise UsageError(
                    f"scorer must give {len(images)} numbers for {len(images)} windows, "
                    f"got the shape {list(scores.shape)}"
                )
            total[:, here[0], here[1]] += scores[:, None, None]
            count[here] += 1
    return total / count
