"""Which layout is fastest here? Nobody can tell but the device: candidates are timed on it."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iared2_jax.errors import UsageError
from iared2_jax.fast_inference.forward import ForwardSpec
from iared2_jax.fast_inference.group import (
    Buffer,
    evidence_in_place,
    first_block_repeated,
    run_group,
)
from iared2_jax.fast_inference.plan import KINDS, GroupPlan, Plan, choose_shapes, needs
from iared2_jax.fast_inference.plan_request import PlanRequest
from iared2_jax.fast_inference.sub_batches import sub_batch_sizes
from iared2_jax.models.backbones.protocol import Backbone
from iared2_jax.timing import Timing, interleaved
from iared2_jax.token_reduction.compaction import kept_first
from iared2_jax.token_reduction.model import IARed2

log = logging.getLogger(__name__)

# Loop bodies of a program, over all groups: more shapes waste less on padding and compile longer.
MAX_SHAPES = {"cpu": 28, "gpu": 16}
# Of a group's share of them, if it is packed: a list wastes little, and its bodies compile longer.
_PACKED_SHARE = 0.6
_IDLE_TURN = 16e-6  # seconds that a shape costs a batch that does not use it; of a 1 ms model
_BATCHES = 256  # drawn from the sample, to see what sub-batches need
FINALISTS = 2  # layouts that are timed in all groups, with all their shapes
_ROUNDS = 3, 200  # of timing, at least and at most
SECONDS = 0.5  # of timing, if that is between the two
QUICK = 0.02  # seconds of a call below which it is as fast as it gets only when repeated


def plan_groups(request: PlanRequest) -> Plan:
    """The fastest layout for every group, timed on `request.devices[0]`, each group alone.

    All candidates run in the group with most to win, the finalists of it in all.

    Raises:
      UsageError: no images to plan with, and no fixed budget.
    """
    with jax.default_device(request.devices[0]):
        keep = _keep_of_sample(request)
        return _plan_groups(request, keep, _fastest_kernel(request, keep))


def _keep_of_sample(request: PlanRequest) -> np.ndarray:
    """Keep masks [images, groups, N] of the sample, by masked execution."""
    n, groups = request.num_patches, request.module.num_groups
    if request.forward.keep_ratios is not None:
        counts = request.module.keep_counts(request.forward.keep_ratios)
        return np.stack([np.arange(n) < count for count in counts])[None]
    if request.images is None or not len(request.images):
        raise UsageError(
            "accelerate needs images=, some dozens of what will be asked: the shapes are planned "
            "for the tokens that these keep. Or give a plan=, or a fixed budget, keep_ratios="
        )

    @jax.jit
    def masks(variables, images, thresholds):
        selector = request.forward.selector
        out = request.module.apply(variables, images, thresholds, selector=selector)[1]
        return jnp.stack(out.keep, axis=1)

    images = np.asarray(request.images, np.float32)
    thresholds = request.thresholds
    if thresholds.ndim == 2 and len(thresholds) != len(images):
        raise UsageError(
            f"thresholds are for {len(thresholds)} images, but images= has {len(images)}"
        )
    thresholds = np.broadcast_to(thresholds, (len(images), groups))
    size = min(len(images), request.batch_size, 32)
    parts = []
    for first in range(0, len(images), size):
        rows = np.arange(first, first + size) % len(images)  # the last may start over
        parts.append(np.asarray(masks(request.variables, images[rows], thresholds[rows])))
    return np.concatenate(parts)[: len(images)].reshape(-1, groups, n)


def _draw(request: PlanRequest, keep: np.ndarray, batches: int, seed: int = 0) -> np.ndarray:
    """Batches of images of the sample: indices [batches, batch]."""
    # With repetition: without it, batches from a small sample would vary too little.
    return np.random.default_rng(seed).integers(0, len(keep), (batches, request.batch_size))


def _lengths(request: PlanRequest, keep: np.ndarray, group: int) -> np.ndarray:
    """Tokens, prefix included, that images keep in a group, in batches drawn from the sample."""
    counts = keep[:, group - 1].sum(-1) + request.module.backbone.num_prefix
    return counts[_draw(request, keep, _BATCHES)]


def attention_kernels(
    module: IARed2, variables: Mapping[str, Any], platform: str | None = None
) -> list[str]:
    """Attention kernels that work here: cuDNN's is tried against the einsum first.

    platform: "cpu" or "gpu"; None: the default device's.
    """
    half = jnp.dtype(module.backbone.dtype).itemsize == 2
    kernels, dense = module.backbone.attention_kernels, module.shows_attention
    on_gpu = (platform or jax.default_backend()) == "gpu"
    if not on_gpu or not half or not dense or "cudnn" not in kernels:
        return ["einsum"]
    images = jax.random.normal(jax.random.key(0), (2, *module.input_spec.shape))

    def logits(kernel):
        # No selector is asked: the variables may hold no interpreters for these groups.
        with_this = ForwardSpec(module).with_kernel(kernel).module
        run = jax.jit(lambda v, x: with_this.apply(v, x, method="dense_logits"))
        return np.asarray(run(variables, images))

    expected = logits("einsum")
    try:
        error = np.abs(logits("cudnn") - expected).max() / np.abs(expected).max()
    except Exception as failure:  # any: the kernel is an option, not a need
        log.warning("cuDNN attention does not run here, einsum does: %s", str(failure)[:200])
        return ["einsum"]
    if not error < 0.05:
        log.warning("cuDNN attention is off by %.3f here and is not used", error)
        return ["einsum"]
    return ["einsum", "cudnn"]


def _fastest_kernel(request: PlanRequest, keep: np.ndarray) -> str:
    """The attention kernel that runs a group of whole padded rows in the least time."""
    kernels = attention_kernels(request.module, request.variables, request.platform)
    if len(kernels) == 1:
        return kernels[0]
    group = _most_to_win(request, keep)
    whole = _laid_out(request, keep, group, ("padded", request.batch_size), 1)
    return min(kernels, key=lambda name: _time_group(request, keep, name, group, [whole])[whole])


def _most_to_win(request: PlanRequest, keep: np.ndarray) -> int:
    """The group with many tokens, of which images keep different numbers."""
    counts = keep.sum(-1)
    work = counts.mean(0) * request.module.group_sizes * (counts.std(0) + 0.1)
    return int(np.argmax(work)) + 1


def _layouts(request: PlanRequest) -> list[tuple[str, int]]:
    """Every kind of layout with every sub-batch size that may be fastest."""
    sizes = sub_batch_sizes(request.batch_size, request.platform)
    if request.forward.keep_ratios is not None:  # all rows alike: nothing to pack
        return [("padded", rows) for rows in sizes]
    # One image's list is its row.
    return [(kind, rows) for kind in KINDS for rows in sizes if kind == "padded" or rows > 1]


def _laid_out(
    request: PlanRequest, keep: np.ndarray, group: int, layout: tuple[str, int], count: int
) -> GroupPlan:
    """A group in this layout, in at most `count` shapes: those that waste least on the sample."""
    kind, rows = layout
    most = request.most_tokens[group - 1]
    blocks = _blocks(request, rows) if kind == "packed" else 1
    if count == 1 or request.forward.keep_ratios is not None:
        return GroupPlan(kind, rows, ((rows * most, *(most,) * blocks),))
    needed = needs(_lengths(request, keep, group), rows, blocks)
    step = _step(request, most)
    shapes = choose_shapes(kind, needed.reshape(-1, 1 + blocks), rows, most, count - 1, step)
    return GroupPlan(kind, rows, shapes)


def _candidates(
    request: PlanRequest,
    keep: np.ndarray,
    group: int,
    limit: int,
    layouts: Sequence[tuple[str, int]] | None = None,
) -> list[GroupPlan]:
    """One group in every layout, or in some, in at most `limit` shapes each."""
    counts = {"padded": limit, "packed": min(limit, max(2, round(_PACKED_SHARE * limit)))}
    return [
        _laid_out(request, keep, group, layout, counts[layout[0]])
        for layout in layouts or _layouts(request)
    ]


def _thinned(
    request: PlanRequest, keep: np.ndarray, group: int, plan: GroupPlan, seconds: float
) -> GroupPlan:
    """The same layout in fewer shapes, if what they waste costs less than turns that none takes."""
    lengths = _lengths(request, keep, group)
    cost = functools.partial(_cost, lengths=lengths, backbone=request.module.backbone)

    def expected(fewer: GroupPlan) -> float:
        return seconds * cost(fewer) / cost(plan) + _IDLE_TURN * len(fewer.shapes)

    counts = range(1, len(plan.shapes))
    fewer = [_laid_out(request, keep, group, (plan.kind, plan.rows), n) for n in counts]
    return min([plan, *fewer], key=expected)


def _step(request: PlanRequest, most: int) -> int:
    """Tokens that neighbouring row lengths differ by, of at most `most`."""
    return max(2, most // 32) if request.platform == "cpu" else 16


def _blocks(request: PlanRequest, rows: int) -> int:
    """The blocks of attention: two, with enough images. A GPU's kernels skip padding themselves."""
    if request.platform != "cpu":
        return 1
    return 2 if rows % 2 == 0 and rows >= 4 else 1


def _limits(request: PlanRequest, keep: np.ndarray) -> list[int]:
    """Shapes that each group may have: one of few different counts leaves its share to others."""
    steps = [_step(request, most) for most in request.most_tokens]
    useful = [len(np.unique(column)) + 1 for column in (keep.sum(-1) // steps).T]
    limits = [1] * len(useful)
    left = max(MAX_SHAPES.get(request.platform, 16), 2 * len(useful))
    for place, group in enumerate(sorted(range(len(useful)), key=useful.__getitem__)):
        limits[group] = min(useful[group], left // (len(useful) - place))
        left -= limits[group]
    return limits


def _plan_groups(request: PlanRequest, keep: np.ndarray, kernel: str) -> Plan:
    """The fastest candidate of every group, timed alone."""
    groups = range(1, request.module.num_groups + 1)
    time = functools.partial(_time_group, request, keep, kernel)
    first = _most_to_win(request, keep)
    timed = time(first, _candidates(request, keep, first, limit=3), rounds=1)
    alike = [(plan.kind, plan.rows) for plan in sorted(timed, key=timed.get)[:FINALISTS]]
    limits = _limits(request, keep)
    chosen: list[GroupPlan] = []
    for group in groups:
        seconds = time(group, _candidates(request, keep, group, limits[group - 1], alike))
        best = min(seconds, key=seconds.get)
        chosen.append(_thinned(request, keep, group, best, seconds[best]))
    return Plan(
        request.batch_size,
        tuple(chosen),
        attention_kernel=kernel,
        switch=_switch(request),
        key=request.key(),
    )


def _switch(request: PlanRequest) -> bool:
    return request.platform != "cpu"


def _time_group(
    request: PlanRequest,
    keep: np.ndarray,
    kernel: str,
    group: int,
    plans: Sequence[GroupPlan],
    rounds: int | None = None,
) -> dict[GroupPlan, float]:
    """Median seconds of each candidate for one group, on a batch drawn from the sample.

    Without `rounds`, as many as fit into a little time.
    """
    forward = request.forward.with_kernel(kernel)
    drawn = keep[_draw(request, keep, 1, seed=1)[0]]
    entering = drawn[:, group - 2] if group > 1 else np.ones_like(drawn[:, 0])
    kept = jnp.asarray(drawn[:, group - 1])
    # In the buffer lies first what the group before kept, then what it dropped.
    places = kept_first(jnp.asarray(entering))[1]
    buffer = _synthetic_buffer(request, forward)

    def timed(plan):
        """One call of the group in this plan."""

        def run(variables, buffer, keep, places):
            """The group's buffer afterwards; what is timed."""
            return run_group(
                forward=forward,
                plan=plan,
                variables=variables,
                group=group,
                buffer=buffer,
                keep=keep,
                places=places,
                switch=_switch(request),
                run_blocks=first_block_repeated,
            )[0]

        return functools.partial(jax.jit(run), request.variables, buffer, kept, places)

    lengths = drawn[:, group - 1].sum(-1) + request.module.backbone.num_prefix
    calls = {plan: timed(_only_used(plan, lengths)) for plan in plans}
    timings = interleaved(calls, rounds) if rounds else timed_together(calls)
    medians = {plan: timing.median for plan, timing in timings.items()}
    return _rescaled_to_sample(request, keep, group, medians, lengths)


def _synthetic_buffer(request: PlanRequest, forward: ForwardSpec) -> Buffer:
    """A group's input in its shapes: random tokens, and zeros for what it decides by."""
    # The values do not change the time, so they need not be any image's.
    backbone = forward.module.backbone
    shape = request.batch_size, backbone.num_prefix + request.num_patches, backbone.embed_dim
    tokens = jax.random.normal(jax.random.key(0), shape).astype(backbone.dtype)
    buffer = {"tokens": tokens}
    if not forward.selector.scores_inputs:  # the next group's evidence is part of this one's work
        shapes = jax.eval_shape(
            lambda v, x: evidence_in_place(forward, v, 1, x), request.variables, tokens
        )
        buffer |= jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return buffer


def _rescaled_to_sample(
    request: PlanRequest,
    keep: np.ndarray,
    group: int,
    seconds: Mapping[GroupPlan, float],
    lengths: np.ndarray,
) -> dict[GroupPlan, float]:
    """Seconds per batch of the sample in the mean, from those of one batch with these lengths."""
    # One batch was timed. It may suit a plan's shapes by luck: go by what batches cost in the mean.
    batches, backbone = _lengths(request, keep, group), request.module.backbone
    return {
        plan: timed * _cost(plan, batches, backbone) / _cost(plan, lengths[None], backbone)
        for plan, timed in seconds.items()
    }


def timed_together(calls: Mapping[Any, Callable[[], object]]) -> dict[Any, Timing]:
    """Interleaved; more rounds where they are quick."""
    return interleaved(calls, _ROUNDS, SECONDS, primed=QUICK)


def _cost(plan: GroupPlan, lengths: np.ndarray, backbone: Backbone) -> float:
    """Mean multiply-adds of a block over batches of images with these lengths [n, b]."""
    shapes = np.array(plan.shapes, float)[_used(plan, lengths)]
    per_block = plan.rows // plan.blocks
    linear = backbone.block_flops(shapes[..., 0]).linear
    attention = backbone.block_flops(shapes[..., 1:]).attention + np.zeros_like(shapes[..., 1:])
    attention = per_block * attention.sum(-1)
    return float((linear + attention).sum(-1).mean())


def _used(plan: GroupPlan, lengths: np.ndarray) -> np.ndarray:
    """Which shape each sub-batch of some batches runs in [batches, chunks]; as the engine does."""
    needed = needs(lengths, plan.rows, plan.blocks)
    if plan.kind == "padded":
        needed[..., 0] = 0
    return (np.array(plan.shapes) < needed[..., None, :]).any(-1).sum(-1)


def uniform_plan(request: PlanRequest, kind: str, rows: int) -> Plan:
    """One layout for all groups, in the shapes that the request's images need; nothing is timed.

    Raises:
      UsageError: it is not among the candidates.
    """
    if (kind, rows) not in _layouts(request):
        raise UsageError(f"{kind} with {rows} rows is no candidate for {request.batch_size}")
    keep = _keep_of_sample(request)
    groups = [
        _candidates(request, keep, group, limit, [(kind, rows)])[0]
        for group, limit in enumerate(_limits(request, keep), start=1)
    ]
    return Plan(request.batch_size, tuple(groups), switch=_switch(request), key=request.key())


def reshaped(request: PlanRequest, plan: Plan) -> Plan:
    """The same layouts, in the shapes that the images of `request` need."""
    keep = _keep_of_sample(request)
    groups = [
        _laid_out(request, keep, number, (group.kind, group.rows), len(group.shapes))
        for number, group in enumerate(plan.groups, start=1)
    ]
    return dataclasses.replace(plan, groups=tuple(groups), key=request.key(), measured={})


def _only_used(plan: GroupPlan, lengths: np.ndarray) -> GroupPlan:
    """The plan without the shapes that these images do not use: what is not run is not compiled."""
    used = set(_used(plan, lengths[None]).ravel().tolist())
    return dataclasses.replace(plan, shapes=tuple(plan.shapes[i] for i in sorted(used)))


def example_batch(request: PlanRequest) -> tuple[np.ndarray, np.ndarray | None]:
    """A batch for all devices, of the request's images, and their own thresholds if they have any.

    Noise for a fixed budget.
    """
    size = request.batch_size * len(request.devices)
    rng = np.random.default_rng(1)
    if request.images is None:
        return rng.standard_normal((size, *request.module.input_spec.shape), np.float32), None
    images = np.asarray(request.images, np.float32)
    rows = np.arange(size) % len(images)  # fewer than a batch are repeated
    return images[rows], request.thresholds[rows] if request.thresholds.ndim == 2 else None
