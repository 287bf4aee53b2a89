"""One loss for each kind of phase.

(task, params, batch, key) -> loss, metrics. In a task with capacities the tokens that are dropped
for good are gathered away (`train_execution = "gathered"`): the same loss and gradient, for less
work, while metrics["overflow"], the tokens that found no slot, is 0.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from einops import rearrange
from jaxtyping import PRNGKeyArray

from iared2_jax.token_reduction import policy
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.training.curriculum import Phase
from iared2_jax.typing import Array

Params = dict[str, Any]
Batch = dict[str, Array]
Metrics = dict[str, Array]
Capacities = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned in a phase.

    Attributes:
      capacities: patch slots of each group whose masks are fixed; None: masked execution.
    """

    module: IARed2
    config: ml_collections.ConfigDict
    phase: Phase
    capacities: Capacities | None = None


def cross_entropy(logits: Array, batch: Batch, smoothing: float) -> tuple[Array, Metrics]:
    """Mean cross-entropy against the batch's targets, or its smoothed labels; the accuracy."""
    labels = batch["label"]
    if "target" in batch:  # of mixup and CutMix, smoothed already
        targets = batch["target"]
    else:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    loss = optax.losses.softmax_cross_entropy(logits, targets).mean()
    return loss, {"accuracy": (logits.argmax(-1) == labels).mean()}


def supervised_loss(
    task: Task, params: Params, batch: Batch, key: PRNGKeyArray
) -> tuple[Array, Metrics]:
    """Cross-entropy of the plain backbone."""
    logits, _ = task.module.apply({"params": params}, batch["input"], execution="dense")
    loss, metrics = cross_entropy(logits, batch, task.phase.options.label_smoothing)
    return loss, {**metrics, "overflow": jnp.zeros(())}


def backbone_loss(
    task: Task, params: Params, batch: Batch, key: PRNGKeyArray
) -> tuple[Array, Metrics]:
    """Cross-entropy under the greedy masks of interpreters 1..group.

    Everything before the group's first block is frozen, so no gradient is computed there.
    """
    module, phase, capacities = task.module, task.phase, task.capacities
    apply = functools.partial(module.apply, {"params": params})
    group, thresholds = phase.group, phase.thresholds
    state = apply(group, batch["input"], thresholds, capacities, method="up_to")
    head_logits = apply(group, state.x, method="interpret")
    keep = policy.greedy(head_logits, state.alive, _own_threshold(phase))
    overflow = state.overflow
    if capacities is not None:
        state = apply(state, keep, capacities[group - 1], method="compact")
        keep, overflow = state.alive, overflow + state.overflow
    logits = apply(group, state.x, keep, thresholds, method="onward")
    loss, metrics = cross_entropy(logits, batch, task.phase.options.label_smoothing)
    kept = (keep.sum(-1) / module.input_spec.num_patches).mean()
    return loss, {**metrics, "keep_rate": kept, "overflow": overflow.sum().astype(jnp.float32)}


def interpreter_loss(
    task: Task, params: Params, batch: Batch, key: PRNGKeyArray
) -> tuple[Array, Metrics]:
    """Self-critical REINFORCE for one interpreter (Eq. 3).

    The prefix up to the interpreter is the same for all rollouts, so it is computed once. The
    sampled rollouts and the greedy one run as one larger batch. Rewards are constants to the
    gradient, so nothing is differentiated but the interpreter itself.
    """
    module, config, phase = task.module, task.config, task.phase
    group, labels, rollouts = phase.group, batch["label"], config.interpreter.rollouts
    n = module.input_spec.num_patches
    apply = functools.partial(module.apply, {"params": params})
    entry = apply(group, batch["input"], phase.thresholds, task.capacities, method="up_to")
    x, alive = jax.lax.stop_gradient(entry.x), entry.alive
    head_logits = apply(group, x, method="interpret")

    greedy = policy.greedy(head_logits, alive, _own_threshold(phase))
    keys = jax.random.split(key, rollouts)
    sampled = jnp.stack(
        [policy.sample(k, head_logits, alive, entry.origin, n) for k in keys], axis=1
    )

    # Rollouts of one image stay next to each other, so that rows split over devices as images do.
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

    tau = config.interpreter.tau[group - 1 if len(config.interpreter.tau) > 1 else 0]
    handed = alive if config.interpreter.reward_denominator == "entering" else None
    rewards = jnp.stack(
        [policy.reward(masks[:, r], correct[:, r], tau, handed, n) for r in range(rollouts + 1)],
        axis=1,
    )
    advantage = rewards[:, :-1] - rewards[:, -1:]
    loss = sum(
        policy.self_critical_loss(
            head_logits,
            sampled[:, r],
            alive,
            advantage[:, r],
            config.interpreter.log_prob_reduction,
        )
        for r in range(rollouts)
    )
    metrics = _health(head_logits, alive, masks.sum(-1) / n, correct, rewards, advantage)
    return loss / rollouts, {**metrics, "overflow": entry.overflow.sum().astype(jnp.float32)}


def _own_threshold(phase: Phase) -> Array:
    """Of the phase's group; [1], or [b, 1] where each image has its own."""
    return jnp.asarray(phase.thresholds, jnp.float32)[..., phase.group - 1, None]


def _health(head_logits, alive, shares, correct, rewards, advantage) -> Metrics:
    """The figures by which one sees whether a policy is learning (SPEC 3)."""
    scores = policy.informative_scores(head_logits)
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
        "entropy": policy.entropy(head_logits, alive).mean(),
        "reward": rewards[:, -1].mean(),
        "advantage_mean": advantage.mean(),
        "advantage_variance": advantage.var(),
        "answers_differ": (correct[:, :-1] != correct[:, -1:]).mean(),
    }


LOSSES = {
    "supervised": supervised_loss,
    "backbone": backbone_loss,
    "interpreter": interpreter_loss,
}
