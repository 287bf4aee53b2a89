"""Magnitude pruning, its cost, and the greedy walk between dropping and pruning (Figure 5)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iared2_jax.errors import UsageError
from iared2_jax.evaluation.pruning import (
    PruningPoint,
    measure_fn,
    pruned_linear_flops,
    pruning_curves,
    thresholds_of,
)
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.token_reduction.model import KEEP_ALL
from iared2_jax.weights.pruning import nonzero_shares, prune


def model():
    module = create_module("vit_3_blocks", groups=3)
    return module, init_variables(module, 3)


def kernel(variables, block=0, layer="mlp", name="fc1"):
    return np.asarray(variables["params"]["backbone"][f"block_{block}"][layer][name]["kernel"])


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_smallest_weights_go_and_the_others_stay(scope):
    _, variables = model()
    scaled = jax.tree.map(lambda x: x, variables)
    scaled["params"]["backbone"]["block_0"]["mlp"]["fc1"]["kernel"] *= 100  # none of it is small
    pruned = prune(scaled, 0.3, scope)
    for block in range(3):
        for layer, name in (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2")):
            before, after = (kernel(v, block, layer, name) for v in (scaled, pruned))
            gone = after == 0
            np.testing.assert_array_equal(after[~gone], before[~gone])
            if scope == "layer":
                assert gone.sum() == int(0.3 * before.size)
            if gone.any() and not gone.all():
                assert np.abs(before[gone]).max() <= np.abs(before[~gone]).min()
    if scope == "global":
        assert (kernel(pruned) == 0).mean() < 0.01
        shares = nonzero_shares(pruned)
        assert shares[0] > shares[1]
        np.testing.assert_allclose(np.mean(list(shares.values())), 0.7, atol=1e-4)
    # Nothing else is touched.
    for path in (("norm", "scale"), ("head", "kernel"), ("patch_embed", "kernel")):
        a, b = (v["params"]["backbone"][path[0]][path[1]] for v in (scaled, pruned))
        np.testing.assert_array_equal(a, b)
    jax.tree.map(
        np.testing.assert_array_equal,
        scaled["params"]["interpreter_1"],
        pruned["params"]["interpreter_1"],
    )


def test_a_weight_of_zero_costs_nothing():
    """By hand: tokens times weights that are not 0, of every block; all else as ever."""
    module, variables = model()
    nonzero = nonzero_shares(prune(variables, 0.25))
    assert set(nonzero.values()) == {0.75}
    kept, d = (60.0, 40.0, 10.0), module.backbone.embed_dim
    blocks = sum((count + 1) * (4 + 2 * module.backbone.mlp_ratio) * d**2 for count in kept)
    full = count_flops(module, kept, interpreters=False).linear
    np.testing.assert_allclose(pruned_linear_flops(module, kept, nonzero), full - 0.25 * blocks)
    nothing = dict.fromkeys(range(3), 1.0)
    assert pruned_linear_flops(module, kept, nothing) == full


def test_settings_are_measured_with_the_models_own_answers():
    module, variables = model()
    rng = np.random.default_rng(0)
    images = rng.standard_normal((5, *module.input_spec.shape)).astype(np.float32)
    logits, out = module.apply(variables, jnp.asarray(images), 0.5)
    labels = np.asarray(logits.argmax(-1))

    def answers(variables, threshold):
        logits, out = module.apply(variables, jnp.asarray(images), threshold)
        kept, scores = jnp.stack(out.keep, 1).sum(-1), jnp.stack(out.scores, 1)
        found = {"answer": logits.argmax(-1), "kept": kept, "scores": scores}
        return {name: np.asarray(value) for name, value in found.items()}

    measure, scores = measure_fn(module, variables, answers, labels)
    assert len(scores) == 5 * 3 * 64
    point = measure(0.5, 0.0)
    assert point.accuracy == 1.0
    counts = np.stack([np.asarray(keep).sum(-1) for keep in out.keep])
    expected = np.mean(count_flops(module, tuple(counts), interpreters=False).linear)
    np.testing.assert_allclose(point.linear, expected)
    assert measure(KEEP_ALL, 0.5).linear < measure(KEEP_ALL, 0.0).linear
    assert measure(KEEP_ALL, 1.0).accuracy <= 1.0
    few, many = thresholds_of(scores, 2)
    share = [(scores <= threshold).mean() for threshold in (few, many)]
    np.testing.assert_allclose(share, [1 / 3, 2 / 3], atol=0.01)


def fabricated(threshold, share):
    """Dropping is free up to 0.2, then dear; pruning loses a little at each step."""
    dropped = max(threshold, 0.0)
    linear = 100 * (1 - dropped) * (1 - share)
    return PruningPoint(threshold, share, linear, 1 - max(0.0, dropped - 0.2) - share / 10)


def test_both_take_the_cheaper_step_each_time():
    curves = pruning_curves(fabricated, [0.1, 0.2, 0.5], [0.1, 0.2])
    walked = [(point.threshold, point.share) for point in curves["both"]]
    assert walked == [(KEEP_ALL, 0), (0.1, 0), (0.2, 0), (0.2, 0.1), (0.2, 0.2), (0.5, 0.2)]
    assert [point.share for point in curves["weights"]] == [0, 0.1, 0.2]
    assert [point.threshold for point in curves["tokens"]] == [KEEP_ALL, 0.1, 0.2, 0.5]


def test_bad_shares_are_named():
    _, variables = model()
    with pytest.raises(UsageError, match=r"share=1\.5 .* \[0, 1\]"):
        prune(variables, 1.5)
    with pytest.raises(UsageError, match="scope='row' is unknown"):
        prune(variables, 0.5, "row")
    with pytest.raises(UsageError, match="no block_<i>"):
        prune({"params": {"backbone": {"head": {"kernel": jnp.ones((2, 2))}}}}, 0.5)
