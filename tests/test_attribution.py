"""Heatmaps, and the segmentation protocol."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iared2_jax import create_model, explain
from iared2_jax.attribution.maps import raw_attention, to_heatmaps
from iared2_jax.attribution.segmentation import (
    foreground,
    measure,
    score_segmentation,
    summarise,
)
from iared2_jax.models.input_spec import images


def test_enlarging_a_map_clamps_at_the_border():
    """Bilinear with half-pixel centres, as torch's interpolate(align_corners=False)."""
    values = np.array([[0.0, 1.0, 2.0, 3.0]], np.float32)  # a 2 x 2 grid
    heatmap = np.asarray(to_heatmaps(values, images(4, 2)))[0]
    weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_allclose(heatmap, weights @ values.reshape(2, 2) @ weights.T, atol=1e-6)


def test_foreground_is_above_the_mean_and_a_flat_map_has_none():
    maps = np.array([[[0.2, 0.4], [0.4, 1.0]], [[0.3, 0.3], [0.3, 0.3]]])
    np.testing.assert_array_equal(
        foreground(maps), [[[False, False], [False, True]], [[False, False], [False, False]]]
    )


def test_segmentation_scores_by_hand():
    mask = np.zeros((1, 2, 5), bool)
    mask[0, 0, :3] = True  # 3 of 10
    predicted = np.zeros_like(mask)
    predicted[0, 0, 1:5] = True  # 2 hits, 2 false alarms
    scores = score_segmentation(predicted, mask)
    assert scores.pixel_accuracy == pytest.approx(0.7)
    assert scores.mean_accuracy == pytest.approx((2 / 3 + 5 / 7) / 2)
    assert scores.mean_iou == pytest.approx((2 / 5 + 5 / 8) / 2)


def test_scores_are_over_all_pixels_not_a_mean_over_images():
    masks = np.array([[[True, True]], [[True, False]]])
    predicted = np.array([[[True, False]], [[False, False]]])
    scores = score_segmentation(predicted, masks)
    assert scores.mean_iou == pytest.approx((1 / 3 + 1 / 3) / 2)


def test_all_background_at_the_papers_share():
    """SPEC 6: at a foreground of 29.3%, all background scores 70.7 / 50.0 / 35.4."""
    mask = (np.arange(1000) < 293).reshape(1, 20, 50)
    scores = score_segmentation(np.zeros_like(mask), mask)
    assert np.round(100 * np.array(scores), 1).tolist() == [70.7, 50.0, 35.4]


def test_a_perfect_map_is_blurred_by_its_enlargement():
    patches = np.random.default_rng(0).random((6, 16)) < 0.3
    masks = patches.reshape(6, 4, 4).repeat(8, axis=1).repeat(8, axis=2)
    heatmaps = np.asarray(to_heatmaps(patches.astype(np.float32), images(32, 8)))
    found = summarise(measure(heatmaps, masks))
    assert 0.7 < found["mean_iou"] < found["best_iou"] < 1
    assert found["chance_iou"] < 0.5


@pytest.fixture(scope="module")
def micro():
    return create_model("vit_micro")


def test_explain_shows_the_scores_of_a_group(micro):
    module, variables = micro
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64, 3)), jnp.float32)
    heatmaps = explain(module, variables, images, group=2)
    assert heatmaps.shape == (2, 64, 64)
    assert 0 <= float(heatmaps.min()) < float(heatmaps.max()) <= 1
    scores = jax.jit(lambda v, x: module.apply(v, x)[1].scores[1])(variables, images)
    np.testing.assert_allclose(heatmaps, to_heatmaps(scores, module.input_spec), atol=1e-6)
    with pytest.raises(ValueError, match=r"1\.\.3"):
        explain(module, variables, images, group=4)


def test_raw_attention_is_a_share_per_block(micro):
    module, variables = micro
    images = jnp.zeros((2, 64, 64, 3))
    blocks = raw_attention(module, variables, images)
    assert len(blocks) == 6
    for attention in blocks:
        assert attention.shape == (2, 64)
        # What is missing to 1 is the CLS token's attention to itself.
        assert bool((attention.sum(-1) < 1).all())
        assert bool((attention > 0).all())
