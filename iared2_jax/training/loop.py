"""Training: one loop for every curriculum. The phases say what trains, and how."""

import contextlib
import dataclasses
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
    runs_ragged,
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
    checkpoints = RunCheckpoints(workdir, config.keep_checkpoints)
    run = _Run(config, workdir, module, plan, dataset, stop, data_mesh(), checkpoints)
    state, step = _resume_or_start(run, variables["params"])
    with (
        MetricWriter(workdir, step) as writer,
        Profile(workdir, config.profile, step) as profile,
        # Raised before a phase's first step, when all that was trained is saved.
        contextlib.suppress(Interrupted),
    ):
        while (phase := phase_at(plan, step)) is not None and not stop.requested:
            state, step = _train_phase(run, phase, state, step, writer, profile)
            if step == phase.end:
                if phase is dense_phase(plan):
                    keep_dense(state.eval_params)
                state = enter_phase(state, phase_at(plan, step), module)
                state = jax.device_put(state, run.replicated)
            _save(run, state, step)
    return state


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all phases of a run share; most of it is given to `train_phases`."""

    config: ml_collections.ConfigDict
    workdir: Path
    module: IARed2
    plan: list[Phase]
    dataset: Dataset
    stop: Stop
    mesh: jax.sharding.Mesh
    checkpoints: RunCheckpoints

    @property
    def replicated(self) -> NamedSharding:
        """How the state lies on the devices: whole on each."""
        return NamedSharding(self.mesh, P())

    @property
    def rows(self) -> NamedSharding:
        """How a batch lies on the devices: its rows split over them."""
        return NamedSharding(self.mesh, P("data"))

    def batches(self, phase: Phase, example: int) -> Iterator[Batch]:
        """The phase's batches on the devices, from that example of the run on."""
        for batch in _batches(self.config, self.module, phase, self.dataset, example):
            yield shard_batch(batch, self.rows)


def _resume_or_start(run: _Run, params: Params) -> tuple[TrainState, int]:
    """The state to train on from, and its step: the newest checkpoint's, else `params` at 0."""

    def state_at(step: int) -> TrainState:
        """A state with the structure of step `step`: the optimizer is that of its phase."""
        state = initial_state(params, run.plan[0], run.module, run.config.ema_decay)
        return enter_phase(state, phase_at(run.plan, step), run.module)

    def abstract_state_at(step: int) -> TrainState:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=run.replicated),
            jax.eval_shape(lambda: state_at(step)),
        )

    if restored := run.checkpoints.restore_newest(abstract_state_at):
        log.info("resuming at step %d of %d", restored[1], run.plan[-1].end)
        return restored
    return jax.device_put(state_at(0), run.replicated), 0


def _save(run: _Run, state: TrainState, step: int) -> None:
    """Writes a checkpoint that names the phase which trains next."""
    phase = phase_at(run.plan, step)
    meta = {"step": step, "phase": phase.name if phase else "done", "config": run.config.name}
    run.checkpoints.save(step, state, meta)


def _train_phase(
    run: _Run,
    phase: Phase,
    state: TrainState,
    step: int,
    writer: MetricWriter,
    profile: Profile,
) -> tuple[TrainState, int]:
    """The state and the step where the phase ends, or where a stop was requested.

    Raises:
      NonFiniteError: see `train_phases`.
      Interrupted: a stop was requested while features were cached, before the first step.
    """
    config = run.config
    capacities = _capacities(run, phase, state.params)
    train_step = make_train_step(run.module, phase, config, run.mesh, capacities)
    stream = _PhaseStream(run, phase, state.params, step - phase.first_step)
    window, alarms = Window(), HealthAlarms(phase, writer.windows(phase.name))
    with Progress(phase, run.plan[-1].end) as progress:
        while step < phase.end and not run.stop.requested:
            profile.before(step)
            state, metrics = train_step(state, next(stream))
            step += 1
            window.add(metrics)
            if step % config.log_every == 0 or step == phase.end:
                figures = window.means()
                writer.write(step, phase.name, figures)
                progress.show(step, figures)
                alarms.check(step, figures)
                _refuse_divergence(figures, config.max_bad_steps, phase, step)
            if step % config.checkpoint_every == 0 and step < phase.end:
                _save(run, state, step)
    return state, step


class _PhaseStream(Iterator[Batch]):
    """A phase's batches (`PhaseKind.stream`) on the devices, from its step `done` on.

    A phase may read many training batches before it gives its first one, to cache their features.
    That takes minutes, so a stop ends it.
    """

    def __init__(self, run: _Run, phase: Phase, params: Params, done: int) -> None:
        self._run, self._phase = run, phase
        self._begun = False  # whether a batch has been given
        context = PhaseContext(run.module, phase)
        self._stream = phase.kind.stream(context, params, self._until_stopped, done)

    def __next__(self) -> Batch:
        batch = next(self._stream)
        self._begun = True
        return shard_batch(batch, self._run.rows)

    def _until_stopped(self, example: int) -> Iterator[Batch]:
        """The training batches that the phase reads."""
        for number, batch in enumerate(self._run.batches(self._phase, example)):
            if number and not self._begun and self._run.stop.requested:
                raise Interrupted("stopped by a signal before the phase's first step")
            yield batch


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


def _capacities(run: _Run, phase: Phase, params: Params) -> Capacities | None:
    """Patch slots for gathered training; None where there are none, or there is nothing to drop."""
    masked = run.config.reduction.train_execution == "masked" or not phase.kind.reduces
    # A budget is its own capacity.
    if masked or phase.keep_ratios or runs_ragged(run.config, phase):
        return None

    def measure() -> Capacities:
        """Slots for the phase's own first images, so that a resumed run would count the same."""
        first = run.batches(phase, phase.first_example)
        return measure_capacities(run.module, params, phase, first)

    slots = recalled(run.workdir / "capacities.json", phase, measure)
    # Where some image keeps all, there is nothing to gather away.
    return None if all(count == run.module.input_spec.num_patches for count in slots) else slots


def _refuse_divergence(figures: dict[str, float], limit: int, phase: Phase, step: int) -> None:
    if figures["bad_steps_max"] >= limit:
        section = phase.kind.section
        raise NonFiniteError(
            f"{limit} steps in a row up to step {step} ({phase.name}) had a loss or gradient that "
            f"is not finite; none was applied. Lower config.{section}.learning_rate or set "
            f"config.{section}.clip_norm=1.0"
        )
