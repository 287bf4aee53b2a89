"""Which tokens live, as a Bernoulli policy, and its reward (paper, Eq. 2 and 3).

Everything is per image and per group. `alive` marks the tokens that the group was handed, and so
decides about: a dropped token, like the prefix tokens, is in neither the log-probability nor the
counts. `handed` is the same mask where it is optional: given, savings are counted against the
tokens handed to the group, else against all patches of the image.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from iared2_jax.typing import Array

LOG_PROB_REDUCTIONS = ("sum", "mean")
REWARD_DENOMINATORS = ("initial", "entering")
ANSWERS = ("right", "probability", "log_probability")


def informative_scores(head_logits: Float[Array, "b n h"]) -> Float[Array, "b n"]:
    """Eq. 1's mean over heads: I in [0, 1]."""
    return jax.nn.sigmoid(head_logits).mean(axis=-1)


def log_scores(
    head_logits: Float[Array, "b n h"],
) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
    """log I and log(1 - I) of Eq. 1's score, finite at any logit.

        log I = logsumexp_h log sigmoid(z_h) - log H,   log(1 - I) likewise with -z_h

    Forming I first gives -inf, and NaN gradients, from a logit of about 17 on.
    """
    z = head_logits.astype(jnp.float32)
    log_heads = jnp.log(z.shape[-1])
    log_i = jax.nn.logsumexp(jax.nn.log_sigmoid(z), axis=-1) - log_heads
    log_not_i = jax.nn.logsumexp(jax.nn.log_sigmoid(-z), axis=-1) - log_heads
    return log_i, log_not_i


def log_prob(
    head_logits: Float[Array, "b n h"],
    keep: Bool[Array, "b n"],
    alive: Bool[Array, "b n"],
) -> Float[Array, " b"]:
    """log pi(u) = sum_i log[I_i u_i + (1 - I_i)(1 - u_i)] over the alive tokens (Eq. 3).

    Args:
      head_logits: the interpreter's per-head logits.
      keep: the actions u; outside `alive` they do not count.
      alive: tokens the group was handed.
    """
    log_i, log_not_i = log_scores(head_logits)
    return jnp.where(alive, jnp.where(keep, log_i, log_not_i), 0.0).sum(axis=-1)


def reduced(
    total: Float[Array, " b"], alive: Bool[Array, "b n"], reduction: str
) -> Float[Array, " b"]:
    """A sum over the alive tokens as it is ("sum", Eq. 3), or per token ("mean").

    Raises:
      ValueError: on an unknown reduction.
    """
    if reduction not in LOG_PROB_REDUCTIONS:
        raise ValueError(f"reduction must be one of {LOG_PROB_REDUCTIONS}, got {reduction!r}")
    return total / jnp.maximum(alive.sum(axis=-1), 1) if reduction == "mean" else total


def entropy(head_logits: Float[Array, "b n h"], alive: Bool[Array, "b n"]) -> Float[Array, " b"]:
    """Mean Bernoulli entropy of the alive tokens, in nats: ln 2 = 0.69 is a coin flip."""
    log_i, log_not_i = log_scores(head_logits)
    per_token = -(jnp.exp(log_i) * log_i + jnp.exp(log_not_i) * log_not_i)
    return jnp.where(alive, per_token, 0.0).sum(-1) / jnp.maximum(alive.sum(-1), 1)


def draws(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    slots: Int[Array, "b n"] | None = None,
    num_patches: int | None = None,
) -> Float[Array, "b n"]:
    """Uniform numbers in [0, 1), one per token of `shape`.

    Args:
      slots, num_patches: which of how many patches each token is, where they have been gathered:
        each patch's draw is then the same as if they had not.
    """
    uniform = jax.random.uniform(key, (shape[0], num_patches or shape[1]))
    return uniform if slots is None else jnp.take_along_axis(uniform, slots, axis=1)


def greedy(
    head_logits: Float[Array, "b n h"],
    alive: Bool[Array, "b n"],
    threshold: float | Float[Array, "..."] = 0.5,
) -> Bool[Array, "b n"]:
    """The most probable action: keep iff I > threshold."""
    return (informative_scores(head_logits) > threshold) & alive


def answer_value(
    logits: Float[Array, "b *k classes"], labels: Int[Array, " b"], answer: str = "right"
) -> Float[Array, "b *k"]:
    """How right an answer is, at most 1: the c of `reward`.

    Args:
      logits: of the masked model; between batch and classes there may be an axis of rollouts.
      labels: the right classes.
      answer: "right": 1 or 0 (Eq. 2); "probability": p of the right class, which is what "right"
        would be worth on average if the answer were drawn from the model's own distribution;
        "log_probability": 1 + log p, which has the same slope at p = 1 and no floor.

    Raises:
      ValueError: on an unknown `answer`.
    """
    if answer not in ANSWERS:
        raise ValueError(f"answer must be one of {ANSWERS}, got {answer!r}")
    labels = labels.reshape(labels.shape + (1,) * (logits.ndim - 2))
    if answer == "right":
        return (logits.argmax(-1) == labels).astype(jnp.float32)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    own = jnp.take_along_axis(
        log_probs, jnp.broadcast_to(labels, logits.shape[:-1])[..., None], axis=-1
    )[..., 0]
    return jnp.exp(own) if answer == "probability" else 1 + own


def reward(
    keep: Bool[Array, "b n"],
    correct: Bool[Array, " b"] | Float[Array, " b"],
    tau: float,
    handed: Bool[Array, "b n"] | None = None,
    num_patches: int | None = None,
) -> Float[Array, " b"]:
    """R = 1 - (|u| / N)^2 where the answer is right, else -tau (Eq. 2).

    Between right (c = 1) and wrong (c = 0): c (1 - (|u| / N)^2) - (1 - c) tau.

    Args:
      keep: which tokens the group's blocks saw.
      correct: whether the image was classified correctly, or c; see `answer_value`.
      tau: the price of an error.
      handed: the tokens that the group was handed, of which `keep` is a part: |u| is divided by
        their number ("entering"). None: by N, the patches that the image started with ("initial").
      num_patches: N, where dropped tokens have been gathered away.
    """
    c = jnp.asarray(correct, jnp.float32)
    return c * saving(keep, handed, num_patches) - (1 - c) * jnp.float32(tau)


def saving(
    keep: Bool[Array, "b n"],
    handed: Bool[Array, "b n"] | None = None,
    num_patches: int | None = None,
) -> Float[Array, " b"]:
    """The reward of a right answer, 1 - (|u| / N)^2; for the arguments see `reward`."""
    count = keep.sum(axis=-1).astype(jnp.float32)
    return 1 - (count / saving_denominator(keep, handed, num_patches)) ** 2


def saving_denominator(
    keep: Bool[Array, "b n"],
    handed: Bool[Array, "b n"] | None = None,
    num_patches: int | None = None,
) -> int | Int[Array, " b"]:
    """The N of `saving`, or the number of `handed` tokens in its place, at least 1.

    For the arguments see `reward`; of `keep` only the shape is used.
    """
    if handed is None:
        return num_patches or keep.shape[-1]
    return jnp.maximum(handed.sum(axis=-1), 1)
