"""The one loop over the groups, which every execution runs: score, decide, reduce, run the blocks.

An `Execution` says how the tokens lie meanwhile: `MaskedExecution` (also of the dense model) leaves
all of them in the array, `GatheredExecution` moves the survivors into fewer slots; `fast_inference`
has a third, ragged. Training runs the same loop up to a group, and on from it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from iared2_jax.token_reduction.compaction import compacted, to_grid
from iared2_jax.token_reduction.reducers.base import Reducer
from iared2_jax.token_reduction.selectors.base import Evidence, Selector
from iared2_jax.token_reduction.selectors.budgets import within_budget
from iared2_jax.token_reduction.state import TokenState
from iared2_jax.typing import Array

# (group, scores [b, k], state) -> which tokens the group keeps [b, k].
Decide = Callable[[int, Array, Any], Array]


def by_budget(thresholds: Float[Array, "... D"], counts: Sequence[int] | None = None) -> Decide:
    """Every group keeps what is above its threshold, or as many as `counts` has for it."""

    def decide(group: int, scores: Array, state: Any) -> Array:
        """The tokens that the group keeps, of those that are there."""
        return within_budget(group, scores, state.alive, thresholds, counts)

    return decide


def given_at(first: int, later: Decide) -> Decide:
    """Group `first` keeps what is alive at its entry, a mask that is given; later ones decide."""

    def decide(group: int, scores: Array, state: Any) -> Array:
        """The mask that is given, and then what `later` says."""
        return state.alive if group == first else later(group, scores, state)

    return decide


class GroupRecord(NamedTuple):
    """What happened in a group, on the patch grid; the fields are those of `Output`."""

    scores: Float[Array, "b n"]
    keep: Bool[Array, "b n"]
    interpreter_logits: Float[Array, "b n heads"] | None
    overflow: Array
    attention: Sequence[Float[Array, "b h n"]]


@runtime_checkable
class Execution(Protocol):
    """How the tokens lie while the groups run. Its `state` has `alive` and `overflow`."""

    def enter(self, group: int, state: Any) -> tuple[Any, Sequence[Array]]:
        """The state where the selector looks at it, and the CLS attention of what ran till then.

        That is as it is; or, for a selector of `scores_after_attention`, behind the attention of
        the group's first block.
        """

    def evidence(self, group: int, state: Any) -> Evidence:
        """The selector's word on the tokens that enter the group, where `state.alive` has them."""

    def reduce(self, group: int, state: Any, keep: Array, scores: Array) -> Any:
        """The state with only the kept tokens alive."""

    def run_blocks(self, group: int, state: Any) -> tuple[Any, Sequence[Array]]:
        """The state behind the group's blocks (what `enter` did not run of them), and each one's
        CLS attention on the grid."""

    def on_grid(self, state: Any, values: Array) -> Array:
        """Values per token [b, k, ..] by patch [b, N, ..], 0 where there is none."""


def run_groups(
    execution: Execution, state: Any, groups: Iterable[int], decide: Decide
) -> tuple[Any, list[GroupRecord]]:
    """Runs some groups in turn (counted from 1), and says what happened in each."""
    records = []
    for group in groups:
        state, first = execution.enter(group, state)
        evidence = execution.evidence(group, state)
        scores = jnp.where(state.alive, evidence.scores, 0.0)
        keep = decide(group, scores, state)
        seen, logits = execution.on_grid(state, scores), evidence.interpreter_logits
        if logits is not None:
            logits = execution.on_grid(state, logits)
        state = execution.reduce(group, state, keep, scores)
        kept = execution.on_grid(state, state.alive)
        state, attention = execution.run_blocks(group, state)
        attention = [*first, *attention]
        records.append(GroupRecord(seen, kept, logits, state.overflow, attention))
    return state, records


class MaskedExecution(NamedTuple):
    """Masked execution: all tokens stay in the array, dropped ones are masked keys. The reference.

    model: the bound module. input_scores: the selector's, if it has some. dense: nothing is
    dropped, so there is nothing to mask.
    """

    model: Any
    selector: Selector
    input_scores: Float[Array, "b n"] | None
    reducer: Reducer
    dense: bool = False

    def enter(self, group: int, state: TokenState) -> tuple[TokenState, list[Array]]:
        return _enter(self, group, state, None if self.dense else state.alive)

    def evidence(self, group: int, state: TokenState) -> Evidence:
        if self.input_scores is not None:
            return Evidence(self.input_scores)
        return _evidence(self, group, state)

    def reduce(self, group: int, state: TokenState, keep: Array, scores: Array) -> TokenState:
        prefix = self.model.num_prefix
        return state if self.dense else self.reducer.reduce(state, keep, scores, prefix)

    def run_blocks(self, group: int, state: TokenState) -> tuple[TokenState, list[Array]]:
        return _run_blocks(self, group, state, None if self.dense else state.alive)

    def on_grid(self, state: TokenState, values: Array) -> Array:
        return values


class GatheredExecution(NamedTuple):
    """Gathered execution: entering group j, the survivors move into `capacities[j - 1]` slots.

    They keep the order that they have in the image.

    keep_best: of too many tokens those with the highest scores; else the first ones, for a caller
    that looks at the overflow and computes such a batch again. full: every slot holds a token, so
    there is nothing to mask.
    """

    model: Any
    selector: Selector
    input_scores: Float[Array, "b n"] | None
    reducer: Reducer
    capacities: Sequence[int]
    keep_best: bool = True
    full: bool = False

    def enter(self, group: int, state: TokenState) -> tuple[TokenState, list[Array]]:
        new, rows = _enter(self, group, state, None if self.full else state.alive)
        return new, self._on_patches(state, rows)

    def evidence(self, group: int, state: TokenState) -> Evidence:
        if self.input_scores is not None:
            return Evidence(jnp.take_along_axis(self.input_scores, state.origin, axis=1))
        return _evidence(self, group, state)

    def reduce(self, group: int, state: TokenState, keep: Array, scores: Array) -> TokenState:
        capacity, prefix = self.capacities[group - 1], self.model.num_prefix
        state = self.reducer.reduce(state, keep, scores, prefix)
        return compacted(state, scores if self.keep_best else None, capacity, prefix)

    def run_blocks(self, group: int, state: TokenState) -> tuple[TokenState, list[Array]]:
        alive = None if self.full else state.alive
        new, rows = _run_blocks(self, group, state, alive, state.origin)
        return new, self._on_patches(state, rows)

    def _on_patches(self, state: TokenState, rows: Sequence[Array]) -> list[Array]:
        n = self.model.input_spec.num_patches
        return [to_grid(row, state.origin, n) for row in rows]

    def on_grid(self, state: TokenState, values: Array) -> Array:
        by_patch = to_grid(
            jnp.moveaxis(values, 1, -1), state.origin, self.model.input_spec.num_patches
        )
        return jnp.moveaxis(by_patch, -1, 1)


def _enter(
    execution: MaskedExecution | GatheredExecution,
    group: int,
    state: TokenState,
    alive: Bool[Array, "b k"] | None,
) -> tuple[TokenState, list[Array]]:
    if not execution.selector.after_attention:
        return state, []
    prefix = execution.model.num_prefix
    x, row, keys = execution.model.run_first_attention(group, state.x, alive, state.sizes)
    row = row[..., prefix:]
    return state._replace(x=x, attention=row, keys=keys[:, prefix:]), [row]


def _evidence(
    execution: MaskedExecution | GatheredExecution, group: int, state: TokenState
) -> Evidence:
    if execution.selector.after_attention:
        return execution.selector.scores_after_attention(state, execution.model.num_prefix)
    return execution.selector.token_scores(
        group, state.x, state.attention, state.alive, execution.model
    )


def _run_blocks(
    execution: MaskedExecution | GatheredExecution,
    group: int,
    state: TokenState,
    alive: Bool[Array, "b k"] | None,
    origin: Int[Array, "b k"] | None = None,
) -> tuple[TokenState, list[Array]]:
    x, rows = execution.model.run_blocks(
        group, state.x, alive, state.sizes, execution.selector.after_attention, origin
    )
    rows = [row[..., execution.model.num_prefix :] for row in rows]
    return state._replace(x=x, attention=rows[-1] if rows else state.attention), rows
