"""One trained model at every budget: accuracy over FLOPs and images per second, without retraining.

    python -m benchmarks.budget --checkpoint=runs/cluttered_mnist/weights.safetensors

One threshold for all groups moves from "keep all" to "keep almost nothing". Accuracy is of the
run's own evaluation images.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from matplotlib.figure import Figure

from benchmarks import common
from benchmarks.workload import evaluation_images
from iared2_jax import count_flops
from iared2_jax.fast_inference import BudgetPoint, budget_curve, with_speed
from iared2_jax.report.tables import as_text


def draw(points: Sequence[BudgetPoint], dense: float, path: Path) -> None:
    """Accuracy over FLOPs, and over speed, side by side."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    over_flops, over_speed = figure.subplots(1, 2, sharey=True)
    accuracy = [100 * point.accuracy for point in points]
    over_flops.plot([point.flops / dense for point in points], accuracy, "o-")
    over_flops.set(xlabel="full FLOPs, of dense", ylabel="top-1, %")
    over_speed.plot([point.images_per_second for point in points], accuracy, "o-")
    over_speed.set(xlabel="images per second")
    for axes in (over_flops, over_speed):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights.safetensors")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=13)
    parser.add_argument("--images", type=int, default=1000)
    flags = parser.parse_args(argv)
    module, variables, images, labels, config = evaluation_images(flags.checkpoint, flags.images)
    curve = budget_curve(
        module, variables, images, labels, points=flags.points, batch_size=flags.batch
    )
    curve = with_speed(module, variables, images[:128], curve, flags.batch)
    dense = count_flops(module).full
    rows = [["threshold", "top-1", "kept per group", "FLOPs of dense", "images/s"]]
    for point in curve:
        rows.append(
            [
                f"{point.thresholds[0]:.3f}",
                f"{100 * point.accuracy:.2f}%",
                " / ".join(f"{share:.2f}" for share in point.kept),
                f"{100 * point.flops / dense:.1f}%",
                f"{point.images_per_second:.0f}",
            ]
        )
    title = f"{config['name']}, {len(images)} images, batch {flags.batch}, trained at 0.5"
    print(as_text((title, rows)), flush=True)
    out = flags.out or common.RESULTS / f"budget_{config['name']}_{jax.default_backend()}.json"
    common.write(
        out,
        {
            "command": "python -m benchmarks.budget --checkpoint=...",
            **common.environment(),
            "batch": flags.batch,
            "images": len(images),
            "dense_flops": dense,
            "points": [dataclasses.asdict(point) for point in curve],
        },
    )
    draw(curve, dense, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
