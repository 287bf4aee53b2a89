"""IA-RED²: a backbone in D groups, each an interpreter and L MSA-FFN blocks (paper, Fig. 2)."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Int

from iared2_jax.models.token_layouts import EVERY_TOKEN, Padded, TokenLayout
from iared2_jax.token_reduction import policy
from iared2_jax.token_reduction.compaction import kept_first, take_tokens, to_grid, top_k_slots
from iared2_jax.token_reduction.interpreter import Interpreter
from iared2_jax.token_reduction.masks import top_k
from iared2_jax.typing import Array, Norm

EXECUTIONS = ("dense", "masked", "gathered")
SCORES = ("interpreter", "attention")

# A threshold below every score: the interpreter keeps all that is still there.
KEEP_ALL = -1.0

Thresholds = float | Sequence[float] | Float[Array, "..."]


class Entry(NamedTuple):
    """What a group is handed.

    x [b, P+k, d]: tokens. alive [b, k]: which patch tokens are still there. slots [b, k]: which
    patch each of them is. overflow [b]: tokens that an earlier group found no slot for.
    """

    x: Float[Array, "b t d"]
    alive: Bool[Array, "b k"]
    slots: Int[Array, "b k"]
    overflow: Int[Array, " b"]


class IARed2(nn.Module):
    """A vision transformer that drops the patches that do not matter for its answer.

    Attributes:
      backbone: the vision transformer (see `models.backbones.protocol`).
      group_sizes: blocks per group, e.g. (4, 4, 4); they add up to the backbone's depth.
      policy_token, interpreter_heads, scale, init_bias: see `Interpreter`.
      norm, crop_pct: how images were prepared for these weights (mean and standard deviation of the
        pixels; see `data.images.eval_transform`). Nothing here computes with them.
    """

    backbone: nn.Module
    group_sizes: tuple[int, ...]
    policy_token: str = "cls"
    interpreter_heads: int = 6
    scale: bool = True
    init_bias: float = 0.0
    norm: Norm | None = None
    crop_pct: float = 1.0

    @property
    def num_groups(self) -> int:
        return len(self.group_sizes)

    def setup(self):
        if sum(self.group_sizes) != self.backbone.depth:
            raise ValueError(
                f"group_sizes {self.group_sizes} must add up to the depth {self.backbone.depth}"
            )
        if self.policy_token == "cls" and not self.backbone.num_prefix:
            raise ValueError('without a prefix token, policy_token must be "learned"')
        self.interpreters = [
            Interpreter(
                self.interpreter_heads,
                self.policy_token,
                self.scale,
                self.init_bias,
                self.backbone.dtype,
                name=f"interpreter_{group}",
            )
            for group in range(1, self.num_groups + 1)
        ]

    # -- One group, in two halves. Groups are counted from 1, as in the paper.

    def interpret(self, group: int, x: Float[Array, "b t d"]) -> Float[Array, "b n h"]:
        """The group's per-head logits for the patch tokens of `x`."""
        return self.interpreters[group - 1](x, self.backbone.num_prefix)

    def run_blocks(
        self, group: int, x: Float[Array, "b t d"], alive: Bool[Array, "b n"] | None
    ) -> tuple[Float[Array, "b t d"], list[Float[Array, "b h t"]]]:
        """The group's blocks over prefix and alive patches; each block's CLS attention, if any."""
        layout = EVERY_TOKEN
        if alive is not None:
            prefix = jnp.ones((x.shape[0], self.backbone.num_prefix), bool)
            layout = Padded(jnp.concatenate([prefix, alive], axis=1))
        return self.run_layout(group, x, layout)

    def run_layout(
        self, group: int, x: Float[Array, "b t d"], layout: TokenLayout
    ) -> tuple[Float[Array, "b t d"], list[Float[Array, "s h c"]]]:
        """The group's blocks over tokens that lie as `layout` says."""
        first = sum(self.group_sizes[: group - 1])
        attention = []
        for index in range(first, first + self.group_sizes[group - 1]):
            x, row = self.backbone.run_block(index, x, layout)
            if row is not None:
                attention.append(row)
        return x, attention

    def _per_group(self, thresholds: Thresholds) -> Float[Array, "... D"]:
        thresholds = jnp.asarray(thresholds, jnp.float32)
        return jnp.broadcast_to(thresholds, (*thresholds.shape[:-1], self.num_groups))

    # -- The whole model.

    def __call__(
        self,
        images: Float[Array, "b height width 3"],
        thresholds: Thresholds = 0.5,
        execution: str = "masked",
        capacities: Sequence[int] | None = None,
        keep: Sequence[Bool[Array, "b n"] | None] | None = None,
        keep_ratios: Sequence[float] | None = None,
        score: str = "interpreter",
    ) -> tuple[Float[Array, "b classes"], dict[str, Any]]:
        """Logits, and everything that led to them.

        Args:
          images: normalised.
          thresholds: keep iff score > threshold, in (0, 1); one for all groups, one each [D], or
            one each per image [B, D]. `KEEP_ALL` switches a group's dropping off.
          execution: "masked", the reference: all tokens stay in the array, dropped ones are masked
            keys. "gathered": kept tokens move into arrays of `capacities` patch slots; the same
            logits as long as `out["overflow"]` is 0. "dense": nothing is dropped.
          capacities: patch slots of each group; with execution="gathered" only.
          keep: per group, a mask that replaces the interpreter's decision (None: its own). A token
            dropped in an earlier group stays dropped.
          keep_ratios: fixed budget: each group keeps its ceil(ratio * N) best-scoring tokens, the
            same number for every image; the thresholds do not count.
          score: what scores the tokens: "interpreter", or "attention", the CLS query's mean weights
            in the block before the group, which needs no training (and a first ratio of 1).

        Returns:
          logits [B, classes], and a dict of one array per group, on the original patch grid:
            scores [B, N]        informative scores, 0 where a token was already dropped
            keep [B, N]          which tokens this group's blocks see
            head_logits [B, N, H]
            overflow [B]         kept tokens that found no slot (0 unless gathered)
          and `attention`, the CLS query's weights [B, heads, N] for every block that has one (of
          CaiT, the class-attention blocks), and `features` [B, d], what the head reads. Under jit,
          what is not used is not computed.

        Raises:
          ValueError: an unknown execution, capacities that are missing, too many, or out of 1..N.
        """
        capacities = self._check(execution, capacities)
        self.check_budget(keep_ratios, score)
        thresholds = self._per_group(thresholds)
        n, prefix = self.backbone.num_patches, self.backbone.num_prefix
        x = self.backbone.embed(images)
        alive = jnp.ones((x.shape[0], n), bool)
        slots = jnp.broadcast_to(jnp.arange(n), alive.shape)  # where each token came from
        out = {"scores": [], "keep": [], "head_logits": [], "overflow": [], "attention": []}

        def on_grid(values):
            return to_grid(values, slots, n) if execution == "gathered" else values

        cls_attention = jnp.ones(alive.shape)  # no block has attended to anything yet
        for group in range(1, self.num_groups + 1):
            if score == "attention":
                evidence = cls_attention
            else:
                head_logits = self.interpret(group, x)
                evidence = policy.informative_scores(head_logits)
                out["head_logits"].append(
                    jnp.moveaxis(on_grid(jnp.moveaxis(head_logits, -1, 1)), 1, -1)
                )
            scores = jnp.where(alive, evidence, 0.0)
            out["scores"].append(on_grid(scores))

            overflow = jnp.zeros(x.shape[0], jnp.int32)
            if execution != "dense":
                forced = keep[group - 1] if keep is not None else None
                if forced is None:
                    alive = self.decide(group, scores, alive, thresholds, keep_ratios)
                else:
                    alive = alive & jnp.take_along_axis(forced, slots, axis=1)
            if execution == "gathered":
                capacity = min(capacities[group - 1], alive.shape[1])
                chosen, alive, overflow = top_k_slots(scores, alive, capacity)
                x = self._with_patches(x, chosen)
                slots = jnp.take_along_axis(slots, chosen, axis=1)
            out["keep"].append(on_grid(alive))
            out["overflow"].append(overflow)

            x, attention = self.run_blocks(group, x, None if execution == "dense" else alive)
            out["attention"] += [on_grid(row[..., prefix:]) for row in attention]
            if attention:
                cls_attention = attention[-1].mean(axis=1)[:, prefix:]

        survivors = None if execution == "dense" else alive
        logits, out["features"], attention = self.backbone.classify(x, survivors)
        out["attention"] += [on_grid(row) for row in attention]
        return logits, out

    def decide(
        self,
        group: int,
        scores: Float[Array, "b n"],
        alive: Bool[Array, "b n"],
        thresholds: Float[Array, "... D"],
        keep_ratios: Sequence[float] | None = None,
    ) -> Bool[Array, "b n"]:
        """The alive tokens the group keeps: those above its threshold, or its share of the best."""
        if keep_ratios is None:
            return alive & (scores > thresholds[..., group - 1, None])
        return top_k(scores, alive, self.budget(keep_ratios)[group - 1])

    def budget(self, keep_ratios: Sequence[float]) -> tuple[int, ...]:
        """Tokens that each group keeps: ceil(ratio * N), and no more than the group before."""
        n = self.backbone.num_patches
        counts = [math.ceil(round(ratio * n, 6)) for ratio in keep_ratios]
        return tuple(itertools.accumulate(counts, min))

    def check_budget(self, keep_ratios: Sequence[float] | None, score: str) -> None:
        """Raises a ValueError if `keep_ratios` and `score` make no sense for this model."""
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        if keep_ratios is not None:
            ratios = tuple(keep_ratios)
            if len(ratios) != self.num_groups or not all(0 < ratio <= 1 for ratio in ratios):
                raise ValueError(
                    f"keep_ratios must be {self.num_groups} shares in (0, 1], got {ratios}"
                )
        if score == "attention" and not self.backbone.num_prefix:
            raise ValueError(
                'score="attention" needs a CLS token in the blocks; this backbone has none there'
            )
        if score == "attention" and (keep_ratios is None or keep_ratios[0] != 1):
            raise ValueError(
                'score="attention" needs keep_ratios that start with 1: before the first block '
                f"nothing has been attended to; got {keep_ratios}"
            )

    def _check(self, execution, capacities):
        if execution not in EXECUTIONS:
            raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
        if (capacities is not None) != (execution == "gathered"):
            raise ValueError('capacities go with execution="gathered", and it needs them')
        if capacities is None:
            return None
        n = self.backbone.num_patches
        if len(capacities) != self.num_groups or not all(1 <= c <= n for c in capacities):
            raise ValueError(
                f"capacities must be {self.num_groups} numbers in 1..{n}, one per group, "
                f"got {tuple(capacities)}"
            )
        return tuple(int(c) for c in capacities)

    def _with_patches(
        self, x: Float[Array, "b t d"], slots: Int[Array, "b k"]
    ) -> Float[Array, "b c d"]:
        """The prefix, and the patch tokens at `slots`."""
        prefix = self.backbone.num_prefix
        return jnp.concatenate([x[:, :prefix], take_tokens(x[:, prefix:], slots)], axis=1)

    # -- The parts that training needs: the prefix once, the suffix for several rollouts.

    def compact(
        self, x: Float[Array, "b t d"], keep: Bool[Array, "b n"], capacity: int
    ) -> tuple[Float[Array, "b c d"], Bool[Array, "b k"], Int[Array, "b k"], Int[Array, " b"]]:
        """Moves the kept patch tokens into `capacity` slots, in order.

        Returns the tokens, which slots are valid, where each came from, and how many tokens found
        no slot (then the result is not masked execution's, and must not be used).
        """
        slots = kept_first(keep)[0][:, :capacity]
        valid = jnp.take_along_axis(keep, slots, axis=1)
        return self._with_patches(x, slots), valid, slots, keep.sum(axis=1) - valid.sum(axis=1)

    def up_to(
        self,
        group: int,
        images: Float[Array, "b height width 3"],
        thresholds: Thresholds = 0.5,
        capacities: Sequence[int] | None = None,
    ) -> Entry:
        """Up to the entry of `group`: by masked execution, or gathered into `capacities` slots.

        Args:
          capacities: patch slots of the groups before `group`; None: masked.
        """
        thresholds = self._per_group(thresholds)
        x = self.backbone.embed(images)
        alive = jnp.ones((x.shape[0], self.backbone.num_patches), bool)
        slots = jnp.broadcast_to(jnp.arange(alive.shape[1]), alive.shape)
        overflow = jnp.zeros(x.shape[0], jnp.int32)
        for earlier in range(1, group):
            head_logits = self.interpret(earlier, x)
            alive = policy.greedy(head_logits, alive, thresholds[..., earlier - 1, None])
            if capacities is not None:
                x, alive, chosen, more = self.compact(x, alive, capacities[earlier - 1])
                slots = jnp.take_along_axis(slots, chosen, axis=1)
                overflow = overflow + more
            x, _ = self.run_blocks(earlier, x, alive)
        return Entry(x, alive, slots, overflow)

    def onward(
        self,
        group: int,
        x: Float[Array, "b t d"],
        keep: Bool[Array, "b n"],
        thresholds: Thresholds = 0.5,
    ) -> Float[Array, "b classes"]:
        """Masked execution from the entry of `group`, whose keep mask is given, to the logits."""
        thresholds = self._per_group(thresholds)
        x, _ = self.run_blocks(group, x, keep)
        for later in range(group + 1, self.num_groups + 1):
            keep = policy.greedy(self.interpret(later, x), keep, thresholds[..., later - 1, None])
            x, _ = self.run_blocks(later, x, keep)
        return self.backbone.classify(x, keep)[0]
