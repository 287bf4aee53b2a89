"""The curriculum as data: what trains, when, and for how long (paper, section 3.2)."""

import ml_collections

from iared2_jax.training.phases import PHASES, Phase, stages


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


def trains_dense_first(config: ml_collections.ConfigDict) -> bool:
    """Whether a config's curriculum trains a dense backbone, and then drops tokens from it."""
    kinds = [PHASES[name] for name, _ in stages(config.curriculum, 1)]
    return kinds[-1].reduces and not kinds[0].reduces


def dense_phase(plan: list[Phase]) -> Phase | None:
    """The phase at whose end a plan's backbone is what its reduced model is compared with.

    None where that is the start of the run, or where nothing is reduced.
    """
    dense = [phase for phase in plan if not phase.kind.reduces]
    return dense[-1] if dense and plan[-1].kind.reduces else None


def phase_at(plan: list[Phase], step: int) -> Phase | None:
    """The phase that trains next after `step` steps; None when all are done."""
    return next((phase for phase in plan if step < phase.end), None)
