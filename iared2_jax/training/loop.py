"""Training: one loop for every curriculum. The phases say what trains, and how."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from iared2_jax.data.augment import augment_options
from iared2_jax.data.datasets import Dataset
from iared2_jax.data.pipeline import mixing, shard_batch, train_batches
from iared2_jax.errors import Interrupted, NonFiniteError
from iared2_jax.signals import Stop
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.training.capacities import measure_capacities, recalled
from iared2_jax.training.checkpoints import RunCheckpoints
from iared2_jax.training.curriculum import dense_phase, phase_at
from iared2_jax.training.monitoring import HealthAlarms, MetricWriter, Profile, Progress, Window
from iared2_jax.training.phases import Batch, Params, Phase, PhaseContext
from iared2_jax.training.phases.base import Capacities
from iared2_jax.training.step import (
    TrainState,
    data_mesh,
    enter_phase,
    initial_state,
    make_train_step,
)

log = logging.getLogger(__name__)


def train_phases(
    config: ml_collections.ConfigDict,
    workdir: Path,
    module: IARed2,
    variables: dict[str, Any],
    plan: list[Phase],
    dataset: Dataset,
    stop: Stop,
    keep_dense: Callable[[Params], None] = lambda params: None,
) -> TrainState:
    """Trains a plan's phases, from the workdir's newest checkpoint on, and returns the state.

    Args:
      variables: what a run without checkpoints starts from; the first step takes its buffers over.
      stop: once it is requested, the state is saved at the current step, and returned.
      keep_dense: called with the parameters after the last phase before tokens are dropped.

    Raises:
      NonFiniteError: too many non-finite steps in a row. The last good checkpoint is kept.
      CheckpointError: no checkpoint could be written, or none of those there is whole.
    """
    mesh = data_mesh()
    sharding, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def state_at(step: int, params: Params) -> TrainState:
        state = initial_state(params, plan[0], module, config.ema_decay)
        return enter_phase(state, phase_at(plan, step), module)

    def abstract_state_at(step: int) -> TrainState:
        shapes = jax.eval_shape(lambda: state_at(step, variables["params"]))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )

    # -- Resume: the workdir's own checkpoint, else what the run starts from ---------------------
    checkpoints = RunCheckpoints(workdir, config.keep_checkpoints)
    restored = checkpoints.restore_newest(abstract_state_at)
    if restored:
        state, step = restored
        log.info("resuming at step %d of %d", step, plan[-1].end)
    else:
        state, step = jax.device_put(state_at(0, variables["params"]), sharding), 0

    def save(state: TrainState, step: int) -> None:
        phase = phase_at(plan, step)
        meta = {"step": step, "phase": phase.name if phase else "done", "config": config.name}
        checkpoints.save(step, state, meta)

    # -- Train ---------------------------------------------------------------------------------
    with (
        MetricWriter(workdir, step) as writer,
        Profile(workdir, config.profile, step) as profile,
        # Raised before a phase's first step, when all that was trained is saved.
        contextlib.suppress(Interrupted),
    ):
        while (phase := phase_at(plan, step)) is not None and not stop.requested:

            def batches(example: int, phase: Phase = phase) -> Iterator[Batch]:
                """The phase's batches on the devices, from that example of the run on."""
                for batch in _batches(config, module, phase, dataset, example):
                    yield shard_batch(batch, rows)

            def until_stopped(
                example: int, batches: Any = batches, begun: int = step
            ) -> Iterator[Batch]:
                """The same, for features of many batches that are cached before the first step."""
                for number, batch in enumerate(batches(example)):
                    # The step of now is meant, so B023 does not apply.
                    if number and step == begun and stop.requested:  # noqa: B023
                        raise Interrupted("stopped by a signal before the phase's first step")
                    yield batch

            capacities = _capacities(config, workdir, module, state.params, phase, batches)
            train_step = make_train_step(module, phase, config, mesh, capacities)
            context = PhaseContext(module, phase)
            done = step - phase.first_step
            stream = phase.kind.stream(context, state.params, until_stopped, done)
            window, alarms = Window(), HealthAlarms(phase, writer.windows(phase.name))
            with Progress(phase, plan[-1].end) as progress:
                while step < phase.end and not stop.requested:
                    profile.before(step)
                    state, metrics = train_step(state, shard_batch(next(stream), rows))
                    step += 1
                    window.add(metrics)
                    if step % config.log_every == 0 or step == phase.end:
                        figures = window.means()
                        writer.write(step, phase.name, figures)
                        progress.show(step, figures)
                        alarms.check(step, figures)
                        _refuse_divergence(figures, config.max_bad_steps, phase, step)
                    if step % config.checkpoint_every == 0 and step < phase.end:
                        save(state, step)
            if step == phase.end:
                if phase is dense_phase(plan):
                    keep_dense(state.eval_params)
                state = enter_phase(state, phase_at(plan, step), module)
                state = jax.device_put(state, sharding)
            save(state, step)
    return state


def _batches(
    config: ml_collections.ConfigDict,
    module: IARed2,
    phase: Phase,
    dataset: Dataset,
    example: int,
) -> Iterator[Batch]:
    """The phase's batches, on the host."""
    mix, options = None, phase.options
    if phase.kind.mixes:
        smoothing = getattr(options, "label_smoothing", 0.0)
        mix = mixing(augment_options(config.data.augment), module.backbone.num_classes, smoothing)
    return iter(
        train_batches(dataset, options.batch_size, example, config.seed, config.data.threads, mix)
    )


def _capacities(
    config: ml_collections.ConfigDict,
    workdir: Path,
    module: IARed2,
    params: Params,
    phase: Phase,
    batches: Any,
) -> Capacities | None:
    """Patch slots for gathered training; None where it is masked, or there is nothing to drop."""
    gathered = config.reduction.train_execution == "gathered"
    if not gathered or not phase.kind.reduces or phase.keep_ratios:  # a budget is its own capacity
        return None

    def measure() -> Capacities:
        """Slots for the phase's own first images, so that a resumed run would count the same."""
        return measure_capacities(module, params, phase, batches(phase.first_example))

    return recalled(workdir / "capacities.json", phase, measure)


def _refuse_divergence(figures: dict[str, float], limit: int, phase: Phase, step: int) -> None:
    if figures["bad_steps_max"] >= limit:
        section = phase.kind.section
        raise NonFiniteError(
            f"{limit} steps in a row up to step {step} ({phase.name}) had a loss or gradient that "
            f"is not finite; none was applied. Lower config.{section}.learning_rate or set "
            f"config.{section}.clip_norm=1.0"
        )
