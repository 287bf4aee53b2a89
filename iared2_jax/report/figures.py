"""The paper's Figures 3 and 4, for any model and any images, as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from iared2_jax.attribution.maps import (
    explain,
    keep_masks,
    normalized,
    raw_attention,
    to_heatmaps,
)
from iared2_jax.token_reduction.model import IARed2, Thresholds

_CELL = 1.5  # inches
_DROPPED = 0.25  # brightness of a dropped patch


def draw_comparison(
    module: IARed2,
    variables: Mapping[str, Any],
    pixels: UInt8[np.ndarray, "b h w 3"],
    path: str | Path,
    *,
    group: int = 2,
    block: int = 1,
    thresholds: Thresholds = 0.5,
    attention_variables: Mapping[str, Any] | None = None,
) -> Path:
    """Figure 3: input, raw attention, and the informative scores, one row per image.

    Args:
      pixels: images at the model's size.
      group: of the scores; the paper shows the second.
      block: of the raw attention, from 0, or -1 for the last; the paper takes Block_1.
      attention_variables: the backbone whose attention is shown; by default `variables`. For a
        fine-tuned model the paper's baseline is the backbone as it was before.
    """
    images = normalized(module, pixels)
    columns = {"input": None}
    maps = raw_attention(module, attention_variables or variables, images)
    if maps:  # a backbone may have none
        shown = "last block" if block < 0 else f"block {block}"
        columns[f"raw attention\n({shown})"] = to_heatmaps(maps[block], module.input_spec)
    columns |= {
        f"ours\n(group {group})": explain(module, variables, images, group, thresholds),
    }
    figure, axes = _grid(len(pixels), list(columns))
    for row, image in enumerate(pixels):
        for axis, heatmaps in zip(axes[row], columns.values(), strict=True):
            axis.imshow(image)
            if heatmaps is not None:
                axis.imshow(_stretched(np.asarray(heatmaps[row])), cmap="jet", alpha=0.5)
    return _save(figure, path)


def draw_hierarchy(
    module: IARed2,
    variables: Mapping[str, Any],
    pixels: UInt8[np.ndarray, "b h w 3"],
    path: str | Path,
    *,
    thresholds: Thresholds = 0.5,
) -> Path:
    """Figure 4: what each group still sees, with the share of patches kept on each image."""
    images = normalized(module, pixels)
    masks = keep_masks(module, variables, images, thresholds)
    titles = ["input", *(f"group {group}" for group in range(1, module.num_groups + 1))]
    figure, axes = _grid(len(pixels), titles)
    size = pixels.shape[1]
    for row, image in enumerate(pixels):
        axes[row, 0].imshow(image)
        for axis, keep in zip(axes[row, 1:], masks, strict=True):
            kept = np.asarray(keep[row])
            axis.imshow(_shaded(image, kept, size))
            axis.text(
                0.04, 0.95, f"{kept.mean():.2f}", transform=axis.transAxes, va="top", fontsize=9,
                color="white", bbox={"facecolor": "black", "pad": 1.5, "linewidth": 0},
            )  # fmt: skip
    return _save(figure, path)


def _shaded(image: np.ndarray, kept: np.ndarray, size: int) -> np.ndarray:
    """The image over a grey ground; dropped patches are dimmed, so that black images show it."""
    side = round(len(kept) ** 0.5)
    mask = np.kron(kept.reshape(side, side), np.ones((size // side, size // side)))[..., None]
    lit = 0.35 + 0.65 * image / 255
    return np.where(mask, lit, lit * _DROPPED)


def _stretched(heatmap: np.ndarray) -> np.ndarray:
    """Min-max per image, as both columns of Figure 3 are shown."""
    span = heatmap.max() - heatmap.min()
    return (heatmap - heatmap.min()) / (span if span > 0 else 1)


def _grid(rows: int, titles: Sequence[str]):
    columns = len(titles)
    figure = Figure(figsize=(_CELL * columns, _CELL * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    return figure, axes


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
