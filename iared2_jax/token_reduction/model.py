"""IA-RED²: a backbone in D groups, each an interpreter and L MSA-FFN blocks (paper, Fig. 2)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Int, Shaped

from iared2_jax.errors import UsageError
from iared2_jax.models import taps
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.models.token_layouts import EVERY_TOKEN, Padded, Places, TokenLayout
from iared2_jax.token_reduction.compaction import compacted, to_grid
from iared2_jax.token_reduction.groups import (
    Decide,
    GatheredExecution,
    GroupRecord,
    MaskedExecution,
    by_budget,
    given_at,
    run_groups,
)
from iared2_jax.token_reduction.interpreter import Interpreter
from iared2_jax.token_reduction.output import Output
from iared2_jax.token_reduction.predictor import Predictor
from iared2_jax.token_reduction.reducers import Reducer, get_reducer
from iared2_jax.token_reduction.selectors import (
    Selector,
    alive_counts,
    asked_selector,
    get_selector,
    keep_counts,
)
from iared2_jax.token_reduction.state import TokenState, all_alive
from iared2_jax.typing import Array

EXECUTIONS = ("dense", "masked", "gathered")
INTERPRETER_KINDS = ("attention", "dynamicvit")

# A threshold below every score: the interpreter keeps all that is still there.
KEEP_ALL = -1.0

Thresholds = float | Sequence[float] | Float[Array, "..."]


class IARed2(nn.Module):
    """A vision transformer that drops the patches that do not matter for its answer.

    Attributes:
      backbone: the vision transformer (see `models.backbones.protocol`).
      group_sizes: blocks per group, e.g. (4, 4, 4); they add up to the backbone's depth.
      interpreter_kind: "attention", the paper's `Interpreter`; or "dynamicvit", the `Predictor` of
        DynamicViT in its place, which has of the options below only init_bias.
      policy_token, interpreter_heads, scale, init_bias: see `Interpreter`.
      remat: gradient checkpointing: a block's activations are computed again when its gradient is
        taken, not kept. The same numbers, for less memory and about a third more work.
    """

    backbone: nn.Module
    group_sizes: tuple[int, ...]
    policy_token: str = "cls"
    interpreter_heads: int = 6
    scale: bool = True
    init_bias: float = 0.0
    remat: bool = False
    interpreter_kind: str = "attention"

    @property
    def num_groups(self) -> int:
        return len(self.group_sizes)

    @property
    def num_prefix(self) -> int:
        return self.backbone.num_prefix

    @property
    def input_spec(self) -> InputSpec:
        return self.backbone.input_spec

    @property
    def shows_attention(self) -> bool:
        """Whether attention has weights over the patches; if not, it goes by a token's place."""
        return getattr(self.backbone, "shows_attention", True)

    def require_attention_weights(self, who: str) -> None:
        """Refuses what goes by attention weights, where there are none.

        Args:
          who: asks for them, in words.

        Raises:
          UsageError: one sentence.
        """
        if not self.shows_attention:
            raise UsageError(
                f"{who} goes by attention weights over the patches, of which "
                f'attention="{self.backbone.attention.name}" has none: use "dense"'
            )

    def setup(self):
        """An interpreter per group; refuses groups that are not the backbone's blocks."""
        if sum(self.group_sizes) != self.backbone.depth:
            raise ValueError(
                f"group_sizes {self.group_sizes} must add up to the depth {self.backbone.depth}"
            )
        if self.policy_token == "cls" and not self.num_prefix:
            raise ValueError('without a prefix token, policy_token must be "learned"')
        self.interpreters = [
            self._interpreter(f"interpreter_{group}") for group in range(1, self.num_groups + 1)
        ]

    def _interpreter(self, name: str) -> nn.Module:
        dtype = self.backbone.dtype
        if self.interpreter_kind == "dynamicvit":
            return Predictor(self.init_bias, dtype, name=name)
        heads, token = self.interpreter_heads, self.policy_token
        return Interpreter(heads, token, self.scale, self.init_bias, dtype, name=name)

    # -- What selectors may ask for.

    def embed(self, inputs: Float[Array, "b ..."]) -> Float[Array, "b t d"]:
        """The tokens that enter the first block, prefix first."""
        return self.backbone.embed(inputs)

    def cls_attention(self, x: Float[Array, "b t d"], block: int) -> Float[Array, "b h n"]:
        """The CLS query's weights over the patches in a block (from 0) of the dense backbone.

        x: the tokens that enter the first block.
        """
        row = None
        for index in range(block + 1):
            x, row = self.backbone.run_block(index, x, EVERY_TOKEN)
        if row is None:
            raise ValueError(
                "this backbone's blocks have no CLS query whose attention could be shown"
            )
        return row[..., self.num_prefix :]

    # -- One group, in two halves. Groups are counted from 1, as in the paper.

    def interpret(
        self,
        group: int,
        x: Float[Array, "b t d"],
        alive: Bool[Array, "b n"] | Float[Array, "b n"] | None = None,
    ) -> Float[Array, "b n h"]:
        """The group's interpreter logits, per head, for the patch tokens of `x`.

        alive: which of them are still there, or how much of each; None: all.
        """
        return self.interpreters[group - 1](x, self.num_prefix, alive)

    def run_blocks(
        self,
        group: int,
        x: Float[Array, "b t d"],
        alive: Bool[Array, "b n"] | None,
        sizes: Float[Array, "b n"] | None = None,
        from_mlp: bool = False,
        origin: Int[Array, "b n"] | None = None,
    ) -> tuple[Float[Array, "b t d"], list[Float[Array, "b h t"]]]:
        """The group's blocks over prefix and alive patches; each block's CLS attention, if any.

        Args:
          alive: None: all are. sizes: how many patches each token stands for; None: one each.
          from_mlp: `run_first_attention` has been; go on from there.
          origin: which patch each token is; None: each is at its place.
        """
        layout = self._layout(alive, sizes, x.shape[0], origin)
        return self.run_layout(group, x, layout, from_mlp)

    def run_layout(
        self, group: int, x: Float[Array, "b t d"], layout: TokenLayout, from_mlp: bool = False
    ) -> tuple[Float[Array, "b t d"], list[Float[Array, "s h c"]]]:
        """The group's blocks over tokens that lie as `layout` says."""
        first = sum(self.group_sizes[: group - 1])
        attention = []
        for index in range(first, first + self.group_sizes[group - 1]):
            if from_mlp and index == first:
                x = self._run(lambda backbone, x: backbone.run_mlp_half(first, x), x)
                continue
            x = taps.tap(self, f"{taps.BLOCK_INPUT}_{index}", x)
            x, row = self._run(lambda backbone, x, i=index: backbone.run_block(i, x, layout), x)
            if row is not None:
                attention.append(row)
        return x, attention

    def run_first_attention(
        self,
        group: int,
        x: Float[Array, "b t d"],
        alive: Bool[Array, "b n"] | None,
        sizes: Float[Array, "b n"] | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h t"], Float[Array, "b t e"]]:
        """The group's first block up to its MLP: tokens, CLS attention, and the tokens' keys."""
        first, layout = sum(self.group_sizes[: group - 1]), self._layout(alive, sizes, x.shape[0])
        x = taps.tap(self, f"{taps.BLOCK_INPUT}_{first}", x)
        return self._run(lambda backbone, x: backbone.run_attention_half(first, x, layout), x)

    def _layout(
        self,
        alive: Bool[Array, "b n"] | None,
        sizes: Float[Array, "b n"] | None,
        batch: int,
        origin: Int[Array, "b n"] | None = None,
    ) -> Padded:
        """One row per image, the prefix before the patches."""
        prefix = jnp.ones((batch, self.num_prefix))
        if alive is not None:
            alive = jnp.concatenate([prefix.astype(bool), alive], axis=1)
        if sizes is not None:
            sizes = jnp.concatenate([prefix, sizes], axis=1)
        places = None
        if origin is not None and not self.shows_attention:
            first = jnp.broadcast_to(jnp.arange(self.num_prefix), prefix.shape)
            after = origin + self.num_prefix
            total = self.num_prefix + self.input_spec.num_patches
            places = Places(jnp.concatenate([first, after], axis=1), total)
        if alive is None and sizes is None and places is None:
            return EVERY_TOKEN
        return Padded(alive, None, sizes, places)

    def _run(self, part: Callable[..., Any], x: Array) -> Any:
        """A part of the backbone, computed again for its gradient if `remat` says so."""
        return (nn.remat(part) if self.remat else part)(self.backbone, x)

    # -- The whole model.

    def __call__(
        self,
        inputs: Shaped[Array, "b ..."],
        thresholds: Thresholds = 0.5,
        execution: str = "masked",
        capacities: Sequence[int] | None = None,
        keep: Sequence[Bool[Array, "b n"] | None] | None = None,
        keep_ratios: Sequence[float] | None = None,
        selector: str | Selector = "interpreter",
        reducer: str | Reducer | None = None,
        score: str | None = None,
    ) -> tuple[Float[Array, "b classes"], Output]:
        """Logits, and everything that led to them.

        Args:
          inputs: images [B, H, W, C] or clips [B, T, H, W, C], normalised.
          thresholds: keep iff score > threshold, in (0, 1); one for all groups, one each [D], or
            one each per input [B, D]. `KEEP_ALL` switches a group's dropping off.
          execution: "masked", the reference: all tokens stay in the array, dropped ones are masked
            keys. "gathered": kept tokens move into arrays of `capacities` patch slots; the same
            logits as long as `out.overflow` is 0. "dense": nothing is dropped.
          capacities: patch slots of each group; with execution="gathered" only.
          keep: per group, a mask that replaces the selector's decision (None: its own). A token
            dropped in an earlier group stays dropped.
          keep_ratios: fixed budget: each group keeps its ceil(ratio * N) best-scoring tokens, the
            same number for every input; the thresholds do not count.
          selector: what scores the tokens: a name of `selectors.SELECTORS` ("interpreter";
            "attention", the CLS query's mean weights in the block before the group, which needs no
            training and a first ratio of 1; "attention_block_1" and its like, the paper's baseline
            in two passes; "magnitude" of the patch embedding; "temporal_difference", of clips;
            "random"; other papers' "evit" and "tome"), or a selector of your own.
          reducer: what becomes of the others, a name of `reducers.REDUCERS`: "drop"; "fuse", they
            become one token, weighted by their scores (EViT); "merge", each is merged into the one
            it resembles most (ToMe). None: as the selector has it.
          score: the old name of `selector`.

        Returns:
          The logits [B, classes], and an `Output`. Under jit, what is not used is not computed.
          An input with a value that is not finite has logits that are NaN, and leaves the others
          as they are.

        Raises:
          ValueError: inputs of another shape or of integers; an unknown execution; thresholds,
            capacities, ratios or masks that do not fit the groups.
        """
        selector = asked_selector(selector, score)
        reducer = get_reducer(selector.reducer if reducer is None else reducer)
        self._check_inputs(inputs)
        self.check_budget(keep_ratios, selector)
        if reducer.needs_keys and not selector.after_attention:
            raise ValueError(
                f"the reducer {type(reducer).__name__} compares the keys of the attention before "
                f'it, which {type(selector).__name__} does not run: use selector="tome"'
            )
        if keep is not None and len(keep) != self.num_groups:
            raise ValueError(f"keep has {len(keep)} masks, the model {self.num_groups} groups")
        capacities = self._check_execution(execution, capacities)
        thresholds = self.per_group(thresholds)
        counts = self.keep_counts(keep_ratios, reducer)
        given = [None] * self.num_groups if keep is None else keep
        decide = _as_given_or_within(given, thresholds, counts)
        x = self.backbone.embed(inputs)
        state = all_alive(x, self.input_spec.num_patches)
        known = selector.input_scores(inputs, x, self)
        if execution == "gathered":
            full = keep is None and capacities == self.slots(keep_ratios, selector, reducer)
            runner = GatheredExecution(self, selector, known, reducer, capacities, full=full)
        else:
            runner = MaskedExecution(self, selector, known, reducer, dense=execution == "dense")
        state, records = run_groups(runner, state, range(1, self.num_groups + 1), decide)
        survivors = None if execution == "dense" else state.alive
        logits, features, attention = self.backbone.classify(state.x, survivors)
        if execution != "dense":
            logits, features = (nan_where_not_finite(y, x) for y in (logits, features))
        if execution == "gathered":
            n = self.input_spec.num_patches
            attention = [to_grid(row, state.origin, n) for row in attention]
        return logits, output_of(records, features, attention)

    # -- The parts that training needs: the prefix once, the suffix for several rollouts.

    def up_to(
        self,
        group: int,
        inputs: Float[Array, "b ..."],
        thresholds: Thresholds = 0.5,
        capacities: Sequence[int] | None = None,
    ) -> TokenState:
        """The tokens at the entry of `group`, by masked execution or in `capacities` slots.

        Args:
          capacities: patch slots of the groups before `group`; None: masked. The state's overflow
            is then the sum over these groups, and where it is not 0 the tokens must not be used.
        """
        selector, reducer = get_selector("interpreter"), get_reducer("drop")
        state = all_alive(self.backbone.embed(inputs), self.input_spec.num_patches)
        if capacities is None:
            runner = MaskedExecution(self, selector, None, reducer)
        else:
            runner = GatheredExecution(self, selector, None, reducer, capacities, keep_best=False)
        decide = by_budget(self.per_group(thresholds))
        state, records = run_groups(runner, state, range(1, group), decide)
        return state._replace(overflow=sum((r.overflow for r in records), state.overflow * 0))

    def onward(
        self,
        group: int,
        x: Float[Array, "b t d"],
        keep: Bool[Array, "b n"],
        thresholds: Thresholds = 0.5,
    ) -> Float[Array, "b classes"]:
        """The logits, by masked execution from the entry of `group`, whose keep mask is given."""
        runner = MaskedExecution(self, get_selector("interpreter"), None, get_reducer("drop"))
        decide = given_at(group, by_budget(self.per_group(thresholds)))
        state = all_alive(x, keep.shape[1])._replace(alive=keep)
        state, _ = run_groups(runner, state, range(group, self.num_groups + 1), decide)
        return self.backbone.classify(state.x, state.alive)[0]

    def relaxed(
        self, inputs: Float[Array, "b ..."], choose: Callable[[int, Array], Array]
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b t d"], list[Float[Array, "b n"]]]:
        """Masked execution as a differentiable function of what is kept (DynamicViT, section 3.3).

        A token is kept to a share w in [0, 1], and as a key of attention it counts w times,

            a_ij = exp(s_ij) g_ij / sum_k exp(s_ik) g_ik,   g_ij = w_j for i != j, and 1 for i = j,

        so that w = 0 is dropped for all but itself, and w = 1 is kept: the logits are then those of
        masked execution under the same masks. A dropped key's exponential is cut off at the
        largest of those that count, which bounds the gradient of its share: without, a key that
        attention was on, dropped, has one of 1e10 and more in DINOv2. (Their code adds 1e-6 to the
        sum, which also changes the logits.)

        Args:
          choose: (group, interpreter logits [b, N, heads]) -> shares [b, N]; what an earlier group
            has dropped stays dropped.

        Returns:
          Logits, all tokens behind the last block, normalised, and each group's shares.
        """
        x = self.backbone.embed(inputs)
        shares, kept = jnp.ones((x.shape[0], self.input_spec.num_patches)), []
        for group in range(1, self.num_groups + 1):
            shares = shares * choose(group, self.interpret(group, x, shares))
            kept.append(shares)
            counts = jnp.pad(shares, ((0, 0), (self.num_prefix, 0)), constant_values=1.0)[:, None]
            own = jnp.eye(counts.shape[-1])
            x, _ = self.run_layout(group, x, Padded(sizes=counts * (1 - own) + own))
        return self.backbone.classify(x, shares)[0], self.backbone.final_tokens(x), kept

    def dense_logits(self, inputs: Float[Array, "b ..."]) -> Float[Array, "b classes"]:
        """The logits of the whole backbone; no interpreter is asked, or need be there."""
        return self.backbone.classify(self._whole(inputs))[0]

    def _whole(self, inputs: Float[Array, "b ..."]) -> Float[Array, "b t d"]:
        """The tokens behind the last block, where nothing is dropped."""
        x = self.backbone.embed(inputs)
        for group in range(1, self.num_groups + 1):
            x, _ = self.run_blocks(group, x, None)
        return x

    def dense_tokens(
        self, inputs: Float[Array, "b ..."]
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b t d"]]:
        """The logits of the whole backbone, and its last tokens, normalised."""
        x = self._whole(inputs)
        return self.backbone.classify(x)[0], self.backbone.final_tokens(x)

    def compact(self, state: TokenState, keep: Bool[Array, "b k"], capacity: int) -> TokenState:
        """The kept patch tokens in `capacity` slots, in order; `overflow` says how many found none.

        Where it is not 0 the result is not masked execution's, and must not be used.
        """
        return compacted(state._replace(alive=keep), None, capacity, self.num_prefix)

    def classify_features(self, features: Float[Array, "b f"]) -> Float[Array, "b classes"]:
        """The head alone: the logits of `out.features`.

        Raises:
          ValueError: the backbone does not say how, or its heads read more than these.
        """
        if not hasattr(self.backbone, "classify_features"):
            raise ValueError(f"{type(self.backbone).__name__} has no method `classify_features`")
        return self.backbone.classify_features(features)

    def dense_heads(
        self, inputs: Float[Array, "b ..."]
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b classes"]]:
        """The logits of a distilled backbone's two heads, dense: CLS', and the other token's."""
        return self.backbone.head_logits(self._whole(inputs))

    # -- What is asked, checked.

    def per_group(self, thresholds: Thresholds) -> Float[Array, "... D"]:
        """The thresholds as an array [D], or [B, D] where each input has its own.

        Raises:
          ValueError: not one number, D, or D per input.
        """
        values = jnp.asarray(thresholds, jnp.float32)
        if values.ndim > 2 or values.shape[-1:] not in ((), (1,), (self.num_groups,)):
            raise ValueError(
                f"thresholds must be one number, {self.num_groups} (one per group), or "
                f"{self.num_groups} per input, got the shape {values.shape}"
            )
        return jnp.broadcast_to(values, (*values.shape[:-1], self.num_groups))

    def keep_counts(
        self, keep_ratios: Sequence[float] | None, reducer: str | Reducer = "drop"
    ) -> tuple[int, ...] | None:
        """Tokens that each group keeps under a fixed budget; None: there is none."""
        if keep_ratios is None:
            return None
        extra = get_reducer(reducer).extra_tokens
        return keep_counts(keep_ratios, self.input_spec.num_patches, extra)

    def slots(
        self,
        keep_ratios: Sequence[float] | None,
        selector: str | Selector = "interpreter",
        reducer: str | Reducer | None = None,
    ) -> tuple[int, ...] | None:
        """Capacities for gathered execution that a fixed budget fills exactly; None: without one.

        What each group keeps, and what the reducer (None: the selector's own) makes of the others.
        """
        if keep_ratios is None:
            return None
        extra = get_reducer(reducer or get_selector(selector).reducer).extra_tokens
        return alive_counts(keep_ratios, self.input_spec.num_patches, extra)

    def check_budget(self, keep_ratios: Sequence[float] | None, selector: Selector) -> None:
        """Raises a ValueError if `keep_ratios` and `selector` make no sense for this model."""
        if keep_ratios is not None:
            ratios = tuple(keep_ratios)
            if len(ratios) != self.num_groups or not all(0 < ratio <= 1 for ratio in ratios):
                raise ValueError(
                    f"keep_ratios must be {self.num_groups} shares in (0, 1], got {ratios}"
                )
        selector.check(self, keep_ratios)

    def _check_inputs(self, inputs: Array) -> None:
        self.input_spec.check(inputs)
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            raise ValueError(
                f"inputs are {inputs.dtype}, but must be normalised: "
                "module.input_spec.normalize(pixels) takes pixels 0..255"
            )

    def _check_execution(
        self, execution: str, capacities: Sequence[int] | None
    ) -> tuple[int, ...] | None:
        if execution not in EXECUTIONS:
            raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
        if (capacities is not None) != (execution == "gathered"):
            raise ValueError('capacities go with execution="gathered", and it needs them')
        if capacities is None:
            return None
        if taps.asked(self, taps.BLOCK_INPUT):
            raise ValueError('taps show the tokens where they are: not with execution="gathered"')
        n = self.input_spec.num_patches
        if len(capacities) != self.num_groups or not all(1 <= c <= n for c in capacities):
            raise ValueError(
                f"capacities must be {self.num_groups} numbers in 1..{n}, one per group, "
                f"got {tuple(capacities)}"
            )
        return tuple(int(c) for c in capacities)


def _as_given_or_within(
    keep: Sequence[Bool[Array, "b n"] | None],
    thresholds: Float[Array, "..."],
    counts: tuple[int, ...] | None,
) -> Decide:
    """A group's decision: the mask that is given for it, else by thresholds or a fixed budget."""
    own = by_budget(thresholds, counts)

    def decide(group: int, scores: Array, state: TokenState) -> Array:
        """The tokens that the group keeps, of those that are there."""
        given = keep[group - 1]
        if given is not None:
            return state.alive & jnp.take_along_axis(given, state.origin, axis=1)
        return own(group, scores, state)

    return decide


def nan_where_not_finite(y: Float[Array, "b k"], x: Float[Array, "b t d"]) -> Float[Array, "b k"]:
    """`y`, NaN for inputs whose embedded tokens `x` are not all finite.

    Dense execution gives NaN there by itself. Where tokens are dropped, NaN scores keep none, and
    the answer of what is left would look like any other.
    """
    finite = jnp.isfinite(x).all(axis=(1, 2))
    return jnp.where(finite[:, None], y, jnp.nan)


def output_of(
    records: Sequence[GroupRecord], features: Array, attention: Sequence[Array]
) -> Output:
    """The output of a forward pass, from what happened in each group and in the classifier."""
    logits = [record.interpreter_logits for record in records]
    return Output(
        scores=tuple(record.scores for record in records),
        keep=tuple(record.keep for record in records),
        interpreter_logits=tuple(x for x in logits if x is not None),
        overflow=tuple(record.overflow for record in records),
        attention=(*(row for record in records for row in record.attention), *attention),
        features=features,
    )
