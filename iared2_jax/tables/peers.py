"""The table of peers: training-free selectors at several costs, beside our trained interpreters."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from iared2_jax.report.tables import METHODS
from iared2_jax.tables.presets import PRESETS, Preset
from iared2_jax.tables.runs import Run
from iared2_jax.tables.shared_runs import head_and_seeds, original_run, seeds_there
from iared2_jax.tables.statistics import mean
from iared2_jax.tables.table import (
    OURS_BETTER_BY,
    PLAIN_COLUMNS,
    Column,
    Results,
    Row,
    Table,
    finished_by_key,
    plain_row,
    set_beside_ours,
)
from iared2_jax.token_reduction.create import create_module, split_into_groups
from iared2_jax.token_reduction.schedules import PUBLISHED, at_linear_flops, published_budget

COLUMNS = (*PLAIN_COLUMNS, Column("kept at the end, %", "kept"), OURS_BETTER_BY)
# Shares of the linear FLOPs, in per cent, around what the paper asks for.
_SHARES = (80, 70, 60)
# EViT and ToMe as published. What attention is worth without EViT's fused token, and chance, at
# the groups and the rate that EViT has.
SELECTORS = ("evit", "tome", "attention", "random")
_NAMES = {**METHODS, "attention": "attention before each group"}
_CURRICULUM = "interpreters"


def peers_table(title: str, paper: str, presets: Sequence[str]) -> Table:
    """Our interpreters over seeds; every training-free selector, which no seed changes, once."""
    return Table(title, paper, COLUMNS, _runs, _rows, presets)


def with_ours(shares: Sequence[int], presets: Iterable[Preset]) -> tuple[int, ...]:
    """The shares, and what ours has on the presets where that is none of these."""
    return (*shares, *(preset.share_of_ours for preset in presets if preset.share_of_ours))


def _name(size: int, selector: str, share: int) -> str:
    return f"{size}px-{selector}-{share}"


def _runs(preset: Preset, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    made = []
    for size in sizes:
        made += head_and_seeds(preset, _CURRICULUM, size, seeds)
        for selector, share in itertools.product(SELECTORS, with_ours(_SHARES, [preset])):
            made.append(_run(preset, size, selector, share))
    return made


def _run(preset: Preset, size: int, selector: str, share: int) -> Run:
    """The evaluation of the original under a selector that nobody trained."""
    groups, ratios = budget(preset.recipe(size).model.name, size, selector, share)
    own = {
        "mode": "eval",
        "curriculum": "selector",
        "model.groups": str(groups),
        "model.group_sizes": "()",
        "reduction.selector": selector,
        "reduction.keep_ratios": repr(ratios),
    }
    name, options = _name(size, selector, share), {"eval.maps": "()"}
    return original_run(preset, name, size, options, kind="evaluation", own=own)


@functools.cache
def budget(model: str, size: int, selector: str, share: int) -> tuple[int, tuple[float, ...]]:
    """A peer's groups, and what each keeps, at a share of the linear FLOPs, in per cent."""
    module = create_module(model, image_size=size)
    if selector in PUBLISHED:
        return published_budget(module, selector, share / 100)
    evit, depth, n = PUBLISHED["evit"], module.backbone.depth, module.input_spec.num_patches
    groups = evit.groups(depth)
    module = module.clone(group_sizes=split_into_groups(depth, groups))
    schedule = functools.partial(evit.schedule, n, groups)
    return groups, at_linear_flops(module, selector, schedule, share / 100)


def _rows(sizes: Sequence[int], seeds: Sequence[int], results: Results) -> list[Row]:
    made = []
    for size in sizes:
        budgets = itertools.product(SELECTORS, with_ours(_SHARES, PRESETS.values()))
        found = finished_by_key(lambda key: _name(size, *key), budgets, results)  # noqa: B023
        ours = seeds_there(_CURRICULUM, size, seeds, results)
        every = [*ours.values(), *found.values()]
        of_size: list[Row] = []
        if every:
            of_size.append(plain_row(size, "original", {None: (every[0]["dense"],) * 2}))
        for (selector, _), run in found.items():
            of_size.append(peer_row(size, _NAMES.get(selector, selector), {None: run}, "reduced"))
        if ours:
            of_size.append(peer_row(size, METHODS["iared2"], ours, "iared2"))
            set_beside_ours(of_size, of_size[-1])
        made += of_size
    return made


def peer_row(size: int, method: str, runs: Mapping[Any, Mapping[str, Any]], block: str) -> Row:
    """A method's accuracy and cost, and what is kept of the patches at the end.

    Args:
      runs: results by seed. block: of them, which holds the method's figures.
    """
    row = plain_row(size, method, {seed: (run[block], run["dense"]) for seed, run in runs.items()})
    row["kept"] = mean([100 * run[block]["kept"][-1] for run in runs.values()])
    return row
