"""The table of baselines as the paper has them: 30% dropped once, at the input (Tables 2 and 5)."""

import functools
from collections.abc import Sequence

from iared2_jax.tables.presets import Preset
from iared2_jax.tables.runs import Run
from iared2_jax.tables.shared_runs import as_long_as_ours, head_runs, original_run
from iared2_jax.tables.statistics import mean
from iared2_jax.tables.table import (
    PLAIN_COLUMNS,
    Column,
    Results,
    Row,
    Table,
    finished_by_key,
    plain_row,
)

KEPT = 0.7  # of the patches, right behind the position embedding; all blocks see them
COLUMNS = (*PLAIN_COLUMNS, Column("mIoU of the scores", "mean_iou"))
# Two passes each, the first up to that block: the paper's Table 5. And what needs one pass.
SELECTORS = {
    "attention_block_0": "attention of block 0, two passes",
    "attention_block_1": "attention of block 1, two passes",
    "attention_block_2": "attention of block 2, two passes",
    "random": "random",
    "magnitude": "magnitude of the patch embedding",
    "memorability": "memorability, or whatever the maps are of",
}


def input_drops_table(title: str, paper: str, presets: Sequence[str]) -> Table:
    """The original, and every selector fine-tuned under what it keeps, over seeds."""
    return Table(title, paper, COLUMNS, _runs, _rows, presets)


def _name(size: int, selector: str, seed: int) -> str:
    return f"{size}px-input-{selector}-{seed}"


def _runs(preset: Preset, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    made = []
    for size in sizes:
        made += head_runs(preset, size)
        asked = [name for name in SELECTORS if preset.maps or name != "memorability"]
        made += [_run(preset, size, name, seed) for seed in seeds for name in asked]
    return made


def _run(preset: Preset, size: int, selector: str, seed: int) -> Run:
    """The original fine-tuned under a selector, for as long as Table 2's own blocks are."""
    own = {
        "curriculum": "selector",
        "seed": str(seed),
        "model.groups": "1",
        "model.group_sizes": "()",
        "reduction.selector": selector,
        "reduction.keep_ratios": f"({KEPT},)",
        **as_long_as_ours(preset.recipe(size)),
    }
    return original_run(preset, _name(size, selector, seed), size, {}, kind="selector", own=own)


def _rows(sizes: Sequence[int], seeds: Sequence[int], results: Results) -> list[Row]:
    made = []
    for size in sizes:
        of_size: list[Row] = []
        for selector, method in SELECTORS.items():
            found = finished_by_key(functools.partial(_name, size, selector), seeds, results)
            if not found:
                continue
            if not of_size:  # the original is the same for all of them
                dense = next(iter(found.values()))["dense"]
                of_size.append(plain_row(size, "original", {None: (dense, dense)}))
            pairs = {seed: (run["reduced"], run["dense"]) for seed, run in found.items()}
            row = plain_row(size, method, pairs)
            maps = [
                run.get("segmentation", {}).get(f"{selector}_group_1") for run in found.values()
            ]
            if all(maps):
                row["mean_iou"] = mean([100 * scores["mean_iou"] for scores in maps])
            of_size.append(row)
        made += of_size
    return made
