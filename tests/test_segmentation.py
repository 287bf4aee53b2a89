"""The segmentation protocol: what is counted, and the file of ImageNet-Segmentation."""

import json
import logging
import sys

import numpy as np
import pytest
from conftest import load_config
from PIL import Image
from scipy.io import savemat
from sklearn.metrics import average_precision_score

from iared2_jax import main
from iared2_jax.attribution.segmentation import (
    METRICS,
    THRESHOLDS,
    MapCounts,
    concatenate,
    foreground,
    measure,
    normalised,
    score_segmentation,
    summarise,
)
from iared2_jax.config.checks import validate
from iared2_jax.data import imagenet_segmentation, small
from iared2_jax.data.cluttered_mnist import scene
from iared2_jax.data.datasets import OPENERS
from iared2_jax.data.imagenet_segmentation import FILE, SegmentationFile
from iared2_jax.data.request import DataRequest
from iared2_jax.errors import DataError, UsageError
from iared2_jax.models.input_spec import InputSpec, images

h5py = pytest.importorskip("h5py")


def maps_and_masks(count, size=(12, 10), seed=0):
    """Noisy maps that are higher on the masks, of 10 to 50% foreground."""
    rng = np.random.default_rng(seed)
    shares = rng.uniform(0.1, 0.5, (count, *(1 for _ in size)))
    masks = rng.random((count, *size)) < shares
    return (rng.normal(size=masks.shape) + masks).astype(np.float32), masks


def one(heatmap, mask):
    """The counts of a map given as lists."""
    return measure(np.array([heatmap], float), np.array([mask], bool))


# -- Maps.


def test_a_map_that_tells_nothing_is_zero():
    maps = np.array([[[2.0, 4.0, 3.0]], [[7.0] * 3], [[0.0, np.nan, 1.0]], [[0.0, np.inf, 1.0]]])
    np.testing.assert_array_equal(normalised(maps)[0], [[0, 1, 0.5]])
    assert not normalised(maps)[1:].any()
    assert not foreground(maps)[1:].any()
    assert normalised(maps.astype(np.float32)).dtype == np.float32
    huge = np.array([[-3e38, 3e38]], np.float32)  # whose span overflows
    assert not normalised(huge).any()


def test_confusions_by_hand():
    # Normalised: 0, .25, .5, 1; mean .4375.
    counts = one([[1, 2], [3, 5]], [[0, 1], [0, 1]])
    np.testing.assert_array_equal(counts.confusion, [[[1, 1], [1, 1]]])
    at = dict(zip(THRESHOLDS.tolist(), counts.sweep[0].tolist(), strict=True))
    assert at[0.0] == [[1, 1], [0, 2]]  # strictly above
    assert at[0.24] == [[1, 1], [0, 2]]
    assert at[0.25] == [[1, 1], [1, 1]]
    assert at[0.5] == at[0.99] == [[2, 0], [1, 1]]


def test_measuring_counts_what_foreground_and_the_scores_do():
    maps, masks = maps_and_masks(5)
    counts = measure(maps, masks)
    scaled = normalised(maps)
    for row in range(5):
        for threshold, confusion in zip(THRESHOLDS, counts.sweep[row], strict=True):
            predicted = scaled[row] > threshold
            expected = np.zeros((2, 2))
            np.add.at(expected, (masks[row].astype(int), predicted.astype(int)), 1)
            np.testing.assert_array_equal(confusion, expected)
    found = summarise(counts, bootstrap=0)
    scores = score_segmentation(foreground(maps), masks)
    assert {key: found[key] for key in scores._fields} == pytest.approx(scores._asdict())
    assert found["predicted_share"] == pytest.approx(foreground(maps).mean())
    best = [score_segmentation(scaled > t, masks).mean_iou for t in THRESHOLDS]
    assert found["best_iou"] == pytest.approx(max(best))
    assert found["best_threshold"] == THRESHOLDS[np.argmax(best)]


def test_average_precision_by_hand():
    # 1 is background for sure, and foreground for sure: right, right. Then background at .75:
    # wrong; foreground at .25: right.
    assert one([0, 0.25, 1], [0, 1, 1]).average_precision[0] == pytest.approx(2 / 3 + 3 / 4 / 3)
    assert one([0, 0.25, 1], [0, 0, 1]).average_precision[0] == 1


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_the_published_one(ties):
    maps, masks = maps_and_masks(4)
    maps = np.round(maps) if ties else maps
    for found, h, mask in zip(
        measure(maps, masks).average_precision, normalised(maps), masks, strict=True
    ):
        both = np.stack([1 - h.ravel(), h.ravel()]), np.stack([~mask.ravel(), mask.ravel()])
        assert found == average_precision_score(both[1].ravel(), both[0].ravel())


def test_maps_and_images_without_foreground_have_an_average_precision():
    masks = np.array([[[True, False, False]]] * 2 + [[[False] * 3]])
    maps = np.array([[[1.0, 1.0, 1.0]], [[0.0, np.nan, 1.0]], [[0.0, 0.5, 1.0]]])
    counts = measure(maps, masks)
    # As published: a map that tells nothing ranks nothing.
    np.testing.assert_allclose(counts.average_precision[:2], 0.5)
    assert counts.confusion[:2].tolist() == [[[2, 0], [1, 0]]] * 2
    # Ranked: (1: right, wrong), (.5: right, wrong), (0: right, wrong).
    assert counts.average_precision[2] == pytest.approx(0.5)
    assert counts.confusion[2].tolist() == [[2, 1], [0, 0]]


def test_clips_are_measured_as_they_are():
    maps, masks = maps_and_masks(2, (3, 4, 5))
    flat = measure(maps.reshape(2, 12, 5), masks.reshape(2, 12, 5))
    for mine, other in zip(measure(maps, masks), flat, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_maps_of_another_size_are_refused():
    maps, masks = maps_and_masks(2)
    with pytest.raises(ValueError, match=r"\[2, 12, 9\].*\[2, 12, 10\].*to_heatmaps"):
        measure(maps[:, :, :9], masks)
    with pytest.raises(ValueError, match=r"\[1, 12, 10\].*\[2, 12, 10\]"):
        measure(maps[:1], masks)


# -- Over a set.


def test_batches_make_the_whole():
    maps, masks = maps_and_masks(7)
    parts = [measure(maps[i : i + 3], masks[i : i + 3]) for i in (0, 3, 6)]
    for mine, whole in zip(concatenate(parts), measure(maps, masks), strict=True):
        np.testing.assert_array_equal(mine, whole)


def repeated(confusion, images=1):
    """Counts of images that are all alike, at every threshold."""
    confusion = np.tile(np.array(confusion), (images, 1, 1))
    sweep = np.repeat(confusion[:, None], len(THRESHOLDS), axis=1)
    return MapCounts(confusion, sweep, np.full(images, 0.5))


def in_percent(found, *keys):
    return [round(100 * found[key], 1) for key in keys]


def test_the_trivial_floors_of_the_papers_table():
    """At a foreground of 29.3%: all background 70.7 / 50 / 35.4, 30% at random 58.3 / 50 / 35.8."""
    nothing = summarise(repeated([[707, 0], [293, 0]]), bootstrap=0)
    table = ("pixel_accuracy", "mean_accuracy", "mean_iou")
    assert in_percent(nothing, *table, "chance_iou") == [70.7, 50.0, 35.4, 35.4]
    # A map that is right wherever it marks, and marks 30%: chance is that of 30%.
    oracle = summarise(repeated([[700, 7], [0, 293]]), bootstrap=0)
    assert in_percent(oracle, "predicted_share", "chance_iou") == [30.0, 35.8]
    chance = [[707 * 0.7, 707 * 0.3], [293 * 0.7, 293 * 0.3]]
    random = summarise(repeated(np.rint(1000 * np.array(chance)).astype(int)), bootstrap=0)
    assert in_percent(random, *table) == [58.3, 50.0, 35.8]
    assert random["chance_iou"] == pytest.approx(random["mean_iou"])


def test_a_random_map_scores_its_chance():
    rng = np.random.default_rng(0)
    masks = rng.random((60, 20, 20)) < 0.3
    found = summarise(measure(rng.random(masks.shape), masks), seed=1)
    low, high = found["interval"]["mean_iou"]
    assert low < found["chance_iou"] < high
    assert found["average_precision"] == pytest.approx(0.5, abs=0.02)


def test_the_interval_has_the_value_and_shrinks_with_more_images():
    maps, masks = maps_and_masks(400, (6, 6))
    widths = []
    for images_ in (25, 400):
        counts = measure(maps[:images_], masks[:images_])
        found = summarise(counts)
        assert found == summarise(counts, seed=0)
        assert found["interval"] != summarise(counts, seed=1)["interval"]
        assert set(found["interval"]) == set(METRICS)
        for key, (low, high) in found["interval"].items():
            assert 0 <= low <= found[key] <= high <= 1
        widths.append([high - low for low, high in found["interval"].values()])
    few, many = np.array(widths)
    assert (many < few / 2).all()  # 4 times, but for chance
    alike = summarise(repeated([[5, 1], [2, 2]], images=6))
    assert alike["interval"]["mean_iou"] == pytest.approx([alike["mean_iou"]] * 2)


def test_the_best_threshold_is_one_for_the_set():
    """Each image's own best would be a perfect mask; the set's is not."""
    maps = np.array([[0.0, 0.3, 1.0], [0.0, 0.6, 1.0]])
    masks = np.array([[False, True, True], [False, False, True]])
    found = summarise(measure(maps, masks), bootstrap=0)
    assert found["best_threshold"] == 0.0  # as good as .6, and lower
    assert found["best_iou"] == pytest.approx((3 / 4 + 2 / 3) / 2)


def test_a_binary_map_is_best_at_its_own_mask():
    maps = maps_and_masks(9)[0]
    binary, masks = (maps > 0.8).astype(np.float32), maps_and_masks(9)[1]
    found = summarise(measure(binary, masks), bootstrap=0)
    assert found["best_iou"] >= found["mean_iou"]
    assert found["best_threshold"] == 0.0
    assert found["best_iou"] == pytest.approx(score_segmentation(binary > 0, masks).mean_iou)


# -- The file.

SIZES = ((30, 40), (50, 20), (24, 24))  # height, width


def pictures(seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(*size, 3) for size in SIZES]
    shapes[2] = SIZES[2]  # grey
    made = [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]
    return made, [(rng.random(size) < 0.4).astype(np.uint8) for size in SIZES]


@pytest.fixture
def path(tmp_path):
    small.write_segmentation(tmp_path / FILE, *pictures())
    return tmp_path / FILE


def opened(path, spec=None):
    """Not `open_dataset`, which opens once per process: these files are rewritten."""
    return OPENERS["imagenet_segmentation"](DataRequest(spec or InputSpec(32, 48), path=str(path)))


def test_images_and_masks_are_read_back_right(path):
    file = SegmentationFile(path)
    assert len(file) == 3
    for index, (image, mask) in enumerate(zip(*pictures(), strict=True)):
        colour = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
        np.testing.assert_array_equal(file.image(index), colour)
        np.testing.assert_array_equal(file.mask(index), mask == 1)
    with h5py.File(path) as stored:  # as the true file has it
        image = stored[stored["/value/img"][0, 0]]
        assert (image.shape, image.dtype) == ((3, 40, 30), np.uint8)
        assert stored[stored[stored["/value/gt"][0, 0]][0, 0]].shape == (40, 30)
    assert path.read_bytes().startswith(b"MATLAB 7.3 MAT-file")


def test_they_are_resized_as_published(path):
    dataset = opened(path)
    dataset.open_split("all")
    pixels, labels, masks = dataset.load("all", 0, 0)
    assert labels is None
    assert (dataset.class_names, dataset.splits, dataset.epoch_size) == ((), ("all",), 3)
    for index, (image, mask) in enumerate(zip(*pictures(), strict=True)):
        colour = Image.fromarray(image).convert("RGB")
        expected = np.asarray(colour.resize((48, 32), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(pixels[index], expected)
        nearest = Image.fromarray(mask).resize((48, 32), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(masks[index], np.asarray(nearest) == 1)
    assert pixels[np.array([0, 2, 0])].shape == (3, 32, 48, 3)
    grey = opened(path, InputSpec(32, 48, channels=1, norm=((0.5,), (0.5,)))).load("all", 0, 0)[0]
    assert grey[:2].shape == (2, 32, 48, 1)


def test_a_part_is_spread_over_the_file(path):
    pixels, _, masks = opened(path).load("all", 2, 0)
    everything, _, all_masks = opened(path).load("all", 0, 0)
    assert len(pixels) == len(masks) == 2
    np.testing.assert_array_equal(pixels[:], everything[[0, 1]])
    np.testing.assert_array_equal(masks, all_masks[[0, 1]])


def test_the_small_file_has_scenes_and_their_masks(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dataset = opened("small", images(64, 8))
    pixels, _, masks = dataset.load("all", 0, 0)
    assert len(pixels) == small.VALIDATION
    expected = scene("test", 0, 5)
    np.testing.assert_array_equal(pixels[5], expected.image)
    np.testing.assert_array_equal(masks[5], expected.mask)
    # Ink is bright, fragments too: even brightness finds it better than chance.
    bright = pixels[:].mean(axis=-1)
    found = summarise(measure(bright, masks), bootstrap=0)
    assert found["mean_iou"] > found["chance_iou"] + 0.1


def test_its_config_is_an_evaluation_without_labels():
    config = load_config("segmentation", "runlocal")
    validate(config, device_count=1)
    assert (config.mode, config.data.eval_split, config.weights) == ("eval", "all", "vit_micro")
    assert load_config("segmentation").data.eval_size == 0
    assert load_config("segmentation").model.name == "deit_s"


# -- What cannot be used.


def refused(path, *words, kind=UsageError, read=lambda data: data.open_split("all")):
    with pytest.raises(kind) as caught:
        read(opened(path))
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


def test_there_is_no_training_and_no_other_split(path):
    dataset = opened(path)
    with pytest.raises(UsageError, match=r"no labels.*config\.mode=eval"):
        dataset.train_example(0, 0)
    with pytest.raises(UsageError, match=r"no split 'val'.*all"):
        dataset.load("val", 0, 0)
    with pytest.raises(UsageError, match="model takes clips"):
        opened(path, InputSpec(32, 32, frames=4))


def test_h5py_is_asked_for(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(path, "needs h5py: pip install 'iared2_jax[segmentation]'")


def test_a_file_of_another_kind_is_named(tmp_path):
    refused(tmp_path / "nowhere.mat", "is not there", FILE)
    refused(tmp_path, "is a folder", FILE)
    old = tmp_path / "old.mat"
    savemat(old, {"value": np.zeros(3)})
    refused(old, "old format", "-v7.3", kind=DataError)
    for content, why in ((b"", "truncated"), (b"\xff\xd8\xff" * 999, "no MATLAB 7.3 (HDF5)")):
        (tmp_path / "other.mat").write_bytes(content)
        refused(tmp_path / "other.mat", why, kind=DataError)


@pytest.mark.parametrize("kept", [100, 600, 0.5, 0.99])
def test_a_truncated_file_is_named(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    refused(path, "truncated", f"bring {FILE} again", kind=DataError)


def test_hdf5_of_something_else_is_named(tmp_path):
    with h5py.File(tmp_path / "a.mat", "w") as file:
        file["/value/gt"] = np.zeros(3)
    refused(tmp_path / "a.mat", "nothing at /value/img", "float64 of shape (3,)", kind=DataError)
    with h5py.File(tmp_path / "b.mat", "w") as file:
        for key, count in (("/value/img", 3), ("/value/gt", 2)):
            file.create_dataset(key, (count, 1), h5py.ref_dtype)
    refused(tmp_path / "b.mat", "(3, 1)", "(2, 1)", "(images, 1)", kind=DataError)


def with_one(path, image=None, mask=None):
    """The file with another picture or mask as its image 1."""
    made, masks = pictures()
    made[1] = made[1] if image is None else image
    masks[1] = masks[1] if mask is None else mask
    small.write_segmentation(path, made, masks)
    return path


def test_an_unusable_image_or_mask_is_named(path):
    turned = with_one(path, mask=np.ones((20, 50), np.uint8))
    refused(turned, "image 1 ", "20 x 50 pixels", "mask 50 x 20", "of one size", kind=DataError)
    real = with_one(path, image=np.ones((50, 20, 3)))
    refused(real, "image 1 ", "float64 of shape (3, 20, 50), not uint8", kind=DataError)
    refused(with_one(path, image=np.ones((50, 20, 4), np.uint8)), "(4, 20, 50)", kind=DataError)
    flat = with_one(path, mask=np.ones((50, 20, 2), np.uint8))
    refused(flat, "image 1 ", "mask uint8 of shape (2, 20, 50)", kind=DataError)
    with h5py.File(path, "r+") as file:
        file["/value/gt"][1, 0] = file["#refs#/gt0"].ref  # no cell between
    refused(path, "image 1 ", "in a cell", kind=DataError)
    with h5py.File(path, "r+") as file:
        file["/value/img"][1, 0] = h5py.Reference()
    refused(path, "damaged, at image 1 ", kind=DataError)


@pytest.mark.parametrize("value", [2, 255])
def test_masks_of_other_values_are_refused(path, value):
    """255 is foreground to some, and "do not count" to others."""
    mask = np.eye(50, 20, dtype=np.uint8)
    mask[3, 4] = value
    changed = with_one(path, mask=mask)
    load = {"kind": DataError, "read": lambda data: data.load("all", 0, 0)}
    refused(changed, "image 1 ", f"other values than 0 and 1 ({value})", "writing 1", **load)
    logical = SegmentationFile(with_one(path, mask=mask > 0))  # MATLAB's own yes and no will do
    np.testing.assert_array_equal(logical.mask(1), mask > 0)


def test_damage_within_is_found_when_it_is_read(path):
    """A compressed image, as MATLAB writes them, with a few bytes overwritten."""
    with h5py.File(path, "r+") as file:
        packed = file.create_dataset("packed", data=pictures()[0][1].T, compression="gzip")
        place, file["/value/img"][1, 0] = packed.id.get_chunk_info(0).byte_offset, packed.ref
    content = bytearray(path.read_bytes())
    content[512 + place + 40 : 512 + place + 60] = bytes(20)
    opened(path, InputSpec(16, 16))
    path.write_bytes(content)
    refused(path, "damaged, at image 1 ", kind=DataError, read=lambda d: d.load("all", 0, 0)[0][:])


def test_images_without_foreground_are_warned_of_once(path, caplog):
    empty = with_one(path, mask=np.zeros((50, 20), np.uint8))
    with caplog.at_level(logging.WARNING, logger=imagenet_segmentation.__name__):
        masks = opened(empty).load("all", 0, 0)[2]
    (record,) = caplog.records
    assert "1 of 3 masks have no foreground, the first is that of image 1" in record.getMessage()
    assert masks.any(axis=(1, 2)).tolist() == [True, False, True]
    small.write_segmentation(path, pictures()[0], [np.zeros(size, np.uint8) for size in SIZES])
    read = {"kind": DataError, "read": lambda data: data.load("all", 0, 0)}
    refused(path, "no foreground in any of the 3 masks", FILE, **read)


# -- The whole command.

EIGHT_DEVICES = ("--config.interpreter.batch_size=8", "--config.backbone.batch_size=8")


@pytest.mark.slow
def test_the_command_fills_the_table(tmp_path, path):
    """From a file in the true layout to figures for every map, without labels."""
    arguments = [
        "--config=configs/segmentation.py:runlocal",
        f"--workdir={tmp_path}",
        f"--config.data.path={path}",
        "--config.data.eval_size=0",
        "--config.eval.maps=('interpreter', 'raw_attention', 'gradcam')",
        "--config.eval.page_images=2",
        *EIGHT_DEVICES,
    ]
    assert main.run(arguments) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    blocks = {f"raw_attention_block_{block}" for block in range(6)}
    # The weights have no interpreters, so no scores; the floor is always there.
    floor = {"random", "center", "all_background"}
    assert set(results["segmentation"]) == blocks | {"gradcam"} | floor
    for figures in results["segmentation"].values():
        assert set(METRICS) <= set(figures)
        assert set(figures["interval"]) == set(METRICS)
    assert "top1" not in results["dense"]
    assert results["map_images"] == results["examples"] > 2
    assert "gradcam" in (tmp_path / "eval" / "report.html").read_text()


def test_training_on_it_is_refused(tmp_path, path, capsys):
    arguments = ["--config=configs/segmentation.py:runlocal", "--config.mode=train"]
    arguments += [*EIGHT_DEVICES, f"--workdir={tmp_path}", f"--config.data.path={path}"]
    assert main.run(arguments) != 0
    assert "has no labels to train with" in capsys.readouterr().err
