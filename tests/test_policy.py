"""The policy gradient, against what can be enumerated or computed by hand."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iared2_jax.token_reduction import policy

TOKENS = 4
ACTIONS = np.array(list(itertools.product([False, True], repeat=TOKENS)))  # all 2^N


@pytest.fixture
def head_logits():
    return jax.random.normal(jax.random.key(0), (1, TOKENS, 3)) * 1.5


def toy_reward(keep):
    """Right iff tokens 0 or 2 survive; so the reward couples the tokens."""
    return policy.reward(keep, keep[:, 0] | keep[:, 2], tau=0.7)


def exact_gradient(head_logits):
    """d/dz of E_u[R(u)], by enumerating all actions with their probabilities."""
    actions = jnp.asarray(ACTIONS)
    rewards = toy_reward(actions)

    def expected_reward(z):
        scores = jax.nn.sigmoid(z).mean(-1)
        probability = jnp.where(actions, scores, 1 - scores).prod(axis=-1)
        return (probability * rewards).sum()

    return jax.grad(expected_reward)(head_logits)


def estimated_gradient(head_logits, actions):
    """The self-critical estimate for each action: minus the gradient of the loss."""
    alive = jnp.ones((1, TOKENS), bool)
    greedy = policy.greedy(head_logits, alive)
    advantage = toy_reward(actions) - toy_reward(greedy)

    def one(action, advantage):
        return -jax.grad(policy.self_critical_loss)(
            head_logits, action[None], alive, advantage[None]
        )

    return jax.vmap(one)(actions, advantage)


def test_expected_policy_gradient_is_the_gradient_of_the_expected_reward(head_logits):
    estimates = estimated_gradient(head_logits, jnp.asarray(ACTIONS))
    log_pi = policy.log_prob(
        jnp.repeat(head_logits, len(ACTIONS), 0), jnp.asarray(ACTIONS), jnp.ones_like(ACTIONS)
    )
    expected = (jnp.exp(log_pi)[:, None, None, None] * estimates).sum(axis=0)
    np.testing.assert_allclose(expected, exact_gradient(head_logits), atol=1e-6)


def test_probabilities_of_all_actions_add_up_to_one(head_logits):
    log_pi = policy.log_prob(
        jnp.repeat(head_logits, len(ACTIONS), 0), jnp.asarray(ACTIONS), jnp.ones_like(ACTIONS)
    )
    assert float(jnp.exp(log_pi).sum()) == pytest.approx(1, abs=1e-6)


def test_reinforce_converges_to_the_exact_gradient(head_logits):
    count = 200_000
    many = jnp.broadcast_to(head_logits, (count, TOKENS, 3))
    actions = policy.sample(jax.random.key(1), many, jnp.ones((count, TOKENS), bool))
    estimates = estimated_gradient(head_logits, actions)
    error = jnp.abs(estimates.mean(0) - exact_gradient(head_logits))
    standard_error = estimates.std(0) / count**0.5
    assert bool((error < 5 * standard_error + 1e-6).all())
    # The bound means something: it is far below the gradient itself.
    assert float(standard_error.max()) < 0.02 * float(jnp.abs(exact_gradient(head_logits)).max())


def test_reward_by_hand():
    keep = jnp.array([[True, True, False, False], [True] * 4, [False] * 4, [True] * 4])
    correct = jnp.array([True, True, True, False])
    np.testing.assert_allclose(policy.reward(keep, correct, tau=3.0), [0.75, 0.0, 1.0, -3.0])
    alive = jnp.array([[True, True, True, False], [True] * 4, [False] * 4, [True] * 4])
    np.testing.assert_allclose(
        policy.reward(keep, correct, 3.0, alive), [1 - (2 / 3) ** 2, 0.0, 1.0, -3.0], rtol=1e-6
    )


def test_log_prob_by_hand():
    head_logits = jnp.array([[[0.0, 2.0], [1.0, -1.0], [5.0, 5.0]]])
    scores = jax.nn.sigmoid(head_logits).mean(-1)[0]
    keep = jnp.array([[True, False, True]])
    alive = jnp.array([[True, True, False]])  # the third token counts for nothing
    expected = jnp.log(scores[0]) + jnp.log(1 - scores[1])
    np.testing.assert_allclose(policy.log_prob(head_logits, keep, alive)[0], expected, rtol=1e-6)
    np.testing.assert_allclose(
        policy.log_prob(head_logits, keep, alive, "mean")[0], expected / 2, rtol=1e-6
    )
    with pytest.raises(ValueError, match="reduction"):
        policy.log_prob(head_logits, keep, alive, "median")


@pytest.mark.parametrize("logit", [-300.0, -20.0, 20.0, 300.0])
@pytest.mark.parametrize("kept", [True, False])
def test_log_prob_and_its_gradient_stay_finite(logit, kept):
    head_logits = jnp.full((1, TOKENS, 6), logit)
    keep, alive = jnp.full((1, TOKENS), kept), jnp.ones((1, TOKENS), bool)
    value, grad = jax.value_and_grad(lambda z: policy.log_prob(z, keep, alive).sum())(head_logits)
    assert bool(jnp.isfinite(value))
    assert bool(jnp.isfinite(grad).all())
    assert bool(jnp.isfinite(policy.entropy(head_logits, alive)).all())


@hypothesis.given(seed=st.integers(0, 2**31 - 1), scale=st.floats(0.1, 10))
def test_dead_tokens_are_never_sampled_and_get_no_gradient(seed, scale):
    keys = jax.random.split(jax.random.key(seed), 3)
    head_logits = jax.random.normal(keys[0], (5, 7, 2)) * scale
    alive = jax.random.bernoulli(keys[1], 0.6, (5, 7))
    sampled = policy.sample(keys[2], head_logits, alive)
    greedy = policy.greedy(head_logits, alive)
    assert not bool((sampled & ~alive).any() | (greedy & ~alive).any())
    grad = jax.grad(lambda z: policy.self_critical_loss(z, sampled, alive, jnp.ones(5)))(
        head_logits
    )
    assert bool((grad[~alive] == 0).all())
    assert bool((grad[alive] != 0).all())


def test_entropy_is_ln_2_for_a_coin_flip_and_0_for_certainty():
    alive = jnp.ones((1, TOKENS), bool)
    coin = policy.entropy(jnp.zeros((1, TOKENS, 2)), alive)
    certain = policy.entropy(jnp.full((1, TOKENS, 2), 50.0), alive)
    np.testing.assert_allclose([coin[0], certain[0]], [np.log(2), 0], atol=1e-6)
