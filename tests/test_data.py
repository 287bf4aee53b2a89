"""Cluttered MNIST and the pipeline: deterministic, disjoint, complete."""

import numpy as np
import pytest

from iared2_jax.data import cluttered_mnist
from iared2_jax.data.datasets import open_dataset
from iared2_jax.data.image_files import resized
from iared2_jax.data.pipeline import eval_batches, train_batches
from iared2_jax.data.request import DataRequest
from iared2_jax.models import input_spec


def test_splits_share_no_digit():
    digits = {split: cluttered_mnist.digits(split) for split in cluttered_mnist.SPLITS}
    assert {split: len(images) for split, (images, _) in digits.items()} == {
        "train": 4000,
        "validation": 500,
        "test": 500,
    }
    # Some MNIST digits are pixel-equal twins by nature; across splits there must be none.
    seen: dict[bytes, str] = {}
    for split, (images, labels) in digits.items():
        assert np.bincount(labels).tolist() == [len(labels) // 10] * 10
        for image in images:
            assert seen.setdefault(image.tobytes(), split) == split


def test_scenes_are_a_pure_function_of_seed_split_and_index():
    images, labels, masks = cluttered_mnist.load("test", size=12, seed=3)
    again = cluttered_mnist.scene("test", 3, 7)  # alone, out of order
    np.testing.assert_array_equal(images[7], again.image)
    np.testing.assert_array_equal(masks[7], again.mask)
    assert labels[7] == again.label
    other, _, _ = cluttered_mnist.load("test", size=12, seed=4)
    assert not np.array_equal(images, other)
    example = cluttered_mnist.example("test", 3, 7)
    np.testing.assert_array_equal(example["image"], again.image)


def test_scenes_look_as_specified():
    images, labels, masks = cluttered_mnist.load("test", size=300, seed=0)
    assert images.shape == (300, 64, 64, 3)
    assert images.dtype == np.uint8
    assert masks.shape == (300, 64, 64)
    assert masks.dtype == bool
    assert set(labels) == set(range(10))
    assert 0.12 <= masks.mean() <= 0.20
    ink = images[..., 0] > cluttered_mnist.INK
    # The mask holds the digit; clutter is ink outside of it, in every scene.
    assert ((ink & ~masks).sum(axis=(1, 2)) > 0).all()
    rows = masks.any(axis=2).sum(axis=1)  # height of a digit, dilated on both sides
    assert rows.max() <= cluttered_mnist.DIGIT_SIZE[1] + 2 * 3


def test_masks_are_the_digits_ink_dilated_by_3_px():
    _, digit, _ = cluttered_mnist._compose("test", 0, 0)
    mask = cluttered_mnist.scene("test", 0, 0).mask
    rows, columns = np.nonzero(digit > cluttered_mnist.INK)
    y, x = np.mgrid[:64, :64]
    nearest = np.min(
        (y[..., None] - rows) ** 2 + (x[..., None] - columns) ** 2, axis=-1
    )  # squared distance to the nearest ink
    np.testing.assert_array_equal(mask, nearest <= 9)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="validation"):
        cluttered_mnist.load("val", 1)
    with pytest.raises(ValueError, match="size"):
        cluttered_mnist.load("test", 0)


def test_training_batches_depend_only_on_their_place():
    source = open_dataset("cluttered_mnist", DataRequest(input_spec.images(64, 8)))
    run = iter(train_batches(source, 4, first_example=0, seed=5, threads=2))
    batches = [next(run) for _ in range(3)]
    resumed = next(iter(train_batches(source, 4, first_example=8, seed=5)))
    np.testing.assert_array_equal(resumed["input"], batches[2]["input"])
    np.testing.assert_array_equal(resumed["label"], batches[2]["label"])
    # Another batch size reads the same stream.
    wide = next(iter(train_batches(source, 12, first_example=0, seed=5)))
    np.testing.assert_array_equal(wide["input"], np.concatenate([b["input"] for b in batches]))


def test_images_are_resized_to_the_model():
    source = open_dataset("cluttered_mnist", DataRequest(input_spec.images(224)))
    batch = next(iter(train_batches(source, 2, 0, seed=0)))
    assert batch["input"].shape == (2, 224, 224, 3)
    pixels, _, masks = source.load("test", 3, 0)
    assert pixels.shape == (3, 224, 224, 3)
    assert masks.shape == (3, 224, 224)
    image = open_dataset("cluttered_mnist", DataRequest(input_spec.images(64, 8))).train_example(
        0, 0
    )["input"]
    assert resized(image, (64, 64)) is image


def test_every_evaluation_example_counts_once():
    values = np.arange(13)
    batches = list(eval_batches({"value": values}, batch_size=5))
    assert [len(batch["value"]) for batch in batches] == [5, 5, 5]
    counted = np.concatenate([batch["value"][batch["counted"]] for batch in batches])
    np.testing.assert_array_equal(counted, values)


def test_normalize():
    pixels = np.array([[[[0, 255, 51]]]], np.uint8)
    result = input_spec.normalize(pixels, ((0.5, 0.5, 0.1), (0.5, 0.25, 0.1)))
    np.testing.assert_allclose(result[0, 0, 0], [-1, 2, 1], rtol=1e-6)
