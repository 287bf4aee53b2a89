"""The table of peers: training-free selectors at several costs, beside our trained interpreters."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from iared2_jax.config.loading import load
from iared2_jax.report.tables import METHODS
from iared2_jax.tables import cutouts
from iared2_jax.tables.runs import Run
from iared2_jax.tables.statistics import mean
from iared2_jax.tables.table import Column, ConfigOfSize, Results, Row, Table
from iared2_jax.token_reduction.create import create_module, split_into_groups
from iared2_jax.token_reduction.schedules import PUBLISHED, at_linear_flops, published_budget

COLUMNS = (
    Column("top-1, %", "top1"),
    Column("lost, points", "lost"),
    Column("linear FLOPs, %", "linear_flops"),
    Column("full FLOPs, %", "full_flops"),
    Column("kept at the end, %", "kept"),
)
# Shares of the linear FLOPs, in per cent, around what the paper asks for.
SHARES = (80, 70, 60)
# EViT and ToMe as published. What attention is worth without EViT's fused token, and chance, at
# the groups and the rate that EViT has.
SELECTORS = ("evit", "tome", "attention", "random")
_NAMES = {**METHODS, "attention": "attention before each group"}
_CURRICULUM = "interpreters"


def peers_table(title: str, paper: str) -> Table:
    """Our interpreters over seeds; every training-free selector, which no seed changes, once."""
    return Table(title, paper, COLUMNS, _runs, _rows)


def _name(size: int, selector: str, share: int) -> str:
    return f"{size}px-{selector}-{share}"


def _runs(config: ConfigOfSize, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    made = []
    for size in sizes:
        made += cutouts.head_and_seeds(config, _CURRICULUM, size, seeds)
        made += [_run(config, size, selector, share) for selector in SELECTORS for share in SHARES]
    return made


def _run(config: ConfigOfSize, size: int, selector: str, share: int) -> Run:
    """The evaluation of the head's model under a selector that nobody trained."""
    groups, ratios = _budget(config(size), size, selector, share)
    options = {
        "mode": "eval",
        "curriculum": "selector",
        "model.groups": str(groups),
        "reduction.selector": selector,
        "reduction.keep_ratios": repr(ratios),
        "eval.maps": "()",
        **cutouts.QUIET,
    }
    return Run(
        _name(size, selector, share),
        config(size),
        options,
        start=cutouts.head_name(size),
        ignored=cutouts.OF_INTERPRETERS,
        minutes=cutouts.minutes(1.2, size),
    )


@functools.cache
def _budget(config: str, size: int, selector: str, share: int) -> tuple[int, tuple[float, ...]]:
    """Groups, and what each keeps, at a share of the linear FLOPs, in per cent."""
    module = create_module(load(config, {}).model.name, image_size=size)
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
        names = {(s, share): _name(size, s, share) for s in SELECTORS for share in SHARES}
        found = {key: results[name] for key, name in names.items() if name in results}
        ours = cutouts.seeds_there(_CURRICULUM, size, seeds, results)
        dense = [run["dense"] for run in (*ours.values(), *found.values())][:1]
        made += [_row(size, "original", [None], dense, dense) for _ in dense]
        for (selector, _), run in found.items():
            method = _NAMES.get(selector, selector)
            made.append(_row(size, method, [None], [run["reduced"]], [run["dense"]]))
        if ours:
            reduced, before = ([run[key] for run in ours.values()] for key in ("iared2", "dense"))
            made.append(_row(size, METHODS["iared2"], list(ours), reduced, before))
    return made


def _row(
    size: int,
    method: str,
    seeds: Sequence[int | None],
    found: Sequence[Mapping[str, Any]],
    dense: Sequence[Mapping[str, Any]],
) -> Row:
    pairs = list(zip(found, dense, strict=True))
    row: Row = {
        "pixels": size,
        "method": method,
        "seeds": list(seeds),
        "top1": mean([100 * run["top1"] for run in found]),
        "lost": mean([100 * (before["top1"] - run["top1"]) for run, before in pairs]),
    }
    if all("kept" in run for run in found):
        row["kept"] = mean([100 * run["kept"][-1] for run in found])
    for kind in ("linear", "full"):
        shares = [100 * run["flops"][kind] / before["flops"][kind] for run, before in pairs]
        row[f"{kind}_flops"] = mean(shares)
    return row
