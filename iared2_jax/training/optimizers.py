"""What trains in a phase, and with which optimizer."""

import functools
import itertools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import traverse_util
from optax.contrib import MuonDimensionNumbers, muon

from iared2_jax.models.backbones.protocol import PARTS
from iared2_jax.models.parameters import decays, declared
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.training.phases.base import Part
from iared2_jax.typing import Array

FlatParams = dict[str, Any]


def part_of(path: str, module: IARed2) -> Part:
    """The part of the model that the parameter at `path` trains with.

    Raises:
      ValueError: nobody says so; no parameter is frozen by accident.

    Example:
      >>> from iared2_jax.token_reduction.create import create_module
      >>> part_of("backbone/block_5/attn/qkv/kernel", create_module("deit_s", groups=3))
      ('blocks', 2)
    """
    top, name, *_ = path.split("/")
    if match := re.fullmatch(r"interpreter_(\d+)", top):
        return "interpreter", int(match[1])
    if match := re.fullmatch(r"block_(\d+)", name):
        ends = itertools.accumulate(module.group_sizes)
        return "blocks", 1 + next(g for g, end in enumerate(ends) if int(match[1]) < end)
    for part, names in {**PARTS, **getattr(module.backbone, "parts", {})}.items():
        if name in names:
            return part, 0
    raise ValueError(
        f"nobody says with which part of the model {path} trains: add {name!r} to the `parts` of "
        f"{type(module.backbone).__name__}"
    )


def split_trainable(
    params: Mapping[str, Any], trains: Collection[Part], module: IARed2
) -> tuple[FlatParams, FlatParams]:
    """Splits parameters into (trainable, frozen), flat, by the parts that train."""
    flat = traverse_util.flatten_dict(params, sep="/")
    trainable = {k: v for k, v in flat.items() if part_of(k, module) in trains}
    return trainable, {k: v for k, v in flat.items() if k not in trainable}


def merge(trainable: FlatParams, frozen: FlatParams) -> dict[str, Any]:
    """The inverse of `split_trainable`."""
    return traverse_util.unflatten_dict({**trainable, **frozen}, sep="/")


@functools.lru_cache(maxsize=8)
def weights_that_decay(module: IARed2) -> frozenset[str]:
    """Paths of the parameters that weight decay and Muon take for weights, as they are declared."""
    found = declared(module, module.input_spec.shape)
    return frozenset(
        path for path, (shape, initial) in found.items() if decays(path, shape.shape, initial)
    )


def _adam(learning_rate, options, mask):
    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(options.weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _sgd(learning_rate, options, mask):
    return optax.chain(
        optax.add_decayed_weights(options.weight_decay, mask),
        optax.sgd(learning_rate, options.momentum, nesterov=True),
    )


def _muon(learning_rate, options, mask):
    # Weights by Muon, scaled to AdamW's update size so that learning rates carry over; the rest by
    # AdamW.
    def dimensions(params):
        return {p: MuonDimensionNumbers() if weight else None for p, weight in mask(params).items()}

    return muon(
        learning_rate,
        weight_decay=options.weight_decay,
        weight_decay_mask=mask,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dimensions,
    )


# "adam" and "adamw" differ only by name: with weight_decay=0 they are the same, else decoupled.
OPTIMIZERS = {"adam": _adam, "adamw": _adam, "sgd": _sgd, "muon": _muon}


def learning_rate_schedule(options: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine from the peak to 0 at the phase's last step."""
    warmup = min(options.warmup_steps, steps - 1)
    if warmup == 0:
        return optax.cosine_decay_schedule(options.learning_rate, steps)
    return optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, warmup, steps)


# (options, part, steps) -> what the part's learning rate is multiplied by; None: by 1.
RateOf = Callable[[ml_collections.ConfigDict, Part, int], optax.Schedule | None]


def make_optimizer(
    options: ml_collections.ConfigDict, steps: int, module: IARed2, rate_of: RateOf | None = None
) -> optax.GradientTransformation:
    """The optimizer of one phase, from its section of the config; for flat parameters."""

    def mask(params: FlatParams) -> dict[str, bool]:
        weights = weights_that_decay(module)
        return {path: path in weights for path in params}

    optimizer = OPTIMIZERS[options.optimizer](learning_rate_schedule(options, steps), options, mask)
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm > 0 else None
    if rate_of is not None:
        return _with_rates(optimizer, clip, options, steps, module, rate_of)
    return optimizer if clip is None else optax.chain(clip, optimizer)


def _with_rates(
    optimizer: optax.GradientTransformation,
    clip: optax.GradientTransformation | None,
    options: ml_collections.ConfigDict,
    steps: int,
    module: IARed2,
    rate_of: RateOf,
) -> optax.GradientTransformation:
    """The optimizer behind `clip`, with some parts' learning rates multiplied.

    A part whose rate is 0 rests: it stays as it is, while the optimizer's means go on following its
    gradients. (Of zeros they would know nothing when it wakes, and Adam's count of steps would say
    that they do: its first updates would be several times too large.)
    """
    # With the clipping's state, which is empty, where it has always been in checkpoints.
    chained = optimizer if clip is None else optax.chain(optax.identity(), optimizer)

    def rates(params: FlatParams) -> dict[str, optax.Schedule]:
        """The schedules of the parameters that have one, by path."""
        found = {path: rate_of(options, part_of(path, module), steps) for path in params}
        return {path: rate for path, rate in found.items() if rate is not None}

    def init(params: FlatParams) -> optax.OptState:
        """The optimizer's state, and the step that the rates go by."""
        state = chained.init(params)
        if not rates(params):
            return state
        # This class, so that `keep_unapplied` lets it advance like any schedule.
        return state, optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        grads: FlatParams, state: optax.OptState, params: FlatParams
    ) -> tuple[FlatParams, optax.OptState]:
        """The updates, each times its part's rate at this step."""
        chosen = rates(params)
        if not chosen:
            return chained.update(_clipped(clip, grads, {}), state, params)
        state, scale = state
        factors = {path: rate(scale.count) for path, rate in chosen.items()}
        updates, state = chained.update(_clipped(clip, grads, factors), state, params)
        scaled = {path: factor * updates[path] for path, factor in factors.items()}
        count = optax.ScaleByScheduleState(count=optax.safe_increment(scale.count))
        return {**updates, **scaled}, (state, count)

    return optax.GradientTransformation(init, update)


def _clipped(
    clip: optax.GradientTransformation | None, grads: FlatParams, factors: Mapping[str, Array]
) -> FlatParams:
    """Gradients clipped by their norm; those of what rests apart, which has no part in it."""
    if clip is None:
        return grads

    def norm_of(chosen: FlatParams) -> FlatParams:
        return clip.update(chosen, optax.EmptyState())[0]

    rests = {path: factors.get(path, 1.0) == 0 for path in grads}
    moving = norm_of({path: jnp.where(rests[path], 0, g) for path, g in grads.items()})
    resting = norm_of({path: jnp.where(rests[path], g, 0) for path, g in grads.items()})
    return {path: jnp.where(rests[path], resting[path], moving[path]) for path in grads}


def keep_unapplied(new: optax.OptState, old: optax.OptState, applied: Array) -> optax.OptState:
    """The optimizer's state behind a step: the new one, or the old one where it was not applied.

    The schedule's count advances either way: the learning rate follows the steps of the phase, so
    that it is 0 at its end however many of them were left out.
    """

    def chosen(after: Any, before: Any) -> Any:
        if isinstance(after, optax.ScaleByScheduleState):
            return after
        return jnp.where(applied, after, before)

    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(chosen, new, old, is_leaf=is_schedule)
