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
from iared2_jax.evaluation.compare_maps import compare_maps
from iared2_jax.evaluation.map_sources import map_sources
from iared2_jax.files import writing
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.report.explorer import collect_images
from iared2_jax.report.figures import draw_all
from iared2_jax.report.page import write_explanations
from iared2_jax.report.results import versions
from iared2_jax.token_reduction.model import IARed2

log = logging.getLogger(__name__)

PAGE = "iared2_report.html"
ON_A_PAGE = 500  # a browser is quick with so many
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
    A page to explore them all, `PAGE`, comes beside them. What cannot be read is named, and left
    out.

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
    spec, done, shown = module.input_spec, [], []
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
        if len(shown) < ON_A_PAGE:
            shown.append(pixels)
        log.info("%s: written beside it", path)
    if not done:
        kind, error = ("videos", BadVideo) if spec.is_clip else ("pictures", BadImage)
        raise error(f"none of the {len(paths)} {kind} in {folder} could be read")
    _write_page(folder / PAGE, config, module, variables, done[: len(shown)], shown)
    log.info("%s shows %d of the %d", folder / PAGE, len(shown), len(done))
    return done


def _write_page(
    page: Path,
    config: ml_collections.ConfigDict,
    module: IARed2,
    variables: dict[str, Any],
    paths: Sequence[Path],
    pictures: Sequence[np.ndarray],
) -> None:
    """The page with every picture, its scores, and the maps that `config.explain.maps` names."""
    pixels, size = np.stack(pictures), min(config.eval.batch_size, len(pictures))
    methods = [name for name in config.explain.maps if name != "interpreter"]
    sources = map_sources(module, methods, options={"lime": {"samples": config.eval.lime_samples}})
    found = compare_maps(
        module, variables, pixels, sources=sources, perturbation=False, sanity=False,
        keep=len(pixels), batch_size=size,
    )  # fmt: skip
    maps = {name.replace("_", " "): heatmaps for name, heatmaps in found["values"].items()}
    explorer = collect_images(
        module, variables, variables, pixels, names=[path.name for path in paths],
        thresholds=config.reduction.threshold, maps=maps, batch_size=size,
    )  # fmt: skip
    with writing(page) as draft:
        write_explanations(draft, explorer, f"IA-RED²: {page.parent.name}", versions())


def _pixels(
    path: Path, spec: InputSpec, config: ml_collections.ConfigDict
) -> UInt8[np.ndarray, "..."]:
    if spec.is_clip:
        return videos.read_video(path, spec, config.data.sampling_rate)
    picture = open_image(path, exif_rotation=config.explain.upright)
    pixels = eval_transform(picture, spec.size, spec.crop_pct, name=str(path))
    return with_channels(pixels, spec.channels)
