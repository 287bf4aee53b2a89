"""The curriculum as data: what trains, when, and for how long (paper, section 3.2)."""

from collections.abc import Sequence

import ml_collections

from iared2_jax.training.phases import PHASES, Phase, PhaseKind, stages


def phases(
    config: ml_collections.ConfigDict, group_sizes: tuple[int, ...], epoch_size: int
) -> list[Phase]:
    """The phases of a config's curriculum, one after the other.

    Args:
      group_sizes: blocks of each group.
      epoch_size: training examples in an epoch.
    """
    num_groups = len(group_sizes)
    result: list[Phase] = []
    step = example = 0
    for name, group in stages(config.curriculum, num_groups):
        kind = PHASES[name]
        options = config[kind.section]
        length = options.steps or options.epochs * epoch_size / options.batch_size
        steps = max(1, round(length * kind.length(options, group)))
        result.append(
            Phase(
                kind=kind,
                group=group,
                trains=kind.trains(options, group, num_groups),
                thresholds=kind.thresholds(config.reduction.threshold, group, num_groups),
                first_step=step,
                steps=steps,
                first_example=example,
                options=options,
                selector=config.reduction.selector,
                keep_ratios=tuple(config.reduction.keep_ratios) or None,
            )
        )
        step += steps
        example += steps * options.batch_size
    return result


def reduces(config: ml_collections.ConfigDict) -> bool:
    """Whether a config's curriculum trains anything that drops tokens."""
    return any(PHASES[name].reduces for name, _ in stages(config.curriculum, 1))


def dense_stages(kinds: Sequence[PhaseKind]) -> int:
    """How many kinds, from the first, train the dense backbone before tokens are dropped from it.

    0 where tokens are never dropped.
    """
    dropping = [place for place, kind in enumerate(kinds) if kind.reduces]
    return dropping[0] if dropping else 0


def trains_dense_first(config: ml_collections.ConfigDict) -> bool:
    """Whether a config's curriculum trains the dense backbone that its model is compared with."""
    return dense_stages([PHASES[name] for name, _ in stages(config.curriculum, 1)]) > 0


def dense_phase(plan: Sequence[Phase]) -> Phase | None:
    """The phase at whose end the dense backbone is as it will be compared with; None: the start."""
    count = dense_stages([phase.kind for phase in plan])
    return plan[count - 1] if count else None


def phase_at(plan: list[Phase], step: int) -> Phase | None:
    """The phase that trains next after `step` steps; None when all are done."""
    return next((phase for phase in plan if step < phase.end), None)
