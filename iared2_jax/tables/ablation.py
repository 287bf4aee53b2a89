"""The ablation: what the paper leaves open, one choice at a time, with a plot (section 4.2)."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from iared2_jax.tables.presets import Preset
from iared2_jax.tables.runs import Run
from iared2_jax.tables.shared_runs import QUIET, head_and_seeds, reducing_name
from iared2_jax.tables.statistics import paired
from iared2_jax.tables.table import (
    PLAIN_COLUMNS,
    Column,
    Results,
    Row,
    Table,
    finished_by_key,
    plain_row,
)
from iared2_jax.token_reduction.create import create_module, split_into_groups
from iared2_jax.token_reduction.schedules import at_linear_flops

_CURRICULUM = "iared2"
_RECIPE = "recipe"
Options = Mapping[str, str]
Settings = Mapping[str, tuple[str, Options]]  # by the runs' names: a title, what is changed
_EQUAL_GROUPS = {"model.group_sizes": "()", "interpreter.lengths": "(1.0,)"}


def _groups(numbers: Sequence[int], prices: str) -> Settings:
    """Equal groups, with one price for all of them."""
    return {
        f"groups-{d}": (
            f"D = {d}, equal groups, one price",
            {**_EQUAL_GROUPS, "model.groups": str(d), "interpreter.tau": prices},
        )
        for d in numbers
    }


def _falling(groups: int, drop: float) -> tuple[float, ...]:
    """Every group drops the same share of the tokens that enter it."""
    return tuple((1 - drop) ** group for group in range(1, groups + 1))


def _groups_at(model: str, numbers: Sequence[int], share: float) -> Settings:
    """Equal groups that all have the same linear FLOPs, as the paper compares them.

    Each is to keep the same share of the tokens that enter it (`keep_target`).

    Args:
      share: of the dense model's linear FLOPs, in [0, 1].
    """
    module, settings = create_module(model), {}
    for d in numbers:
        own = module.clone(group_sizes=split_into_groups(module.backbone.depth, d))
        budget = at_linear_flops(own, "interpreter", functools.partial(_falling, d), share)
        settings[f"groups-{d}-budget"] = (
            f"D = {d}, equal groups, equal FLOPs",
            {
                **_EQUAL_GROUPS,
                "model.groups": str(d),
                "interpreter.keep_target": repr(tuple(round(kept, 4) for kept in budget)),
                "interpreter.target_weight": "100.0",
                "interpreter.exact_saving": "False",
                "interpreter.reward_denominator": "initial",
                "interpreter.tau": "(10.0,)",
            },
        )
    return settings


_MODEL: Settings = {
    "policy-learned": ("a learned policy token, not CLS", {"model.policy_token": "learned"}),
    "predictor": ("DynamicViT's predictors", {"model.interpreter_kind": "dynamicvit"}),
    "unscaled": ("Eq. 1 without 1 / sqrt(c)", {"model.scale": "False"}),
}
# What differs from a preset's recipe, one choice at a time.
SETTINGS: dict[str, Settings] = {
    "cluttered_mnist": {
        _RECIPE: ("the recipe", {}),
        **_groups((2, 3, 6), prices="(60.0,)"),
        **_groups_at("vit_micro", (2, 3, 6), share=0.43),  # the recipe's
        "heads-1": ("1 head", {"model.interpreter_heads": "1"}),
        "heads-4": ("4 heads", {"model.interpreter_heads": "4"}),
        **_MODEL,
        "denominator": ("reward over all N tokens", {"interpreter.reward_denominator": "initial"}),
        "tau-half": ("tau / 2", {"interpreter.tau": "(20.0,30.0,300.0)"}),
        "tau-double": ("2 tau", {"interpreter.tau": "(80.0,120.0,1200.0)"}),
        "right-or-wrong": ("answers right or wrong (Eq. 2)", {"interpreter.answer": "right"}),
        "self-critical": (
            "the paper's estimator (Eq. 3)",
            {"interpreter.estimator": "self_critical"},
        ),
    },
    "imagenet": {
        _RECIPE: ("the recipe", {}),
        **_groups((2, 4), prices="(1.0,)"),
        **_groups_at("deit_s", (2, 3, 4), share=0.68),  # the paper's 2.9 of 4.24 G
        "heads-1": ("1 head", {"model.interpreter_heads": "1"}),
        **_MODEL,
        "denominator-entering": (
            "reward over the tokens that enter a group",
            {"interpreter.reward_denominator": "entering"},
        ),
        "tau-half": ("tau / 2", {"interpreter.tau": "(0.5,)"}),
        "tau-double": ("2 tau", {"interpreter.tau": "(2.0,)"}),
        "probability": ("answers by probability", {"interpreter.answer": "probability"}),
        "rloo": (
            "leave-one-out, 3 rollouts",
            {"interpreter.estimator": "rloo", "interpreter.rollouts": "3"},
        ),
    },
}
COLUMNS = (
    Column("kept per group", "kept", 2),
    *PLAIN_COLUMNS,
    Column("lost more than the recipe, points", "worse"),
)


def ablation_table(title: str, paper: str) -> Table:
    """A row for each setting, over seeds, and a plot of them."""
    return Table(title, paper, COLUMNS, _runs, _rows, presets=tuple(SETTINGS), plot=plot)


def _name(size: int, setting: str, seed: int) -> str:
    """The folder of a setting's run; the recipe itself is a run like other tables'."""
    if setting == _RECIPE:
        return reducing_name(_CURRICULUM, size, seed)
    return f"{size}px-ablation-{setting}-{seed}"


def _runs(preset: Preset, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    made = []
    for size in sizes:
        made += head_and_seeds(preset, _CURRICULUM, size, seeds, baselines=False)
        for setting, (_, options) in SETTINGS[preset.name].items():
            if setting != _RECIPE:
                made += [_run(preset, size, setting, seed, options) for seed in seeds]
    return made


def _run(preset: Preset, size: int, setting: str, seed: int, options: Options) -> Run:
    shared = {
        **preset.options,
        "curriculum": _CURRICULUM,
        "seed": str(seed),
        "eval.maps": "()",
        **QUIET,
    }
    return Run(
        _name(size, setting, seed),
        preset.config(size),
        shared,
        own=options,
        minutes=preset.minutes_of(f"{_CURRICULUM} alone", size),
    )


def _rows(sizes: Sequence[int], seeds: Sequence[int], results: Results) -> list[Row]:
    return [row for size in sizes for row in _rows_of_size(size, seeds, results)]


def _rows_of_size(size: int, seeds: Sequence[int], results: Results) -> list[Row]:
    made, lost_by = [], {}
    # Runs' names say the setting, whichever preset they are of; its title is the same in all.
    titles = {name: title for of in SETTINGS.values() for name, (title, _) in of.items()}
    for setting, method in titles.items():
        found = finished_by_key(functools.partial(_name, size, setting), seeds, results)
        if not found:
            continue
        pairs = {seed: (run["iared2"], run["dense"]) for seed, run in found.items()}
        row = plain_row(size, method, pairs)
        kept = [run["iared2"]["kept"] for run in found.values()]
        row["kept"] = np.mean(kept, axis=0).tolist()
        lost_by[setting] = lost = dict(zip(found, row["lost"].values, strict=True))
        both = sorted(lost.keys() & lost_by.get(_RECIPE, {}).keys())
        if both and setting != _RECIPE:
            recipe = lost_by[_RECIPE]
            losses = [lost[seed] for seed in both], [recipe[seed] for seed in both]
            row["worse"] = paired(*losses, seeds=both)
        made.append(row)
    return made


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Points lost, and FLOPs: a line for each setting, a dot for each seed, a bar at their mean."""
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"lost": "top-1 lost, points", "full_flops": "full FLOPs, % of the dense model's"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for place, row in enumerate(rows):
            values = row[key].values
            axes.plot(values, [place] * len(values), "o", color="C0", alpha=0.6)
            axes.plot(row[key].value, place, "|", color="black", markersize=14)
        axes.axvline(rows[0][key].value, color="grey", linewidth=0.8)  # the recipe's own
        axes.set(xlabel=title)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [row["method"] for row in rows])
    panels[0].invert_yaxis()
    return figure
