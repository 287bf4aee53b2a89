"""The policy and its reward, against what can be enumerated or computed by hand."""

import itertools

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


def test_probabilities_of_all_actions_add_up_to_one(head_logits):
    log_pi = policy.log_prob(
        jnp.repeat(head_logits, len(ACTIONS), 0), jnp.asarray(ACTIONS), jnp.ones_like(ACTIONS)
    )
    assert float(jnp.exp(log_pi).sum()) == pytest.approx(1, abs=1e-6)


def test_reward_by_hand():
    keep = jnp.array([[True, True, False, False], [True] * 4, [False] * 4, [True] * 4])
    correct = jnp.array([True, True, True, False])
    np.testing.assert_allclose(policy.reward(keep, correct, tau=3.0), [0.75, 0.0, 1.0, -3.0])
    handed = jnp.array([[True, True, True, False], [True] * 4, [False] * 4, [True] * 4])
    np.testing.assert_allclose(
        policy.reward(keep, correct, 3.0, handed), [1 - (2 / 3) ** 2, 0.0, 1.0, -3.0], rtol=1e-6
    )


def test_log_prob_by_hand():
    head_logits = jnp.array([[[0.0, 2.0], [1.0, -1.0], [5.0, 5.0]]])
    scores = jax.nn.sigmoid(head_logits).mean(-1)[0]
    keep = jnp.array([[True, False, True]])
    alive = jnp.array([[True, True, False]])  # the third token counts for nothing
    expected = jnp.log(scores[0]) + jnp.log(1 - scores[1])
    np.testing.assert_allclose(policy.log_prob(head_logits, keep, alive)[0], expected, rtol=1e-6)
    total = policy.log_prob(head_logits, keep, alive)
    assert policy.reduced(total, alive, "sum") is total
    np.testing.assert_allclose(policy.reduced(total, alive, "mean")[0], expected / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="reduction"):
        policy.reduced(total, alive, "median")


def test_what_an_answer_is_worth_by_hand():
    probabilities = jnp.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]])
    logits, labels = jnp.log(probabilities) + 3.0, jnp.array([0, 2])
    for answer, expected in (
        ("right", [1, 0]),
        ("probability", [0.7, 0.2]),
        ("log_probability", [1 + np.log(0.7), 1 + np.log(0.2)]),
    ):
        np.testing.assert_allclose(policy.answer_value(logits, labels, answer), expected, rtol=1e-5)
        rollouts = policy.answer_value(jnp.stack([logits, logits[::-1]], axis=1), labels, answer)
        np.testing.assert_allclose(rollouts[:, 0], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="answer must be one of"):
        policy.answer_value(logits, labels, "margin")
    half = policy.reward(jnp.array([[True, False]]), jnp.array([0.5]), tau=3.0)
    np.testing.assert_allclose(half, [0.5 * 0.75 - 0.5 * 3])


@pytest.mark.parametrize("logit", [-300.0, -20.0, 20.0, 300.0])
@pytest.mark.parametrize("kept", [True, False])
def test_log_prob_and_its_gradient_stay_finite(logit, kept):
    head_logits = jnp.full((1, TOKENS, 6), logit)
    keep, alive = jnp.full((1, TOKENS), kept), jnp.ones((1, TOKENS), bool)
    value, grad = jax.value_and_grad(lambda z: policy.log_prob(z, keep, alive).sum())(head_logits)
    assert bool(jnp.isfinite(value))
    assert bool(jnp.isfinite(grad).all())
    assert bool(jnp.isfinite(policy.entropy(head_logits, alive)).all())


def test_entropy_is_ln_2_for_a_coin_flip_and_0_for_certainty():
    alive = jnp.ones((1, TOKENS), bool)
    coin = policy.entropy(jnp.zeros((1, TOKENS, 2)), alive)
    certain = policy.entropy(jnp.full((1, TOKENS, 2), 50.0), alive)
    np.testing.assert_allclose([coin[0], certain[0]], [np.log(2), 0], atol=1e-6)
