"""Dropping tokens, pruning weights, and both: accuracy over FLOPs (the paper's Figure 5).

Nothing is fine-tuned after pruning, which is magnitude pruning of all linear layers of the blocks.
Zeros that lie anywhere make no matrix product faster: only FLOPs are counted, nothing is timed.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from iared2_jax.tables.presets import Preset
from iared2_jax.tables.runs import Run
from iared2_jax.tables.shared_runs import evaluation_run, head_and_seeds, reducing_name
from iared2_jax.tables.statistics import mean
from iared2_jax.tables.table import Column, Results, Row, Table, finished_by_key

# Points of accuracy that a setting may lose. The paper: 1.7 times fewer FLOPs for 1.7 points.
LOSSES = (0.5, 1.0, 1.7, 3.0)
KINDS = {"tokens": "tokens dropped", "weights": "weights pruned", "both": "both, greedily"}
COLUMNS = tuple(
    Column(f"times fewer linear FLOPs, {loss} points lost", f"fewer_{loss}", 2) for loss in LOSSES
)
_CURRICULUM = "iared2"

Point = Mapping[str, float]  # of a curve: "linear" FLOPs and "accuracy", see `PruningPoint`


def pruning_table(title: str, paper: str, presets: Sequence[str]) -> Table:
    """Three curves, dearest point first, over seeds of our model with fine-tuned blocks."""
    return Table(title, paper, COLUMNS, _runs, _rows, presets, plot=plot)


def _name(size: int, seed: int) -> str:
    return f"{reducing_name(_CURRICULUM, size, seed)}-pruning"


def _runs(preset: Preset, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    made = []
    options = {"eval.pruning": "8", "data.eval_size": "1000"}
    for size in sizes:
        made += head_and_seeds(preset, _CURRICULUM, size, seeds, baselines=False)
        made += [
            evaluation_run(
                preset, _name(size, seed), _CURRICULUM, size, seed, options, kind="pruning"
            )
            for seed in seeds
        ]
    return made


def times_fewer(points: Sequence[Point], loss: float) -> float:
    """How many times fewer FLOPs a curve needs, if it may lose so many points of accuracy."""
    whole = points[0]
    enough = [p for p in points if 100 * (whole["accuracy"] - p["accuracy"]) <= loss + 1e-9]
    return whole["linear"] / min(p["linear"] for p in enough)


def _rows(sizes: Sequence[int], seeds: Sequence[int], results: Results) -> list[Row]:
    made = []
    for size in sizes:
        found = finished_by_key(functools.partial(_name, size), seeds, results)
        if not found:
            continue
        for kind, title in KINDS.items():
            curves = [run["pruning"][kind] for run in found.values()]
            row: Row = {"pixels": size, "method": title, "seeds": list(found), "curves": curves}
            for loss in LOSSES:
                row[f"fewer_{loss}"] = mean([times_fewer(points, loss) for points in curves])
            made.append(row)
    return made


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over linear FLOPs, a line for each kind and seed; the smallest images alone."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    shown = [row for row in rows if row["pixels"] == rows[0]["pixels"]]
    for place, row in enumerate(shown):
        for number, points in enumerate(row["curves"]):
            axes.plot(
                [100 * point["linear"] / points[0]["linear"] for point in points],
                [100 * point["accuracy"] for point in points],
                ".-",
                color=f"C{place}",
                linewidth=1,
                label=row["method"] if number == 0 else None,
            )
    axes.invert_xaxis()
    axes.set(xlabel="linear FLOPs, % of dense (zeros are free)", ylabel="top-1, %")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
