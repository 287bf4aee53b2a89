"""FLOPs against the published figures (SPEC 5)."""

import numpy as np
import pytest

from iared2_jax import count_flops
from iared2_jax.token_reduction.create import create_module


@pytest.mark.parametrize(
    ("name", "linear", "full"),
    [("deit_s", 4.24, 4.60), ("deit_b", 16.85, 17.56), ("deit_b_384", 49.35, 55.48)],
)
def test_dense_models(name, linear, full):
    flops = count_flops(name)
    assert round(flops.linear / 1e9, 2) == linear
    assert round(flops.full / 1e9, 2) == full


def test_thirty_percent_dropped_at_the_input():
    flops = count_flops("deit_s", kept=(137,), interpreters=False)
    assert round(flops.linear / 1e9, 2) == 2.99
    assert round(flops.full / 1e9, 2) == 3.16


def test_interpreters_count_in_full_only():
    with_them = count_flops("deit_s", kept=(196, 196, 196))
    dense = count_flops("deit_s")
    assert with_them.linear == dense.linear
    # 3 x (197 d^2 for q and k, 196 d for the products)
    assert with_them.full - dense.full == 3 * (197 * 384**2 + 196 * 384)


def test_an_interpreter_scores_only_what_it_is_handed():
    none = count_flops("deit_s", kept=(0, 0, 0), interpreters=True)
    bare = count_flops("deit_s", kept=(0, 0, 0), interpreters=False)
    first_scores_all_then_none = (197 + 1 + 1) * 384**2 + 196 * 384
    assert none.full - bare.full == first_scores_all_then_none


def test_arrays_give_one_cost_per_image():
    kept = (np.array([196, 100]), np.array([150, 50]), np.array([100, 0]))
    flops = count_flops("deit_s", kept)
    for image in range(2):
        alone = count_flops("deit_s", [count[image] for count in kept])
        assert flops.linear[image] == alone.linear
        assert flops.full[image] == alone.full


def test_a_module_brings_its_own_groups():
    module = create_module("deit_s", groups=(2, 4, 6))
    by_module = count_flops(module, kept=(196, 100, 50))
    by_name = count_flops("deit_s", kept=(196, 100, 50), group_sizes=(2, 4, 6))
    assert by_module == by_name
    assert by_module.full > count_flops("deit_s", kept=(100, 100, 50), group_sizes=(2, 4, 6)).full


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.196"):
        count_flops("deit_s", kept=(197, 100, 50))
    with pytest.raises(ValueError, match="entries"):
        count_flops(create_module("deit_s"), kept=(196, 100))
