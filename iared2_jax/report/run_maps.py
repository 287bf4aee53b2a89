"""The maps of a run's evaluation: measured, drawn, and on the page."""

from pathlib import Path
from typing import Any

import numpy as np

from iared2_jax.attribution.maps import to_heatmaps
from iared2_jax.evaluation.compare_maps import compare_maps
from iared2_jax.evaluation.map_sources import MapSource, map_sources
from iared2_jax.report import figures
from iared2_jax.report.comparison import Comparison
from iared2_jax.report.explorer import ExplorerData, collect_images
from iared2_jax.report.page import OF_THE_MODEL


def measure_maps(comparison: Comparison) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """How good the maps are that `config.eval.maps` asks for, and the first of them.

    Nothing, where nothing can be measured.
    """
    options, module = comparison.config.eval, comparison.module
    judged = comparison.masks is not None
    if not options.maps or not (judged or options.perturbation):
        return {}, {}
    sources = sources_of(comparison)
    size = min(options.maps_size or len(comparison.pixels), len(comparison.pixels))
    first = np.arange(size)
    found = compare_maps(
        module,
        comparison.trained,
        comparison.pixels[first],
        original=comparison.original,
        labels=None if comparison.labels is None else comparison.labels[:size],
        masks=comparison.masks[:size] if judged else None,
        sources=sources,
        perturbation=options.perturbation,
        replacement=options.replacement,
        explained=options.explained if comparison.labels is not None else "predicted",
        sanity=options.perturbation,
        keep=options.page_images,
        batch_size=options.batch_size,
        stop=comparison.stop,
    )
    left_out, values = found.pop("left_out"), found.pop("values", {})
    results = {"map_images": size, **found}
    if judged:
        results["foreground_share"] = float(comparison.masks[:size].mean())
    if left_out:
        results["maps_left_out"] = left_out
    return results, values


def sources_of(comparison: Comparison) -> dict[str, MapSource]:
    """The maps to measure: the scores of the run's selector, other methods, the floor."""
    options = comparison.config.eval
    methods = [*options.maps, "random", "center"]
    own = comparison.selector == "interpreter"
    sources = map_sources(
        comparison.module,
        methods,
        applied=comparison.applied,
        scores="group" if own else f"{comparison.selector}_group",
        options={"lime": {"samples": options.lime_samples}},
    )
    meaningful = comparison.reduces and comparison.scored
    return {name: s for name, s in sources.items() if s.of == "original" or meaningful}


def explored(comparison: Comparison, values: dict[str, np.ndarray]) -> ExplorerData | None:
    """The images that the page has to look at, with all their maps but the scores, which it has."""
    options = comparison.config.eval
    size = min(options.page_images, len(comparison.pixels))
    if values:
        size = min(size, *map(len, values.values()))
    if not size:
        return None
    return collect_images(
        comparison.module,
        comparison.trained,
        comparison.original,
        comparison.pixels[np.arange(size)],
        labels=None if comparison.labels is None else comparison.labels[:size],
        class_names=comparison.class_names or None,
        thresholds=comparison.config.reduction.threshold,
        maps={
            name.replace("_", " "): maps[:size]
            for name, maps in values.items()
            if not name.startswith("group_") and name not in ("random", "center")
        },
        batch_size=options.batch_size,
        stop=comparison.stop,
    )


def draw_figures(comparison: Comparison, values: dict[str, np.ndarray], folder: Path) -> list[Path]:
    """The figures of the first images: Figures 3 and 4, every map, and of clips the animation."""
    drawn = []
    columns = {name: maps for name, maps in values.items() if not _left_aside(name, values)}
    if len(columns) > 1 and not comparison.module.input_spec.is_clip:
        shown = min(comparison.config.eval.figures, *map(len, columns.values()))
        pixels, path = comparison.pixels[np.arange(shown)], folder / "maps.png"
        spec = comparison.module.input_spec
        first = {name: np.asarray(to_heatmaps(x[:shown], spec)) for name, x in columns.items()}
        drawn = [figures.draw_maps(spec, pixels, first, path)]
    return drawn + figures.draw_all(
        comparison.module,
        comparison.trained,
        comparison.pixels[: comparison.config.eval.figures],
        [folder / name for name in OF_THE_MODEL],
        thresholds=comparison.config.reduction.threshold,
        attention_variables=comparison.original,
    )


def _left_aside(name: str, values: dict[str, np.ndarray]) -> bool:
    """Whether a map gets no column: of the blocks' attention only the paper's and the last do."""
    blocks = [other for other in values if other.startswith("raw_attention_block_")]
    return name in blocks and name not in ("raw_attention_block_1", blocks[-1])
