"""The table of maps: our scores beside every other map, by the segmentation protocol (Table 1)."""

from collections.abc import Mapping, Sequence
from typing import Any

from iared2_jax.errors import UsageError
from iared2_jax.tables import cutouts
from iared2_jax.tables.runs import Run
from iared2_jax.tables.statistics import mean
from iared2_jax.tables.table import Column, ConfigAt, Results, Row, Table

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


def maps_table(title: str, paper: str) -> Table:
    """Our scores over seeds; every other map, which no seed changes, once."""
    return Table(title, paper, COLUMNS, _runs, _rows)


def _runs(config: ConfigAt, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    made = []
    for size in sizes:
        made.append(cutouts.head(config, size))
        made += [cutouts.reducing(config, _CURRICULUM, size, seed) for seed in seeds]
        made.append(cutouts.all_maps(config, size))
    return made


def _rows(sizes: Sequence[int], seeds: Sequence[int], results: Results) -> list[Row]:
    made = []
    for size in sizes:
        names = {seed: cutouts.reducing_name(_CURRICULUM, size, seed) for seed in seeds}
        found = {seed: results[name] for seed, name in names.items() if name in results}
        if not found:
            raise UsageError(f"no run of {size} px is finished yet: there is nothing to tabulate")
        ours = [run["segmentation"] for run in found.values()]
        for name in ours[0]:
            if name.startswith("group_"):
                title = f"IA-RED2, {name.replace('_', ' ')}"
                made.append(_row(size, title, list(found), [maps[name] for maps in ours]))
        others = results.get(cutouts.maps_name(size), {}).get("segmentation", {})
        # Without that run, those maps that stand beside our scores in every run.
        for name, scores in (others or ours[0]).items():
            if not name.startswith("group_"):
                made.append(_row(size, name.replace("_", " "), list(found)[:1], [scores]))
    return made


def _row(size: int, method: str, seeds: Sequence[int], found: Sequence[Mapping[str, Any]]) -> Row:
    row: Row = {"pixels": size, "method": method, "seeds": list(seeds)}
    for column in COLUMNS:
        if all(column.key in scores for scores in found):
            row[column.key] = mean([100 * scores[column.key] for scores in found])
    # Half the 95% interval over the images, of the first seed.
    row["over_images"] = {
        key: 50 * (high - low) for key, (low, high) in found[0]["interval"].items()
    }
    return row
