"""The curriculum as data: what trains, when, and for how long (paper, section 3.2)."""

import dataclasses

import ml_collections
import numpy as np

from iared2_jax.config import dataset_of
from iared2_jax.token_reduction.model import KEEP_ALL
from iared2_jax.training.optimizers import Part


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training with one optimizer.

    Attributes:
      name: for people, e.g. "interpreter 2".
      kind: "interpreter" (policy gradient), "backbone" (cross-entropy under the greedy masks of
        interpreters 1..group) or "supervised" (cross-entropy, dense).
      group: which group, from 1; 0 for "supervised".
      trains: the parts of the model that move (see `optimizers.RULES`).
      thresholds: one per group; interpreters after `group` keep everything. (Benchmarks give each
        image its own, [b, D].)
      first_step, steps: its place in the run.
      first_example: its place in the stream of training examples.
      options: the config's section for this kind (batch size, optimizer, ..).
    """

    name: str
    kind: str
    group: int
    trains: frozenset[Part]
    thresholds: tuple[float, ...] | np.ndarray
    first_step: int
    steps: int
    first_example: int
    options: ml_collections.ConfigDict

    @property
    def end(self) -> int:
        return self.first_step + self.steps


def phases(config: ml_collections.ConfigDict, group_sizes: tuple[int, ...]) -> list[Phase]:
    """The curriculum of a config (paper, section 3.2).

    "iared2": for j = 1..D, interpreter j alone, then the blocks of groups j..D under the masks so
    far. "interpreters": the first halves only. "supervised": the backbone alone, as one phase.
    """
    groups = range(1, len(group_sizes) + 1)
    head = {("head", 0)} if config.backbone.train_head else set()
    plan: list[tuple[str, int, set[Part]]] = []
    if config.curriculum == "supervised":
        blocks = {("blocks", group) for group in groups}
        plan.append(("supervised", 0, blocks | {("embedding", 0), ("head", 0)}))
    else:
        for j in groups:
            plan.append(("interpreter", j, {("interpreter", j)}))
            if config.curriculum == "iared2":
                plan.append(("backbone", j, {("blocks", k) for k in groups if k >= j} | head))

    epoch = dataset_of(config).epoch_size
    result: list[Phase] = []
    step = example = 0
    for kind, group, trains in plan:
        options = config[kind]
        steps = options.steps or max(1, round(options.epochs * epoch / options.batch_size))
        result.append(
            Phase(
                name=f"{kind} {group}" if group else kind,
                kind=kind,
                group=group,
                trains=frozenset(trains),
                thresholds=tuple(
                    config.reduction.threshold if g <= group else KEEP_ALL for g in groups
                ),
                first_step=step,
                steps=steps,
                first_example=example,
                options=options,
            )
        )
        step += steps
        example += steps * options.batch_size
    return result


def phase_at(plan: list[Phase], step: int) -> Phase | None:
    """The phase that trains next after `step` steps; None when all are done."""
    return next((phase for phase in plan if step < phase.end), None)
