"""Explains a folder of pictures: what a model looked at, written next to each, without labels."""

import logging
from pathlib import Path

import ml_collections
import numpy as np

from iared2_jax import train
from iared2_jax.checkpoints.tensors import read_tensors
from iared2_jax.checkpoints.weights import num_classes_of, warn_if_untrained
from iared2_jax.data.images import BadImage, eval_transform, open_image
from iared2_jax.errors import UsageError
from iared2_jax.models.registry import get_variant
from iared2_jax.report.figures import draw_comparison, draw_hierarchy

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png")
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


def explain_pictures(config: ml_collections.ConfigDict) -> list[Path]:
    """Writes <picture>.heatmap.png and <picture>.hierarchy.png beside every picture of data.path.

    The model is config.model with config.weights; the heatmaps are the scores of the second group
    (Fig. 3), the hierarchy what each group still sees (Fig. 4). A picture that cannot be read is
    named, and left out.

    Returns:
      The pictures that were explained.

    Raises:
      UsageError: no folder, no pictures, or weights that do not fit; BadImage if none was readable.
    """
    paths = pictures_in(Path(config.data.path))
    config = config.copy_and_resolve_references()
    config.unlock()
    tensors, _ = read_tensors(config.weights)
    warn_if_untrained(config.weights, tensors)
    config.model.num_classes = config.model.num_classes or num_classes_of(tensors)
    module, variables = train.build_model(config)
    variant = get_variant(config.model.name)
    done = []
    for path in paths:
        try:
            picture = open_image(path)
        except BadImage as error:
            log.warning("left out: %s", error)
            continue
        pixels = eval_transform(picture, module.backbone.image_size, variant.crop_pct)[None]
        _draw(config, module, variables, np.asarray(pixels), path)
        done.append(path)
        log.info("%s: written beside it", path)
    if not done:
        raise BadImage(f"none of the {len(paths)} pictures in {config.data.path} could be read")
    return done


def _draw(config, module, variables, pixels, path: Path) -> None:
    norm = get_variant(config.model.name).norm
    heatmap, hierarchy = (path.with_name(path.stem + ending) for ending in _WRITTEN)
    draw_comparison(
        module,
        variables,
        pixels,
        norm,
        heatmap,
        group=min(2, module.num_groups),
        block=1 if module.backbone.num_prefix else -1,
        thresholds=config.threshold,
    )
    draw_hierarchy(module, variables, pixels, norm, hierarchy, thresholds=config.threshold)
