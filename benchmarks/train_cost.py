"""What a training step of each phase costs, against a step of plain fine-tuning.

    python -m benchmarks.train_cost --model=deit_s

    python -m benchmarks.train_cost --model=dinov2_s14 --size=224 --batch=16 --rollouts=3 \
      --phase=interpreter --rounds=3

One step: forward, backward, SGD. Plain fine-tuning moves all blocks of the dense backbone. The
interpreter's step has one sampled rollout and the greedy one, or --rollouts sampled ones (RLOO).
Masks keep tokens as drawn in benchmarks/workload.py, even spread.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.workload import Workload, synthetic
from iared2_jax import count_flops
from iared2_jax.config import default_config
from iared2_jax.fast_inference.sub_batches import run_dense
from iared2_jax.report.tables import as_text
from iared2_jax.timing import interleaved
from iared2_jax.token_reduction.estimators import ESTIMATORS
from iared2_jax.token_reduction.model import KEEP_ALL
from iared2_jax.training.optimizers import split_trainable
from iared2_jax.training.phases import PHASES, PhaseContext
from iared2_jax.training.phases.base import Phase
from iared2_jax.training.ragged import RaggedParts
from iared2_jax.training.step import data_mesh, fitting_gradients

LEARNING_RATE = 1e-6  # so small that all steps are alike


def _phases(module, kinds: Sequence[str], rollouts: int) -> dict[str, Phase]:
    groups = range(1, module.num_groups + 1)
    made, config = {}, default_config()
    if rollouts > 1:
        config.interpreter.estimator, config.interpreter.rollouts = "rloo", rollouts
    for kind in kinds:
        for j in groups:
            options, phase = config[kind], PHASES[kind]
            trains = phase.trains(options, j, module.num_groups)
            thresholds = phase.thresholds(0.5, j, module.num_groups)
            made[f"{kind} {j}"] = Phase(phase, j, trains, thresholds, 0, 1, 0, options)
    everything = frozenset({("blocks", k) for k in groups})
    made["plain fine-tuning"] = Phase(
        PHASES["supervised"], 0, everything, (KEEP_ALL,) * module.num_groups, 0, 1, 0,
        default_config().supervised,
    )  # fmt: skip
    return made


def _step(task: PhaseContext):
    def step(params, batch, key):
        """Forward, backward, SGD; the tokens that found no slot, the shares that rollouts keep."""
        trainable, _ = split_trainable(params, task.phase.trains, task.module)
        grads, metrics = fitting_gradients(task, params, batch, key)
        moved = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, trainable, grads)
        shares = []  # of each rollout, the sampled ones first
        if "keep_rate_sampled" in metrics:
            shares = [metrics["keep_rate_sampled"]] * task.phase.options.rollouts
            shares += [metrics["keep_rate"]] * ESTIMATORS[task.phase.options.estimator].greedy
        return moved, metrics.get("overflow", 0.0), shares

    return step


def _ideal(
    module, phase: Phase, counts: np.ndarray, gathered: bool, shares: Sequence[float] = ()
) -> float:
    """Multiply-adds over plain fine-tuning's; a backward pass counts two forward ones.

    shares: of all tokens, that the rollouts of ragged execution keep, on average.
    """
    n = module.input_spec.num_patches
    dense = count_flops(module).full

    def groups_cost(kept: Sequence[Any], which: Sequence[int]) -> float:
        """Forward cost of some groups' blocks (from 1)."""
        vit, cost = module.backbone, 0.0
        for group in which:
            tokens = np.asarray(kept[group - 1]) + vit.num_prefix
            cost += module.group_sizes[group - 1] * float(np.mean(vit.block_flops(tokens).full))
        return cost

    groups, j = list(range(1, module.num_groups + 1)), phase.group
    if not phase.kind.reduces:
        return 1.0
    fixed = phase.kind.fixed_groups(j)
    kept = [
        np.minimum.accumulate(counts, axis=1)[:, min(g, fixed) - 1] if gathered and fixed else n
        for g in groups
    ]
    for g in groups[:fixed]:
        kept[g - 1] = counts[:, g - 1] if gathered else n
    before = groups_cost(kept, groups[: j - 1])
    if shares:
        onward = [groups_cost([share * n for _ in groups], groups[j - 1 :]) for share in shares]
        return (before + sum(onward)) / (3 * dense)
    after = groups_cost(kept, groups[j - 1 :])
    # The blocks behind an interpreter run for its rollouts, and nothing goes back through them.
    rollouts = phase.options.get("rollouts", 1)
    passes = 3 if any(part == "blocks" for part, _ in phase.trains) else max(2, rollouts)
    return (before + passes * after) / (3 * dense)


def _contexts(
    work: Workload, kinds: Sequence[str], rollouts: int
) -> Iterator[tuple[str, PhaseContext]]:
    """Every step to be timed, by what the table calls it."""
    module = work.module
    n = module.input_spec.num_patches
    slots = [int(min(n, -(-count // 8) * 8)) for count in work.counts.max(0)]
    for name, phase in _phases(module, kinds, rollouts).items():
        if not phase.kind.reduces:
            yield name, PhaseContext(module, phase)
            continue
        # Each image has its own thresholds, so that it keeps the drawn number of tokens.
        thresholds = work.thresholds.copy()
        thresholds[:, phase.group :] = KEEP_ALL
        phase = dataclasses.replace(phase, thresholds=thresholds)
        fixed = phase.kind.fixed_groups(phase.group)
        yield f"{name}, masked", PhaseContext(module, phase)
        if fixed:
            yield f"{name}, gathered", PhaseContext(module, phase, tuple(slots[:fixed]))
        if phase.kind.frozen_blocks:
            ragged = RaggedParts(module, data_mesh(jax.devices()[:1]))
            yield f"{name}, ragged", PhaseContext(module, phase, ragged=ragged)


def table(title: str, rows: dict[str, Any]) -> str:
    """The steps as text."""
    cells = [["step", "ms", "of plain", "ideal", "MiB", "compile s"]]
    for name, row in rows.items():
        cells.append(
            [
                name,
                f"{row['ms']:.0f}",
                f"{row['of_plain']:.2f}",
                f"{row['ideal']:.2f}",
                f"{(row['memory_bytes'] or 0) / 2**20:.0f}",
                f"{row['compile_seconds']:.1f}",
            ]
        )
    return as_text((title, cells))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what it wrote."""
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, help="of the images, px; else the variant's own")
    parser.add_argument("--rollouts", type=int, default=1, help="sampled ones; above 1 by RLOO")
    kinds = ("interpreter", "backbone")
    parser.add_argument("--phase", choices=kinds, nargs="+", default=kinds)
    parser.add_argument("--rounds", type=int, default=7)
    flags = parser.parse_args(argv)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    size = {"image_size": flags.size} if flags.size else {}
    work = synthetic(flags.model, flags.batch, "even", dtype=dtype, **size)
    images, params = jnp.asarray(work.images), work.variables["params"]
    batch = {"input": images, "label": jnp.zeros(flags.batch, jnp.int32)}
    key = jax.random.key(0)

    calls, rows = {}, {}

    def add(name, fn, *args, **row):
        """Compiles one row's call."""
        program, seconds = common.compiled(fn, *args)
        calls[name] = functools.partial(program, *args)
        memory = common.memory(program)
        rows[name] = {**row, "compile_seconds": seconds, "memory_bytes": memory}

    for name, task in _contexts(work, flags.phase, flags.rollouts):
        add(name, _step(task), params, batch, key, capacities=task.capacities)
        _, lost, shares = calls[name]()
        if lost:
            raise SystemExit(f"{name}: {float(lost):g} tokens found no slot")
        shares = [float(share) for share in shares] if task.ragged else ()
        leaves_out = bool(task.capacities or task.ragged)
        rows[name]["ideal"] = _ideal(work.module, task.phase, work.counts, leaves_out, shares)
    dense = functools.partial(run_dense, work.module, flags.batch)
    add("forward only", dense, work.variables, images, ideal=1 / 3)

    timings = interleaved(calls, flags.rounds, primed=math.inf)
    for name, row in rows.items():
        timing = timings[name]
        row |= {"ms": 1e3 * timing.median, "p25_ms": 1e3 * timing.lower}
        row |= {"p75_ms": 1e3 * timing.upper}
        row["of_plain"] = timing.median / timings["plain fine-tuning"].median
    px = "x".join(map(str, work.module.input_spec.size))
    title = f"{flags.model}, {px}, batch {flags.batch}, {jnp.dtype(dtype).name}, {work.source}"
    print(table(title, rows), flush=True)
    result = {
        "command": " ".join(
            ["python -m benchmarks.train_cost", *(sys.argv[1:] if argv is None else argv)]
        ),
        **common.environment(),
        "batch": flags.batch,
        "dtype": jnp.dtype(dtype).name,
        "counts": work.source,
        "kept": (work.counts.mean(0) / work.module.input_spec.num_patches).tolist(),
        "steps": rows,
    }
    backend = jax.default_backend()
    common.write(flags.out or common.RESULTS / f"train_cost_{flags.model}_{backend}.json", result)
    return result


if __name__ == "__main__":
    main()
