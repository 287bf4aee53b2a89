"""Explains a folder of pictures: what a model looked at, written next to each, without labels."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from iared2_jax.data.folder import EXTENSIONS
from iared2_jax.data.images import BadImage, eval_transform, open_image, with_channels
from iared2_jax.errors import UsageError
from iared2_jax.report.figures import draw_comparison, draw_hierarchy
from iared2_jax.token_reduction.model import IARed2

log = logging.getLogger(__name__)

_WRITTEN = (".heatmap.png", ".hierarchy.png")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, but for those that `explain_pictures` wrote.

    Raises:
      UsageError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise UsageError(
            f"config.data.path={str(folder)!r} must be a folder of pictures to explain"
        )
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in EXTENSIONS and not path.name.endswith(_WRITTEN)
    )
    if not found:
        raise UsageError(f"{folder} holds no pictures ({', '.join(EXTENSIONS)})")
    return found


def explain_pictures(
    config: ml_collections.ConfigDict, load: Callable[[], tuple[IARed2, dict[str, Any]]]
) -> list[Path]:
    """Writes <picture>.heatmap.png and <picture>.hierarchy.png beside every picture of data.path.

    The heatmaps are the scores of the second group (Fig. 3), the hierarchy what each group still
    sees (Fig. 4). A picture that cannot be read is named, and left out.

    Args:
      load: gives module and variables, once there are pictures.

    Returns:
      The pictures that were explained.

    Raises:
      UsageError: no folder, no pictures, or weights that do not fit; BadImage if none was readable.
    """
    if not config.data.path:
        raise UsageError("config.mode=explain needs config.data.path: which folder of pictures?")
    paths = pictures_in(Path(config.data.path))
    module, variables = load()
    spec, done = module.input_spec, []
    for path in paths:
        try:
            pixels = eval_transform(
                open_image(path, exif_rotation=config.explain.upright),
                spec.size,
                spec.crop_pct,
                name=str(path),
            )
        except BadImage as error:
            log.warning("left out: %s", error)
            continue
        pixels = with_channels(pixels, spec.channels)
        _draw(module, variables, pixels[None], path, config.reduction.threshold)
        done.append(path)
        log.info("%s: written beside it", path)
    if not done:
        raise BadImage(f"none of the {len(paths)} pictures in {config.data.path} could be read")
    return done


def _draw(module, variables, pixels, path: Path, threshold: float) -> None:
    heatmap, hierarchy = (path.with_name(path.name + ending) for ending in _WRITTEN)
    draw_comparison(
        module,
        variables,
        pixels,
        heatmap,
        group=min(2, module.num_groups),
        block=1 if module.backbone.num_prefix else -1,
        thresholds=threshold,
    )
    draw_hierarchy(module, variables, pixels, hierarchy, thresholds=threshold)
