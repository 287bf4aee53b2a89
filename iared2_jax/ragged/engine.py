"""Ragged execution: every image keeps its own number of tokens, every shape is static.

The whole forward pass is one compiled program. Between groups the tokens live in one buffer, a row
per image, survivors first. A group sorts the images by how many tokens they keep, takes them a
sub-batch at a time, and runs each in the smallest of a few static shapes that holds it: a loop per
shape, whose number of turns is computed on the device. No count ever travels to the host, nothing
is compiled after the start, and a sub-batch that fits no planned shape runs in the last, which
holds anything.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Bool, Float, Int

from iared2_jax.models.iared2 import IARed2
from iared2_jax.ragged.plan import GroupPlan, Plan
from iared2_jax.reduction.gather import partition
from iared2_jax.reduction.layout import EVERY_TOKEN, packed, padded
from iared2_jax.typing import Array

State = dict[str, Array]


def with_kernel(module: IARed2, kernel: str) -> IARed2:
    """The same model with another attention kernel."""
    return module.clone(backbone=module.backbone.clone(attention_kernel=kernel))


def run_ragged(
    module: IARed2,
    plan: Plan,
    attention: bool,
    variables: Mapping[str, Any],
    images: Float[Array, "b height width 3"],
    thresholds: Float[Array, "b D"],
    size: Int[Array, ""],
    keep_ratios: Sequence[float] | None = None,
    score: str = "interpreter",
) -> tuple[Float[Array, "b classes"], dict[str, Any]]:
    """The forward pass in the shapes of `plan`; a pure function, to be jitted.

    Args:
      attention: whether `out` has the CLS attention of every block.
      size: how many of the images are real; the others keep nothing.
      keep_ratios, score: as `IARed2.__call__` has them.

    Returns:
      Logits and `out` as of masked execution, on the original patch grid; of dropped tokens,
      `head_logits` and `attention` are 0. Besides, out["shapes_used"]: per group, how many
      sub-batches ran in each shape.
    """
    module = with_kernel(module, plan.attention_kernel)
    b, n = images.shape[0], module.backbone.num_patches
    prefix = module.backbone.num_prefix
    tokens = module.apply(variables, images, method=lambda m, x: m.backbone.embed(x))
    alive = jnp.broadcast_to((jnp.arange(b) < size)[:, None], (b, n))
    if keep_ratios is not None:  # every image costs the same, real or not
        alive = jnp.ones((b, n), bool)
    state: State = {"tokens": tokens}
    state |= _evidence(module, variables, 1, tokens, score)
    out: dict[str, list] = {name: [] for name in ("scores", "keep", "head_logits", "shapes_used")}
    maps: list[Array] = []

    for group, group_plan in enumerate(plan.groups, start=1):
        slot = jnp.cumsum(alive, axis=1) - 1  # where each grid token lies in the buffer

        def on_grid(values, slot=slot, alive=alive):  # [b, n, ..] of slots -> of the grid
            index = slot.reshape(*slot.shape, *(1,) * (values.ndim - 2))
            values = jnp.take_along_axis(values, jnp.maximum(index, 0), axis=1)
            return jnp.where(alive.reshape(index.shape), values, 0)

        if "head_logits" in state:
            out["head_logits"].append(on_grid(state["head_logits"]))
        scores = on_grid(state["scores"])
        keep = module.decide(group, scores, alive, thresholds, keep_ratios)
        out["scores"].append(scores)
        out["keep"].append(keep)

        blocks = module.group_sizes[group - 1]
        if attention:
            heads = module.backbone.num_heads
            state["attention"] = jnp.zeros((b, n, blocks, heads), jnp.float32)
        state, used = run_group(
            module,
            variables,
            group,
            group_plan,
            state,
            keep,
            slot,
            equal_counts=keep_ratios is not None,
            score=score,
            switch=plan.switch,
        )
        out["shapes_used"].append(used)
        alive = keep
        if attention:
            slot = jnp.cumsum(alive, axis=1) - 1
            grid = on_grid(state.pop("attention"), slot, alive)
            maps += [jnp.moveaxis(grid[:, :, block], 1, 2) for block in range(blocks)]

    logits, features = module.apply(
        variables, state["tokens"][:, :prefix], method=lambda m, x: m.backbone.classify(x)
    )
    result = {**out, "features": features, "overflow": [jnp.zeros(b, jnp.int32)] * len(plan.groups)}
    return logits, ({**result, "attention": maps} if attention else result)


def run_masked(
    module: IARed2,
    plan: Plan,
    attention: bool,
    variables: Mapping[str, Any],
    images: Float[Array, "b height width 3"],
    thresholds: Float[Array, "b D"],
    size: Int[Array, ""],
    keep_ratios: Sequence[float] | None = None,
    score: str = "interpreter",
) -> tuple[Float[Array, "b classes"], dict[str, Any]]:
    """Masked execution, `plan.masked_rows` images at a time: for where dropping does not pay."""
    module = with_kernel(module, plan.attention_kernel)

    def forward(images, thresholds):
        logits, out = module.apply(
            variables, images, thresholds, keep_ratios=keep_ratios, score=score
        )
        if not attention:
            del out["attention"]
        entering = [True, *(keep[..., None] for keep in out["keep"])]
        out["head_logits"] = [
            jnp.where(alive, values, 0)
            for alive, values in zip(entering, out["head_logits"], strict=False)
        ]
        return logits, out

    return in_sub_batches(forward, plan.masked_rows, images, thresholds)


def in_sub_batches(forward: Callable[..., Any], rows: int, *arrays: Array) -> Any:
    """`forward(*arrays)`, `rows` images at a time: a whole batch may not fit into the caches.

    An end that does not fill a sub-batch is padded with zeros, and cut off again.
    """
    b = arrays[0].shape[0]
    if not 0 < rows < b:
        return forward(*arrays)

    def cut(x):
        x = jnp.pad(x, ((0, -b % rows), *((0, 0),) * (x.ndim - 1)))
        return rearrange(x, "(c r) ... -> c r ...", r=rows)

    result = jax.lax.map(lambda parts: forward(*parts), tuple(cut(x) for x in arrays))
    return jax.tree.map(lambda x: rearrange(x, "c r ... -> (c r) ...")[:b], result)


def _evidence(module, variables, group: int, x: Float[Array, "s c d"], score: str) -> State:
    """What `group` decides by, from the tokens that enter it."""
    if score == "attention":
        # Nothing has been attended to before the first block: all tokens score alike.
        return {"scores": jnp.ones((x.shape[0], x.shape[1] - module.backbone.num_prefix))}
    head_logits = module.apply(variables, group, x, method="interpret")
    return {
        "head_logits": head_logits,
        "scores": jax.nn.sigmoid(head_logits).mean(axis=-1),
    }


def run_group(
    module: IARed2,
    variables: Mapping[str, Any],
    group: int,
    plan: GroupPlan,
    state: State,
    keep: Bool[Array, "b n"],
    slot: Int[Array, "b n"],
    equal_counts: bool = False,
    score: str = "interpreter",
    switch: bool = False,
) -> tuple[State, Int[Array, " shapes"]]:
    """One group over all its sub-batches.

    Args:
      state: "tokens" [b, P+N, d] and whatever else the next group needs, by slot.
      keep: which grid tokens go on.
      slot: where in its row of the buffer each of them is, after the prefix.
      equal_counts: every image keeps as many tokens as the only shape's rows hold.
      switch: see `Plan`.

    Returns:
      The state, its first slots overwritten, and how many sub-batches ran in each shape.
    """
    b, prefix = keep.shape[0], module.backbone.num_prefix
    lengths = keep.sum(axis=1) + prefix
    # Where the first, second, .. token that goes on is now; anywhere, where there is none.
    ordered, _ = partition(keep)
    source = jnp.maximum(jnp.take_along_axis(slot, ordered, axis=1), 0) + prefix
    source = jnp.concatenate([jnp.broadcast_to(jnp.arange(prefix), (b, prefix)), source], axis=1)
    rows = plan.rows
    chunks = -(-b // rows)
    order = jnp.arange(b)
    as_they_come = chunks == 1 and plan.blocks == 1
    if not (as_they_come or equal_counts):
        order = jnp.argsort(lengths, stable=True)
    # Images that fill up the first sub-batch have the index b: never written.
    order = jnp.concatenate([jnp.full(chunks * rows - b, b), order])
    order = order.reshape(chunks, rows)
    chunk_lengths = jnp.where(order < b, lengths[jnp.minimum(order, b - 1)], 0)

    shapes = jnp.asarray(plan.shapes)
    in_blocks = rearrange(chunk_lengths, "c (k r) -> c k r", k=plan.blocks)
    needed = jnp.concatenate([in_blocks.sum((1, 2))[:, None], in_blocks.max(-1)], axis=1)
    if plan.kind == "padded":
        needed = needed.at[:, 0].set(0)
    # All needs grow along the sorted sub-batches, so those of one shape are neighbours.
    shape_of = (shapes[None] < needed[:, None]).any(-1).sum(-1)
    starts = jnp.searchsorted(shape_of, jnp.arange(len(plan.shapes)), side="left")
    stops = jnp.searchsorted(shape_of, jnp.arange(len(plan.shapes)), side="right")

    def body(shape: tuple[int, ...]):
        row_length = max(shape[1:])

        def run(chunk, state: State) -> State:
            taken = None if as_they_come else order[chunk]

            def rows_of(values):
                return values if taken is None else values[jnp.minimum(taken, b - 1)]

            def put(buffer, values):  # the first slots of these images; nobody reads the others
                if taken is None:
                    return jax.lax.dynamic_update_slice(buffer, values, (0,) * buffer.ndim)
                return buffer.at[taken, : values.shape[1]].set(values, mode="drop")

            x, layout = _enter(
                rows_of(state["tokens"]),
                rows_of(source)[:, :row_length],
                chunk_lengths[chunk],
                plan.kind,
                shape,
            )
            if equal_counts:
                layout = EVERY_TOKEN  # no padding, so no masks
            x, attention = module.apply(variables, group, x, layout, method="run_layout")
            x = layout.spread(x)
            new = {"tokens": x}
            if group < module.num_groups:
                found = _evidence(module, variables, group + 1, x, score)
                if score == "attention":
                    found["scores"] = attention[-1].mean(axis=1)[:, prefix:]
                new |= found
            if "attention" in state:
                new["attention"] = jnp.moveaxis(jnp.stack(attention)[..., prefix:], (0, 3), (2, 1))
            return {
                name: put(buffer, new[name].astype(buffer.dtype)) if name in new else buffer
                for name, buffer in state.items()
            }

        return run

    if len(plan.shapes) == chunks == 1:
        return body(plan.shapes[0])(0, state), stops - starts
    if switch and chunks == 1:
        branches = [functools.partial(body(shape), 0) for shape in plan.shapes]
        return jax.lax.switch(shape_of[0], branches, state), stops - starts
    for index, shape in enumerate(plan.shapes):
        state = jax.lax.fori_loop(starts[index], stops[index], body(shape), state)
    return state, stops - starts


def _enter(tokens, source, lengths, kind: str, shape: tuple[int, ...]):
    """A sub-batch's survivors, moved from the buffer's rows into a shape; and their layout.

    Whatever lies in places that hold no survivor, NaN included, is replaced by 0.
    """
    places, *row_lengths = shape
    s, t, d = tokens.shape
    if kind == "padded":
        layout = padded(lengths, row_lengths[0])
        x = jnp.take_along_axis(tokens, source[..., None], axis=1)
        return jnp.where(layout.valid[..., None], x, 0), layout
    layout = packed(lengths, places, row_lengths)
    place = jnp.arange(places)
    ends = jnp.cumsum(lengths)
    image = jnp.minimum((place[:, None] >= ends).sum(-1), s - 1)
    column = jnp.clip(place - (ends - lengths)[image], 0, source.shape[1] - 1)
    x = tokens.reshape(s * t, d)[image * t + source[image, column]]
    return jnp.where((place < ends[-1])[:, None], x, 0)[None], layout
