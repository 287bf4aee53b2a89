"""Explains a folder of pictures or videos: what a model looked at, next to each, without labels."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import UInt8

from iared2_jax.data import videos
from iared2_jax.data.folder import EXTENSIONS
from iared2_jax.data.images import BadImage, eval_transform, open_image, with_channels
from iared2_jax.data.videos import BadVideo
from iared2_jax.errors import DataError, UsageError
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.report.figures import draw_all
from iared2_jax.token_reduction.model import IARed2

log = logging.getLogger(__name__)

_WRITTEN = (".heatmap.png", ".hierarchy.png", ".scores.gif")


def pictures_in(folder: Path, extensions: Sequence[str] = EXTENSIONS) -> list[Path]:
    """The pictures (or videos) of a folder, but for those that `explain_pictures` wrote.

    Raises:
      UsageError: there is no such folder, or none of them in it.
    """
    if not folder.is_dir():
        raise UsageError(
            f"config.data.path={str(folder)!r} must be a folder of pictures or videos to explain"
        )
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in extensions and not path.name.endswith(_WRITTEN)
    )
    if not found:
        kind = "videos" if extensions == videos.EXTENSIONS else "pictures"
        raise UsageError(f"{folder} holds no {kind} ({', '.join(extensions)})")
    return found


def explain_pictures(
    config: ml_collections.ConfigDict, load: Callable[[], tuple[IARed2, dict[str, Any]]]
) -> list[Path]:
    """Writes <picture>.heatmap.png and <picture>.hierarchy.png beside every picture of data.path.

    The heatmaps are the scores of the second group (Fig. 3), the hierarchy what each group still
    sees (Fig. 4). A model of clips explains videos: their frames in a row, and <video>.scores.gif.
    What cannot be read is named, and left out.

    Args:
      load: gives module and variables, once there is something to explain.

    Returns:
      The pictures or videos that were explained.

    Raises:
      UsageError: no folder, no pictures, or weights that do not fit.
      DataError: none of them was readable.
    """
    if not config.data.path:
        raise UsageError("config.mode=explain needs config.data.path: which folder of pictures?")
    folder = Path(config.data.path)
    pictures_in(folder, (*EXTENSIONS, *videos.EXTENSIONS))
    module, variables = load()
    spec, done = module.input_spec, []
    paths = pictures_in(folder, videos.EXTENSIONS if spec.is_clip else EXTENSIONS)
    for path in paths:
        try:
            pixels = _pixels(path, spec, config)
        except DataError as error:
            log.warning("left out: %s", error)
            continue
        beside = [path.with_name(path.name + ending) for ending in _WRITTEN]
        draw_all(module, variables, pixels[None], beside, thresholds=config.reduction.threshold)
        done.append(path)
        log.info("%s: written beside it", path)
    if not done:
        kind, error = ("videos", BadVideo) if spec.is_clip else ("pictures", BadImage)
        raise error(f"none of the {len(paths)} {kind} in {folder} could be read")
    return done


def _pixels(
    path: Path, spec: InputSpec, config: ml_collections.ConfigDict
) -> UInt8[np.ndarray, "..."]:
    if spec.is_clip:
        return videos.read_video(path, spec, config.data.sampling_rate)
    picture = open_image(path, exif_rotation=config.explain.upright)
    pixels = eval_transform(picture, spec.size, spec.crop_pct, name=str(path))
    return with_channels(pixels, spec.channels)
