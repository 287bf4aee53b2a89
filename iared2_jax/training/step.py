"""The training state, and the jitted, sharded step that moves it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax
from einops import rearrange
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PRNGKeyArray

from iared2_jax.token_reduction.model import IARed2
from iared2_jax.training import optimizers
from iared2_jax.training.phases import Batch, Metrics, Params, Phase, PhaseContext
from iared2_jax.training.phases.base import Capacities
from iared2_jax.training.ragged import RaggedParts


@flax.struct.dataclass
class TrainState:
    """All that changes, and so all that a checkpoint holds.

    The fields are `Any`: JAX and Orbax fill the same structure with shapes, shardings and None.

    step: of the run, over all phases; which phase it is in follows from it.
    params: all of them; opt_state: only of what the current phase trains.
    ema: a moving average of the parameters, or {} when off.
    bad_steps: non-finite steps in a row.
    extra: state of the current phase's own (`PhaseKind.initial_extra`), or {}.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    bad_steps: Any
    extra: Any = flax.struct.field(default_factory=dict)

    @property
    def eval_params(self) -> dict[str, Any]:
        return self.ema or self.params


def enter_phase(state: TrainState, phase: Phase | None, module: IARed2) -> TrainState:
    """The state with a fresh optimizer for `phase`; without one when training is over."""
    if phase is None:
        return state.replace(opt_state=(), extra={})
    trainable, _ = optimizers.split_trainable(state.params, phase.trains, module)
    optimizer = optimizers.make_optimizer(phase.options, phase.steps, module, phase.kind.rate)
    extra = phase.kind.initial_extra(module, state.params)
    return state.replace(opt_state=optimizer.init(trainable), extra=extra)


def initial_state(
    params: dict[str, Any], phase: Phase, module: IARed2, ema_decay: float
) -> TrainState:
    """The state before the first step."""
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=(),
        ema=jax.tree.map(jnp.copy, params) if ema_decay else {},
        bad_steps=jnp.zeros((), jnp.int32),
    )
    return enter_phase(state, phase, module)


def make_train_step(
    module: IARed2,
    phase: Phase,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    capacities: Capacities | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step of one phase: batch rows split over the mesh, state replicated and donated.

    A step whose loss, gradient or update is not finite changes nothing but the counters.

    Args:
      capacities: patch slots per group, for gathered training (`PhaseKind.loss`); None: masked. A
        batch that does not fit is computed again, masked, and shows in metrics["overflow"].
    """
    ragged = RaggedParts(module, mesh) if runs_ragged(config, phase) else None
    optimizer = optimizers.make_optimizer(phase.options, phase.steps, module, phase.kind.rate)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update, or none if it is not finite."""
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if "input" in batch:  # a phase may have taken features in its place
            batch = {**batch, "input": module.input_spec.normalize(batch["input"])}
        context = PhaseContext(module, phase, capacities, ragged, state.extra)
        grads, metrics = fitting_gradients(context, state.params, batch, key)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        trainable, frozen = optimizers.split_trainable(state.params, phase.trains, module)
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        norms = (metrics["loss"], metrics["gradient_norm"], optax.tree.norm(updates))
        finite = jnp.isfinite(jnp.stack(norms)).all()
        params = optimizers.merge(optax.apply_updates(trainable, updates), frozen)

        def applied(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        params = applied(params, state.params)
        ema = state.ema
        if config.ema_decay:
            ema = applied(optax.incremental_update(params, ema, 1 - config.ema_decay), ema)
        extra = applied(phase.kind.next_extra(state.extra, params), state.extra)
        new = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=optimizers.keep_unapplied(opt_state, state.opt_state, finite),
            ema=ema,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            extra=extra,
        )
        return new, {**metrics, "bad_steps": new.bad_steps.astype(jnp.float32)}

    replicated, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    return jax.jit(
        step,
        in_shardings=(replicated, rows),
        out_shardings=(replicated, replicated),
        donate_argnums=0,
    )


def runs_ragged(config: ml_collections.ConfigDict, phase: Phase) -> bool:
    """Whether the phase's blocks run ragged: no gradient passes through them, and it was asked."""
    return config.reduction.train_execution == "ragged" and phase.kind.frozen_blocks


def fitting_gradients(
    context: PhaseContext, params: Params, batch: Batch, key: PRNGKeyArray
) -> tuple[Params, Metrics]:
    """Gradients of what the phase trains, and the metrics, as `make_train_step` takes them.

    Where tokens found no slot, all is computed again without slots.
    """
    grads, metrics = _gradients(context, params, batch, key)
    if not context.capacities:
        return grads, metrics
    lost = metrics["overflow"]

    def masked(turn, _):
        """Masked execution needs no slots."""
        whole = dataclasses.replace(context, capacities=None)
        # Without it, all of this is the same in every turn, and XLA moves it before the loop.
        given = jax.lax.optimization_barrier((params, batch, key, turn))[:3]
        again, figures = _gradients(whole, *given)
        return again, {**figures, "overflow": lost}

    # A loop of one turn or none: XLA:CPU runs a conditional's branch on one core.
    return jax.lax.fori_loop(0, (lost > 0).astype(jnp.int32), masked, (grads, metrics))


def _gradients(
    context: PhaseContext, params: Params, batch: Batch, key: PRNGKeyArray
) -> tuple[Params, Metrics]:
    """Gradients of what the phase trains, over the micro-batches; and the metrics."""
    phase, micro = context.phase, context.phase.options.accumulate
    trainable, frozen = optimizers.split_trainable(params, phase.trains, context.module)

    def loss(trainable, batch, key):
        """The phase's loss as a function of what is trained."""
        return phase.kind.loss(context, optimizers.merge(trainable, frozen), batch, key)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if micro == 1:
        (value, metrics), grads = value_and_grad(trainable, batch, key)
        return grads, {**metrics, "loss": value}

    # Every micro-batch takes each device's rows in turn, so no row changes its device.
    parts = jax.tree.map(lambda x: rearrange(x, "(b m) ... -> m b ...", m=micro), batch)

    def body(total, part):
        """Adds one micro-batch's share."""
        batch, index = part
        (value, metrics), grads = value_and_grad(trainable, batch, jax.random.fold_in(key, index))
        total = jax.tree.map(lambda t, g: t + g / micro, total, grads)
        return total, {**metrics, "loss": value}

    zeros = jax.tree.map(jnp.zeros_like, trainable)
    grads, metrics = jax.lax.scan(body, zeros, (parts, jnp.arange(micro)))
    return grads, jax.tree.map(lambda x: x.mean(axis=0), metrics)


def data_mesh(devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """All devices in one axis, "data". Auto axes: linen does not run under Explicit ones."""
    devices = devices or jax.devices()
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )
