"""`accelerate`: a model that drops tokens, as fast as this device can run it."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from iared2_jax.data.inputs import Images, as_inputs, refuse_non_finite
from iared2_jax.errors import UsageError
from iared2_jax.fast_inference import plan_request, planner
from iared2_jax.fast_inference.accelerated import Accelerated, per_group, programs_kept
from iared2_jax.fast_inference.forward import ForwardSpec
from iared2_jax.fast_inference.plan import Plan
from iared2_jax.fast_inference.plan_request import PlanRequest
from iared2_jax.fast_inference.sub_batches import sub_batch_sizes
from iared2_jax.token_reduction.model import IARed2, Thresholds
from iared2_jax.token_reduction.selectors import Selector, asked_selector

log = logging.getLogger(__name__)


def accelerate(
    module: IARed2,
    variables: Mapping[str, Any],
    batch_size: int,
    thresholds: Thresholds = 0.5,
    *,
    images: Images | None = None,
    keep_ratios: Sequence[float] | None = None,
    selector: str | Selector = "interpreter",
    attention: bool = False,
    plan: Plan | None = None,
    cache_dir: str | Path | None = "auto",
    devices: Sequence[jax.Device] | None = None,
    score: str | None = None,
) -> Accelerated:
    """Compiles a model so that the tokens it drops buy time; the logits stay masked execution's.

    How each group runs its survivors is planned by measuring, on this device: one padded array,
    images sorted by count in sub-batches of a few lengths, or one packed list of tokens. Where
    dropping does not pay, the plan is masked execution, and says so. Selectors that reduce tokens
    within a block ("evit", "tome") keep equally many of every image: they run gathered.

    Args:
      module, variables: e.g. from `create_model` or `load_model`.
      batch_size: images per call, over all devices. Smaller batches run padded.
      thresholds: keep iff score > threshold; one for all groups, one each [D], or one each per
        image of `images` [m, D] (those of a call's own images go to the call).
      images: what will be asked, some dozens of it (`data.inputs.as_inputs`). The shapes are
        planned for the counts that these keep. Without them, a plan or a fixed budget, the images
        of the first call give the plan, and that call takes as long as planning does.
      keep_ratios, selector: a fixed budget (see `IARed2.__call__`): top-k, no thresholds.
      attention: whether `out` has the CLS attention of every block.
      plan: a plan to pin, e.g. `Plan.load(path)`; nothing is measured then.
      cache_dir: of plans and compiled programs: None keeps none, "auto" is ~/.cache/iared2_jax (or
        under $XDG_CACHE_HOME). A cached plan is used where module, interpreters, thresholds,
        batch, device and versions agree. A `jax_compilation_cache_dir` of your own is respected.
      devices: the batch is split over them; None: the default device.
      score: the old name of `selector`.

    Raises:
      UsageError: arguments that do not fit each other, the model or the plan.

    Example:
      >>> import jax, iared2_jax
      >>> module, variables = iared2_jax.create_model("vit_micro")
      >>> images = jax.random.normal(jax.random.key(0), [4, 64, 64, 3])
      >>> run = iared2_jax.accelerate(module, variables, 4, images=images, cache_dir=None)
      >>> logits, out = run(images[:3])
      >>> logits.shape, out.keep[0].shape
      ((3, 10), (3, 64))
    """
    devices = tuple(devices) if devices is not None else tuple(jax.devices()[:1])
    if batch_size < 1 or batch_size % len(devices):
        raise UsageError(
            f"batch_size={batch_size} must be a positive multiple of the {len(devices)} devices"
        )
    selector = asked_selector(selector, score)
    try:
        module.check_budget(keep_ratios, selector)
    except ValueError as error:
        raise UsageError(str(error)) from error
    request = PlanRequest(
        forward=ForwardSpec(
            module, tuple(keep_ratios) if keep_ratios else None, selector, attention
        ),
        variables=variables,
        batch_size=batch_size // len(devices),
        thresholds=per_group(thresholds, module.num_groups),
        images=None if images is None else np.asarray(as_inputs(images, module.input_spec)),
        devices=devices,
    )
    if request.images is not None:
        refuse_non_finite(request.images)
    folder = plan_request.cache_folder(cache_dir)
    programs = folder / "programs" if folder else None
    if plan is not None:
        if plan.groups and request.forward.runs_whole:
            raise UsageError(
                f"the plan is of ragged groups, but {type(selector).__name__} reduces tokens "
                "within a block, or the attention goes by their places: leave out plan=, and "
                "another is made"
            )
        if request.forward.equal_counts and any(group.kind == "packed" for group in plan.groups):
            raise UsageError(
                "the plan packs images of different lengths, but with keep_ratios all are as long: "
                "leave out plan=, and another is made"
            )
        plan.check(request.batch_size, request.most_tokens)
    else:
        plan = plan_request.cached_plan(request, folder)
    if plan is not None:
        return Accelerated(request, plan, programs)
    if request.images is None and not request.forward.equal_counts:
        if request.thresholds.ndim == 2:  # of a sample that was not given
            raise UsageError("thresholds per image need the images= that they belong to")
        return Accelerated(request, None, programs, _planned_late(request, folder, programs))
    return _planned(request, folder, programs)


def _planned(
    request: PlanRequest, folder: Path | None, programs: Path | None, sample: str = ""
) -> Accelerated:
    """The model planned by measuring, its plan kept; `sample` says what stood for its inputs."""
    with programs_kept(programs):
        if request.forward.runs_whole:
            run = _fastest_whole(request)
        else:
            run = _fastest(request, planner.plan_groups(request))
    if sample:
        run.plan = dataclasses.replace(run.plan, planned_from=sample)
    plan_request.keep_plan(request, run.plan, folder)
    return run


def _planned_late(
    request: PlanRequest, folder: Path | None, programs: Path | None
) -> Callable[[np.ndarray], Accelerated]:
    """Plans when the first images come, and says so."""

    def plan_for(images: np.ndarray) -> Accelerated:
        """The model planned for these images."""
        begun = time.monotonic()
        sample = f"the first call's {len(images)} images"
        run = _planned(dataclasses.replace(request, images=images), folder, programs, sample)
        log.info("planned from %s in %.0f s", sample, time.monotonic() - begun)
        return run

    return plan_for


def _fastest(request: PlanRequest, ragged: Plan) -> Accelerated:
    """The ragged plan as a whole, or masked execution where that is faster."""

    def masked(rows):
        return Accelerated(request, dataclasses.replace(ragged, groups=(), masked_rows=rows))

    whole, *parts = sub_batch_sizes(request.batch_size, request.platform)
    runs = {"ragged": Accelerated(request, ragged), "masked": masked(whole)}
    seconds = _measured(request, runs)
    if seconds["ragged"] > 0.8 * seconds["masked"]:  # close: masks may gain from sub-batches, too
        runs |= {f"masked, {rows} at a time": masked(rows) for rows in parts[:2]}
        seconds = _measured(request, runs)
    if request.platform == "cpu" and seconds["ragged"] < planner.QUICK:
        # There, branches take one core for what loops do in two, but less time to be passed by.
        runs["by branches"] = Accelerated(request, dataclasses.replace(ragged, switch=True))
        seconds = _measured(request, runs)
    return _best(runs, seconds)


def _fastest_whole(request: PlanRequest) -> Accelerated:
    """A model that reduces tokens within blocks: all its groups, so many images at a time.

    By a fixed budget it runs gathered: every image has as many tokens as any other, so all slots
    are full, and there is nothing else to plan.
    """
    runs, execution = {}, "gathered" if request.forward.equal_counts else "masked"
    kernels = planner.attention_kernels(request.module, request.variables, request.platform)
    for kernel in kernels:
        for rows in sub_batch_sizes(request.batch_size, request.platform):
            plan = Plan(
                request.batch_size,
                masked_rows=rows,
                execution=execution,
                attention_kernel=kernel,
                key=request.key(),
            )
            runs[f"{rows} at a time, {kernel}"] = Accelerated(request, plan)
    return _best(runs, _measured(request, runs))


def _measured(request: PlanRequest, runs: Mapping[str, Accelerated]) -> dict[str, float]:
    """The seconds that each run takes for a batch."""
    sharding = next(iter(runs.values())).sharding
    batch = jax.device_put(planner.example_batch(request), sharding)
    calls = {name: functools.partial(run, *batch) for name, run in runs.items()}
    return {name: timing.median for name, timing in planner.timed_together(calls).items()}


def _best(runs: Mapping[str, Accelerated], seconds: dict[str, float]) -> Accelerated:
    """The fastest of them, what was measured in its plan."""
    best = runs[min(seconds, key=seconds.get)]
    best.plan = dataclasses.replace(best.plan, measured=seconds)
    best.forget_usage()
    return best
