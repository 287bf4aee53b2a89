"""The table of baselines as the paper has them: 30% dropped once, at the input (Tables 2 and 5)."""

from collections.abc import Mapping, Sequence
from typing import Any

from iared2_jax.tables import cutouts
from iared2_jax.tables.runs import Run
from iared2_jax.tables.statistics import mean
from iared2_jax.tables.table import Column, ConfigOfSize, Results, Row, Table

KEPT = 0.7  # of the patches, right behind the position embedding; all blocks see them
COLUMNS = (
    Column("top-1, %", "top1"),
    Column("lost, points", "lost"),
    Column("linear FLOPs, %", "linear_flops"),
    Column("full FLOPs, %", "full_flops"),
    Column("mIoU of the scores", "mean_iou"),
)
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
    options = {
        "curriculum": "selector",
        "seed": str(seed),
        "model.groups": "1",
        "reduction.selector": selector,
        "reduction.keep_ratios": f"({KEPT},)",
        "backbone.steps": "240",
        **cutouts.QUIET,
    }
    return Run(
        _name(size, selector, seed),
        config(size),
        options,
        start=cutouts.head_name(size),
        ignored=cutouts.OF_INTERPRETERS,
        minutes=cutouts.minutes(9, size),
    )


def _rows(sizes: Sequence[int], seeds: Sequence[int], results: Results) -> list[Row]:
    made = []
    for size in sizes:
        original = True
        for selector, method in SELECTORS.items():
            names = {seed: _name(size, selector, seed) for seed in seeds}
            found = {seed: results[name] for seed, name in names.items() if name in results}
            if not found:
                continue
            if original:  # the same for all of them
                dense = next(iter(found.values()))["dense"]
                made.append(_row(size, "original", {None: {"dense": dense, "reduced": dense}}, ""))
                original = False
            made.append(_row(size, method, found, f"{selector}_group_1"))
    return made


def _row(size: int, method: str, found: Mapping[int | None, Mapping[str, Any]], scores: str) -> Row:
    """A selector's row. scores: what its map is called among those that were measured."""
    pairs = [(run["reduced"], run["dense"]) for run in found.values()]
    row: Row = {
        "pixels": size,
        "method": method,
        "seeds": list(found),
        "top1": mean([100 * after["top1"] for after, _ in pairs]),
        "lost": mean([100 * (before["top1"] - after["top1"]) for after, before in pairs]),
    }
    for kind in ("linear", "full"):
        shares = [100 * after["flops"][kind] / before["flops"][kind] for after, before in pairs]
        row[f"{kind}_flops"] = mean(shares)
    maps = [run.get("segmentation", {}).get(scores) for run in found.values()]
    if all(maps):
        row["mean_iou"] = mean([100 * found["mean_iou"] for found in maps])
    return row
