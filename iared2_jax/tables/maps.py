"""The table of maps: our scores beside every other map, by the segmentation protocol (Table 1)."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from iared2_jax.errors import UsageError
from iared2_jax.models.variants import get_variant
from iared2_jax.tables.presets import Preset
from iared2_jax.tables.runs import Run
from iared2_jax.tables.shared_runs import (
    QUIET,
    finished_seeds,
    head_and_seeds,
    maps_name,
    maps_options,
    maps_run,
    reducing_name,
)
from iared2_jax.tables.statistics import mean
from iared2_jax.tables.table import Column, Results, Row, Table, finished_by_key

COLUMNS = (
    Column("pixel accuracy", "pixel_accuracy"),
    Column("mAcc", "mean_accuracy"),
    Column("mIoU", "mean_iou"),
    Column("chance mIoU", "chance_iou"),
    Column("best mIoU", "best_iou"),
    Column("mAP", "average_precision"),
)
# Our scores are those of Table 4's runs, on the very backbone whose other maps stand beside them.
_CURRICULUM = "interpreters"
# Where the images have no masks, those of the paper's own model, Table 2's, on images that have.
_ELSEWHERE = "iared2"


def maps_table(title: str, paper: str, presets: Sequence[str]) -> Table:
    """Our scores over seeds; every other map, which no seed changes, once."""
    return Table(title, paper, COLUMNS, _runs, _rows, presets)


def _runs(preset: Preset, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    made = []
    for size in sizes:
        if preset.segmentation:
            made += head_and_seeds(preset, _ELSEWHERE, size, seeds)
            scores = {"eval.maps": "('interpreter',)"}
            for seed in seeds:
                start = reducing_name(_ELSEWHERE, size, seed)
                made.append(_on_masks(preset, size, _scores_name(size, seed), start, scores))
            made.append(_on_masks(preset, size, maps_name(size), "", maps_options()))
        else:
            made += head_and_seeds(preset, _CURRICULUM, size, seeds)
            made.append(maps_run(preset, size))
    return made


def _scores_name(size: int, seed: int) -> str:
    return f"{reducing_name(_ELSEWHERE, size, seed)}-segmentation"


def _on_masks(preset: Preset, size: int, name: str, start: str, options: Mapping[str, str]) -> Run:
    """A run that measures maps of the preset's model on the images that have masks."""
    model = preset.recipe(size).model.name
    named = {
        "model.name": model,
        "model.num_classes": str(get_variant(model).backbone.num_classes),
        "eval.maps_size": "0",  # all
        **QUIET,
    }
    data = {"data.path": preset.segmentation_path, "data.maps": "", "data.eval_split": "all"}
    return Run(name, preset.segmentation, {**named, **options}, own=data, start=start)


def _rows(sizes: Sequence[int], seeds: Sequence[int], results: Results) -> list[Row]:
    made = []
    for size in sizes:
        found = finished_by_key(functools.partial(_scores_name, size), seeds, results)
        found = found or finished_seeds(_CURRICULUM, size, seeds, results)
        every = results.get(maps_name(size))
        _check_same_images([*found.values(), *([every] if every else [])])
        ours = [run["segmentation"] for run in found.values()]
        for name in ours[0]:
            if name.startswith("group_"):
                title = f"IA-RED2, {name.replace('_', ' ')}"
                made.append(_row(size, title, list(found), [maps[name] for maps in ours]))
        # Without the run of all maps, those that stand beside our scores in every run.
        for name, scores in (every["segmentation"] if every else ours[0]).items():
            if not name.startswith("group_"):
                made.append(_row(size, name.replace("_", " "), [None], [scores]))
    return made


def _check_same_images(found: Sequence[Mapping[str, Any]]) -> None:
    """Refuses maps of different images, or none, side by side."""
    sizes = {results.get("map_images", 0) for results in found}
    if len(sizes) > 1 or 0 in sizes:
        counts = " and ".join(map(str, sorted(sizes)))
        raise UsageError(
            f"maps were measured on {counts} images: give all runs the same, at least one, by "
            "--config.eval.maps_size and --config.data.eval_size"
        )


def _row(
    size: int, method: str, seeds: Sequence[int | None], found: Sequence[Mapping[str, Any]]
) -> Row:
    row: Row = {"pixels": size, "method": method, "seeds": list(seeds)}
    for column in COLUMNS:
        if all(column.key in scores for scores in found):
            row[column.key] = mean([100 * scores[column.key] for scores in found])
    # Half the 95% interval over the images, of the first seed.
    row["over_images"] = {
        key: 50 * (high - low) for key, (low, high) in found[0]["interval"].items()
    }
    return row
