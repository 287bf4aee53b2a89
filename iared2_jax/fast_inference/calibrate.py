"""The budget dial: thresholds for a wanted cost, speed or accuracy, without retraining."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iared2_jax.data.inputs import Images, as_inputs, check_labels, refuse_non_finite
from iared2_jax.errors import UsageError
from iared2_jax.fast_inference import planner
from iared2_jax.fast_inference.accelerate import accelerate
from iared2_jax.fast_inference.accelerated import Accelerated, per_group
from iared2_jax.fast_inference.forward import ForwardSpec
from iared2_jax.fast_inference.plan import Plan
from iared2_jax.fast_inference.plan_request import PlanRequest
from iared2_jax.timing import interleaved
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.token_reduction.model import KEEP_ALL, IARed2, Thresholds
from iared2_jax.typing import Array

# From a threshold to its point, and all scores that were compared with it.
Measure = Callable[[float], "tuple[BudgetPoint, np.ndarray]"]

log = logging.getLogger(__name__)

_POINTS = 33  # of the dial
_ROUNDS = 7  # of timing


@dataclasses.dataclass(frozen=True)
class BudgetPoint:
    """What one setting of the dial gives, on the images it was measured with.

    Attributes:
      thresholds: one per group.
      flops: mean full multiply-adds per image, interpreters included (`count_flops(..).full`).
      kept: mean share of the patches that each group's blocks see.
      accuracy: share of right answers; without labels, of answers as with all tokens kept.
      images_per_second: by `accelerate`, if it was measured.
    """

    thresholds: tuple[float, ...]
    flops: float
    kept: tuple[float, ...]
    accuracy: float
    images_per_second: float | None = None


def budget_curve(
    module: IARed2,
    variables: Mapping[str, Any],
    images: Images,
    labels: Sequence[int] | Array | None = None,
    *,
    points: int = _POINTS,
    batch_size: int = 32,
) -> list[BudgetPoint]:
    """The dial from "keep all" to "keep almost nothing", dearest first.

    One threshold for all groups. It moves through the quantiles of the scores that the images have
    in any group, so that every step drops about as many tokens as the one before.

    Args:
      images: held-out (`data.inputs.as_inputs`).
      labels: the right answers; None judges by the answers of the model that keeps all.
    """
    return _curve(_measure_fn(module, variables, images, labels, batch_size), points)


def _curve(measure: Measure, points: int) -> list[BudgetPoint]:
    everything, scores = measure(KEEP_ALL)
    levels = np.unique(np.quantile(scores, np.linspace(0, 1, points)[1:-1]).astype(np.float32))
    curve = [everything, *(measure(float(level))[0] for level in levels)]
    return sorted(curve, key=lambda point: -point.flops)


def calibrate(
    module: IARed2,
    variables: Mapping[str, Any],
    images: Images,
    labels: Sequence[int] | Array | None = None,
    *,
    target_flops: float | None = None,
    target_images_per_second: float | None = None,
    max_accuracy_drop: float | None = None,
    batch_size: int = 32,
) -> tuple[float, ...]:
    """Thresholds that meet one target on held-out images; no weight changes.

    Args:
      images: see `data.inputs.as_inputs`; not those the result will be reported on.
      labels: the right answers; None counts agreement with the model that keeps all.
      target_flops: at most so many full multiply-adds per image in the mean; the dearest setting
        below it is returned.
      target_images_per_second: at least so many, by `accelerate` on this device, at `batch_size`.
      max_accuracy_drop: at most so much less accuracy (0.01 is one point) than with all tokens; the
        cheapest such setting is returned.

    Returns:
      One threshold per group, for `accelerate` and `module.apply`.

    Raises:
      UsageError: not exactly one target, or one that no setting reaches (it says what can be
        reached); images that are not finite, labels that are no classes of the model.

    Example:
      >>> import jax, iared2_jax
      >>> module, variables = iared2_jax.create_model("vit_micro")
      >>> images = jax.random.normal(jax.random.key(0), [8, 64, 64, 3])
      >>> thresholds = iared2_jax.calibrate(module, variables, images, target_flops=12e6)
      >>> _, out = module.apply(variables, images, thresholds)
    """
    targets = (target_flops, target_images_per_second, max_accuracy_drop)
    if sum(target is not None for target in targets) != 1:
        raise UsageError(
            "calibrate needs exactly one of target_flops, target_images_per_second and "
            "max_accuracy_drop"
        )
    measure = _measure_fn(module, variables, images, labels, batch_size)
    curve = _curve(measure, _POINTS)
    if target_flops is not None:
        return _for_flops(curve, target_flops, lambda t: measure(t)[0]).thresholds
    if max_accuracy_drop is not None:
        enough = [p for p in curve if p.accuracy >= curve[0].accuracy - max_accuracy_drop - 1e-9]
        if not enough:
            raise UsageError(f"max_accuracy_drop={max_accuracy_drop} must not be negative")
        return enough[-1].thresholds
    speed_of = speed_meter(module, variables, images, batch_size)
    return _for_speed(curve, target_images_per_second, speed_of).thresholds


def with_speed(
    module: IARed2,
    variables: Mapping[str, Any],
    images: Images,
    curve: Sequence[BudgetPoint],
    batch_size: int = 32,
) -> list[BudgetPoint]:
    """The curve's points, with images per second of the fastest execution on this device."""
    speed_of = speed_meter(module, variables, images, batch_size)
    return [dataclasses.replace(p, images_per_second=speed_of(p.thresholds)) for p in curve]


def _measure_fn(
    module: IARed2,
    variables: Mapping[str, Any],
    images: Images,
    labels: Sequence[int] | Array | None,
    batch_size: int,
) -> Measure:
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    images = np.asarray(as_inputs(images, module.input_spec), np.float32)
    refuse_non_finite(images)
    if labels is not None:
        labels = check_labels(labels, len(images), module.backbone.num_classes)
    size = min(batch_size, len(images))
    rows = np.arange(-(-len(images) // size) * size) % len(images)

    @jax.jit
    def forward(variables, images, thresholds):
        logits, out = module.apply(variables, images, thresholds)
        return logits.argmax(-1), jnp.stack(out.keep, 1), jnp.stack(out.scores, 1)

    def run(threshold):
        thresholds = per_group(threshold, module.num_groups)
        parts = [forward(variables, images[part], thresholds) for part in rows.reshape(-1, size)]
        whole = jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *parts)
        return [x[: len(images)] for x in whole]

    everything = run(KEEP_ALL)
    truth = everything[0] if labels is None else labels
    _warn_near_chance(
        float((everything[0] == truth).mean()), len(images), module.backbone.num_classes
    )

    def measure(threshold: float) -> tuple[BudgetPoint, np.ndarray]:
        """One setting of the dial."""
        answers, keep, scores = everything if threshold == KEEP_ALL else run(threshold)
        counts = keep.sum(-1)
        point = BudgetPoint(
            thresholds=(threshold,) * module.num_groups,
            flops=float(np.mean(count_flops(module, tuple(counts.T)).full)),
            kept=tuple((counts.mean(0) / keep.shape[-1]).tolist()),
            accuracy=float((answers == truth).mean()),
        )
        return point, scores[scores > 0]

    return measure


def _warn_near_chance(accuracy: float, count: int, num_classes: int) -> None:
    """Says that the model hardly beats guessing with all tokens: its labels must be wrong."""
    chance = 1 / num_classes
    if accuracy < 2 * chance + 2 * (chance * (1 - chance) / count) ** 0.5 and num_classes > 2:
        log.warning(
            "with all tokens kept the accuracy is only %.1f%% on these %d images, guessing has "
            "%.1f%%: are the labels those of this model, counted from 0, and the weights trained?",
            100 * accuracy, count, 100 * chance,
        )  # fmt: skip


def _for_flops(
    curve: Sequence[BudgetPoint], target: float, measure: Callable[[float], BudgetPoint]
) -> BudgetPoint:
    below = [point for point in curve if point.flops <= target]
    if not below:
        raise UsageError(
            f"target_flops={target:.4g} cannot be reached: with almost no token kept it is still "
            f"{curve[-1].flops:.4g}"
        )
    best = below[0]
    if best is curve[0]:
        return best
    above = curve[curve.index(best) - 1]
    if above.thresholds[0] == KEEP_ALL:
        return best
    low, high = above.thresholds[0], best.thresholds[0]
    for _ in range(8):  # the quantiles are some percent apart: come nearer
        middle = measure((low + high) / 2)
        if middle.flops <= target:
            best, high = middle, middle.thresholds[0]
        else:
            low = middle.thresholds[0]
    return best


def _for_speed(
    curve: Sequence[BudgetPoint], target: float, speed_of: Callable[[tuple[float, ...]], float]
) -> BudgetPoint:
    cheapest = speed_of(curve[-1].thresholds)
    if cheapest < target:
        raise UsageError(
            f"target_images_per_second={target:g} cannot be reached: with almost no token kept it "
            f"is {cheapest:.4g} here"
        )
    low, high = -1, len(curve) - 1  # curve[high] is fast enough
    while high - low > 1:
        middle = (low + high) // 2
        if speed_of(curve[middle].thresholds) >= target:
            high = middle
        else:
            low = middle
    return curve[high]


def speed_meter(
    module: IARed2,
    variables: Mapping[str, Any],
    images: Images,
    batch_size: int,
) -> Callable[[tuple[float, ...]], float]:
    """A function from thresholds to images per second, from images on the device to logits.

    Ragged layouts are planned once, where half of the tokens are kept; every setting gets shapes
    for its counts, and is timed beside masked execution: the faster one counts.
    """
    images = np.asarray(as_inputs(images, module.input_spec), np.float32)

    def asked(thresholds: Thresholds) -> PlanRequest:
        """The plan's request at these thresholds."""
        return PlanRequest(
            forward=ForwardSpec(module),
            variables=variables,
            batch_size=batch_size,
            thresholds=per_group(thresholds, module.num_groups),
            images=images,
        )

    if ForwardSpec(module).runs_whole:
        plan = None
        whole = accelerate(module, variables, batch_size, images=images, cache_dir=None)
    else:
        plan = planner.plan_groups(asked(_of_half(module, variables, images[:batch_size])))
        whole = Accelerated(asked(0.5), Plan(batch_size, masked_rows=batch_size))

    @functools.cache
    def speed_of(thresholds: tuple[float, ...]) -> float:
        """Images per second at these thresholds."""
        request = asked(thresholds)
        batch = jnp.asarray(planner.example_batch(request)[0])
        calls = {"whole": lambda: whole(batch, thresholds)[0]}
        if plan is not None:
            ragged = Accelerated(request, planner.reshaped(request, plan))
            calls["ragged"] = lambda: ragged(batch)[0]
        timings = interleaved(calls, _ROUNDS)
        return batch_size / min(timing.median for timing in timings.values())

    return speed_of


def _of_half(module: IARed2, variables: Mapping[str, Any], images: Array) -> np.ndarray:
    """Thresholds that half of the patches exceed in each group, if all reach it."""
    scores = jax.jit(lambda v, x: module.apply(v, x, KEEP_ALL)[1].scores)(variables, images)
    return np.array([np.median(of_group) for of_group in scores], np.float32)
