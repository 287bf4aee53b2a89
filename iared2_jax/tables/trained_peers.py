"""The table of peers that are trained for what they drop, as long as our blocks are."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from iared2_jax.report.tables import METHODS
from iared2_jax.tables.peers import COLUMNS, budget, peer_row, with_ours
from iared2_jax.tables.presets import PRESETS, Preset
from iared2_jax.tables.runs import Run
from iared2_jax.tables.shared_runs import (
    as_long_as_ours,
    head_and_seeds,
    original_run,
    seeds_there,
)
from iared2_jax.tables.table import Results, Row, Table, finished_by_key, plain_row, set_beside_ours
from iared2_jax.training.phases import PHASES

_SHARES = (70,)  # of the linear FLOPs, per cent
SELECTORS = ("evit", "tome")  # blocks fine-tuned under what needs no training itself
# Rows that our own run has already, fine-tuned as long in its groups.
_BESIDE_OURS = ("original_fine_tuned", "attention_before_group")
_DYNAMICVIT = "dynamicvit"
# Every peer: the block of its results that holds its figures, and its name.
_BLOCKS = {**dict.fromkeys(SELECTORS, "reduced"), _DYNAMICVIT: "iared2"}
_NAMES = {**METHODS, _DYNAMICVIT: "DynamicViT"}
_OURS = "iared2"


def trained_peers_table(title: str, paper: str, presets: Sequence[str]) -> Table:
    """Ours with fine-tuned blocks, and every peer, over seeds."""
    return Table(title, paper, COLUMNS, _runs, _rows, presets)


def _name(size: int, peer: str, share: int, seed: int) -> str:
    return f"{size}px-{peer}-{share}-trained-{seed}"


def _runs(preset: Preset, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    made = []
    for size in sizes:
        made += head_and_seeds(preset, _OURS, size, seeds)
        for share, seed in itertools.product(with_ours(_SHARES, [preset]), seeds):
            made.append(_dynamicvit_run(preset, size, share, seed))
            made += [_selector_run(preset, size, selector, share, seed) for selector in SELECTORS]
    return made


def _selector_run(preset: Preset, size: int, selector: str, share: int, seed: int) -> Run:
    """All blocks fine-tuned under a selector, for as many steps as ours are."""
    recipe = preset.recipe(size)
    groups, ratios = budget(recipe.model.name, size, selector, share)
    own = {
        "curriculum": "selector",
        "seed": str(seed),
        "model.groups": str(groups),
        "model.group_sizes": "()",
        "reduction.selector": selector,
        "reduction.keep_ratios": repr(ratios),
        **as_long_as_ours(recipe),
    }
    name, options = _name(size, selector, share, seed), {"eval.maps": "()"}
    return original_run(preset, name, size, options, kind="selector", own=own)


def _dynamicvit_run(preset: Preset, size: int, share: int, seed: int) -> Run:
    """Predictors for as many steps as our interpreters and blocks take, blocks as ours."""
    recipe = preset.recipe(size)
    # Its published groups and rates are EViT's: three of four drop, each the same share.
    groups, ratios = budget(recipe.model.name, size, "attention", share)
    unit = "steps" if recipe.backbone.steps else "epochs"
    groups_of_ours = range(1, recipe.model.groups + 1)
    lengths = [PHASES["interpreter"].length(recipe.interpreter, j) for j in groups_of_ours]
    interpreters = sum(lengths) * recipe.interpreter[unit]
    blocks = recipe.model.groups * recipe.backbone[unit]
    total, rate = interpreters + blocks, 1e-3
    own = {
        "curriculum": _DYNAMICVIT,
        "seed": str(seed),
        "model.groups": str(groups),
        "model.group_sizes": "()",
        "model.interpreter_kind": _DYNAMICVIT,
        "reduction.keep_ratios": repr(ratios),
        "dynamicvit.keep_target": repr(ratios),
        "dynamicvit.epochs": str(total if unit == "epochs" else 0.0),
        "dynamicvit.steps": str(round(total) if unit == "steps" else 0),
        "dynamicvit.batch_size": str(recipe.backbone.batch_size),
        "dynamicvit.clip_norm": str(recipe.backbone.clip_norm),
        "dynamicvit.learning_rate": str(rate),
        "dynamicvit.backbone_rest": str(interpreters / total),  # so its blocks move as long as ours
        "dynamicvit.backbone_rate": str(recipe.backbone.learning_rate / rate),
    }
    name, options = _name(size, _DYNAMICVIT, share, seed), {"eval.maps": "()"}
    return original_run(preset, name, size, options, kind=_DYNAMICVIT, own=own)


def _rows(sizes: Sequence[int], seeds: Sequence[int], results: Results) -> list[Row]:
    made = []
    for size in sizes:
        of_size: list[Row] = []
        peers: list[Mapping[int, Mapping[str, Any]]] = []
        for peer, share in itertools.product(_BLOCKS, with_ours(_SHARES, PRESETS.values())):
            if found := finished_by_key(
                functools.partial(_name, size, peer, share), seeds, results
            ):
                peers.append(found)
                of_size.append(peer_row(size, _NAMES[peer], found, _BLOCKS[peer]))
        if ours := seeds_there(_OURS, size, seeds, results):
            of_size += [_beside_ours(size, method, ours) for method in _BESIDE_OURS]
            of_size.append(peer_row(size, METHODS["iared2"], ours, "iared2"))
        if of_size:
            runs = [run for found in peers for run in found.values()]
            dense = [*runs, *ours.values()][0]["dense"]
            of_size.insert(0, plain_row(size, "original", {None: (dense, dense)}))
        if ours:
            set_beside_ours(of_size, of_size[-1])
        made += of_size
    return made


def _beside_ours(size: int, method: str, ours: Mapping[int, Mapping[str, Any]]) -> Row:
    """The row of a baseline that our runs were compared with."""
    found = {}
    for seed, run in ours.items():
        row = run["methods"][method]
        figures = {
            "top1": 1 - row["top1_error"] / 100,
            "flops": row["flops"],
            "kept": row["kept_per_group"],
        }
        found[seed] = {"dense": run["dense"], method: figures}
    return peer_row(size, METHODS[method], found, method)
