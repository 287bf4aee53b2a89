"""Training: one loop for every curriculum. The phases say what trains, and how."""

import contextlib
import fcntl
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from iared2_jax import config as config_lib
from iared2_jax.config_checks import validate
from iared2_jax.data.pipeline import mixing, shard_batch, train_batches
from iared2_jax.errors import NonFiniteError, UsageError
from iared2_jax.files import write_json
from iared2_jax.signals import Stop
from iared2_jax.token_reduction import create
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.training.capacities import measure_capacities, recalled
from iared2_jax.training.checkpoints import RunCheckpoints
from iared2_jax.training.curriculum import Phase, phase_at, phases
from iared2_jax.training.losses import Batch, Capacities, Params
from iared2_jax.training.monitoring import HealthAlarms, MetricWriter, Profile, Progress, Window
from iared2_jax.training.step import (
    TrainState,
    data_mesh,
    enter_phase,
    initial_state,
    make_train_step,
)
from iared2_jax.weights import load as weights
from iared2_jax.weights.files import read_tensors

log = logging.getLogger(__name__)

Model = tuple[IARed2, dict[str, Any]]  # module and variables


def model_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What `create_model` has to be called with to make the config's model."""
    options = {
        "name": config.model.name,
        "num_classes": config_lib.num_classes(config),
        "groups": config_lib.model_groups(config),
        "policy_token": config.model.policy_token or None,
        "scale": config.model.scale,
        "init_bias": config.model.init_bias,
        **{key: size for key, size in config_lib.input_sizes(config).items() if size},
    }
    if config.model.interpreter_heads:
        options["interpreter_heads"] = config.model.interpreter_heads
    return options


def build_model(config: ml_collections.ConfigDict) -> Model:
    """The config's model with the parameters it starts from: `config.weights`, else scratch."""
    dtype = jnp.dtype(config.model.dtype)
    module = create.create_module(**model_options(config), dtype=dtype)
    if source := config_lib.weights_of(config):
        # An interpreter's reward, and an evaluation, need answers that mean something.
        fresh_head = config.mode == "train" and config.curriculum == "supervised"
        loaded = weights.load_weights(module, source, seed=config.seed, fresh_head=fresh_head)
        return module, loaded
    return module, create.init_variables(module, config.seed)


@contextlib.contextmanager
def claimed(config: ml_collections.ConfigDict, workdir: Path) -> Iterator[Model]:
    """The workdir as this run's own while the block lasts; all is checked before it is written.

    Yields:
      The model that the config starts from (`build_model`).

    Raises:
      UsageError: the config or its weights cannot be used, or the workdir cannot be written, is in
        use, or holds another run's config.
    """
    validate(config, jax.device_count())
    model = build_model(config)  # weights that do not fit are refused before anything compiles
    with contextlib.ExitStack() as held:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((workdir / "lock").open("w"))
            # The kernel lets go of it however the process ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _adopt_config(config, workdir)
        except BlockingIOError as error:
            raise UsageError(
                f"another run is at work in {workdir}: wait for it, or give another --workdir"
            ) from error
        except OSError as error:
            raise UsageError(
                f"workdir {workdir} cannot be written ({error.strerror}): give another --workdir"
            ) from error
        yield model


def _adopt_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes config.json into a workdir; refuses one that holds another run's."""
    path = workdir / "config.json"
    mine = json.loads(json.dumps(config_lib.flatten(config)))
    # A path may change, for data that moved; what is there may not.
    mine["data found"] = config_lib.dataset_of(config).fingerprint
    try:
        theirs = json.loads(path.read_text()) if path.exists() else mine
    except ValueError as error:
        raise UsageError(f"{path} is damaged: delete it, or give another --workdir") from error
    differ = [
        f"{key} ({theirs.get(key)!r} there, {mine.get(key)!r} here)"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key) and key not in config_lib.RESUMABLE
    ]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UsageError(
            f"workdir {workdir} holds another run's config: {', '.join(differ[:3])}{more}; "
            "give another --workdir"
        )
    write_json(path, dict(sorted(mine.items())))


def train(
    config: ml_collections.ConfigDict, workdir: str | Path, stop: Stop | None = None
) -> TrainState:
    """Trains what the config says, from the workdir's newest checkpoint on, and returns the state.

    On SIGTERM (or `stop.request()`) the state is saved at the current step, and returned; the same
    call goes on from there, to bitwise the same parameters on the same devices.

    Raises:
      UsageError: the config or the workdir cannot be used; nothing was compiled or changed.
      NonFiniteError: too many non-finite steps in a row. The last good checkpoint is kept.
      CheckpointError: no checkpoint could be written, or none of those there is whole.
    """
    with claimed(config, Path(workdir)) as model:
        return _train(config, Path(workdir), stop or Stop(), model)


def _train(
    config: ml_collections.ConfigDict, workdir: Path, stop: Stop, model: Model
) -> TrainState:
    # -- Model, phases, state ------------------------------------------------------------------
    mesh = data_mesh()
    module, variables = model  # whose buffers the first step takes over
    plan = phases(config, module.group_sizes)
    sharding = NamedSharding(mesh, P())

    def state_at(step: int, params) -> TrainState:
        state = initial_state(params, plan[0], module.group_sizes, config.ema_decay)
        return enter_phase(state, phase_at(plan, step), module.group_sizes)

    def abstract_state_at(step: int) -> TrainState:
        shapes = jax.eval_shape(lambda: state_at(step, variables["params"]))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )

    # -- Resume: the workdir's own checkpoint, else the weights the config names -----------------
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
    rows = NamedSharding(mesh, P("data"))
    with MetricWriter(workdir, step) as writer, Profile(workdir, config.profile, step) as profile:
        while (phase := phase_at(plan, step)) is not None and not stop.requested:
            capacities = _capacities(config, workdir, module, state.params, phase)
            train_step = make_train_step(module, phase, config, mesh, capacities)
            done = (step - phase.first_step) * phase.options.batch_size
            batches = _batches(config, module, phase, phase.first_example + done)
            window, alarms = Window(), HealthAlarms(phase)
            with Progress(phase, plan[-1].end) as progress:
                while step < phase.end and not stop.requested:
                    profile.before(step)
                    state, metrics = train_step(state, shard_batch(next(batches), rows))
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
                state = enter_phase(state, phase_at(plan, step), module.group_sizes)
                state = jax.device_put(state, sharding)
            save(state, step)
    return state


def _batches(
    config: ml_collections.ConfigDict, module: IARed2, phase: Phase, example: int
) -> Iterator[Batch]:
    """The phase's batches, from that example of the run on."""
    mix = None
    if phase.kind != "interpreter":  # whose reward is for the right answer, which must be one
        augment = config_lib.augment_of(config)
        mix = mixing(augment, module.backbone.num_classes, phase.options.label_smoothing)
    source, options = config_lib.dataset_of(config), phase.options
    return iter(
        train_batches(source, options.batch_size, example, config.seed, config.data.threads, mix)
    )


def _capacities(
    config: ml_collections.ConfigDict, workdir: Path, module: IARed2, params: Params, phase: Phase
) -> Capacities | None:
    """Patch slots for gathered training; None where it is masked, or there is nothing to drop."""
    if config.reduction.train_execution != "gathered" or phase.kind == "supervised":
        return None

    def measure():
        """From the phase's own first images, so that a resumed run would count the same."""
        batches = _batches(config, module, phase, phase.first_example)
        return measure_capacities(module, params, phase, batches)

    return recalled(workdir / "capacities.json", phase, measure)


def _refuse_divergence(figures: dict[str, float], limit: int, phase: Phase, step: int) -> None:
    if figures["bad_steps_max"] >= limit:
        raise NonFiniteError(
            f"{limit} steps in a row up to step {step} ({phase.name}) had a loss or gradient that "
            f"is not finite; none was applied. Lower config.{phase.kind}.learning_rate or set "
            f"config.{phase.kind}.clip_norm=1.0"
        )


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> None:
    """What `config.mode` says."""
    if config.mode == "explain":
        from iared2_jax.report.pictures import explain_pictures

        validate(config, jax.device_count())
        explain_pictures(config)
    elif config.mode == "eval":
        evaluate(config, workdir)
    else:
        train_and_evaluate(config, workdir)


def evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any] | None:
    """The evaluation and report of `config.weights`, into <workdir>/eval; no weights are written.

    Returns:
      The results; None if a signal stopped it.
    """
    from iared2_jax.report.results import evaluate_run

    workdir = Path(workdir) / "eval"
    shutil.rmtree(workdir, ignore_errors=True)  # of an evaluation before
    with Stop() as stop, claimed(config, workdir) as (_, variables):
        weights.warn_if_untrained(config.weights, read_tensors(config.weights)[0])
        return evaluate_run(config, workdir, variables["params"], stop, write_weights=False)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> TrainState:
    """`train`, then the evaluation and report of the finished model; returns the final state."""
    from iared2_jax.report.results import evaluate_run  # evaluation is the room above this one

    workdir = Path(workdir)
    with Stop() as stop, claimed(config, workdir) as model:
        state = _train(config, workdir, stop, model)
        if not stop.requested:
            evaluate_run(config, workdir, state.eval_params, stop)
        if stop.requested:
            log.warning("stopped by a signal, state saved: the same command goes on from here")
    return state
