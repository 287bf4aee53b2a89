"""Ragged execution: every image keeps its own number of tokens, every shape is static.

The whole forward pass is one compiled program. Between groups the tokens live in one buffer, a row
per image, survivors first. A group sorts the images by how many tokens they keep, takes them a
sub-batch at a time, and runs each in the smallest of a few static shapes that holds it: a loop per
shape, whose number of turns is computed on the device. No count ever travels to the host, nothing
is compiled after the start, and a sub-batch that fits no planned shape runs in the last, which
holds anything.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from iared2_jax.fast_inference.forward import BoundModel, ForwardSpec
from iared2_jax.fast_inference.group import Buffer, evidence_in_place, run_group
from iared2_jax.fast_inference.plan import Plan
from iared2_jax.token_reduction.compaction import kept_first
from iared2_jax.token_reduction.groups import by_budget, given_at, run_groups
from iared2_jax.token_reduction.model import IARed2, nan_where_not_finite, output_of
from iared2_jax.token_reduction.output import Output
from iared2_jax.token_reduction.selectors import Evidence
from iared2_jax.token_reduction.state import TokenState, all_alive
from iared2_jax.typing import Array


class RaggedState(NamedTuple):
    """The tokens between two groups of ragged execution.

    buffer: see `group.Buffer`. alive [b, n]: on the grid. places [b, n]: where each grid token lies
    in the buffer, behind the prefix. overflow [b]: always 0, as some shape holds any sub-batch; it
    is there for the loop shared with masked and gathered execution, which records it.
    """

    buffer: Buffer
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
            buffer |= evidence_in_place(self._forward, self._variables, 1, tokens)
        places = jnp.broadcast_to(jnp.arange(n), (b, n))
        return RaggedState(buffer, alive, places, jnp.zeros(b, jnp.int32))

    def enter(self, group: int, state: RaggedState) -> tuple[RaggedState, list[Array]]:
        """The state as it is: selectors that look behind the attention are not run ragged."""
        return state, []

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
    tokens = module.apply(variables, inputs, method="embed")
    alive = jnp.broadcast_to((jnp.arange(b) < size)[:, None], (b, n))
    if forward.equal_counts:
        alive = jnp.ones((b, n), bool)
    known = forward.selector.input_scores(inputs, tokens, BoundModel(module, variables))
    counts = module.keep_counts(forward.keep_ratios)

    how = Ragged(forward, plan, variables, known)
    groups = range(1, module.num_groups + 1)
    decide = by_budget(thresholds, counts)
    state, records = run_groups(how, how.start(tokens, alive), groups, decide)

    logits, features, rows = _classified(module, variables, state)
    logits, features = (nan_where_not_finite(y, tokens) for y in (logits, features))
    rows = [jnp.moveaxis(_by_patch(state, jnp.moveaxis(row, 1, 2)), 2, 1) for row in rows]
    out = output_of(records, features, rows)
    return logits, out if forward.attention else out.replace(attention=()), how.shapes_used


def _classified(
    module: IARed2, variables: Mapping[str, Any], state: RaggedState
) -> tuple[Array, Array, list[Array]]:
    """What the backbone's end makes of the survivors: logits, features, CLS attention by place."""
    method = lambda m, *args: m.backbone.classify(*args)  # noqa: E731
    return module.apply(variables, state.buffer["tokens"], _at_first_places(state), method=method)


def _at_first_places(state: RaggedState) -> Bool[Array, "b n"]:
    """Which places of the buffer's rows hold survivors, behind a group: the first ones."""
    return jnp.arange(state.alive.shape[1]) < state.alive.sum(axis=1, keepdims=True)


# -- The two parts that training needs, as `IARed2.up_to` and `IARed2.onward` are by masked
# -- execution, with the model's own attention kernel. No gradient passes through them: the number
# -- of a loop's turns is known too late.


def ragged_up_to(
    forward: ForwardSpec,
    plan: Plan,
    variables: Mapping[str, Any],
    group: int,
    inputs: Float[Array, "b ..."],
    thresholds: Float[Array, "b D"],
) -> TokenState:
    """The tokens at the entry of `group`, each image's survivors first; behind them, zeros."""
    module = forward.module
    tokens = module.apply(variables, inputs, method="embed")
    state = all_alive(tokens, module.input_spec.num_patches)
    if group == 1:
        return state
    how, decide = Ragged(forward, plan, variables, None), by_budget(thresholds)
    ragged, _ = run_groups(how, how.start(tokens, state.alive), range(1, group), decide)
    alive, prefix = _at_first_places(ragged), module.num_prefix
    here = jnp.pad(alive, ((0, 0), (prefix, 0)), constant_values=True)[..., None]
    x = jnp.where(here, ragged.buffer["tokens"], 0)
    # Masked execution makes all tokens of such an input NaN; here they may have been dropped.
    finite = jnp.isfinite(tokens).all(axis=(1, 2), keepdims=True)
    origin = kept_first(ragged.alive)[0]
    return state._replace(x=jnp.where(finite, x, jnp.nan), alive=alive, origin=origin)


def ragged_onward(
    forward: ForwardSpec,
    plan: Plan,
    variables: Mapping[str, Any],
    group: int,
    x: Float[Array, "b t d"],
    keep: Bool[Array, "b n"],
    thresholds: Float[Array, "b D"],
) -> Float[Array, "b classes"]:
    """The logits from the entry of `group` on, whose keep mask is given."""
    how, (b, n) = Ragged(forward, plan, variables, None), keep.shape
    buffer = {"tokens": x} | evidence_in_place(forward, variables, group, x)
    places = jnp.broadcast_to(jnp.arange(n), (b, n))
    state = RaggedState(buffer, keep, places, jnp.zeros(b, jnp.int32))
    groups = range(group, forward.module.num_groups + 1)
    state, _ = run_groups(how, state, groups, given_at(group, by_budget(thresholds)))
    logits = _classified(forward.module, variables, state)[0]
    return nan_where_not_finite(logits, x)
