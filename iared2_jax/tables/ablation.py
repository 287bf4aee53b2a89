"""The ablation: what the paper leaves open, one choice at a time, on digits (section 4.2)."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from iared2_jax.errors import UsageError
from iared2_jax.tables.cutouts import QUIET
from iared2_jax.tables.runs import Run
from iared2_jax.tables.statistics import mean, paired
from iared2_jax.tables.table import Column, ConfigOfSize, Results, Row, Table

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
    Column("top-1, %", "top1"),
    Column("lost, points", "lost"),
    Column("full FLOPs, %", "full_flops"),
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
        ours = [run["iared2"] for run in found.values()]
        dense = [run["dense"] for run in found.values()]
        lost = {
            seed: 100 * (run["dense"]["top1"] - run["iared2"]["top1"])
            for seed, run in found.items()
        }
        lost_by[setting] = lost
        both = sorted(lost.keys() & lost_by.get(_RECIPE, {}).keys())
        shares = [
            100 * a["flops"]["full"] / b["flops"]["full"] for a, b in zip(ours, dense, strict=True)
        ]
        groups = zip(*(run["kept"] for run in ours), strict=True)
        row: Row = {
            "pixels": SIZE,
            "method": method,
            "seeds": list(found),
            "kept": [sum(kept) / len(kept) for kept in groups],
            "top1": mean([100 * run["top1"] for run in ours]),
            "lost": mean(list(lost.values())),
            "full_flops": mean(shares),
        }
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
