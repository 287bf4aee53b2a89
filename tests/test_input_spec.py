"""Inputs of any size, patch, channels and length: one description, used everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from iared2_jax import count_flops, create_model
from iared2_jax.data.datasets import open_dataset
from iared2_jax.data.images import eval_transform, random_resized_crop, with_channels
from iared2_jax.data.request import DataRequest
from iared2_jax.errors import UsageError
from iared2_jax.models.input_spec import IMAGENET_NORM, InputSpec, images
from iared2_jax.models.variants import VARIANTS, resized
from iared2_jax.token_reduction.create import create_module, init_variables


def numbered(spec: InputSpec) -> np.ndarray:
    """One input whose pixels all differ."""
    return np.arange(np.prod(spec.shape), dtype=np.float32).reshape(1, *spec.shape)


def test_patches_lie_row_by_row():
    spec = images((4, 6), patch=(2, 3), channels=1, norm=((0.0,), (1.0,)))
    assert (spec.grid, spec.num_patches, spec.patch_values) == ((2, 2), 4, 6)
    patches = spec.to_patches(numbered(spec))
    assert patches[0, 1].tolist() == [3, 4, 5, 9, 10, 11]
    assert patches[0, 2].tolist() == [12, 13, 14, 18, 19, 20]


def test_frames_of_one_place_follow_each_other():
    """The order of TimeSformer: index = place * frames + frame."""
    spec = InputSpec(4, 6, 1, (2, 3), frames=3, norm=((0.0,), (1.0,)))
    assert (spec.shape, spec.grid, spec.num_patches) == ((3, 4, 6, 1), (3, 2, 2), 12)
    patches = spec.to_patches(numbered(spec))
    place, frame = 2, 1  # below the first, second frame: 24 pixels a frame
    assert patches[0, place * 3 + frame].tolist() == [36, 37, 38, 42, 43, 44]
    grid = spec.on_grid(np.arange(12))
    assert grid.shape == (3, 2, 2)
    assert grid[frame, 1, 0] == place * 3 + frame


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 225}, "16 x 16 px do not divide 225 x 224"),
        ({"patch": (0, 16)}, "must be positive"),
        ({"frames": 0}, "must be positive"),
        ({"channels": 1}, "per channel"),
    ],
)
def test_sizes_that_make_no_input(changes, words):
    with pytest.raises(ValueError, match=words):
        InputSpec(**changes)


def test_wrong_inputs_and_values_are_named():
    spec = images(32, 8)
    with pytest.raises(ValueError, match=r"must be \[B, 32, 32, 3\], got \[2, 32, 24, 3"):
        spec.to_patches(np.zeros((2, 32, 24, 3)))
    # Of two images with 8 values each, one with 16 must not become.
    with pytest.raises(ValueError, match="16 values, one per patch"):
        spec.on_grid(np.zeros((2, 8)))


@pytest.mark.parametrize(
    ("sizes", "shape", "patches"),
    [
        ({"image_size": (224, 320)}, (224, 320, 3), 14 * 20),
        ({"image_size": 224, "patch_size": 14}, (224, 224, 3), 256),
        ({"patch_size": (32, 16)}, (224, 224, 3), 98),
        ({"channels": 1}, (224, 224, 1), 196),
        ({"channels": 4, "image_size": 64}, (64, 64, 4), 16),
    ],
)
@pytest.mark.parametrize("name", ["deit_3_blocks", "cait_3_blocks"])
def test_any_variant_at_any_size(name, sizes, shape, patches):
    module = create_module(name, **sizes)
    assert (module.input_spec.shape, module.input_spec.num_patches) == (shape, patches)
    variables = jax.eval_shape(lambda: init_variables(module))
    inputs = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    logits, out = jax.eval_shape(module.apply, variables, inputs)
    assert logits.shape == (2, 1000)
    assert [scores.shape for scores in out.scores] == [(2, patches)] * 3
    linear = count_flops(module).linear - count_flops(name).linear
    assert (linear > 0) == (patches > 196 or (shape[-1] > 3 and patches == 196))


def test_a_grey_model_runs_and_its_norm_is_the_mean():
    module, variables = create_model("vit_micro", image_size=(16, 32), channels=1)
    assert module.input_spec.norm == ((0.5,), (0.5,))
    logits, out = module.apply(variables, jnp.zeros((2, 16, 32, 1)))
    assert (logits.shape, out.keep[0].shape) == ((2, 10), (2, 8))
    means, _ = resized(VARIANTS["deit_s"].backbone.input_spec, channels=1).norm
    assert means == pytest.approx([np.mean(IMAGENET_NORM[0])])


def test_sizes_that_do_not_fit_are_one_sentence():
    with pytest.raises(UsageError, match="16 x 16 px do not divide 230 x 230"):
        create_model("deit_ti", image_size=230)


def test_a_crop_that_is_not_square_covers_and_is_centred():
    gradient = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    image = Image.fromarray(np.ascontiguousarray(gradient))
    pixels = eval_transform(image, (50, 60), 1.0)  # becomes 50 x 100, then the middle 60
    assert pixels.shape == (50, 60, 3)
    np.testing.assert_allclose(pixels[25, :, 0], 41 + 2 * np.arange(60), atol=2)
    assert random_resized_crop(image, (8, 24), np.random.default_rng(0)).shape == (8, 24, 3)


def test_grey_is_pillows():
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    grey = np.asarray(Image.fromarray(rgb).convert("L"))
    np.testing.assert_array_equal(with_channels(rgb, 1)[..., 0], grey)
    with pytest.raises(UsageError, match="model takes 4"):
        with_channels(rgb, 4)


def test_datasets_make_what_the_model_takes():
    spec = images((32, 48), 8, channels=1, norm=((0.5,), (0.5,)))
    dataset = open_dataset("cluttered_mnist", DataRequest(spec))
    assert dataset.train_example(0, 0)["input"].shape == spec.shape
    pixels, _, masks = dataset.load("test", 2, 0)
    assert (pixels.shape, masks.shape) == ((2, 32, 48, 1), (2, 32, 48))
    folder = open_dataset("folder", DataRequest(spec, path="small"))
    assert folder.train_example(0, 0)["input"].shape == spec.shape
    assert folder.load("val", 2, 0)[0][:2].shape == (2, *spec.shape)
    clips = InputSpec(32, 32, patch=(8, 8), frames=4)
    with pytest.raises(UsageError, match="the model takes clips"):
        open_dataset("cluttered_mnist", DataRequest(clips))
