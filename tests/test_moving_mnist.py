"""Moving MNIST: exact motion and masks, nothing to see in one frame, the whole way through."""

import jax
import numpy as np
import pytest
from conftest import StopAfter

from iared2_jax.config.checks import validate
from iared2_jax.data import cluttered_mnist, moving_mnist
from iared2_jax.data.datasets import open_dataset
from iared2_jax.data.request import DataRequest
from iared2_jax.errors import UsageError
from iared2_jax.experiment.build import check_data
from iared2_jax.experiment.run import train
from iared2_jax.models.input_spec import clips, images


def test_a_clip_is_a_pure_function_of_its_place():
    frames, labels, masks = moving_mnist.load("test", 6)
    again = moving_mnist.clip("test", 0, 5)
    np.testing.assert_array_equal(frames[5], again.frames)
    np.testing.assert_array_equal(masks[5], again.masks)
    assert labels[5] == again.label
    assert frames.shape == (6, 4, 64, 80, 3)
    other = moving_mnist.example("train", 0, 5)["frames"]
    assert not np.array_equal(other, frames[5])


def test_the_mask_moves_the_way_the_class_says():
    """From frame to frame the whole mask moves 6 to 10 px along its direction (y is down)."""
    seen = set()
    for index in range(80):
        clip = moving_mnist.clip("test", 3, index)
        areas = clip.masks.sum(axis=(1, 2))
        whole = np.flatnonzero(areas == areas.max())  # frames in which nothing of it is outside
        if len(whole) < 2:
            continue
        first, last = clip.masks[whole[0]], clip.masks[whole[-1]]
        move = np.round(_middle(last) - _middle(first)).astype(int)
        np.testing.assert_array_equal(np.roll(first, move, (0, 1)), last)
        drift = move / (whole[-1] - whole[0])
        assert 5 < np.hypot(*drift) < 11  # whole pixels, so not quite the speed
        turns = np.arctan2(*drift) / (2 * np.pi) * 8
        assert round(turns) % 8 == clip.label, moving_mnist.CLASS_NAMES[clip.label]
        seen.add(clip.label)
    assert seen == set(range(8))


def _middle(mask):
    return np.argwhere(mask).mean(axis=0)


def test_the_ink_is_in_the_mask_and_the_clutter_stands_still():
    for index in range(10):
        clip = moving_mnist.clip("validation", 1, index)
        background = clip.frames[..., 0].min(axis=0)  # what is there in every frame
        moving = clip.frames[..., 0] > np.maximum(background, cluttered_mnist.INK)
        assert (clip.masks | ~moving).all()


def test_one_frame_cannot_tell_the_class():
    """All that is in one frame is the digit's place: who knew it exactly would be right in 32%."""
    rng = np.random.default_rng(0)
    angles = 2 * np.pi * np.arange(8) / 8
    steps = np.stack([np.sin(angles), np.cos(angles)], axis=1) * 1.5  # from the middle to the end
    label, speed = rng.integers(8, size=20_000), rng.uniform(*moving_mnist.SPEED, size=(20_000, 1))
    place = rng.normal(0, moving_mnist.SPREAD, size=(20_000, 2)) + speed * steps[label]
    # How likely each direction makes that place, over all speeds that it may have had.
    speeds = np.linspace(*moving_mnist.SPEED, 21)
    off = place[:, None, None] - steps[:, None] * speeds[:, None]
    likelihood = np.exp(-(off**2).sum(-1) / (2 * moving_mnist.SPREAD**2)).mean(axis=-1)
    assert 0.30 < (likelihood.argmax(axis=1) == label).mean() < 0.35


def test_the_middle_of_the_clip_says_nothing_at_all():
    """Halfway, the digit's place does not depend on the direction."""
    clips = [moving_mnist.clip("train", 0, index, frames=1) for index in range(400)]
    off = np.array([_middle(clip.masks[0]) for clip in clips if clip.masks.any()])
    off -= np.array(moving_mnist.SIZE) / 2
    labels = np.array([clip.label for clip in clips if clip.masks.any()])
    for label in range(8):
        assert (np.abs(off[labels == label].mean(axis=0)) < 6).all()  # 12 px / sqrt(50), 3.5 times
    assert (np.abs(off.std(axis=0) - moving_mnist.SPREAD) < 2).all()


def test_the_dataset_gives_what_the_model_takes():
    spec = clips((32, 48), frames=5, patch=8, channels=1, norm=((0.5,), (0.5,)))
    dataset = open_dataset("moving_mnist", DataRequest(spec))
    assert dataset.train_example(0, 3)["input"].shape == spec.shape
    pixels, labels, masks = dataset.load("test", 2, 0)
    assert (pixels.shape[1:], masks.shape) == (spec.shape, (2, 5, 32, 48))
    assert pixels.dtype == np.uint8
    assert labels.dtype == np.int32
    assert dataset.load_crops("test", 2, 0).shape == (2, 3, *spec.shape)
    with pytest.raises(UsageError, match="has clips, but the model takes images"):
        open_dataset("moving_mnist", DataRequest(images(64)))
    with pytest.raises(UsageError, match="has images, but the model takes clips"):
        open_dataset("cluttered_mnist", DataRequest(spec))
    with pytest.raises(UsageError, match=r"config\.data\.eval_size"):
        dataset.load("test", 0, 0)


def test_crops_of_a_clip_see_all_of_it():
    """Left, centre and right; the centre is what `load` gives, with its mask."""
    spec = clips(64, frames=4)
    dataset = open_dataset("moving_mnist", DataRequest(spec))
    whole, _, masks = moving_mnist.load("test", 3)
    crops = dataset.load_crops("test", 3, 0)
    for view, left in enumerate((0, 8, 16)):
        np.testing.assert_array_equal(crops[:, view], whole[..., left : left + 64, :])
    pixels, _, cropped = dataset.load("test", 3, 0)
    np.testing.assert_array_equal(pixels, crops[:, 1])
    np.testing.assert_array_equal(cropped, masks[..., 8:72])
    random = open_dataset("moving_mnist", DataRequest(spec, clip_view="random"))
    seen, _, seen_masks = random.load("test", 3, 0)
    for row in range(3):
        left = next(x for x in range(17) if (whole[row, ..., x : x + 64, :] == seen[row]).all())
        np.testing.assert_array_equal(seen_masks[row], masks[row, ..., left : left + 64])
    np.testing.assert_array_equal(seen, random.load("test", 3, 0)[0])


# -- The same training loop as for images (the report: tests/test_baselines.py).


@pytest.fixture
def video_config(clip_config):
    """A few steps of one interpreter."""
    config = clip_config
    config.curriculum = "interpreters"
    config.interpreter.batch_size, config.interpreter.epochs = 8, 0.0
    config.interpreter.steps = 3
    return config


@pytest.mark.slow
def test_a_video_run_that_was_stopped_goes_on_bitwise(video_config, tmp_path):
    video_config.checkpoint_every = 1
    whole = train(video_config, tmp_path / "whole")
    stopped = train(video_config, tmp_path / "stopped", StopAfter(1))
    assert int(stopped.step) == 1  # in the middle of the phase
    again = train(video_config, tmp_path / "stopped")
    assert int(again.step) == int(whole.step) == 3
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


def test_what_does_not_fit_is_refused_before_it_compiles(video_config):
    video_config.model.name, video_config.model.num_frames = "vit_micro", 4
    with pytest.raises(UsageError, match="num_frames=4 is for models of clips"):
        validate(video_config, 1)
    video_config.model.num_frames = 0
    validate(video_config, 1)
    with pytest.raises(UsageError, match="has clips, but the model takes images"):
        check_data(video_config)
