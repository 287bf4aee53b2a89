"""One group of ragged execution: sub-batches of like images, each in a shape that holds it."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Bool, Float, Int

from iared2_jax.fast_inference.forward import BoundModel, ForwardSpec
from iared2_jax.fast_inference.plan import GroupPlan
from iared2_jax.models.token_layouts import EVERY_TOKEN, TokenLayout, list_places, packed, padded
from iared2_jax.token_reduction.compaction import kept_first
from iared2_jax.typing import Array

# What groups hand to each other, by place in the buffer: "tokens" [b, P+N, d], and what the next
# group decides by ("scores", "interpreter_logits").
Buffer = dict[str, Array]

# (forward, variables, group, tokens, layout) -> tokens and each block's CLS attention.
BlocksFn = Callable[..., tuple[Array, list[Array]]]


def evidence_in_place(
    forward: ForwardSpec,
    variables: Mapping[str, Any],
    group: int,
    x: Float[Array, "s c d"],
    attention: Float[Array, "s h n"] | None = None,
    alive: Bool[Array, "s n"] | None = None,
) -> Buffer:
    """What `group` decides by, from the tokens that enter it: a part of the buffer."""
    model = BoundModel(forward.module, variables)
    evidence = forward.selector.token_scores(group, x, attention, alive, model)
    if evidence.interpreter_logits is None:
        return {"scores": evidence.scores}
    return {"scores": evidence.scores, "interpreter_logits": evidence.interpreter_logits}


class _Turns(NamedTuple):
    """Which images a group takes together, and in which shape.

    order [chunks, rows]: the images of each sub-batch; b or more of a ghost, which fills it up.
    lengths [chunks, rows]: their tokens, prefix included.
    shape_of [chunks]: the first shape that holds each; ascending.
    starts, stops [shapes]: the sub-batches of each shape, which are neighbours.
    as_they_come: the only sub-batch is the batch itself.
    """

    order: Int[Array, "chunks rows"]
    lengths: Int[Array, "chunks rows"]
    shape_of: Int[Array, " chunks"]
    starts: Int[Array, " shapes"]
    stops: Int[Array, " shapes"]
    as_they_come: bool


def _take_turns(plan: GroupPlan, lengths: Int[Array, " b"], equal_counts: bool) -> _Turns:
    """The sub-batches of a group: images sorted by count, each with the shape that holds it.

    equal_counts: all images have as many tokens, so there is nothing to sort.
    """
    b, rows = lengths.shape[0], plan.rows
    chunks = -(-b // rows)
    order = jnp.arange(b)
    as_they_come = chunks == 1 and plan.blocks == 1
    if not (as_they_come or equal_counts):
        order = jnp.argsort(lengths, stable=True)
    # Ghosts go first, as the shortest. An index >= b has no row in the buffer: never written.
    order = jnp.concatenate([b + jnp.arange(chunks * rows - b), order]).reshape(chunks, rows)
    lengths = jnp.where(order < b, lengths[jnp.minimum(order, b - 1)], 0)

    in_blocks = rearrange(lengths, "c (k r) -> c k r", k=plan.blocks)
    needed = jnp.concatenate([in_blocks.sum((1, 2))[:, None], in_blocks.max(-1)], axis=1)
    if plan.kind == "padded":  # rows of the length needed have all the places there can be
        needed = needed.at[:, 0].set(0)
    # Shapes ascend in every entry (`Plan.check`), so those too small come first, and their number
    # is the index of the first shape that holds the sub-batch.
    # All needs grow along the sorted sub-batches, so those of one shape are neighbours.
    shape_of = (jnp.asarray(plan.shapes)[None] < needed[:, None]).any(-1).sum(-1)
    shapes = jnp.arange(len(plan.shapes))
    starts, stops = (jnp.searchsorted(shape_of, shapes, side=side) for side in ("left", "right"))
    return _Turns(order, lengths, shape_of, starts, stops, as_they_come)


def all_blocks(
    forward: ForwardSpec, variables: Mapping[str, Any], group: int, x: Array, layout: TokenLayout
) -> tuple[Array, list[Array]]:
    """A sub-batch through the group's blocks: its tokens, and each block's CLS attention."""
    return forward.module.apply(variables, group, x, layout, method="run_layout")


def first_block_repeated(
    forward: ForwardSpec, variables, group: int, x: Array, layout: TokenLayout
):
    """The time of `all_blocks`, from one block in a loop: to be timed, it is compiled sooner."""
    sizes = forward.module.group_sizes

    def block(x):
        method = lambda m, *args: m.backbone.run_block(*args)  # noqa: E731
        return forward.module.apply(variables, sum(sizes[: group - 1]), x, layout, method=method)

    like = jax.eval_shape(block, x)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like[1])
    x, row = jax.lax.fori_loop(0, sizes[group - 1], lambda _, last: block(last[0]), (x, empty))
    return x, [] if row is None else [row] * sizes[group - 1]


def run_group(
    forward: ForwardSpec,
    plan: GroupPlan,
    variables: Mapping[str, Any],
    group: int,
    buffer: Buffer,
    keep: Bool[Array, "b n"],
    places: Int[Array, "b n"],
    switch: bool = False,
    run_blocks: BlocksFn = all_blocks,
) -> tuple[Buffer, Int[Array, "b n"], Int[Array, " shapes"]]:
    """One group over all its sub-batches.

    Args:
      buffer: "tokens" [b, P+N, d] and whatever else the next group needs, by place.
      keep: which grid tokens go on.
      places: where in its row of the buffer each of them is, after the prefix.
      switch: see `Plan`.
      run_blocks: `all_blocks`, or what takes their time.

    Returns:
      The buffer, the first places of its rows overwritten; where each of the kept tokens is now;
      and how many sub-batches ran in each shape.
    """
    prefix = forward.module.backbone.num_prefix
    turns = _take_turns(plan, keep.sum(axis=1) + prefix, forward.equal_counts)
    sources, new_places = _moves(keep, places, prefix)

    def turn(shape: tuple[int, ...], chunk: int | Int[Array, ""], buffer: Buffer) -> Buffer:
        """The buffer after the sub-batch number `chunk` has run in `shape`, which holds it."""
        images = None if turns.as_they_come else turns.order[chunk]
        source = _take_rows(sources, images)[:, : max(shape[1:])]
        tokens = _take_rows(buffer["tokens"], images)
        x, layout = _enter(tokens, source, turns.lengths[chunk], plan, shape)
        if forward.equal_counts:
            layout = EVERY_TOKEN  # no padding, so no masks
        x, attention = run_blocks(forward, variables, group, x, layout)
        new = _new_rows(forward, variables, group, x, layout, attention, buffer.keys())
        return {
            name: _write_rows(values, new[name], images) if name in new else values
            for name, values in buffer.items()
        }

    used = turns.stops - turns.starts
    turn_in = [functools.partial(turn, shape) for shape in plan.shapes]
    return _run_turns(turns, turn_in, buffer, switch), new_places, used


def _moves(
    keep: Bool[Array, "b n"], places: Int[Array, "b n"], prefix: int
) -> tuple[Int[Array, "b t"], Int[Array, "b n"]]:
    """Where in its row each token that goes on lies now, prefix first; and its place afterwards.

    Behind the last that goes on, the first array may point anywhere.
    """
    ordered, new_places = kept_first(keep)
    sources = jnp.take_along_axis(places, ordered, axis=1) + prefix
    of_prefix = jnp.broadcast_to(jnp.arange(prefix), (keep.shape[0], prefix))
    return jnp.concatenate([of_prefix, sources], axis=1), new_places


def _take_rows(values: Array, images: Int[Array, " s"] | None) -> Array:
    """The rows of a sub-batch's images, all of them if `images` is None; of a ghost, the last."""
    return values if images is None else values[jnp.minimum(images, values.shape[0] - 1)]


def _write_rows(values: Array, new: Array, images: Int[Array, " s"] | None) -> Array:
    """Values with the first places of these images' rows overwritten; nobody reads the others."""
    new = new.astype(values.dtype)
    if images is None:
        return jax.lax.dynamic_update_slice(values, new, (0,) * values.ndim)
    # No image is taken twice. Told so, a GPU writes without atomic operations.
    places = values.at[images, : new.shape[1]]
    return places.set(new, mode="drop", unique_indices=True)


def _run_turns(
    turns: _Turns,
    turn_in: Sequence[Callable[[int | Array, Buffer], Buffer]],
    buffer: Buffer,
    switch: bool,
) -> Buffer:
    """The buffer after every sub-batch has had its turn, in its shape.

    turn_in: (chunk, buffer) -> buffer, for each shape.
    """
    chunks = turns.order.shape[0]
    if len(turn_in) == chunks == 1:
        return turn_in[0](0, buffer)
    if switch and chunks == 1:
        branches = [functools.partial(turn, 0) for turn in turn_in]
        return jax.lax.switch(turns.shape_of[0], branches, buffer)
    for start, stop, turn in zip(turns.starts, turns.stops, turn_in, strict=True):
        buffer = jax.lax.fori_loop(start, stop, turn, buffer)
    return buffer


def _new_rows(
    forward: ForwardSpec,
    variables: Mapping[str, Any],
    group: int,
    x: Array,
    layout: TokenLayout,
    attention: list[Array],
    wanted: Collection[str],
) -> Buffer:
    """The sub-batch's tokens, and what the next group decides by: its rows of the buffer."""
    x, prefix = layout.spread(x), forward.module.num_prefix
    new, rows = {"tokens": x}, [row[..., prefix:] for row in attention]
    if group < forward.module.num_groups and "scores" in wanted:
        last = rows[-1] if rows else None
        alive = None if layout.real is None else layout.real[:, prefix:]
        new |= evidence_in_place(forward, variables, group + 1, x, last, alive)
    if "attention" in wanted:
        new["attention"] = jnp.moveaxis(jnp.stack(rows), (0, 3), (2, 1))
    return new


def _enter(tokens, source, lengths, plan: GroupPlan, shape: tuple[int, ...]):
    """A sub-batch's survivors, moved from the buffer's rows into a shape; and their layout.

    Whatever lies in places that hold no survivor, NaN included, is replaced by 0.
    """
    total, *row_lengths = shape
    s, t, d = tokens.shape
    if plan.kind == "padded":
        layout = padded(lengths, row_lengths[0])
        x = jnp.take_along_axis(tokens, source[..., None], axis=1)
        return jnp.where(layout.valid[..., None], x, 0), layout
    image, column, real = list_places(lengths, total)
    column = jnp.minimum(column, source.shape[1] - 1)
    x = tokens.reshape(s * t, d)[image * t + source[image, column]]
    return jnp.where(real[:, None], x, 0)[None], packed(lengths, total, row_lengths)
