"""The paper's Figures 3 and 4 for any model and inputs as PNG; clips also as animated GIF."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from iared2_jax.attribution.maps import (
    explain,
    keep_masks,
    raw_attention,
    to_heatmaps,
)
from iared2_jax.files import writing
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.report.packing import in_colour
from iared2_jax.token_reduction.model import IARed2, Thresholds
from iared2_jax.typing import Array

_CELL = 1.5  # inches
_DROPPED = 0.25  # brightness of a dropped patch
_BLACK = 16  # a picture of which half the pixels are darker has a black ground
_GROUND = 0.35  # the grey that it is made
_ANIMATED = 4  # clips in one animation
_GIF_HEIGHT = 128  # px of a frame, at least


def draw_comparison(
    module: IARed2,
    variables: Mapping[str, Any],
    pixels: UInt8[np.ndarray, "b ..."],
    path: str | Path,
    *,
    group: int = 2,
    block: int = 1,
    thresholds: Thresholds = 0.5,
    attention_variables: Mapping[str, Any] | None = None,
) -> Path:
    """Figure 3: input, raw attention, and the informative scores, one row per image.

    Args:
      pixels: images or clips at the model's size; a clip is shown as its frames in a row.
      group: of the scores; the paper shows the second.
      block: of the raw attention, from 0, or -1 for the last; the paper takes Block_1.
      attention_variables: the backbone whose attention is shown; by default `variables`. For a
        fine-tuned model the paper's baseline is the backbone as it was before.
    """
    images = module.input_spec.normalize(pixels)
    columns = {"input": None}
    maps = raw_attention(module, attention_variables or variables, images)
    if maps:  # a backbone may have none
        shown = "last block" if block < 0 else f"block {block}"
        columns[f"raw attention\n({shown})"] = to_heatmaps(maps[block], module.input_spec)
    columns[f"ours\n(group {group})"] = explain(module, variables, images, group, thresholds)
    spec = module.input_spec
    figure, axes = _grid(len(pixels), list(columns), spec)
    for row, image in enumerate(pixels):
        for axis, heatmaps in zip(axes[row], columns.values(), strict=True):
            axis.imshow(_picture(image, spec))
            if heatmaps is not None:
                heatmap = _stretched(np.asarray(heatmaps[row]))
                axis.imshow(_in_a_row(heatmap, spec, gap=np.nan), cmap="jet", alpha=0.5)
    return _save(figure, path)


def draw_maps(
    spec: InputSpec,
    pixels: UInt8[np.ndarray, "b ..."],
    maps: Mapping[str, Float[Array, "b ..."]],
    path: str | Path,
) -> Path:
    """Figure 3 with any maps: the input, and every map over it, one row per image.

    Args:
      pixels: images or clips at the model's size.
      maps: heatmaps of these inputs, by name (`iared2_jax.explain`).
      path: its suffix says what is written: .png, .pdf, ..
    """
    titles = ["input", *(_title(name) for name in maps)]
    figure, axes = _grid(len(pixels), titles, spec)
    for row, image in enumerate(pixels):
        for axis in axes[row]:
            axis.imshow(_picture(image, spec))
        for axis, heatmaps in zip(axes[row, 1:], maps.values(), strict=True):
            heatmap = _stretched(np.asarray(heatmaps[row], np.float32))
            axis.imshow(_in_a_row(heatmap, spec, gap=np.nan), cmap="jet", alpha=0.5)
    return _save(figure, path)


def _title(name: str) -> str:
    """A map's name over its column, on two lines where it is long."""
    words = name.replace("_", " ")
    return words if len(words) < 12 else "\n".join(words.split(" ", 1))


def draw_curves(results: Mapping[str, Any], path: str | Path) -> Path:
    """The perturbation curves of every map: accuracy while pixels are taken away.

    Args:
      results: with "perturbation", as `compare_maps` returns it.
      path: its suffix says what is written: .png, .pdf, ..
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    titles = {
        "positive": "most important pixels first: lower is better",
        "negative": "least important pixels first: higher is better",
    }
    found = results["perturbation"]
    colours = colormaps["tab20"](np.linspace(0, 1, max(2, len(found))))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (order, title) in zip(axes, titles.items(), strict=True):
        for (name, figures), colour in zip(found.items(), colours, strict=False):
            values = 100 * np.asarray(figures["curves"][order]["accuracy"])
            ours = name.startswith("group")
            axis.plot(
                np.linspace(0, 100, len(values)),
                values,
                color=colour,
                label=name.replace("_", " "),
                linewidth=2.5 if ours else 1.2,
                linestyle="--" if name in ("random", "center") else "-",
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("pixels taken away, %")
        axis.grid(alpha=0.3)
    read = next(iter(found.values()))["read"]
    axes[0].set_ylabel(f"{read}, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    return _save(figure, path)


def draw_hierarchy(
    module: IARed2,
    variables: Mapping[str, Any],
    pixels: UInt8[np.ndarray, "b ..."],
    path: str | Path,
    *,
    thresholds: Thresholds = 0.5,
) -> Path:
    """Figure 4: what each group still sees, with the share of patches kept on each image."""
    images = module.input_spec.normalize(pixels)
    masks = keep_masks(module, variables, images, thresholds)
    titles = ["input", *(f"group {group}" for group in range(1, module.num_groups + 1))]
    spec = module.input_spec
    figure, axes = _grid(len(pixels), titles, spec)
    for row, image in enumerate(pixels):
        axes[row, 0].imshow(_picture(image, spec))
        for axis, keep in zip(axes[row, 1:], masks, strict=True):
            kept = np.asarray(keep[row])
            axis.imshow(_shaded(image, kept, spec))
            axis.text(
                0.04, 0.95, f"{kept.mean():.2f}", transform=axis.transAxes, va="top", fontsize=9,
                color="white", bbox={"facecolor": "black", "pad": 1.5, "linewidth": 0},
            )  # fmt: skip
    return _save(figure, path)


def draw_animation(
    module: IARed2,
    variables: Mapping[str, Any],
    pixels: UInt8[np.ndarray, "b t h w c"],
    path: str | Path,
    *,
    group: int = 1,
    thresholds: Thresholds = 0.5,
    frames_per_second: float = 4.0,
) -> Path:
    """Clips as an animated GIF, a row each: as they are, their scores, what the group keeps.

    Raises:
      ValueError: the model takes images.
    """
    spec = module.input_spec
    if not spec.is_clip:
        raise ValueError("an animation shows clips; this model takes images")
    inputs = spec.normalize(pixels)
    scores = np.asarray(explain(module, variables, inputs, group, thresholds))
    keep = spec.on_grid(np.asarray(keep_masks(module, variables, inputs, thresholds)[group - 1]))
    enlarged = -(-_GIF_HEIGHT // spec.height)
    shown = []
    for t in range(spec.frames):
        rows = []
        for clip, heatmap, kept in zip(pixels, scores, keep, strict=True):
            picture = in_colour(clip[t])
            hot = colormaps["jet"](_stretched(heatmap)[t])[..., :3]
            parts = (picture / 255, 0.5 * picture / 255 + 0.5 * hot, _lit(picture, kept[t], spec))
            rows.append(np.concatenate(parts, axis=1))
        panel = np.rint(255 * np.concatenate(rows)).astype(np.uint8)
        shown.append(Image.fromarray(panel.repeat(enlarged, axis=0).repeat(enlarged, axis=1)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    duration = round(1000 / frames_per_second)
    with writing(path) as draft:
        shown[0].save(
            draft, "GIF", save_all=True, append_images=shown[1:], duration=duration, loop=0
        )
    return path


def draw_all(
    module: IARed2,
    variables: Mapping[str, Any],
    pixels: UInt8[np.ndarray, "b ..."],
    paths: Sequence[Path],
    *,
    thresholds: Thresholds = 0.5,
    attention_variables: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Figure 3 (of the second group, if there is one), Figure 4, and of clips the animation.

    Args:
      paths: of the three; that of the animation is not written for images.

    Returns:
      The paths that were written.
    """
    drawn = [
        draw_comparison(
            module,
            variables,
            pixels,
            paths[0],
            group=min(2, module.num_groups),
            block=1 if module.backbone.num_prefix else -1,  # CaiT: its last class attention
            thresholds=thresholds,
            attention_variables=attention_variables,
        ),
        draw_hierarchy(module, variables, pixels, paths[1], thresholds=thresholds),
    ]
    if module.input_spec.is_clip:
        shown = pixels[:_ANIMATED]
        drawn.append(draw_animation(module, variables, shown, paths[2], thresholds=thresholds))
    return drawn


def _in_a_row(values: np.ndarray, spec: InputSpec, gap: float) -> np.ndarray:
    """A picture [H, W, ..] as it is; the frames of a clip [T, H, W, ..] side by side.

    gap: what is between the frames.
    """
    if not spec.is_clip:
        return values
    between = np.full_like(values[0, :, : max(1, spec.width // 32)], gap)
    first, *others = values
    return np.concatenate([first, *(part for x in others for part in (between, x))], axis=1)


def _picture(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Pixels [H, W, 3] of an input; grey ones in colour, of more channels the first three."""
    return _in_a_row(in_colour(pixels), spec, gap=255)


def _shaded(pixels: np.ndarray, kept: np.ndarray, spec: InputSpec) -> np.ndarray:
    """An input, its dropped patches dimmed."""
    lit = _lit(in_colour(pixels), spec.on_grid(kept), spec)
    return _in_a_row(lit, spec, gap=1)


def _lit(picture: np.ndarray, grid: np.ndarray, spec: InputSpec) -> np.ndarray:
    """The picture with its dropped patches dimmed; a black ground is made grey, to show them.

    grid: whether each patch is kept, by row and column.
    """
    mask = np.kron(grid, np.ones(spec.patch))[..., None]
    ground = _GROUND if np.median(picture) < _BLACK else 0.0
    lit = ground + (1 - ground) * picture / 255
    return np.where(mask, lit, lit * _DROPPED)


def _stretched(heatmap: np.ndarray) -> np.ndarray:
    """Min-max per image, as both columns of Figure 3 are shown."""
    span = heatmap.max() - heatmap.min()
    return (heatmap - heatmap.min()) / (span if span > 0 else 1)


def _grid(rows: int, titles: Sequence[str], spec: InputSpec):
    """A figure with an axis per input and column, each as wide as its picture."""
    columns, width = len(titles), spec.width * (spec.frames or 1) / spec.height
    figure = Figure(figsize=(_CELL * width * columns, _CELL * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    return figure, axes


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as draft:
        figure.savefig(draft, dpi=130, format=path.suffix.removeprefix("."))
    return path
