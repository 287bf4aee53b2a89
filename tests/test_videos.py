"""Video files in the true formats, from the list to the trained model; bad ones in words."""

import json
import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

import iared2_jax
from iared2_jax import main
from iared2_jax.data import moving_mnist, small
from iared2_jax.data.augment import CROP_FLIP, DEIT
from iared2_jax.data.datasets import open_dataset
from iared2_jax.data.request import DataRequest
from iared2_jax.data.video_files import VideoFiles, read_list
from iared2_jax.data.videos import (
    BadVideo,
    ClipSampling,
    centre_crop,
    crop_boxes,
    read_clip,
    read_video,
    spatial_crops,
    train_crop,
)
from iared2_jax.errors import DataError, UsageError
from iared2_jax.models.input_spec import clips, images

av = pytest.importorskip("av", reason="no PyAV: pip install 'iared2_jax[video]'")

SPEC = clips(64, frames=4, crop_pct=0.875)


def level(frame: int) -> int:
    """The grey of a frame: it tells its number, and survives compression."""
    return 20 + 3 * frame


def write_video(path, frames=40, fps=Fraction(30), size=(64, 80), times=None, top=None):
    """Frame i is all `level(i)`; `top`: the grey of the upper half, to see rotation."""
    height, width = size
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "10", "g": "12"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            pixels = np.full((height, width, 3), level(i), np.uint8)
            if top is not None:
                pixels[: height // 2] = top
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path):
    """Silence, and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = np.zeros((1, 4096), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def rotated(path, target, degrees=90):
    """The same file whose header says that it is to be turned (the matrix in `tkhd`)."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: the matrix is 40 bytes into the box
    one = 1 << 16
    matrix = {90: (0, one, 0, -one, 0, 0, 0, 0, 1 << 30)}[degrees]
    content[at : at + 36] = struct.pack(">9i", *matrix)
    target.write_bytes(content)
    return target


def shown(path, sampling, position=0.0):
    """Which frames a clip is made of, by their grey."""
    frames = read_clip(path, lambda times: sampling.indices(times, position))
    greys = np.array([np.asarray(frame).mean() for frame in frames])
    return np.rint((greys - level(0)) / 3).astype(int).tolist()


# -- Sampling.


@pytest.mark.parametrize("fps", [Fraction(30), Fraction(24000, 1001), Fraction(25)])
@pytest.mark.parametrize(("rate", "position"), [(2, 0.0), (3, 1.0), (1, 0.37), (30, 0.0)])
def test_the_frames_are_timesformers(tmp_path, fps, rate, position):
    """Their formula, in numbers of frames: linspace from start to start + span - 1, truncated."""
    path, count, frames = write_video(tmp_path / "v.mp4", fps=fps), 40, 8
    span = rate * frames / 30 * float(fps)
    start = max(count - span, 0) * position
    wanted = np.clip(np.linspace(start, start + span - 1, frames) + 1e-4, 0, count - 1)
    assert shown(path, ClipSampling(frames, rate), position) == wanted.astype(int).tolist()


def test_a_variable_rate_is_sampled_by_time(tmp_path):
    """Ten frames in the first second, thirty in the next: evenly spread in time, not in number."""
    times = [100 * i for i in range(10)] + [1000 + 33 * i for i in range(30)]
    path = write_video(tmp_path / "vfr.mp4", times=times)
    found = shown(path, ClipSampling(4, 15))  # 2 s, four frames
    at = np.linspace(0, 2000 - 33, 4)
    assert found == [max(i for i, t in enumerate(times) if t <= x + 1) for x in at]
    assert found[1] < 10 < found[2]


def test_a_short_video_repeats_its_last_frame(tmp_path):
    path = write_video(tmp_path / "short.mp4", frames=3)
    assert shown(path, ClipSampling(8, 2)) == [0, 2, 2, 2, 2, 2, 2, 2]  # of 16 frames


def test_rotation_of_the_header_is_applied(tmp_path):
    """A phone's video: what its header turns by 90 degrees is upright for us as for a player."""
    plain = write_video(tmp_path / "plain.mp4", frames=2, size=(64, 96), top=200)
    turned = rotated(plain, tmp_path / "turned.mp4")
    (upright,) = read_clip(turned, lambda times: np.array([0]))
    assert upright.size == (64, 96)  # width, height
    # Turned clockwise, the upper half comes to lie on the right.
    pixels = np.asarray(upright)
    assert pixels[:, 40:].mean() > 180 > 60 > pixels[:, :24].mean()


# -- Crops.


def test_crops():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (37, 61, 3), np.uint8)
    frames = [Image.fromarray(pixels)] * 3
    centre = centre_crop(frames, (32, 32), 0.875, "v")
    assert centre.shape == (3, 32, 32, 3)
    for seed in range(8):
        clip = train_crop(frames, (32, 48), np.random.default_rng(seed), 0.5)
        assert clip.shape == (3, 32, 48, 3)
        np.testing.assert_array_equal(clip[0], clip[2])  # one crop for all frames
    same, other = (train_crop(frames, (32, 32), np.random.default_rng(0), f) for f in (0.0, 1.0))
    np.testing.assert_array_equal(same, other[:, :, ::-1])


def test_three_crops_see_the_whole_frame():
    """TimeSformer's: the shorter side is the crop's; left, centre (rounded up), right."""
    assert crop_boxes((224, 301), (224, 224), 3) == [(0, 0), (0, 39), (0, 77)]
    assert crop_boxes((301, 224), (224, 224), 3) == [(0, 0), (39, 0), (77, 0)]
    assert crop_boxes((224, 301), (224, 224), 1) == [(0, 39)]
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, :, 0] = 3 * np.arange(64)
    frames = [Image.fromarray(wide)] * 2
    crops = spatial_crops(frames, (32, 32))
    assert crops.shape == (3, 2, 32, 32, 3)
    for crop, left in zip(crops, (0, 16, 32), strict=True):
        np.testing.assert_array_equal(crop[1], wide[:, left : left + 32])
    high = spatial_crops([frame.rotate(-90, expand=True) for frame in frames], (32, 32))
    np.testing.assert_array_equal(high[0], np.rot90(crops[0], -1, (1, 2)))
    assert spatial_crops(frames, (16, 16)).shape == (3, 2, 16, 16, 3)


# -- Twenty videos, all the way.


@pytest.fixture(scope="module")
def kaleidoscope(tmp_path_factory):
    """Lists of 20 videos: odd sizes and rates, a turned, a short and a variable one."""
    root = tmp_path_factory.mktemp("videos")
    sizes = [(64, 80), (50, 98), (128, 66), (72, 72)]
    rates = [Fraction(30), Fraction(24000, 1001), Fraction(25)]
    for i in range(16):
        write_video(root / f"video {i}.mp4", 24, rates[i % 3], sizes[i % 4])
    rotated(root / "video 1.mp4", root / "turned.mp4")
    write_video(root / "short.mp4", frames=3)
    write_video(root / "variable.mp4", 20, times=[50 * i + 7 * i * i for i in range(20)])
    write_video(root / "plain.mkv", 24)
    names = [f"video {i}.mp4" for i in range(16)]
    names += ["turned.mp4", "short.mp4", "variable.mp4", "plain.mkv"]
    lines = [f"{name} {i % 3}" for i, name in enumerate(names)]
    (root / "train.csv").write_text("\n".join(lines[:14]) + "\n")
    (root / "val.csv").write_text("\n".join(lines[14:]))
    (root / "test.csv").write_text("\n".join(f"{n},{i % 3}" for i, n in enumerate(names)))
    (root / "classes.txt").write_text("running\nreading\nrowing\n")
    return root


def test_examples_are_pure_functions_of_their_place(kaleidoscope):
    request = DataRequest(SPEC, str(kaleidoscope), sampling_rate=2)
    first, again = (VideoFiles(request) for _ in range(2))
    for index in (0, 13, 14, 30):
        one, other = first.train_example(5, index), again.train_example(5, index)
        np.testing.assert_array_equal(one["input"], other["input"])
        assert one["label"] == other["label"]
        assert (one["input"].shape, one["input"].dtype) == (SPEC.shape, np.uint8)
    epoch = [int(first.train_example(5, i)["label"]) for i in range(14)]
    assert sorted(epoch) == sorted(i % 3 for i in range(14))  # each video once


@pytest.mark.slow
def test_from_the_list_to_the_explanation(kaleidoscope, tmp_path, caplog):
    """A truncated video and one of sound alone are in the training list, too, and are named."""
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "cut.mp4").write_bytes((kaleidoscope / "video 2.mp4").read_bytes()[:2000])
    write_sound(lists / "sound.mp4")
    for split in ("train", "val", "test"):
        lines = (kaleidoscope / f"{split}.csv").read_text().splitlines()
        (lists / f"{split}.csv").write_text("".join(f"{kaleidoscope}/{x}\n" for x in lines))
    with (lists / "train.csv").open("a") as training:
        training.write("cut.mp4 0\nsound.mp4 1\n")
    (lists / "classes.txt").write_text((kaleidoscope / "classes.txt").read_text())
    arguments = [
        "--config=configs/timesformer_micro.py:runlocal",
        f"--workdir={tmp_path}",
        "--config.data.name=videos",
        f"--config.data.path={lists}",
        "--config.data.bad_share=0.2",
        "--config.data.eval_split=test",
        "--config.data.eval_size=0",
        "--config.data.sampling_rate=2",
        "--config.model.num_classes=0",
        "--config.model.num_frames=4",
        "--config.model.patch_size=16,16",
        "--config.model.groups=1",
        "--config.curriculum=interpreters",
        "--config.weights=scratch",
        "--config.interpreter.epochs=0",
        "--config.interpreter.steps=2",
        "--config.interpreter.batch_size=8",
        "--config.eval.speed_batch=0",
    ]
    assert main.run(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["examples"] == 20  # every video counts
    assert results["unusable_training_examples"] == 2
    assert 0 <= results["iared2"]["video"]["top1"] <= 1  # of three crops each
    for name, why in (("cut.mp4", "is"), ("sound.mp4", "has no video in it, only sound")):
        assert f"training videos: another takes its place: {lists / name} {why}" in caplog.text
    assert (tmp_path / "figures" / "heatmaps.png").stat().st_size > 5_000
    module, variables = iared2_jax.load_model(tmp_path / "weights.safetensors")
    assert module.backbone.num_classes == 3
    dataset = open_dataset("videos", DataRequest(module.input_spec, str(kaleidoscope)))
    pixels, _, masks = dataset.load("val", 2, 0)
    assert masks is None
    heatmaps = iared2_jax.explain(module, variables, pixels[:], group=1)
    assert heatmaps.shape == (2, 4, 64, 64)
    # A file says the same as the clip that is read from it.
    path = kaleidoscope / dataset.open_split("val").files[0]
    clip = read_video(path, module.input_spec)
    np.testing.assert_array_equal(clip, pixels[0])
    of_file = iared2_jax.explain(module, variables, path, group=1)
    np.testing.assert_allclose(of_file[0], heatmaps[0], atol=1e-5)
    _explains_a_folder(tmp_path / "weights.safetensors", kaleidoscope, tmp_path / "shown", caplog)


def _explains_a_folder(weights, source, folder, caplog):
    """Beside every video its filmstrips and an animation; a damaged one is named, and left out."""
    folder.mkdir()
    for name in ("video 0.mp4", "turned.mp4"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "noise.mp4").write_bytes(b"no video at all")
    arguments = [
        "--config=configs/timesformer_micro.py:runlocal",
        "--config.mode=explain",
        f"--config.weights={weights}",
        f"--config.data.path={folder}",
        "--config.data.sampling_rate=2",
        "--config.explain.maps='rollout'",  # on the page; the others compile for longer
    ]
    assert main.run(arguments) == 0
    assert "left out" in caplog.text
    assert "noise.mp4 is damaged" in caplog.text
    for name in ("video 0.mp4", "turned.mp4"):
        with Image.open(folder / f"{name}.scores.gif") as animation:
            assert animation.n_frames == 4
            assert animation.size == (3 * 128, 128)  # input, scores, kept
        for ending in ("heatmap", "hierarchy"):
            with Image.open(folder / f"{name}.{ending}.png") as strip:
                assert strip.width > 4 * strip.height  # frames side by side, for every column
    (folder / "video 0.mp4").unlink()
    (folder / "turned.mp4").unlink()
    assert main.run(arguments) == 65
    (folder / "noise.mp4").unlink()
    assert main.run(arguments) == 2


def test_random_views_are_pure_functions_of_their_place(kaleidoscope):
    request = DataRequest(SPEC, str(kaleidoscope), sampling_rate=1, clip_view="random")
    seen = [VideoFiles(request).load("test", 6, seed)[0][:] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])
    crops = VideoFiles(request).load_crops("test", 6, 0)
    assert crops[1:3].shape == (2, 3, *SPEC.shape)


def test_the_small_videos_are_kinetics_in_small(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(small, "TRAIN", 2)
    monkeypatch.setattr(small, "VALIDATION", 2)
    spec = clips(64, frames=8)
    dataset = open_dataset("videos", DataRequest(spec, "small"))
    assert (dataset.num_classes, dataset.class_names[:2]) == (400, ("right", "down_right"))
    pixels, labels, _ = dataset.load("val", 0, 0)
    crops = dataset.load_crops("val", 0, 0)[:]
    for row in range(2):  # the frames are those that were written, but for the compression
        clip = moving_mnist.clip("test", 0, row, 8)
        assert labels[row] == clip.label
        assert pixels[row].shape == spec.shape
        error = np.abs(crops[row, 1].astype(int) - clip.frames[:, :, 8:72]).mean()
        assert error < 4


# -- Bad input, one line each.


def test_files_that_are_no_video(tmp_path):
    every = lambda times: np.arange(len(times))  # noqa: E731
    good = write_video(tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(good[: int(0.6 * len(good))])
    with pytest.raises(BadVideo, match=r"cut\.mp4 is (truncated|damaged)"):
        read_clip(tmp_path / "cut.mp4", every)
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(BadVideo, match=r"noise\.mp4 is damaged, or no video"):
        read_clip(tmp_path / "noise.mp4", every)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(BadVideo, match=r"empty\.mp4"):
        read_clip(tmp_path / "empty.mp4", every)
    with pytest.raises(BadVideo, match=r"nowhere\.mp4"):
        read_clip(tmp_path / "nowhere.mp4", every)
    write_sound(tmp_path / "sound.mp4")
    with pytest.raises(BadVideo, match=r"sound\.mp4 has no video in it, only sound"):
        read_clip(tmp_path / "sound.mp4", every)
    picture = Image.new("RGB", (16, 16))
    picture.save(tmp_path / "moving.gif", save_all=True, append_images=[picture])
    with pytest.raises(BadVideo, match=r"moving\.gif is a GIF"):
        read_clip(tmp_path / "moving.gif", every)


def test_without_pyav_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"pip install 'iared2_jax\[video\]'"):
        read_clip("v.mp4", lambda times: np.array([0]))


def test_lists_are_refused_in_words(tmp_path):
    with pytest.raises(UsageError, match=r"train\.csv cannot be read .*it lists the videos"):
        read_list(tmp_path, "train")
    with pytest.raises(UsageError, match=r"no split 'vall' \(did you mean 'val'\?\)"):
        read_list(tmp_path, "vall")
    (tmp_path / "train.csv").write_text("\n")
    with pytest.raises(UsageError, match="lists no videos"):
        read_list(tmp_path, "train")
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 minus\n")
    with pytest.raises(UsageError, match=r"line 2: 'b\.mp4 minus' is not `path label`"):
        read_list(tmp_path, "train")
    for name in ("one, two.mp4", "a b.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "train.csv").write_text("one, two.mp4 3\na b.mp4, 4\n")
    assert read_list(tmp_path, "train")[1:] == (("one, two.mp4", "a b.mp4"), (3, 4))
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 1\n")
    with pytest.raises(UsageError, match=r"2 videos that are not there, the first is a\.mp4"):
        read_list(tmp_path, "train")


def test_what_does_not_fit_is_refused(kaleidoscope, tmp_path):
    path = str(kaleidoscope)
    with pytest.raises(UsageError, match="has clips, but the model takes images"):
        open_dataset("videos", DataRequest(images(64), path))
    with pytest.raises(UsageError, match="rand_augment, erasing and repeats are for images"):
        VideoFiles(DataRequest(SPEC, path, augment=DEIT))
    write_video(tmp_path / "v.mp4", 3)
    (tmp_path / "train.csv").write_text("v.mp4 0\n")
    (tmp_path / "val.csv").write_text("v.mp4 7\n")
    files = VideoFiles(DataRequest(SPEC, str(tmp_path), augment=CROP_FLIP))
    with pytest.raises(UsageError, match=r"has the label 7 \(v\.mp4\), but there are classes 0"):
        files.open_split("val")


def test_bad_training_videos_are_replaced_and_counted(tmp_path, caplog):
    for i in range(4):
        write_video(tmp_path / f"{i}.mp4", 6)
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    (tmp_path / "train.csv").write_text("".join(f"{n}.mp4 0\n" for n in (0, 1, "bad", 2, 3)))
    files = VideoFiles(DataRequest(SPEC, str(tmp_path), bad_share=0.3))
    for index in range(5):
        assert files.train_example(0, index)["input"].shape == SPEC.shape
    assert "training videos: another takes its place" in caplog.text
    assert "bad.mp4 is damaged" in caplog.text
    strict = VideoFiles(DataRequest(SPEC, str(tmp_path), bad_share=0.0))
    with pytest.raises(DataError, match=r"1 training videos cannot be used"):
        [strict.train_example(0, index) for index in range(5)]
    (tmp_path / "val.csv").write_text("bad.mp4 0\n")
    pixels, _, _ = files.load("val", 0, 0)
    with pytest.raises(BadVideo, match=r"bad\.mp4 is damaged"):
        pixels[:]
