"""What a training step of each phase costs, against a step of plain fine-tuning.

    python -m benchmarks.train_cost --model=deit_s

One step: forward, backward, SGD. Plain fine-tuning moves all blocks of the dense backbone. The
interpreter's step has one sampled rollout and the greedy one. Masks keep tokens as drawn in
benchmarks/workload.py, even spread.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.workload import synthetic
from iared2_jax import count_flops, losses
from iared2_jax.config import default_config
from iared2_jax.models.iared2 import KEEP_ALL
from iared2_jax.optim import merge, partition
from iared2_jax.phases import Phase
from iared2_jax.report.tables import as_text
from iared2_jax.timing import interleaved

LEARNING_RATE = 1e-6  # so small that all steps are alike


def _phases(module) -> dict[str, Phase]:
    groups = range(1, module.num_groups + 1)
    made = {}
    for kind in ("interpreter", "backbone"):
        for j in groups:
            if kind == "interpreter":
                trains = frozenset({("interpreter", j)})
            else:
                trains = frozenset({("blocks", k) for k in groups if k >= j})
            thresholds = tuple(0.5 if g <= j else KEEP_ALL for g in groups)
            made[f"{kind} {j}"] = Phase(
                f"{kind} {j}", kind, j, trains, thresholds, 0, 1, 0, default_config()[kind]
            )
    everything = frozenset({("blocks", k) for k in groups})
    made["plain fine-tuning"] = Phase(
        "plain", "supervised", 0, everything, (KEEP_ALL,) * module.num_groups, 0, 1, 0,
        default_config().supervised,
    )  # fmt: skip
    return made


def _step(module, phase: Phase, config, capacities):
    def step(params, batch, key):
        trainable, frozen = partition(params, phase.trains, module.group_sizes)

        def loss(trainable):
            return losses.LOSSES[phase.kind](
                module, config, phase, merge(trainable, frozen), batch, key, capacities
            )

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        moved = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, trainable, grads)
        return moved, metrics["overflow"]

    return step


def _ideal(module, phase: Phase, counts: np.ndarray, gathered: bool) -> float:
    """Multiply-adds over plain fine-tuning's; a backward pass counts two forward ones."""
    n = module.backbone.num_patches
    dense = count_flops(module).full

    def groups_cost(kept: Sequence[Any], which: Sequence[int]) -> float:
        """Forward cost of some groups' blocks (from 1)."""
        cost = 0.0
        for group in which:
            tokens = np.asarray(kept[group - 1]) + module.backbone.num_prefix
            d = module.backbone.embed_dim
            cost += module.group_sizes[group - 1] * float(
                np.mean(12 * tokens * d**2 + 2 * tokens**2 * d)
            )
        return cost

    groups, j = list(range(1, module.num_groups + 1)), phase.group
    if phase.kind == "supervised":
        return 1.0
    fixed = j - (phase.kind == "interpreter")
    kept = [
        np.minimum.accumulate(counts, axis=1)[:, min(g, fixed) - 1] if gathered and fixed else n
        for g in groups
    ]
    for g in groups[:fixed]:
        kept[g - 1] = counts[:, g - 1] if gathered else n
    before = groups_cost(kept, groups[: j - 1])
    after = groups_cost(kept, groups[j - 1 :])
    passes = 2 if phase.kind == "interpreter" else 3
    return (before + passes * after) / (3 * dense)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what it wrote."""
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    flags = parser.parse_args(argv)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    work = synthetic(flags.model, flags.batch, "even", dtype=dtype)
    module, params = work.module, work.variables["params"]
    config = default_config()
    batch = {
        "image": jnp.asarray(work.images),
        "label": jnp.zeros(flags.batch, jnp.int32),
    }
    key = jax.random.key(0)
    n = module.backbone.num_patches
    slots = [int(min(n, -(-c // 8) * 8)) for c in work.counts.max(0)]

    steps, rows, capacities = {}, {}, {}
    for name, phase in _phases(module).items():
        # Each image has its own thresholds, so that it keeps the drawn number of tokens.
        thresholds = work.thresholds.copy()
        thresholds[:, phase.group :] = KEEP_ALL
        if phase.kind != "supervised":
            phase = dataclasses.replace(phase, thresholds=thresholds)
        fixed = phase.group - (phase.kind == "interpreter")
        for execution in ("masked", "gathered"):
            if execution == "gathered" and not fixed:
                continue
            capacities[name] = tuple(slots[:fixed]) if execution == "gathered" else None
            label = name if phase.kind == "supervised" else f"{name}, {execution}"
            fn = _step(module, phase, config, capacities[name])
            program, seconds = common.compiled(fn, params, batch, key)
            lost = float(program(params, batch, key)[1])
            if lost:
                raise SystemExit(f"{label}: {lost:g} tokens found no slot")
            steps[label] = lambda program=program: program(params, batch, key)
            rows[label] = {
                "ideal": _ideal(module, phase, work.counts, execution == "gathered"),
                "compile_seconds": seconds,
                "memory_bytes": common.memory(program),
                "capacities": capacities[name],
            }
            if phase.kind == "supervised":
                break

    def forward(variables, images):
        return module.apply(variables, images, execution="dense")[0]

    program, seconds = common.compiled(forward, work.variables, batch["image"])
    steps["forward only"] = lambda: program(work.variables, batch["image"])
    rows["forward only"] = {
        "ideal": 1 / 3,
        "compile_seconds": seconds,
        "memory_bytes": common.memory(program),
    }
    timings = interleaved(steps, flags.rounds)
    plain = timings["plain fine-tuning"].median
    table = [["step", "ms", "of plain", "ideal", "MiB", "compile s"]]
    for name, row in rows.items():
        row["ms"] = 1e3 * timings[name].median
        row["p25_ms"], row["p75_ms"] = 1e3 * timings[name].lower, 1e3 * timings[name].upper
        row["of_plain"] = timings[name].median / plain
        table.append(
            [
                name,
                f"{row['ms']:.0f}",
                f"{row['of_plain']:.2f}",
                f"{row['ideal']:.2f}",
                f"{(row['memory_bytes'] or 0) / 2**20:.0f}",
                f"{row['compile_seconds']:.1f}",
            ]
        )
    title = f"{flags.model}, batch {flags.batch}, {jnp.dtype(dtype).name}, {work.source}"
    print(as_text((title, table)), flush=True)
    out = flags.out or common.RESULTS / f"train_cost_{flags.model}_{jax.default_backend()}.json"
    kept = (work.counts.mean(0) / n).tolist()
    result = {
        "command": f"python -m benchmarks.train_cost --model={flags.model}",
        **common.environment(),
        "batch": flags.batch,
        "dtype": jnp.dtype(dtype).name,
        "counts": work.source,
        "kept": kept,
        "steps": rows,
    }
    common.write(out, result)
    return result


if __name__ == "__main__":
    main()
