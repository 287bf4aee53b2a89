"""The policy gradient of one interpreter (paper, Eq. 2 and 3)."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from einops import rearrange
from jaxtyping import PRNGKeyArray

from iared2_jax.errors import UsageError, nearest
from iared2_jax.token_reduction import estimators, policy
from iared2_jax.token_reduction.estimators import ESTIMATORS, ControlVariate
from iared2_jax.token_reduction.state import TokenState
from iared2_jax.training.phases.base import (
    Batch,
    Metrics,
    Params,
    Part,
    Phase,
    PhaseContext,
    PhaseKind,
    phase_options,
)
from iared2_jax.typing import Array

# The most that the share of kept tokens may move in the last third of a phase that has settled. The
# learning rate has fallen to a quarter by then.
SETTLED = 0.05


class InterpreterPhase(PhaseKind):
    """The policy gradient of one interpreter; all else is fixed."""

    section = "interpreter"
    mixes = False  # its reward is for the right answer, which must be one
    frozen_blocks = True

    def options(self) -> dict[str, Any]:
        """The reward (Eq. 2) and the policy gradient (Eq. 3). The paper does not give tau."""
        return phase_options(
            epochs=10.0,
            lengths=(1.0,),  # times steps or epochs: one for all groups, or one each
            tau=(1.0,),  # the price of an error: one for all groups, or one each
            reward_denominator="initial",  # "initial": N | "entering": N_j
            # What an answer is worth: "right" or wrong (Eq. 2), the right class' "probability", or
            # its "log_probability"; see policy.answer_value.
            answer="right",
            # "self_critical" (Eq. 3) | "rloo" | "antithetic": docs/policy_gradient.md.
            estimator="self_critical",
            exact_saving=False,  # differentiate the expected saving itself; sample only the errors
            log_prob_reduction="sum",  # "sum" (Eq. 3) | "mean"
            rollouts=1,  # sampled masks per image; they share the prefix
            # A budget in place of the saving: the share of all N tokens that the group is to keep,
            # on average over a (micro-)batch; one for all groups, or one each. (): Eq. 2's saving.
            keep_target=(),
            target_weight=10.0,  # what it costs to miss it, as tau is of an error: times (k - t)^2
        )

    def length(self, options: ml_collections.ConfigDict, group: int) -> float:
        return _of_group(options.lengths, group)

    def trains(
        self, options: ml_collections.ConfigDict, group: int, num_groups: int
    ) -> frozenset[Part]:
        return frozenset({("interpreter", group)})

    def fixed_groups(self, group: int) -> int:
        return group - 1

    def check_options(self, options: ml_collections.ConfigDict) -> None:
        """Refuses names that are not known, and no rollouts."""
        for key, choices in (
            ("reward_denominator", policy.REWARD_DENOMINATORS),
            ("log_prob_reduction", policy.LOG_PROB_REDUCTIONS),
            ("answer", policy.ANSWERS),
            ("estimator", ESTIMATORS),
        ):
            if options[key] not in choices:
                raise UsageError(
                    f"config.interpreter.{key}={options[key]!r} is unknown"
                    f"{nearest(options[key], choices)}"
                )
        estimators.check_rollouts(options.estimator, options.rollouts)
        if not all(0 < share <= 1 for share in options.keep_target):
            raise UsageError(
                f"config.interpreter.keep_target={tuple(options.keep_target)} must be shares of "
                "the tokens, above 0 and at most 1"
            )
        if any(later > earlier for earlier, later in itertools.pairwise(options.keep_target)):
            raise UsageError(
                f"config.interpreter.keep_target={tuple(options.keep_target)} must not rise: these "
                "are shares of all tokens, and a group can keep at most what the one before left"
            )
        for name, paper in (("exact_saving", False), ("reward_denominator", "initial")):
            if options.keep_target and options[name] != paper:
                raise UsageError(
                    f"config.interpreter.{name}={options[name]!r} has no meaning beside "
                    "keep_target, which takes the saving's place: leave one of them out"
                )
        if not all(length > 0 for length in options.lengths):
            raise UsageError(
                f"config.interpreter.lengths={tuple(options.lengths)} must all be above 0"
            )

    def check(self, options: ml_collections.ConfigDict, num_groups: int) -> None:
        """Refuses prices, lengths and shares that are not one for all groups, nor one each."""
        for name in ("tau", "lengths", "keep_target"):
            given = len(options[name])
            if given not in (1, num_groups) and not (name == "keep_target" and given == 0):
                raise UsageError(
                    f"config.interpreter.{name} has {given} values for {num_groups} "
                    f"groups: give 1 or {num_groups}"
                )

    def loss(
        self, context: PhaseContext, params: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        """Minus the mean objective of `options.estimator`; its gradient is the policy gradient.

        The prefix up to the interpreter is the same for all rollouts, so it is computed once, and
        they run as one larger batch. Rewards are constants to the gradient, so nothing is
        differentiated but the interpreter itself.

        With `exact_saving` the reward is split into what is known and what must be tried,

            R = s - (1 - c) (s + tau),   s = 1 - (|u| / N)^2, c: how right the answer is,

        and the expectation of s is differentiated as it is: only errors are left to chance. With
        `keep_target` t it is not a saving that is set against errors, but a budget,

            R = -(1 - c) tau - w (k - t)^2,   k: the share of N that the greedy masks keep,

        on average over the batch. k is a step function of the scores: for its derivative stands
        that of their mean (straight-through).
        """
        module, phase, options = context.module, context.phase, context.phase.options
        group, rollouts = phase.group, options.rollouts
        n, estimator = module.input_spec.num_patches, ESTIMATORS[options.estimator]
        apply = functools.partial(module.apply, {"params": params})
        entry = _entry(context, params, batch["input"])
        x, alive = jax.lax.stop_gradient(entry.x), entry.alive
        policy_logits = apply(group, x, alive, method="interpret")

        greedy = policy.greedy(policy_logits, alive, phase.own_threshold)
        sampled = estimator.sample(key, policy_logits, alive, rollouts, entry.origin, n)
        masks = jnp.concatenate([sampled, greedy[:, None]], axis=1) if estimator.greedy else sampled
        logits = jax.lax.stop_gradient(_run_masks(context, params, x, masks))

        answers = policy.answer_value(logits, batch["label"], options.answer)
        if options.keep_target:
            rewards, control = _budgeted(options, group, answers, policy_logits, alive, greedy, n)
        else:
            rewards, control = _priced(options, group, answers, policy_logits, alive, masks, n)
        objective = estimator.objective(policy_logits, sampled, alive, rewards, control)
        objective = policy.reduced(objective, alive, options.log_prob_reduction)

        right = policy.answer_value(logits, batch["label"], "right")
        metrics = {
            **_policy_metrics(policy_logits, alive),
            **_reward_metrics(right, rewards, rollouts),
            "keep_rate": (greedy.sum(-1) / n).mean(),
            "keep_rate_sampled": (sampled.sum(-1) / n).mean(),
            "handed_rate": (alive.sum(-1) / n).mean(),
            "overflow": entry.overflow.sum().astype(jnp.float32),
        }
        return -objective.mean(), metrics

    def alarms(self, phase: Phase, figures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """A policy that keeps all that it is handed, or nothing."""
        # Kept of what the group was handed: after the first group that is not N.
        kept = figures["keep_rate"] / max(figures["handed_rate"], 1e-9)
        target = phase.options.keep_target
        # A budget that all tokens fit into is no reason to drop any.
        asked = bool(target) and _of_group(target, phase.group) >= figures["handed_rate"]
        price, cheaper = ("target_weight", "raise") if target else ("tau", "lower")
        if kept > 0.999 and not asked:
            yield (
                "all-kept",
                f"interpreter {phase.group} keeps every token: {cheaper} config.interpreter."
                f"{price}, lower config.model.init_bias, or raise config.interpreter.learning_rate",
            )
        if figures["keep_rate"] < 0.001:
            yield (
                "none-kept",
                f"interpreter {phase.group} drops every token: raise config.interpreter.{price} "
                "or config.model.init_bias, or lower config.interpreter.learning_rate",
            )

    def unsettled(
        self, phase: Phase, history: Sequence[tuple[int, Mapping[str, float]]]
    ) -> Iterator[tuple[str, str]]:
        """A share of kept tokens that another seed, or more steps, would have left elsewhere."""
        shares = [figures["keep_rate"] for _, figures in history]
        if max(shares) - min(shares) > SETTLED:
            yield (
                "not-settled",
                f"interpreter {phase.group} has not settled: in the last third of its steps the "
                f"share of tokens that it keeps went from {shares[0]:.2f} to {shares[-1]:.2f} "
                f"({min(shares):.2f} to {max(shares):.2f}); raise config.interpreter.steps or "
                "rollouts (docs/policy_gradient.md)",
            )


def _of_group(values: Sequence[float], group: int) -> float:
    """A group's own of `values`, which are one for all groups or one each."""
    return values[group - 1 if len(values) > 1 else 0]


def _priced(
    options: ml_collections.ConfigDict,
    group: int,
    answers: Array,
    policy_logits: Array,
    alive: Array,
    masks: Array,
    n: int,
) -> tuple[Array, ControlVariate | None]:
    """Rewards [b, m] by Eq. 2, a price for errors and a saving for what is dropped.

    With `exact_saving`, the saving is their control variate.
    """
    tau = _of_group(options.tau, group)
    handed = alive if options.reward_denominator == "entering" else None
    over_masks = functools.partial(jax.vmap, in_axes=1, out_axes=1)
    rewards = over_masks(lambda mask, answer: policy.reward(mask, answer, tau, handed, n))(
        masks, answers
    )
    if not options.exact_saving:
        return rewards, None
    savings = over_masks(lambda mask: policy.saving(mask, handed, n))(masks)
    expected = estimators.expected_saving(policy_logits, alive, handed, n)
    return rewards, ControlVariate(rewards=savings, mean=expected)


def _budgeted(
    options: ml_collections.ConfigDict,
    group: int,
    answers: Array,
    policy_logits: Array,
    alive: Array,
    greedy: Array,
    n: int,
) -> tuple[Array, ControlVariate]:
    """Rewards [b, m] by `keep_target`, a price for errors and one for missing the target.

    No sampled mask changes the second price, so it is known: the control variate.
    """
    share = estimators.greedily_kept(policy_logits, alive, greedy).mean() / n
    missed = share - _of_group(options.keep_target, group)
    budget = jnp.broadcast_to(-options.target_weight * missed**2, len(answers))
    per_mask = jnp.broadcast_to(jax.lax.stop_gradient(budget)[:, None], answers.shape)
    rewards = per_mask - (1 - answers) * _of_group(options.tau, group)
    return rewards, ControlVariate(rewards=per_mask, mean=budget)


def _entry(context: PhaseContext, params: Params, inputs: Array) -> TokenState:
    """The tokens at the entry of the phase's group."""
    module, group, thresholds = context.module, context.phase.group, context.phase.thresholds
    if context.ragged:
        return context.ragged.up_to(params, group, inputs, thresholds)
    return module.apply(
        {"params": params}, group, inputs, thresholds, context.capacities, method="up_to"
    )


def _run_masks(context: PhaseContext, params: Params, x: Array, masks: Array) -> Array:
    """The logits [b, k, classes] of `masks` [b, k, n] from the entry of the phase's group on."""
    module, phase, count = context.module, context.phase, masks.shape[1]
    # Masks of one image stay next to each other, so rows split over devices as images do.
    thresholds = jnp.asarray(phase.thresholds, jnp.float32)
    if thresholds.ndim == 2:  # one each per image
        thresholds = jnp.repeat(thresholds, count, axis=0)
    x, rows = jnp.repeat(x, count, axis=0), rearrange(masks, "b k n -> (b k) n")
    if context.ragged:
        logits = context.ragged.onward(params, phase.group, x, rows, thresholds)
    else:
        given = (phase.group, x, rows, thresholds)
        logits = module.apply({"params": params}, *given, method="onward")
    return rearrange(logits, "(b k) c -> b k c", k=count)


def _policy_metrics(policy_logits: Array, alive: Array) -> Metrics:
    """Where the scores are, and how sure they are (SPEC 3)."""
    scores = policy.informative_scores(policy_logits)
    count = jnp.maximum(alive.sum(), 1)
    mean = jnp.where(alive, scores, 0).sum() / count
    spread = jnp.sqrt(jnp.where(alive, (scores - mean) ** 2, 0).sum() / count)
    entropy = policy.entropy(policy_logits, alive).mean()
    return {"score_mean": mean, "score_spread": spread, "entropy": entropy}


def _reward_metrics(right: Array, rewards: Array, rollouts: int) -> Metrics:
    """What the masks earned. The greedy one comes last, where the estimator runs it."""
    metrics = {
        "accuracy_sampled": right[:, :rollouts].mean(),
        "reward_sampled": rewards[:, :rollouts].mean(),
        "reward_spread": rewards.std(axis=1).mean(),  # over the masks of one image
    }
    if rewards.shape[1] > rollouts:
        advantage = rewards[:, :-1] - rewards[:, -1:]
        metrics |= {
            "accuracy": right[:, -1].mean(),
            "reward": rewards[:, -1].mean(),
            "advantage_mean": advantage.mean(),
            "advantage_variance": advantage.var(),
            "answers_differ": (right[:, :-1] != right[:, -1:]).mean(),
        }
    return metrics
