"""Moving MNIST: exact motion and masks, nothing to see in one frame, the whole way through."""

import json

import jax
import numpy as np
import pytest
from conftest import StopAfter, load_config

import iared2_jax
from iared2_jax import main
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
    assert frames.shape == (6, 8, 64, 64, 3)
    other = moving_mnist.example("train", 0, 5)["frames"]
    assert not np.array_equal(other, frames[5])


def test_the_mask_moves_the_way_the_class_says():
    """From frame to frame the mask is rolled, 2 to 4 px along its direction (y is down)."""
    seen = set()
    for index in range(40):
        clip = moving_mnist.clip("test", 3, index)
        seen.add(clip.label)
        angle = np.arctan2(*_drift(clip.masks))
        turns = angle / (2 * np.pi) * 8
        assert round(turns) % 8 == clip.label, moving_mnist.CLASS_NAMES[clip.label]
        assert 1.9 < np.hypot(*_drift(clip.masks)) < 4.1
    assert seen == set(range(8))


def _drift(masks):
    """The mean move of a mask between frames (down, right), on the torus."""
    first, last = masks[0], masks[-1]
    best = max(
        ((down, right) for down in range(-30, 31) for right in range(-30, 31)),
        key=lambda shift: (np.roll(first, shift, (0, 1)) & last).sum(),
    )
    assert np.array_equal(np.roll(first, best, (0, 1)), last)
    return np.array(best) / (len(masks) - 1)


def test_the_ink_is_in_the_mask_and_the_clutter_stands_still():
    for index in range(10):
        clip = moving_mnist.clip("validation", 1, index)
        background = clip.frames[..., 0].min(axis=0)  # what is there in every frame
        moving = clip.frames[..., 0] > np.maximum(background, cluttered_mnist.INK)
        assert (clip.masks | ~moving).all()
        assert clip.masks.any(axis=(1, 2)).all()


class Rigged(np.random.Generator):
    """The generator of a clip, whose first draw is the class that we want."""

    wanted = None

    def integers(self, *args, **options):
        value = super().integers(*args, **options)
        if self.wanted is not None:
            value, self.wanted = self.wanted, None
        return value


def test_one_frame_says_nothing_of_the_class(monkeypatch):
    """Whatever the direction, the first frame is the same; the digit's place in it is uniform."""
    real, shown, places = np.random.default_rng, [], []
    for label in range(8):

        def rigged(seed, label=label):
            rng = Rigged(real(seed).bit_generator)
            rng.wanted = label
            return rng

        with monkeypatch.context() as patch:
            patch.setattr(moving_mnist.np.random, "default_rng", rigged)
            clip = moving_mnist.clip("test", 0, 7)
        assert clip.label == label
        shown.append(clip.frames[0])
        places.append(clip.masks[-1])
    for frame in shown[1:]:
        np.testing.assert_array_equal(frame, shown[0])
    assert len({place.tobytes() for place in places}) == 8


def test_the_dataset_gives_what_the_model_takes():
    spec = clips((32, 48), frames=5, patch=8, channels=1, norm=((0.5,), (0.5,)))
    dataset = open_dataset("moving_mnist", DataRequest(spec))
    assert dataset.train_example(0, 3)["input"].shape == spec.shape
    pixels, labels, masks = dataset.load("test", 2, 0)
    assert (pixels.shape[1:], masks.shape) == (spec.shape, (2, 5, 32, 48))
    assert pixels.dtype == np.uint8
    assert labels.dtype == np.int32
    with pytest.raises(UsageError, match="has clips, but the model takes images"):
        open_dataset("moving_mnist", DataRequest(images(64)))
    with pytest.raises(UsageError, match="has images, but the model takes clips"):
        open_dataset("cluttered_mnist", DataRequest(spec))
    with pytest.raises(UsageError, match=r"config\.data\.eval_size"):
        dataset.load("test", 0, 0)


# -- The same training loop, executions and report as for images.


@pytest.fixture
def video_config():
    """Two steps of both phases on clips of two frames, from random weights."""
    config = load_config("timesformer_micro", "runlocal")
    config.curriculum, config.weights = "iared2", "scratch"
    config.model.groups, config.model.num_frames = 1, 2
    config.reduction.train_execution = "gathered"
    for section in (config.interpreter, config.backbone):
        section.batch_size, section.epochs, section.steps = 8, 0.0, 2
    return config


def test_a_video_run_that_was_stopped_goes_on_bitwise(video_config, tmp_path):
    video_config.checkpoint_every = 1
    whole = train(video_config, tmp_path / "whole")
    stopped = train(video_config, tmp_path / "stopped", StopAfter(1))
    assert int(stopped.step) == 1  # in the middle of the interpreter's phase
    again = train(video_config, tmp_path / "stopped")
    assert int(again.step) == int(whole.step) == 4
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


def test_training_evaluation_and_report(tmp_path):
    arguments = [
        "--config=configs/timesformer_micro.py:runlocal",
        f"--workdir={tmp_path}",
        "--config.curriculum=interpreters",
        "--config.weights=scratch",
        "--config.model.groups=1",
        "--config.model.num_frames=2",
        "--config.interpreter.epochs=0",
        "--config.interpreter.steps=2",
        "--config.interpreter.batch_size=8",
        "--config.eval.speed_batch=0",
    ]
    assert main.run(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["examples"] == 16
    assert {"group_1", "raw_attention_block_1", "random"} <= results["segmentation"].keys()
    assert (tmp_path / "figures" / "heatmaps.png").stat().st_size > 5_000
    module, variables = iared2_jax.load_model(tmp_path / "weights.safetensors")
    assert module.input_spec == clips(64, frames=2)
    heatmaps = iared2_jax.explain(
        module, variables, moving_mnist.load("test", 2, frames=2)[0], group=1
    )
    assert heatmaps.shape == (2, 2, 64, 64)


def test_what_does_not_fit_is_refused_before_it_compiles(video_config):
    video_config.model.name, video_config.model.num_frames = "vit_micro", 4
    with pytest.raises(UsageError, match="num_frames=4 is for models of clips"):
        validate(video_config, 1)
    video_config.model.num_frames = 0
    validate(video_config, 1)
    with pytest.raises(UsageError, match="has clips, but the model takes images"):
        check_data(video_config)
