"""Self-critical REINFORCE for one interpreter (paper, Eq. 2 and 3)."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from einops import rearrange
from jaxtyping import PRNGKeyArray

from iared2_jax.errors import UsageError, nearest
from iared2_jax.token_reduction import policy
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


class InterpreterPhase(PhaseKind):
    """The policy gradient of one interpreter; all else is fixed."""

    section = "interpreter"
    mixes = False  # its reward is for the right answer, which must be one

    def options(self) -> dict[str, Any]:
        """The reward (Eq. 2) and the policy gradient (Eq. 3). The paper does not give tau."""
        return phase_options(
            epochs=10.0,
            tau=(1.0,),  # the price of an error: one for all groups, or one each
            reward_denominator="initial",  # "initial": N | "entering": N_j
            log_prob_reduction="sum",  # "sum" (Eq. 3) | "mean"
            rollouts=1,  # sampled masks per image; they share the prefix and the greedy rollout
        )

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
        ):
            if options[key] not in choices:
                raise UsageError(
                    f"config.interpreter.{key}={options[key]!r} is unknown"
                    f"{nearest(options[key], choices)}"
                )
        if options.rollouts < 1:
            raise UsageError(f"config.interpreter.rollouts={options.rollouts} must be at least 1")

    def check(self, options: ml_collections.ConfigDict, num_groups: int) -> None:
        """Refuses prices that are not one for all groups, nor one each."""
        if len(options.tau) not in (1, num_groups):
            raise UsageError(
                f"config.interpreter.tau has {len(options.tau)} values for {num_groups} groups: "
                f"give 1 or {num_groups}"
            )

    def loss(
        self, context: PhaseContext, params: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        """-mean of A log pi(u), A = R(sampled) - R(greedy) (Eq. 3).

        The prefix up to the interpreter is the same for all rollouts, so it is computed once. The
        sampled rollouts and the greedy one run as one larger batch. Rewards are constants to the
        gradient, so nothing is differentiated but the interpreter itself.
        """
        module, phase, options = context.module, context.phase, context.phase.options
        group, labels, rollouts = phase.group, batch["label"], options.rollouts
        n = module.input_spec.num_patches
        apply = functools.partial(module.apply, {"params": params})
        entry = apply(group, batch["input"], phase.thresholds, context.capacities, method="up_to")
        x, alive = jax.lax.stop_gradient(entry.x), entry.alive
        policy_logits = apply(group, x, method="interpret")

        greedy = policy.greedy(policy_logits, alive, phase.own_threshold)
        keys = jax.random.split(key, rollouts)
        sampled = jnp.stack(
            [policy.sample(k, policy_logits, alive, entry.origin, n) for k in keys], axis=1
        )

        # Rollouts of one image stay next to each other, so rows split over devices as images do.
        masks = jnp.concatenate([sampled, greedy[:, None]], axis=1)
        thresholds = jnp.asarray(phase.thresholds, jnp.float32)
        if thresholds.ndim == 2:  # one each per image
            thresholds = jnp.repeat(thresholds, rollouts + 1, axis=0)
        logits = apply(
            group,
            jnp.repeat(x, rollouts + 1, axis=0),
            rearrange(masks, "b r n -> (b r) n"),
            thresholds,
            method="onward",
        )
        logits = rearrange(logits, "(b r) c -> b r c", r=rollouts + 1)
        correct = jax.lax.stop_gradient(logits.argmax(-1) == labels[:, None])

        tau = options.tau[group - 1 if len(options.tau) > 1 else 0]
        handed = alive if options.reward_denominator == "entering" else None
        rewards = jnp.stack(
            [
                policy.reward(masks[:, r], correct[:, r], tau, handed, n)
                for r in range(rollouts + 1)
            ],
            axis=1,
        )
        advantage = rewards[:, :-1] - rewards[:, -1:]
        loss = sum(
            policy.self_critical_loss(
                policy_logits, sampled[:, r], alive, advantage[:, r], options.log_prob_reduction
            )
            for r in range(rollouts)
        )
        shares = masks.sum(-1) / n
        metrics = _health(policy_logits, alive, shares, correct, rewards, advantage)
        metrics["handed_rate"] = (alive.sum(-1) / n).mean()
        return loss / rollouts, {**metrics, "overflow": entry.overflow.sum().astype(jnp.float32)}

    def alarms(self, phase: Phase, figures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """A policy that keeps all that it is handed, or nothing."""
        # Kept of what the group was handed: after the first group that is not N.
        kept = figures["keep_rate"] / max(figures["handed_rate"], 1e-9)
        if kept > 0.999:
            yield (
                "all-kept",
                f"interpreter {phase.group} keeps every token: lower config.interpreter.tau or "
                "config.model.init_bias, or raise config.interpreter.learning_rate",
            )
        if figures["keep_rate"] < 0.001:
            yield (
                "none-kept",
                f"interpreter {phase.group} drops every token: raise config.interpreter.tau or "
                "config.model.init_bias, or lower config.interpreter.learning_rate",
            )


def _health(
    policy_logits: Array,
    alive: Array,
    shares: Array,
    correct: Array,
    rewards: Array,
    advantage: Array,
) -> Metrics:
    """The figures by which one sees whether a policy is learning (SPEC 3)."""
    scores = policy.informative_scores(policy_logits)
    count = jnp.maximum(alive.sum(), 1)
    mean = jnp.where(alive, scores, 0).sum() / count
    spread = jnp.sqrt(jnp.where(alive, (scores - mean) ** 2, 0).sum() / count)
    return {
        "accuracy": correct[:, -1].mean(),
        "accuracy_sampled": correct[:, :-1].mean(),
        "keep_rate": shares[:, -1].mean(),
        "keep_rate_sampled": shares[:, :-1].mean(),
        "score_mean": mean,
        "score_spread": spread,
        "entropy": policy.entropy(policy_logits, alive).mean(),
        "reward": rewards[:, -1].mean(),
        "advantage_mean": advantage.mean(),
        "advantage_variance": advantage.var(),
        "answers_differ": (correct[:, :-1] != correct[:, -1:]).mean(),
    }
