"""Perturbation: pixels are taken away in the order of a map, and the answer is read."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iared2_jax.attribution.batched_forward import dense_logits
from iared2_jax.errors import UsageError
from iared2_jax.evaluation.compare_maps import BOOTSTRAP
from iared2_jax.evaluation.perturbation import (
    REPLACEMENTS,
    STEPS,
    Curves,
    area,
    perturb,
    ranks,
    replacement_for,
    summarise_curves,
)
from iared2_jax.models.input_spec import HALF_NORM, InputSpec, clips, images
from iared2_jax.models.parameters import constant
from iared2_jax.token_reduction.create import init_variables
from iared2_jax.token_reduction.model import IARed2

PATCH = 6  # which the toy reads: of 16, row 1 and column 2
HERE = np.s_[8:16, 16:24]
SPEC = images(32, 8, norm=HALF_NORM)


class Planted(nn.Module):
    """A backbone that reads the mean brightness of one patch, and no other."""

    input_spec: InputSpec = SPEC
    num_classes: int = 3
    dtype: jnp.dtype = jnp.float32
    attention_kernel: str = "einsum"
    attention_kernels = ("einsum",)
    num_prefix, embed_dim, depth, num_heads = 0, 192, 1, 1

    def setup(self):
        self.gain = self.param("head", constant(4.0), (1,))

    def embed(self, inputs):
        return self.input_spec.to_patches(inputs)

    def run_block(self, index, x, layout):
        return x, None

    def classify(self, x, alive):
        brightness = self.gain * x[:, PATCH].mean(axis=-1)
        # Class 1 where it is bright, 0 where it is dark, 2 never.
        logits = jnp.stack([-brightness, brightness, jnp.full_like(brightness, -9)], axis=-1)
        return logits, x[:, 0], []


pytestmark = pytest.mark.usefixtures("compiled_quickly")


def planted(spec: InputSpec = SPEC):
    module = IARed2(Planted(spec), (1,), "learned", interpreter_heads=3)
    return module, init_variables(module)


def bright(count: int) -> np.ndarray:
    """Noise, normalised, in which the patch that is read is bright."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (count, 32, 32, 3)).astype(np.float32)
    noise[:, *HERE] += 0.5
    return noise


def perfect(count: int) -> np.ndarray:
    """The map that marks that patch; all other pixels are ties."""
    maps = np.zeros((count, 32, 32), np.float32)
    maps[:, *HERE] = 1
    return maps


@pytest.fixture(scope="module")
def model():
    return planted()


# -- Curves.


def test_accuracy_falls_at_the_first_positive_step_and_at_the_last_negative_one(model):
    x = bright(3)
    curves = perturb(*model, x, perfect(3), np.array([1, 1, 0]))
    # Black is class 0: from then on the first two are wrong, and the third is right.
    positive = np.array([[1] + [0] * 10, [1] + [0] * 10, [0] + [1] * 10])
    np.testing.assert_array_equal(curves["positive"].correct, positive)
    # The patch is 1/16 of the pixels: at nine tenths it is still there.
    negative = np.array([[1] * 10 + [0], [1] * 10 + [0], [0] * 10 + [1]])
    np.testing.assert_array_equal(curves["negative"].correct, negative)
    np.testing.assert_array_equal(curves["positive"].agrees, positive[[0, 0, 0]])
    np.testing.assert_array_equal(curves["negative"].agrees, negative[[0, 0, 0]])
    assert area(curves["positive"].correct).tolist() == pytest.approx([0.05, 0.05, 0.85])
    assert area(curves["negative"].correct).tolist() == pytest.approx([0.9, 0.9, 0])


def test_the_map_upside_down_swaps_the_orders(model):
    """But for ties, which stay in the order of the pixels: here there are none."""
    maps = np.random.default_rng(1).permuted(np.arange(3 * 1024.0).reshape(3, -1), axis=1)
    maps = maps.reshape(3, 32, 32).astype(np.float32)
    here, there = (perturb(*model, bright(3), sign * maps) for sign in (1, -1))
    for order, other in (("positive", "negative"), ("negative", "positive")):
        np.testing.assert_array_equal(here[order].probability, there[other].probability)


def test_the_first_step_takes_nothing_and_the_last_everything_in_both_orders(model):
    module, variables = model
    x = bright(3)
    curves = perturb(module, variables, x, perfect(3), explained=np.array([1, 0, 2]))
    black = np.full_like(x, -1)
    for step, shown in ((0, x), (STEPS, black)):
        probability = np.asarray(jax.nn.softmax(dense_logits(module, variables, shown)))
        for order in curves:
            np.testing.assert_allclose(
                curves[order].probability[:, step], probability[[0, 1, 2], [1, 0, 2]], rtol=1e-5
            )


def test_each_step_takes_a_tenth_of_the_pixels(model):
    """The class's logits are linear in the share of the patch that is left."""
    maps = np.broadcast_to(np.arange(1024.0, dtype=np.float32).reshape(32, 32), (3, 32, 32))
    x = np.ones((3, 32, 32, 3), np.float32)  # white: black is -1
    curves = perturb(*model, x, maps)
    for step in range(STEPS + 1):
        gone = maps[0][HERE] >= 1024 - round(1024 * step / STEPS)
        brightness = 4 * (1 - 2 * gone.mean())
        expected = np.exp(brightness) / (np.exp(brightness) + np.exp(-brightness) + np.exp(-9))
        assert curves["positive"].probability[0, step] == pytest.approx(expected, rel=1e-4)


def test_without_labels_the_agreement_is_read(model):
    curves = perturb(*model, bright(3), perfect(3))
    assert np.isnan(curves["positive"].correct).all()
    found = summarise_curves(curves, lambda values: np.full(5, values.mean()))
    assert found["read"] == "agreement"
    assert (found["positive_auc"], found["negative_auc"]) == pytest.approx((0.05, 0.9))


def test_pixels_of_clips_are_ordered_over_all_frames():
    spec = clips(16, frames=2, patch=8, norm=HALF_NORM)
    module, variables = planted(spec)
    row, column, frame = 1, 1, 0  # patch 6 = (1 * 2 + 1) * 2 + 0
    assert (row * 2 + column) * 2 + frame == PATCH
    x, maps = np.ones((1, 2, 16, 16, 3), np.float32), np.zeros((1, 2, 16, 16), np.float32)
    maps[:, frame, 8:, 8:] = 1  # an eighth of the pixels
    curves = perturb(module, variables, x, maps, np.array([1]))
    assert curves["positive"].correct[0].tolist() == [1] + [0] * 10
    assert curves["negative"].correct[0].tolist() == [1] * 10 + [0]


# -- Areas.


def test_areas_are_trapezoids_over_the_share_that_is_gone():
    curves = np.random.default_rng(0).random((3, STEPS + 1))
    share = np.arange(STEPS + 1) / STEPS
    np.testing.assert_allclose(area(curves), np.trapezoid(curves[:, :10], share[:10]))
    np.testing.assert_allclose(area(curves, STEPS), np.trapezoid(curves, share))
    assert area(np.ones(STEPS + 1)) == pytest.approx(0.9)  # the most that is published


def test_deletion_and_insertion_are_areas_of_the_probability():
    rng = np.random.default_rng(0)
    curves = {
        order: Curves(*(rng.random((4, STEPS + 1), np.float32) for _ in Curves._fields))
        for order in ("positive", "negative")
    }
    weights = rng.multinomial(4, np.full(4, 1 / 4), size=BOOTSTRAP) / 4
    found = summarise_curves(curves, lambda values: weights @ values)
    share = np.arange(STEPS + 1) / STEPS
    areas = {
        "positive_auc": area(curves["positive"].correct),
        "negative_auc": area(curves["negative"].correct),
        # Insertion shows ever more, the most important first: the negative order from its end.
        "deletion_auc": np.trapezoid(curves["positive"].probability, share),
        "insertion_auc": np.trapezoid(curves["negative"].probability[:, ::-1], share),
    }
    assert found["interval"].keys() == areas.keys()
    for name, values in areas.items():
        assert found[name] == pytest.approx(values.mean(), rel=1e-5)
        expected = np.percentile(weights @ values, (2.5, 97.5))
        np.testing.assert_allclose(found["interval"][name], expected, rtol=1e-5)
    assert found["read"] == "accuracy"
    for order, of in found["curves"].items():
        np.testing.assert_allclose(of["accuracy"], curves[order].correct.mean(axis=0))
        np.testing.assert_allclose(of["probability"], curves[order].probability.mean(axis=0))


# -- The order, and what stands in the place of a pixel.


def test_ties_are_in_the_order_of_the_pixels():
    maps = np.array([[[0.5, 2.0], [0.5, 2.0]], [[0.0, 0.0], [0.0, 0.0]]], np.float32)
    np.testing.assert_array_equal(ranks(maps), [[[2, 0], [3, 1]], [[0, 1], [2, 3]]])
    np.testing.assert_array_equal(ranks(-maps), [[[0, 2], [1, 3]], [[0, 1], [2, 3]]])


def test_what_is_no_number_counts_least():
    assert ranks(np.array([[[0.5, np.nan, 0.7]]], np.float32)).tolist() == [[[1, 2, 0]]]


def test_black_is_zero_normalised_and_the_mean_is_the_datas():
    spec = images(16, 8)
    x = np.ones((2, 16, 16, 3), np.float32)
    black = replacement_for(x, spec, "black")
    np.testing.assert_allclose(black, spec.normalize(np.zeros((2, 16, 16, 3), np.uint8)))
    mean = replacement_for(x, spec, "mean")
    np.testing.assert_allclose(mean, np.zeros_like(x))


@pytest.mark.parametrize("spec", [images((32, 48), 8), clips(32, frames=2, patch=8)])
def test_blur_keeps_the_mean_and_loses_the_detail(spec):
    rng = np.random.default_rng(0)
    flat = np.full((1, *spec.shape), 0.7, np.float32)
    np.testing.assert_allclose(replacement_for(flat, spec, "blur"), flat, rtol=1e-5)
    inside = np.zeros((1, *spec.shape), np.float32)
    inside[..., 10:22, 10:22, :] = rng.random(3)  # as far from the border as the blur reaches
    blurred = np.asarray(replacement_for(inside, spec, "blur"))
    np.testing.assert_allclose(blurred.mean(axis=(-3, -2)), inside.mean(axis=(-3, -2)), rtol=1e-4)
    noise = rng.normal(size=(1, *spec.shape)).astype(np.float32)
    assert np.asarray(replacement_for(noise, spec, "blur")).std() < 0.2 * noise.std()


def test_blur_is_a_gaussian_with_a_repeated_border():
    from scipy.ndimage import gaussian_filter

    x = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    blurred = replacement_for(x, images(32, 8), "blur")
    expected = gaussian_filter(x[0], (2, 2, 0), mode="nearest", truncate=3)  # 32 px / 16
    np.testing.assert_allclose(blurred[0], expected, atol=1e-5)


def test_what_is_taken_away_may_be_replaced_otherwise(model):
    dark = {"black": 0.0, "mean": 0.5}  # of the class "bright", where the whole image is gone
    for kind in REPLACEMENTS:
        curves = perturb(*model, bright(3), perfect(3), replacement=kind)
        end = curves["positive"].probability[:, STEPS]
        if kind == "blur":  # the patch is still the brightest place
            assert (end > 0.5).all()
        else:
            np.testing.assert_allclose(end, [dark[kind]] * 3, atol=1e-3)


# -- What is refused.


def test_perturbation_is_refused_in_words(model):
    x = bright(2)
    with pytest.raises(UsageError, match=r"heatmaps must be \[2, 32, 32\].*got \[2, 16\]"):
        perturb(*model, x, np.zeros((2, 16), np.float32))
    with pytest.raises(UsageError, match=r"no replacement 'blck' \(did you mean 'black'"):
        perturb(*model, x, perfect(2), replacement="blck")
