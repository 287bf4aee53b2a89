"""Estimators of the policy gradient, against the exact gradient of the expected reward."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iared2_jax.errors import UsageError
from iared2_jax.token_reduction import estimators, policy
from iared2_jax.token_reduction.estimators import ESTIMATORS, ControlVariate

TOKENS, ALIVE = 4, 3  # the last token is dead: it counts for nothing
ACTIONS = np.array([(*u, False) for u in itertools.product([False, True], repeat=ALIVE)])
alive = jnp.arange(TOKENS)[None] < ALIVE


@pytest.fixture(params=["below half", "above half", "mixed"])
def head_logits(request):
    z = jax.random.normal(jax.random.key(0), (1, TOKENS, 3))
    return z + {"below half": -2.0, "above half": 2.0, "mixed": 0.0}[request.param]


def answers(masks):
    """Right iff token 0 or 2 survives, and surer with both: the reward couples the tokens."""
    return jnp.where(masks[..., 0] | masks[..., 2], 0.6, 0.1) + 0.3 * masks[..., 0] * masks[..., 2]


def toy_reward(masks):
    """Rewards of masks [..., n]."""
    flat = masks.reshape(-1, TOKENS)
    return policy.reward(flat, answers(flat), tau=0.7).reshape(masks.shape[:-1])


def exact_gradient(head_logits):
    """d/dz of E_u[R(u)], by enumerating all actions with their probabilities."""
    actions = jnp.asarray(ACTIONS)

    def expected_reward(z):
        scores = jax.nn.sigmoid(z).mean(-1)
        probability = jnp.where(alive, jnp.where(actions, scores, 1 - scores), 1.0).prod(axis=-1)
        return (probability * toy_reward(actions)).sum()

    return jax.grad(expected_reward)(head_logits)


def independent_outcomes(scores, count):
    """All ways in which `count` independent masks can fall [m, count, n], with probabilities."""
    one = np.where(ACTIONS[:, :ALIVE], scores, 1 - scores).prod(axis=-1)
    picks = np.array(list(itertools.product(range(len(ACTIONS)), repeat=count)))
    return ACTIONS[picks], one[picks].prod(axis=-1)


def paired_outcomes(scores):
    """All ways in which a pair of masks of r and 1 - r can fall [m, 2, n], with probabilities.

    Of a uniform r, min(I, 1 - I) gives (1, 0), as much (0, 1), and the rest both the same.
    """
    rare = np.minimum(scores, 1 - scores)
    per_token = [
        [((1, 0), rare[i]), ((0, 1), rare[i]), ((scores[i] > 0.5,) * 2, 1 - 2 * rare[i])]
        for i in range(ALIVE)
    ]
    masks, chances = [], []
    for outcome in itertools.product(*per_token):
        pair = np.array([values for values, _ in outcome] + [(0, 0)], bool).T
        masks.append(pair)
        chances.append(np.prod([chance for _, chance in outcome]))
    return np.array(masks), np.array(chances)


def gradients(name, head_logits, masks, exact_saving=False, reduction="sum"):
    """One estimate for each of `masks` [m, k, n]."""
    estimator = ESTIMATORS[name]
    run = masks = jnp.asarray(masks)
    if estimator.greedy:
        greedy = jnp.broadcast_to(policy.greedy(head_logits, alive), (len(masks), 1, TOKENS))
        run = jnp.concatenate([masks, greedy], axis=1)
    rewards = toy_reward(run)
    savings = policy.saving(run.reshape(-1, TOKENS)).reshape(rewards.shape)

    def one(mask, reward, saving):
        def objective(z):
            control = None
            if exact_saving:
                control = ControlVariate(saving[None], estimators.expected_saving(z, alive))
            value = estimator.objective(z, mask[None], alive, reward[None], control)
            return policy.reduced(value, alive, reduction).sum()

        return jax.grad(objective)(head_logits)

    return jax.vmap(one)(masks, rewards, savings)


def expectation(name, head_logits, count, **options):
    """The exact mean of an estimator, over all ways in which its masks can fall."""
    scores = np.asarray(policy.informative_scores(head_logits), np.float64)[0, :ALIVE]
    if ESTIMATORS[name].paired:
        masks, chances = paired_outcomes(scores)
    else:
        masks, chances = independent_outcomes(scores, count)
    assert chances.sum() == pytest.approx(1)
    return np.einsum("m,m...->...", chances, gradients(name, head_logits, masks, **options))


CASES = [("self_critical", 1), ("self_critical", 2), ("rloo", 2), ("rloo", 3), ("antithetic", 2)]


def test_every_estimator_is_among_the_cases():
    assert {name for name, _ in CASES} == set(ESTIMATORS)


@pytest.mark.parametrize("exact_saving", [False, True], ids=["sampled", "exact saving"])
@pytest.mark.parametrize(("name", "count"), CASES)
def test_is_the_gradient_of_the_expected_reward_on_average(head_logits, name, count, exact_saving):
    mean = expectation(name, head_logits, count, exact_saving=exact_saving)
    exact = exact_gradient(head_logits)
    np.testing.assert_allclose(mean, exact, atol=2e-6)
    assert float(jnp.abs(exact[0, :ALIVE]).min()) > 1e-4  # there is something to estimate
    assert bool((mean[0, ALIVE:] == 0).all())


@pytest.mark.parametrize(("name", "count"), CASES)
def test_mean_reduction_is_the_gradient_per_alive_token(head_logits, name, count):
    mean = expectation(name, head_logits, count, reduction="mean")
    np.testing.assert_allclose(mean, exact_gradient(head_logits) / ALIVE, atol=2e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_masks_fall_as_the_scores_say(head_logits, name):
    count, estimator = 20_000, ESTIMATORS[name]
    many = jnp.broadcast_to(head_logits, (count, TOKENS, 3))
    masks = estimator.sample(jax.random.key(1), many, jnp.broadcast_to(alive, (count, TOKENS)), 2)
    scores = jnp.where(alive, policy.informative_scores(head_logits), 0.0)
    np.testing.assert_allclose(masks.mean((0, 1)), scores[0], atol=0.012)
    both = (masks[:, 0] & masks[:, 1]).mean(0)
    expected = jnp.maximum(2 * scores - 1, 0) if estimator.paired else scores**2
    np.testing.assert_allclose(both, expected[0], atol=0.016)


@pytest.mark.parametrize("name", ESTIMATORS)
@hypothesis.given(seed=st.integers(0, 2**31 - 1), scale=st.floats(0.1, 10))
def test_dead_tokens_are_never_sampled_and_get_no_gradient(name, seed, scale):
    keys = jax.random.split(jax.random.key(seed), 3)
    head_logits = jax.random.normal(keys[0], (5, 7, 2)) * scale
    alive = jax.random.bernoulli(keys[1], 0.6, (5, 7))
    sampled = ESTIMATORS[name].sample(keys[2], head_logits, alive, 2)
    greedy = policy.greedy(head_logits, alive)
    assert not bool((sampled & ~alive[:, None]).any() | (greedy & ~alive).any())
    grad = jax.grad(lambda z: policy.log_prob(z, sampled[:, 0], alive).sum())(head_logits)
    assert bool((grad[~alive] == 0).all())
    assert bool((grad[alive] != 0).all())


def test_gathered_tokens_draw_what_they_would_have_drawn_in_place():
    head_logits = jax.random.normal(jax.random.key(2), (3, 6, 2))
    slots = jnp.array([[0, 2, 3, 5]] * 3)
    for estimator in ESTIMATORS.values():
        whole = estimator.sample(jax.random.key(3), head_logits, jnp.ones((3, 6), bool), 4)
        few = estimator.sample(
            jax.random.key(3), head_logits[:, slots[0]], jnp.ones((3, 4), bool), 4, slots, 6
        )
        np.testing.assert_array_equal(few, whole[:, :, slots[0]])


def test_expected_saving_is_the_mean_over_all_masks(head_logits):
    scores = np.asarray(policy.informative_scores(head_logits), np.float64)[0, :ALIVE]
    masks, chances = independent_outcomes(scores, 1)
    for handed in (None, alive):
        every = None if handed is None else jnp.broadcast_to(handed, (len(masks), TOKENS))
        mean = (chances * policy.saving(jnp.asarray(masks[:, 0]), every)).sum()
        exact = estimators.expected_saving(head_logits, alive, handed)
        np.testing.assert_allclose(exact[0], mean, rtol=1e-5)


def test_what_is_kept_at_inference_moves_as_the_mean_score_does(head_logits):
    greedy = policy.greedy(head_logits, alive)
    kept, gradient = jax.value_and_grad(lambda z: estimators.greedily_kept(z, alive, greedy).sum())(
        head_logits
    )
    assert kept == greedy.sum()
    mean = jax.grad(lambda z: jax.nn.sigmoid(z).mean(-1)[:, :ALIVE].sum())(head_logits)
    np.testing.assert_allclose(gradient, mean, atol=1e-7)
    assert bool((gradient[:, ALIVE:] == 0).all())


@pytest.mark.parametrize("logit", [-300.0, 300.0])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_stay_finite_at_any_score(name, logit):
    masks = jnp.asarray(ACTIONS[-1:][None].repeat(2, axis=1))
    found = gradients(name, jnp.full((1, TOKENS, 3), logit), masks, exact_saving=True)
    assert bool(jnp.isfinite(found).all())


@pytest.mark.parametrize(
    ("name", "rollouts", "message"),
    [
        ("self_critical", 0, "rollouts=0 must be at least 1"),
        ("rloo", 1, "rollouts=1 must be at least 2 for config.interpreter.estimator='rloo'"),
        ("antithetic", 3, "rollouts=3 must be even for config.interpreter.estimator='antithetic'"),
    ],
)
def test_numbers_of_rollouts_without_an_estimate_are_refused(name, rollouts, message):
    with pytest.raises(UsageError, match=message):
        estimators.check_rollouts(name, rollouts)
    estimators.check_rollouts(name, 4)
