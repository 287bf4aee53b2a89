"""Dropping tokens, pruning weights, and both: accuracy over FLOPs (the paper's Figure 5).

    python -m benchmarks.pruning --checkpoint runs/seed_1/weights.safetensors runs/seed_2/..

The checkpoints are seeds of one recipe: figures are their means, with half a 95% interval. Nothing
is fine-tuned after pruning, which is magnitude pruning of all linear layers of the blocks. Zeros
that lie anywhere make no matrix product faster: only FLOPs are counted, nothing is timed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks import common
from benchmarks.workload import evaluation_images
from iared2_jax import count_flops
from iared2_jax.evaluation.pruning import PruningPoint, measure_fn, pruning_curves
from iared2_jax.report.tables import as_text
from iared2_jax.tables.statistics import Mean, mean
from iared2_jax.weights.pruning import SCOPES

SHARES = tuple(round(0.1 * step, 1) for step in range(1, 9))
# Points of accuracy that a setting may lose. The paper: 1.7 times fewer FLOPs for 1.7 points.
LOSSES = (0.5, 1.0, 1.7, 3.0)
LABELS = {"tokens": "tokens dropped", "weights": "weights pruned", "both": "both, greedily"}

Curves = Mapping[str, Sequence[PruningPoint]]


def times_fewer(points: Sequence[PruningPoint], loss: float) -> float:
    """How many times fewer FLOPs a curve needs, if it may lose so many points of accuracy."""
    enough = [p for p in points if 100 * (points[0].accuracy - p.accuracy) <= loss + 1e-9]
    return points[0].linear / min(p.linear for p in enough)


def summary(curves: Sequence[Curves]) -> dict[str, dict[str, Mean]]:
    """`times_fewer` of every curve, over the checkpoints, by the loss that is allowed."""
    return {
        kind: {str(loss): mean([times_fewer(c[kind], loss) for c in curves]) for loss in LOSSES}
        for kind in LABELS
    }


def draw(curves: Sequence[Curves], path: Path) -> None:
    """Accuracy over linear FLOPs, a line per kind and checkpoint."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for color, (kind, label) in zip(("C0", "C1", "C2"), LABELS.items(), strict=True):
        for number, found in enumerate(curves):
            points = found[kind]
            axes.plot(
                [100 * point.linear / points[0].linear for point in points],
                [100 * point.accuracy for point in points],
                ".-",
                color=color,
                linewidth=1,
                label=label if number == 0 else None,
            )
    axes.invert_xaxis()
    axes.set(xlabel="linear FLOPs, % of dense (zeros are free)", ylabel="top-1, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, nargs="+", required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--points", type=int, default=8, help="thresholds on the curves")
    parser.add_argument("--scope", choices=SCOPES, default="layer")
    flags = parser.parse_args(argv)
    curves, names, dense = [], [], 0.0
    for path in flags.checkpoint:
        module, variables, images, labels, config = evaluation_images(path, flags.images)
        measure, scores = measure_fn(module, variables, images, labels, flags.scope, flags.batch)
        levels = np.quantile(scores, np.linspace(0, 1, flags.points + 2)[1:-1])
        curves.append(pruning_curves(measure, sorted(set(map(float, levels))), SHARES))
        names.append({"name": config["name"], "seed": config["seed"]})
        dense = count_flops(module).linear
        print(f"{path}: {100 * curves[-1]['tokens'][0].accuracy:.2f}% with all of it", flush=True)
    found = summary(curves)
    rows = [["may lose, points", *LABELS.values()]]
    for loss in LOSSES:
        rows.append([f"{loss}", *(f"{found[kind][str(loss)].text(2)}x" for kind in LABELS)])
    title = f"times fewer linear FLOPs, {len(curves)} checkpoints, {flags.images} images"
    print(as_text((title, rows)), flush=True)
    out = flags.out or common.RESULTS / f"pruning_{names[0]['name']}_{jax.default_backend()}.json"
    record: dict[str, Any] = {
        "command": "python -m benchmarks.pruning --checkpoint ...",
        **common.environment(),
        "images": flags.images,
        "scope": flags.scope,
        "dense_linear_flops": dense,
        "checkpoints": names,
        "times_fewer": {
            kind: {loss: value._asdict() for loss, value in by_loss.items()}
            for kind, by_loss in found.items()
        },
        "curves": [
            {kind: [point._asdict() for point in points] for kind, points in each.items()}
            for each in curves
        ],
    }
    common.write(out, record)
    draw(curves, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
