"""Tables of accuracy and cost: ours beside the original and baselines (the paper's 2, 3 and 4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iared2_jax.report.tables import METHODS
from iared2_jax.tables.presets import Preset
from iared2_jax.tables.runs import Run
from iared2_jax.tables.shared_runs import (
    finished_seeds,
    head_and_seeds,
    speed_name,
    speed_run,
)
from iared2_jax.tables.statistics import mean, paired
from iared2_jax.tables.table import OURS_BETTER_BY, Column, Results, Row, Table, set_beside_ours

_SHARED_COLUMNS = (
    Column("linear FLOPs, %", "linear_flops"),
    Column("full FLOPs, %", "full_flops"),
    OURS_BETTER_BY,
)
IMAGE_COLUMNS = (
    Column("kept per group", "kept", 2),
    Column("top-1, %", "top1"),
    Column("lost, points", "lost"),
    *_SHARED_COLUMNS,
    Column("images/s", "images_per_s"),
    Column("of possible, %", "of_possible", 0),
)
CLIP_COLUMNS = (
    Column("kept per group", "kept", 2),
    Column("clip-1 error, %", "clip1_error"),
    Column("video-1 error, %", "video1_error"),
    Column("lost, points", "lost"),
    *_SHARED_COLUMNS,
    Column("clips/s", "images_per_s"),
    Column("of possible, %", "of_possible", 0),
)


def accuracy_table(
    title: str, paper: str, curriculum: str, presets: Sequence[str], clips: bool = False
) -> Table:
    """The table of what a curriculum trains, after the head if there is one to train.

    Args:
      clips: whether the inputs are clips, whose errors are a clip's and a video's.
    """

    def runs(preset: Preset, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
        """For each size the head, a run for each seed, and one for speed."""
        made = []
        for size in sizes:
            made += head_and_seeds(preset, curriculum, size, seeds)
            made.append(speed_run(preset, curriculum, size, seeds[0]))
        return made

    def rows(sizes: Sequence[int], seeds: Sequence[int], results: Results) -> list[Row]:
        """A row for each method at each size."""
        made = []
        for size in sizes:
            found = finished_seeds(curriculum, size, seeds, results)
            of_size = _rows_of_size(size, list(found), list(found.values()), clips)
            for place, seed in enumerate(found):
                if speed := results.get(speed_name(curriculum, size, seed)):
                    _add_speed(of_size, speed, seed, place)
                    break
            made += of_size.values()
        return made

    return Table(title, paper, CLIP_COLUMNS if clips else IMAGE_COLUMNS, runs, rows, presets)


def _rows_of_size(
    size: int, seeds: Sequence[int], found: Sequence[Mapping[str, Any]], clips: bool
) -> dict[str, Row]:
    """The rows of the finished runs at one size, by method; each over the seeds that have it."""
    from iared2_jax.experiment.compare import methods  # slow to import

    of_seed = [run["methods"] if "methods" in run else methods(run, {}, clips) for run in found]
    rows = {}
    dense = {kind: found[0]["dense"]["flops"][kind] for kind in ("linear", "full")}
    error = "clip1_error" if clips else "top1_error"
    for method in max(of_seed, key=len):
        pairs = [(s, of) for s, of in zip(seeds, of_seed, strict=True) if method in of]
        mine, errors = (
            [of[method] for _, of in pairs],
            {name: [of[name][error] for _, of in pairs] for name in (method, "original")},
        )
        row: Row = {
            "pixels": size,
            "method": METHODS.get(method, method.replace("_", " ")),
            "seeds": [seed for seed, _ in pairs],
            "lost": paired(errors[method], errors["original"]),
            "kept": np.mean([figures["kept_per_group"] for figures in mine], axis=0).tolist(),
        }
        if clips:
            for key in ("clip1_error", "video1_error"):
                if all(key in figures for figures in mine):  # config.eval.video may be off
                    row[key] = mean([figures[key] for figures in mine])
        else:
            row["top1"] = mean([100 - share for share in errors[method]])
        for kind in ("linear", "full"):
            row[f"{kind}_flops"] = mean([100 * f["flops"][kind] / dense[kind] for f in mine])
        rows[method] = row
    set_beside_ours(list(rows.values()), rows["iared2"])
    return rows


def _add_speed(rows: Mapping[str, Row], speed: Mapping[str, Any], seed: int, place: int) -> None:
    """Images a second of one seed's model and the dense one, and what FLOPs allow of it.

    What is possible goes by the FLOPs of the batch that was timed, where the run says them.

    place: of that seed among the row's.
    """
    timed = speed["images_per_second"]
    rates = timed["executions"]
    dense = max(rate["median"] for name, rate in rates.items() if name.startswith("dense"))
    ragged, of_all = rates["ragged"]["median"], rows["iared2"]["full_flops"].values[place] / 100
    share = timed.get("full_flops_share", of_all)
    rows["original"]["images_per_s"] = mean([dense], [seed])
    rows["iared2"]["images_per_s"] = mean([ragged], [seed])
    rows["iared2"]["of_possible"] = mean([100 * ragged / dense * share], [seed])
