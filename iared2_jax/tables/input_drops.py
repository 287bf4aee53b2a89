"""The table of baselines as the paper has them: 30% dropped once, at the input (Tables 2 and 5)."""

from collections.abc import Sequence

from iared2_jax.config.loading import load
from iared2_jax.tables import cutouts
from iared2_jax.tables.runs import Run
from iared2_jax.tables.statistics import mean
from iared2_jax.tables.table import (
    PLAIN_COLUMNS,
    Column,
    ConfigOfSize,
    Results,
    Row,
    Table,
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
}


def input_drops_table(title: str, paper: str) -> Table:
    """The original, and every selector fine-tuned under what it keeps, over seeds."""
    return Table(title, paper, COLUMNS, _runs, _rows)


def _name(size: int, selector: str, seed: int) -> str:
    return f"{size}px-input-{selector}-{seed}"


def _runs(config: ConfigOfSize, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    cutouts.check_seeds(seeds)
    made = []
    for size in sizes:
        made.append(cutouts.head_run(config, size))
        made += [_run(config, size, name, seed) for seed in seeds for name in SELECTORS]
    return made


def _run(config: ConfigOfSize, size: int, selector: str, seed: int) -> Run:
    """The head's model fine-tuned under a selector, for as long as Table 2's own blocks are."""
    recipe = load(config(size), {})
    options = {
        "curriculum": "selector",
        "seed": str(seed),
        "model.groups": "1",
        "reduction.selector": selector,
        "reduction.keep_ratios": f"({KEPT},)",
        "backbone.steps": str(recipe.model.groups * recipe.backbone.steps),
    }
    return cutouts.from_head(_name(size, selector, seed), config(size), size, options, at_112=9)


def _rows(sizes: Sequence[int], seeds: Sequence[int], results: Results) -> list[Row]:
    made = []
    for size in sizes:
        of_size: list[Row] = []
        for selector, method in SELECTORS.items():
            names = {seed: _name(size, selector, seed) for seed in seeds}
            found = {seed: results[name] for seed, name in names.items() if name in results}
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
