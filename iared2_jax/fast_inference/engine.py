"""Ragged execution: every image keeps its own number of tokens, every shape is static.

The whole forward pass is one compiled program. Between groups the tokens live in one buffer, a row
per image, survivors first. A group sorts the images by how many tokens they keep, takes them a
sub-batch at a time, and runs each in the smallest of a few static shapes that holds it: a loop per
shape, whose number of turns is computed on the device. No count ever travels to the host, nothing
is compiled after the start, and a sub-batch that fits no planned shape runs in the last, which
holds anything.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Bool, Float, Int

from iared2_jax.fast_inference.plan import GroupPlan, Plan
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.models.token_layouts import EVERY_TOKEN, TokenLayout, list_places, packed, padded
from iared2_jax.token_reduction.compaction import kept_first
from iared2_jax.token_reduction.groups import run_groups
from iared2_jax.token_reduction.model import IARed2, nan_where_not_finite, output_of
from iared2_jax.token_reduction.output import Output
from iared2_jax.token_reduction.selectors import ByInterpreter, Evidence, Selector, within_budget
from iared2_jax.typing import Array

# What groups hand to each other, by place in the buffer: "tokens" [b, P+N, d], and what the next
# group decides by ("scores", "interpreter_logits").
State = dict[str, Array]

# (forward, variables, group, tokens, layout) -> tokens and each block's CLS attention.
BlocksFn = Callable[..., tuple[Array, list[Array]]]


@dataclasses.dataclass(frozen=True)
class ForwardSpec:
    """A forward pass: what is to be computed, however it is run.

    Attributes:
      module: the model.
      keep_ratios, selector: as `IARed2.__call__` has them.
      attention: whether `out` has the CLS attention of every block.
    """

    module: IARed2
    keep_ratios: tuple[float, ...] | None = None
    selector: Selector = dataclasses.field(default_factory=ByInterpreter)
    attention: bool = False

    @property
    def equal_counts(self) -> bool:
        """Whether every image keeps the same number of tokens: then rows have no padding."""
        return self.keep_ratios is not None

    def with_kernel(self, kernel: str) -> "ForwardSpec":
        """The same with another attention kernel."""
        backbone = self.module.backbone.clone(attention_kernel=kernel)
        return dataclasses.replace(self, module=self.module.clone(backbone=backbone))


@dataclasses.dataclass(frozen=True)
class BoundModel:
    """A module with its variables: the methods of `IARed2` that selectors call, as functions."""

    module: IARed2
    variables: Mapping[str, Any]

    @property
    def num_prefix(self) -> int:
        return self.module.num_prefix

    @property
    def input_spec(self) -> InputSpec:
        return self.module.input_spec

    def interpret(self, group: int, x: Float[Array, "s t d"]) -> Float[Array, "s n h"]:
        """The group's interpreter logits."""
        return self.module.apply(self.variables, group, x, method="interpret")


class RaggedState(NamedTuple):
    """The tokens between two groups of ragged execution.

    buffer: see `State`. alive [b, n]: on the grid. places [b, n]: where each grid token lies in the
    buffer, behind the prefix. overflow [b]: always 0.
    """

    buffer: State
    alive: Bool[Array, "b n"]
    places: Int[Array, "b n"]
    overflow: Int[Array, " b"]


class Ragged:
    """Ragged execution of the groups, in the shapes of a plan; see `token_reduction.groups`.

    Scores, masks and logits are on the patch grid at once; only the buffer is not.
    """

    def __init__(
        self,
        forward: ForwardSpec,
        plan: Plan,
        variables: Mapping[str, Any],
        input_scores: Float[Array, "b n"] | None,
    ):
        self._forward, self._plan, self._variables = forward, plan, variables
        self._input_scores = input_scores
        self.shapes_used: list[Int[Array, " shapes"]] = []

    def start(self, tokens: Float[Array, "b t d"], alive: Bool[Array, "b n"]) -> RaggedState:
        """The state before the first group."""
        b, n = alive.shape
        buffer = {"tokens": tokens}
        if self._input_scores is None:
            buffer |= evidence_in_place(self._forward, self._variables, 1, tokens, None)
        places = jnp.broadcast_to(jnp.arange(n), (b, n))
        return RaggedState(buffer, alive, places, jnp.zeros(b, jnp.int32))

    def evidence(self, group: int, state: RaggedState) -> Evidence:
        """The scores that the group before left in the buffer, or those known from the start."""
        if self._input_scores is not None:
            return Evidence(self._input_scores)
        logits = state.buffer.get("interpreter_logits")
        logits = None if logits is None else _by_patch(state, logits)
        return Evidence(_by_patch(state, state.buffer["scores"]), logits)

    def reduce(self, group: int, state: RaggedState, keep: Array, scores: Array) -> RaggedState:
        """Only the mask: the tokens move when a sub-batch takes them up."""
        return state._replace(alive=keep)

    def run_blocks(self, group: int, state: RaggedState) -> tuple[RaggedState, list[Array]]:
        """The group over all its sub-batches."""
        module, buffer = self._forward.module, dict(state.buffer)
        blocks, (b, n) = module.group_sizes[group - 1], state.alive.shape
        if self._forward.attention and module.num_prefix:
            heads = module.backbone.num_heads
            buffer["attention"] = jnp.zeros((b, n, blocks, heads), jnp.float32)
        buffer, places, used = run_group(
            self._forward,
            self._plan.groups[group - 1],
            self._variables,
            group,
            buffer,
            state.alive,
            state.places,
            self._plan.switch,
        )
        self.shapes_used.append(used)
        rows = buffer.pop("attention", None)
        state = RaggedState(buffer, state.alive, places, state.overflow)
        if rows is None:
            return state, []
        grid = _by_patch(state, rows)
        return state, [jnp.moveaxis(grid[:, :, block], 1, 2) for block in range(blocks)]

    def on_grid(self, state: RaggedState, values: Array) -> Array:
        return values


def _by_patch(state: RaggedState, values: Array) -> Array:
    """Values [b, n, ..] by place, put by patch; 0 where the token is gone."""
    index = state.places.reshape(*state.places.shape, *(1,) * (values.ndim - 2))
    values = jnp.take_along_axis(values, index, axis=1)
    return jnp.where(state.alive.reshape(index.shape), values, 0)


def run_ragged(
    forward: ForwardSpec,
    plan: Plan,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    thresholds: Float[Array, "b D"],
    size: Int[Array, ""],
) -> tuple[Float[Array, "b classes"], Output, list[Int[Array, " shapes"]]]:
    """The forward pass in the shapes of `plan`; a pure function, to be jitted.

    Args:
      size: how many of the inputs are real; the others keep nothing.

    Returns:
      Logits and output as of masked execution, on the original patch grid; of dropped tokens,
      `interpreter_logits` and `attention` are 0. And per group, how many sub-batches ran in each
      shape.
    """
    forward = forward.with_kernel(plan.attention_kernel)
    module = forward.module
    b, n = inputs.shape[0], module.input_spec.num_patches
    tokens = module.apply(variables, inputs, method=lambda m, x: m.backbone.embed(x))
    alive = jnp.broadcast_to((jnp.arange(b) < size)[:, None], (b, n))
    if forward.equal_counts:
        alive = jnp.ones((b, n), bool)
    known = forward.selector.input_scores(inputs, tokens, BoundModel(module, variables))
    counts = module.keep_counts(forward.keep_ratios)

    def decide(group: int, scores: Array, state: RaggedState) -> Array:
        return within_budget(group, scores, state.alive, thresholds, counts)

    how = Ragged(forward, plan, variables, known)
    groups = range(1, module.num_groups + 1)
    state, records = run_groups(how, how.start(tokens, alive), groups, decide)

    survivors = jnp.arange(n) < state.alive.sum(axis=1, keepdims=True)
    logits, features, rows = module.apply(
        variables,
        state.buffer["tokens"],
        survivors,
        method=lambda m, *args: m.backbone.classify(*args),
    )
    logits, features = (nan_where_not_finite(y, tokens) for y in (logits, features))
    rows = [jnp.moveaxis(_by_patch(state, jnp.moveaxis(row, 1, 2)), 2, 1) for row in rows]
    out = output_of(records, features, rows)
    return logits, out if forward.attention else out.replace(attention=()), how.shapes_used


def run_masked(
    forward: ForwardSpec,
    plan: Plan,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    thresholds: Float[Array, "b D"],
    size: Int[Array, ""],
) -> tuple[Float[Array, "b classes"], Output, list[Int[Array, " shapes"]]]:
    """Masked execution, `plan.masked_rows` images at a time: for where dropping does not pay."""
    module = forward.with_kernel(plan.attention_kernel).module

    def some(inputs, thresholds):
        """The logits and output of one sub-batch; what `run_ragged` leaves at 0 is 0 here, too."""
        logits, out = module.apply(
            variables,
            inputs,
            thresholds,
            keep_ratios=forward.keep_ratios,
            selector=forward.selector,
        )
        entering = [True, *(keep[..., None] for keep in out.keep)]
        of_alive = tuple(
            jnp.where(alive, values, 0)
            for alive, values in zip(entering, out.interpreter_logits, strict=False)
        )
        out = out.replace(interpreter_logits=of_alive)
        return logits, out if forward.attention else out.replace(attention=())

    return *in_sub_batches(some, plan.masked_rows, inputs, thresholds), []


def run_dense(
    module: IARed2,
    rows: int,
    variables: Mapping[str, Any],
    images: Float[Array, "b height width 3"],
) -> Float[Array, "b classes"]:
    """Logits of the dense model, `rows` images at a time: the baseline, as fast as it can be."""

    def forward(images):
        return module.apply(variables, images, execution="dense")[0]

    return in_sub_batches(forward, rows, images)


def sub_batch_sizes(batch_size: int, platform: str) -> list[int]:
    """Images at a time that may be fastest, largest first: a CPU's caches hold only a few."""
    divisors = (1, 2, 4) if platform == "cpu" else (1, 2, 4, 8)
    sizes = {max(1, batch_size // divisor) for divisor in divisors}
    if platform == "cpu":
        sizes |= {size for size in (4, 8) if size < batch_size}
    return sorted(sizes, reverse=True)


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


def evidence_in_place(
    forward: ForwardSpec,
    variables: Mapping[str, Any],
    group: int,
    x: Float[Array, "s c d"],
    attention: Float[Array, "s h n"] | None,
) -> State:
    """What `group` decides by, from the tokens that enter it: a part of the buffer."""
    model = BoundModel(forward.module, variables)
    evidence = forward.selector.token_scores(group, x, attention, model)
    if evidence.interpreter_logits is None:
        return {"scores": evidence.scores}
    return {"scores": evidence.scores, "interpreter_logits": evidence.interpreter_logits}


class _Turns(NamedTuple):
    """Which images a group takes together, and in which shape.

    order [chunks, rows]: the images of each sub-batch; b where there is none.
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
    b, rows = lengths.shape[0], plan.rows
    chunks = -(-b // rows)
    order = jnp.arange(b)
    as_they_come = chunks == 1 and plan.blocks == 1
    if not (as_they_come or equal_counts):
        order = jnp.argsort(lengths, stable=True)
    # Images that fill up the first sub-batch have the index b: never written.
    order = jnp.concatenate([jnp.full(chunks * rows - b, b), order]).reshape(chunks, rows)
    lengths = jnp.where(order < b, lengths[jnp.minimum(order, b - 1)], 0)

    in_blocks = rearrange(lengths, "c (k r) -> c k r", k=plan.blocks)
    needed = jnp.concatenate([in_blocks.sum((1, 2))[:, None], in_blocks.max(-1)], axis=1)
    if plan.kind == "padded":
        needed = needed.at[:, 0].set(0)
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
    state: State,
    keep: Bool[Array, "b n"],
    places: Int[Array, "b n"],
    switch: bool = False,
    run_blocks: BlocksFn = all_blocks,
) -> tuple[State, Int[Array, "b n"], Int[Array, " shapes"]]:
    """One group over all its sub-batches.

    Args:
      state: "tokens" [b, P+N, d] and whatever else the next group needs, by place.
      keep: which grid tokens go on.
      places: where in its row of the buffer each of them is, after the prefix.
      switch: see `Plan`.
      run_blocks: `all_blocks`, or what takes their time.

    Returns:
      The state, the first places of its rows overwritten; where each of the kept tokens is now;
      and how many sub-batches ran in each shape.
    """
    b, prefix = keep.shape[0], forward.module.backbone.num_prefix
    turns = _take_turns(plan, keep.sum(axis=1) + prefix, forward.equal_counts)
    # Where the first, second, .. token that goes on is now; anywhere, where there is none.
    ordered, new_places = kept_first(keep)
    source = jnp.take_along_axis(places, ordered, axis=1) + prefix
    source = jnp.concatenate([jnp.broadcast_to(jnp.arange(prefix), (b, prefix)), source], axis=1)

    def turn(shape: tuple[int, ...], chunk, state: State) -> State:
        """The sub-batch number `chunk`, in a shape that holds it."""
        taken = None if turns.as_they_come else turns.order[chunk]

        def rows_of(values):
            return values if taken is None else values[jnp.minimum(taken, b - 1)]

        def put(buffer, values):  # the first places of these images; nobody reads the others
            values = values.astype(buffer.dtype)
            if taken is None:
                return jax.lax.dynamic_update_slice(buffer, values, (0,) * buffer.ndim)
            return buffer.at[taken, : values.shape[1]].set(values, mode="drop")

        sources = rows_of(source)[:, : max(shape[1:])]
        x, layout = _enter(rows_of(state["tokens"]), sources, turns.lengths[chunk], plan, shape)
        if forward.equal_counts:
            layout = EVERY_TOKEN  # no padding, so no masks
        x, attention = run_blocks(forward, variables, group, x, layout)
        new = _new_state(forward, variables, group, layout.spread(x), attention, state.keys())
        return {name: put(state[name], new[name]) if name in new else state[name] for name in state}

    used = turns.stops - turns.starts
    chunks = turns.order.shape[0]
    bodies = [functools.partial(turn, shape) for shape in plan.shapes]
    if len(bodies) == chunks == 1:
        state = bodies[0](0, state)
    elif switch and chunks == 1:
        branches = [functools.partial(body, 0) for body in bodies]
        state = jax.lax.switch(turns.shape_of[0], branches, state)
    else:
        for start, stop, body in zip(turns.starts, turns.stops, bodies, strict=True):
            state = jax.lax.fori_loop(start, stop, body, state)
    return state, new_places, used


def _new_state(
    forward: ForwardSpec,
    variables: Mapping[str, Any],
    group: int,
    x: Array,
    attention: list[Array],
    wanted: Collection[str],
) -> State:
    """The sub-batch's tokens, and what the next group decides by."""
    new, rows = {"tokens": x}, [row[..., forward.module.num_prefix :] for row in attention]
    if group < forward.module.num_groups and "scores" in wanted:
        last = rows[-1] if rows else None
        new |= evidence_in_place(forward, variables, group + 1, x, last)
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
