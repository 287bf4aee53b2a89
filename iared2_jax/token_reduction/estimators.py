"""Estimators of the policy gradient, by name: which masks are sampled, and what they are worth.

All of them estimate the gradient of E_u[R(u)], u ~ Bernoulli(I), from K sampled masks per image;
they differ in variance, and in how many forward passes they need. One image's reward is shared by
all its tokens, so its noise moves all scores together: the less of it, the sooner a policy settles.
docs/policy_gradient.md has each one's measured variance.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from iared2_jax.errors import UsageError
from iared2_jax.token_reduction import policy
from iared2_jax.typing import Array


class ControlVariate(NamedTuple):
    """A part s(u) of the reward whose mean mu(z) = E_u[s(u)] is known: it is not estimated.

    Attributes:
      rewards: s of each mask that was run; constants.
      mean: mu, as a function of the head logits z: it is differentiated.
    """

    rewards: Float[Array, "b m"]
    mean: Float[Array, " b"]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """One way to estimate the policy gradient.

    Attributes:
      surrogate: S, from (head logits [b, n, h], masks [b, k, n], alive [b, n], rewards [b, k],
        rewards of the greedy masks [b] or None) to a number per image [b], whose gradient is the
        estimate. Rewards and masks are constants.
      greedy: whether the most probable mask is run, too: one more forward pass.
      paired: whether masks come in antithetic pairs, so that there must be an even number of them.
      fewest: the smallest number of sampled masks that it is defined for.
    """

    surrogate: Callable[..., Float[Array, " b"]]
    greedy: bool = False
    paired: bool = False
    fewest: int = 1

    def sample(
        self,
        key: PRNGKeyArray,
        head_logits: Float[Array, "b n h"],
        alive: Bool[Array, "b n"],
        count: int,
        slots: Int[Array, "b n"] | None = None,
        num_patches: int | None = None,
    ) -> Bool[Array, "b k n"]:
        """`count` masks per image; `slots` and `num_patches` as `policy.draws` takes them."""
        independent = count // 2 if self.paired else count
        uniform = jnp.stack(
            [
                policy.draws(k, alive.shape, slots, num_patches)
                for k in jax.random.split(key, independent)
            ],
            axis=1,
        )
        if self.paired:
            uniform = jnp.concatenate([uniform, 1 - uniform], axis=1)
        scores = policy.informative_scores(head_logits)
        return (uniform < scores[:, None]) & alive[:, None]

    def objective(
        self,
        head_logits: Float[Array, "b n h"],
        sampled: Bool[Array, "b k n"],
        alive: Bool[Array, "b n"],
        rewards: Float[Array, "b m"],
        control: ControlVariate | None = None,
    ) -> Float[Array, " b"]:
        """The surrogate objective per image: its gradient is the estimate of that of E_u[R(u)].

            S(z; R),   or with a control variate s of mean mu:   mu(z) + S(z; R - s)

        Args:
          head_logits: z.
          sampled: the masks of `sample`.
          rewards: R of each of them, and at last of the greedy mask, where the estimator runs it.
          control: s and mu. mu is differentiated as it is; only what is left of R is estimated.
        """
        estimated = rewards if control is None else rewards - control.rewards
        of_sampled = estimated[:, : sampled.shape[1]]
        of_greedy = estimated[:, -1] if self.greedy else None
        surrogate = self.surrogate(head_logits, sampled, alive, of_sampled, of_greedy)
        return surrogate if control is None else control.mean + surrogate


def _score_function(
    head_logits: Array, masks: Array, alive: Array, advantages: Float[Array, "b k"]
) -> Array:
    """mean_k A_k log pi(u_k), per image (REINFORCE)."""
    log_probs = jax.vmap(
        lambda mask: policy.log_prob(head_logits, mask, alive), in_axes=1, out_axes=1
    )(masks)
    return (jax.lax.stop_gradient(advantages) * log_probs).mean(axis=1)


def _self_critical(head_logits, masks, alive, rewards, greedy_reward):
    """A_k = R(u_k) - R(greedy): the paper's Eq. 3 (Rennie et al. 2017). Unbiased.

    K + 1 forward passes. Where random masks do worse than the greedy one on the whole, the baseline
    is far from the mean reward, and every sampled action is discouraged: noise.
    """
    return _score_function(head_logits, masks, alive, rewards - greedy_reward[:, None])


def _leave_one_out(head_logits, masks, alive, rewards, greedy_reward):
    """A_k = R(u_k) - mean of R(u_j), j != k (RLOO; Kool et al. 2019). Unbiased.

    K forward passes, K >= 2. The baseline is the image's own mean reward, from other samples.
    """
    count = rewards.shape[1]
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / (count - 1)
    return _score_function(head_logits, masks, alive, rewards - others)


def _antithetic(head_logits, masks, alive, rewards, greedy_reward):
    """Pairs u(r), u(1 - r) of the same random numbers r (DisARM; Dong et al. 2020). Unbiased.

        dE[R]/dz_i ~ 1/2 (R(u) - R(u')) (u_i - u'_i) max(I_i, 1 - I_i),  z_i = logit I_i

    K forward passes, K even; the pairs are averaged. Tokens on which both masks agree get nothing:
    the two answers' difference cannot be theirs.
    """
    log_i, log_not_i = policy.log_scores(head_logits)
    logits = jnp.where(alive, log_i - log_not_i, 0.0)
    certainty = jnp.exp(jnp.maximum(log_i, log_not_i))
    half = masks.shape[1] // 2
    differ = masks[:, :half].astype(jnp.float32) - masks[:, half:]
    gain = (rewards[:, :half] - rewards[:, half:])[..., None] / 2
    weights = (gain * differ).mean(axis=1) * certainty
    return (jax.lax.stop_gradient(weights) * logits).sum(axis=-1)


ESTIMATORS: dict[str, Estimator] = {
    "self_critical": Estimator(_self_critical, greedy=True),
    "rloo": Estimator(_leave_one_out, fewest=2),
    "antithetic": Estimator(_antithetic, paired=True, fewest=2),
}


def check_rollouts(name: str, rollouts: int) -> None:
    """Refuses a number of sampled masks that an estimator is not defined for.

    Raises:
      UsageError: one sentence with the number and what would do.
    """
    estimator = ESTIMATORS[name]
    if rollouts < estimator.fewest:
        raise UsageError(
            f"config.interpreter.rollouts={rollouts} must be at least {estimator.fewest} for "
            f"config.interpreter.estimator={name!r}"
        )
    if estimator.paired and rollouts % 2:
        raise UsageError(
            f"config.interpreter.rollouts={rollouts} must be even for "
            f"config.interpreter.estimator={name!r}, whose masks come in pairs"
        )


def greedily_kept(
    head_logits: Float[Array, "b n h"], alive: Bool[Array, "b n"], greedy: Bool[Array, "b n"]
) -> Float[Array, " b"]:
    """The number of tokens that the greedy mask keeps, with a derivative: that of the scores' sum.

    The sum is the mean number over all masks u ~ Bernoulli(I). It may lie far from what a threshold
    keeps: n scores of .6 add up to .6 n, and a threshold of .5 keeps all n.
    """
    mean = jnp.where(alive, policy.informative_scores(head_logits), 0.0).sum(axis=-1)
    return mean + jax.lax.stop_gradient(greedy.sum(axis=-1) - mean)


def expected_saving(
    head_logits: Float[Array, "b n h"],
    alive: Bool[Array, "b n"],
    handed: Bool[Array, "b n"] | None = None,
    num_patches: int | None = None,
) -> Float[Array, " b"]:
    """The mean of `policy.saving` over all masks u ~ Bernoulli(I), exactly.

        E[1 - (|u| / M)^2] = 1 - ((sum_i I_i)^2 + sum_i I_i (1 - I_i)) / M^2

    Args:
      alive: the tokens that the group was handed: the others are never kept.
      handed, num_patches: the same tokens again where M is their number, else None; and N. As
        `policy.saving` takes them.
    """
    scores = jnp.where(alive, policy.informative_scores(head_logits), 0.0)
    square = scores.sum(-1) ** 2 + (scores * (1 - scores)).sum(-1)
    return 1 - square / policy.saving_denominator(alive, handed, num_patches) ** 2
