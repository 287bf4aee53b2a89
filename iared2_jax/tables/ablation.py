"""The ablation: what the paper leaves open, one choice at a time, on digits (section 4.2)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from iared2_jax.errors import UsageError
from iared2_jax.tables.cutouts import QUIET
from iared2_jax.tables.runs import Run
from iared2_jax.tables.statistics import paired
from iared2_jax.tables.table import (
    PLAIN_COLUMNS,
    Column,
    ConfigOfSize,
    Results,
    Row,
    Table,
    plain_row,
)

SIZE = 64  # px, of Cluttered MNIST
_RECIPE = "recipe"

# What differs from the demo's recipe, by the runs' names. Equal groups get one price for all.
_EQUAL = {
    "model.group_sizes": "()",
    "interpreter.tau": "(60.0,)",
    "interpreter.lengths": "(1.0,)",
}
SETTINGS: dict[str, tuple[str, Mapping[str, str]]] = {
    _RECIPE: ("the demo's recipe", {}),
    "groups-2": ("D = 2, equal groups, one price", {**_EQUAL, "model.groups": "2"}),
    "groups-3": ("D = 3, equal groups, one price", {**_EQUAL, "model.groups": "3"}),
    "groups-6": ("D = 6, equal groups, one price", {**_EQUAL, "model.groups": "6"}),
    "heads-1": ("1 head, not 8", {"model.interpreter_heads": "1"}),
    "heads-4": ("4 heads, not 8", {"model.interpreter_heads": "4"}),
    "policy-learned": ("a learned policy token, not CLS", {"model.policy_token": "learned"}),
    "predictor": ("DynamicViT's predictors", {"model.interpreter_kind": "dynamicvit"}),
    "unscaled": ("Eq. 1 without 1 / sqrt(c)", {"model.scale": "False"}),
    "denominator": ("reward over all N tokens", {"interpreter.reward_denominator": "initial"}),
    "tau-half": ("tau / 2", {"interpreter.tau": "(20.0,30.0,300.0)"}),
    "tau-double": ("2 tau", {"interpreter.tau": "(80.0,120.0,1200.0)"}),
    "right-or-wrong": ("answers right or wrong (Eq. 2)", {"interpreter.answer": "right"}),
    "self-critical": ("the paper's estimator (Eq. 3)", {"interpreter.estimator": "self_critical"}),
}
COLUMNS = (
    Column("kept per group", "kept", 2),
    *PLAIN_COLUMNS,
    Column("lost more than the recipe, points", "worse"),
)


def ablation_table(title: str, paper: str) -> Table:
    """A row for each setting, over seeds, and a plot of them."""
    return Table(title, paper, COLUMNS, _runs, _rows, presets=("cluttered_mnist",), plot=plot)


def _name(setting: str, seed: int) -> str:
    return f"ablation-{setting}-{seed}"


def _runs(config: ConfigOfSize, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    if list(sizes) != [SIZE]:
        raise UsageError(f"--sizes {' '.join(map(str, sizes))}: digits are of {SIZE} px alone")
    return [
        Run(
            _name(setting, seed),
            config(SIZE),
            {
                "curriculum": "iared2",
                "seed": str(seed),
                "eval.maps": "()",
                "eval.perturbation": "False",
                **QUIET,
                **options,
            },
            minutes=2.0,
        )
        for setting, (_, options) in SETTINGS.items()
        for seed in seeds
    ]


def _rows(sizes: Sequence[int], seeds: Sequence[int], results: Results) -> list[Row]:
    made, lost_by = [], {}
    for setting, (method, _) in SETTINGS.items():
        names = {seed: _name(setting, seed) for seed in seeds}
        found = {seed: results[name] for seed, name in names.items() if name in results}
        if not found:
            continue
        row = plain_row(
            SIZE, method, {seed: (run["iared2"], run["dense"]) for seed, run in found.items()}
        )
        kept = [run["iared2"]["kept"] for run in found.values()]
        row["kept"] = np.mean(kept, axis=0).tolist()
        lost_by[setting] = lost = dict(zip(found, row["lost"].values, strict=True))
        both = sorted(lost.keys() & lost_by.get(_RECIPE, {}).keys())
        if both and setting != _RECIPE:
            row["worse"] = paired(
                [lost[seed] for seed in both], [lost_by[_RECIPE][seed] for seed in both]
            )
        made.append(row)
    return made


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Points lost over FLOPs, a mark for each setting, with the seeds' intervals."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    markers = "osD^v<>pPXh*dH8"
    for place, row in enumerate(rows):
        x, y = row["full_flops"], row["lost"]
        axes.errorbar(
            x.value,
            y.value,
            xerr=x.half or 0,
            yerr=y.half or 0,
            fmt=markers[place % len(markers)],
            capsize=2,
            label=row["method"],
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="full FLOPs, % of the dense model's", ylabel="top-1 lost, points")
    figure.legend(loc="outside right upper", fontsize="small")
    return figure
