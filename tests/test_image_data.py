"""Image datasets through the pipeline: what is read, augmented, counted, and what is refused."""

import dataclasses
import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import load_config
from PIL import Image

from iared2_jax.config.checks import validate
from iared2_jax.data import small
from iared2_jax.data.augment import CROP_FLIP, DEIT, NONE
from iared2_jax.data.datasets import open_dataset
from iared2_jax.data.image_files import BAD_IN_A_ROW, BadExamples
from iared2_jax.data.images import BadImage, eval_transform, open_image
from iared2_jax.data.pipeline import eval_batches, mixing, train_batches
from iared2_jax.data.request import DataRequest
from iared2_jax.errors import UsageError
from iared2_jax.experiment.build import check_data, dataset_of
from iared2_jax.experiment.run import run
from iared2_jax.experiment.run_directory import adopt_config
from iared2_jax.models.input_spec import HALF_NORM, images


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The small datasets, in a cache of their own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def folder(cache, tmp_path):
    """A small folder that a test may damage."""
    shutil.copytree(small.small_folder(), tmp_path / "images")
    return tmp_path / "images"


def opened(folder, **changes):
    return open_dataset(
        "folder", DataRequest(images(32, norm=HALF_NORM), path=str(folder), **changes)
    )


@pytest.mark.parametrize("augment", [CROP_FLIP, DEIT], ids=["crop and flip", "DeiT's"])
def test_training_batches_depend_only_on_their_place(folder, augment):
    source = opened(folder, augment=augment)
    mix = None if augment is CROP_FLIP else mixing(augment, 10, 0.1)
    run = iter(train_batches(source, 4, 0, seed=5, threads=3, mix=mix))
    batches = [next(run) for _ in range(4)]
    resumed = iter(train_batches(source, 4, first_example=8, seed=5, mix=mix))
    for expected in batches[2:]:
        for key, values in next(resumed).items():
            np.testing.assert_array_equal(values, expected[key])
    other = next(iter(train_batches(source, 4, 0, seed=6, mix=mix)))
    assert not np.array_equal(other["input"], batches[0]["input"])
    assert batches[0]["input"].shape == (4, 32, 32, 3)
    if mix is not None:
        np.testing.assert_allclose(batches[0]["target"].sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batches_of_one(folder, hosts):
    source = opened(folder)
    alone = iter(train_batches(source, 8, 16, seed=1))
    shares = [iter(train_batches(source, 8, 16, 1, host=h, hosts=hosts)) for h in range(hosts)]
    for _ in range(8):  # across the end of an epoch
        expected = next(alone)
        parts = [next(share) for share in shares]
        for key, values in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), values)
    with pytest.raises(ValueError, match="cannot have its share"):
        train_batches(source, 8, 0, 1, host=0, hosts=3)


def test_an_epoch_shows_every_image_once(folder):
    source = opened(folder, augment=NONE)
    size = source.epoch_size
    assert size == small.TRAIN
    first, second = (
        [source.train_example(3, index)["input"].tobytes() for index in range(start, start + size)]
        for start in (0, size)
    )
    assert len(set(first)) == size
    assert set(first) == set(second)
    assert first != second  # in another order


def test_repeated_augmentation_shows_a_third_of_the_images_thrice(folder):
    source = opened(folder, augment=dataclasses.replace(NONE, repeats=3))
    seen = [source.train_example(0, k)["input"].tobytes() for k in range(small.TRAIN)]
    assert len(set(seen)) == small.TRAIN // 3


def test_every_validation_image_counts_the_last_partial_batch_too(folder):
    source = opened(folder)
    pixels, labels, masks = source.load("val", 0, 0)
    assert masks is None
    assert len(pixels) == len(labels) == small.VALIDATION
    seen = []
    for batch in eval_batches({"pixels": pixels, "label": labels}, batch_size=5):
        seen += [
            (image.tobytes(), int(label))
            for image, label, counted in zip(*batch.values(), strict=True)
            if counted
        ]
    expected = [
        (eval_transform(open_image(path), 32, 1.0).tobytes(), int(path.parent.name))
        for path in sorted((folder / "val").rglob("*.jpg"))
    ]
    assert seen == expected
    few, few_labels, _ = source.load("val", 4, 0)
    assert few_labels.tolist() == [expected[i][1] for i in (0, 4, 8, 12)]
    assert few[1:3].shape == (2, 32, 32, 3)


def test_a_bad_training_image_is_named_counted_and_replaced(folder, caplog):
    victim = sorted((folder / "train").rglob("*.jpg"))[7]
    victim.write_bytes(victim.read_bytes()[:200])
    source = opened(folder, augment=NONE, bad_share=0.05)
    with caplog.at_level(logging.WARNING):
        images = [source.train_example(0, index)["input"] for index in range(small.TRAIN * 2)]
    assert len({image.tobytes() for image in images}) == small.TRAIN - 1
    warnings = [record.getMessage() for record in caplog.records if "another" in record.message]
    assert len(warnings) == 1  # once, although it came up twice
    assert f"{victim.parent.name}/{victim.name} is damaged" in warnings[0]
    for path in sorted((folder / "train").rglob("*.jpg"))[:4]:
        path.write_bytes(b"no image")
    strict = opened(folder, augment=NONE, bad_share=0.03)
    with pytest.raises(BadImage, match="2 training images cannot be used"):
        [strict.train_example(0, index) for index in range(small.TRAIN)]


def test_bad_images_are_counted_by_many_threads():
    """Every bad image once, whoever meets it; and as many in a row as there are, no fewer."""
    counter = BadExamples(share=0.9, total=1000)
    error = BadImage("is damaged")

    def meet(row):
        counter.bad(row, error)
        counter.good()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(meet, [row % 50 for row in range(4000)]))
    counter.good()
    for row in range(BAD_IN_A_ROW - 1):  # the count began anew with the good one
        counter.bad(row % 50, error)
    with pytest.raises(BadImage, match="50 training images cannot be used"):
        counter.bad(0, error)


def test_a_bad_validation_image_ends_the_evaluation(folder):
    victim = sorted((folder / "val").rglob("*.jpg"))[3]
    victim.write_bytes(b"")
    pixels, _, _ = opened(folder).load("val", 0, 0)
    with pytest.raises(BadImage, match=f"{victim.parent.name}/{victim.name} is an empty file") as e:
        pixels[np.arange(8)]
    assert e.value.exit_code == 65


def test_a_config_opens_its_data_as_its_model_wants_them(cache):
    config = load_config("vit_augreg_s16", "runlocal")
    validate(config, device_count=1)
    source = dataset_of(config)
    assert source.num_classes == 1000
    assert source.class_names[0] == "tench, Tinca tinca"
    assert source.train_example(0, 0)["input"].shape == (224, 224, 3)
    pixels, labels, _ = source.load("validation", 0, 0)
    assert pixels[:2].shape == (2, 224, 224, 3)
    assert set(labels) <= set(range(10))
    assert dataset_of(config) is source  # opened once


def test_a_run_goes_on_only_with_the_data_it_began_with(folder, tmp_path):
    config = load_config("folder", "model=deit_ti,runlocal")
    config.data.path = str(folder)
    config.interpreter.batch_size = config.backbone.batch_size = 8
    (tmp_path / "run").mkdir()

    def adopted():
        adopt_config(config, dataset_of(config), tmp_path / "run")

    adopted()
    moved = folder.rename(tmp_path / "moved")
    config.data.path = str(moved)
    adopted()
    shutil.copytree(moved, tmp_path / "other")
    classes = (tmp_path / "other" / "train").iterdir()
    next(max(classes, key=lambda of_class: len(list(of_class.iterdir()))).iterdir()).unlink()
    config.data.path = str(tmp_path / "other")
    with pytest.raises(UsageError, match=r"data found \('48 images of 10 classes"):
        adopted()
    # As many images of as many classes, but one has become another's.
    shutil.copytree(moved, tmp_path / "relabelled")
    ones, twos = (sorted((tmp_path / "relabelled" / "train" / c).iterdir()) for c in "12")
    ones[0].rename(twos[0].parent / "from another.jpg")
    config.data.path = str(tmp_path / "relabelled")
    assert dataset_of(config).summary in (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UsageError, match="labels"):
        adopted()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.path": ""}, "needs config.data.path"),
        ({"data.path": "nowhere"}, "nowhere"),
        ({"data.eval_split": "test"}, "config.data.eval_split='test' is unknown"),
        ({"model.num_classes": 10}, "imagenet has 1000 classes"),
        ({"weights": ""}, "interpreters need a trained backbone"),
        ({"data.augment.scale": (0.5,)}, "config.data.augment.scale"),
        ({"data.augment.erasing": 2.0}, "config.data.augment.erasing=2.0 must be at most 1"),
        ({"data.augment.repeats": 0}, "config.data.augment.repeats=0 must be at least 1"),
        ({"mode": "evaluate"}, "config.mode='evaluate' is unknown"),
        ({"mode": "eval", "weights": ""}, "config.mode=eval needs config.weights"),
        ({"mode": "eval", "weights": "scratch"}, "config.mode=eval needs config.weights"),
    ],
)
def test_data_that_cannot_be_used_are_refused(cache, changes, says):
    config = load_config("vit_augreg_s16", "runlocal")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UsageError, match=says):  # noqa: PT012
        validate(config, device_count=1)
        check_data(config)


# -- A map beside each image (config.data.maps).

WITH_MAPS = dataclasses.replace(images(32, norm=HALF_NORM), map_channel=True)


@pytest.fixture
def maps(folder, tmp_path):
    """A map of every image of `folder`: its own red, so that whoever moves it can be told."""
    for path in folder.rglob("*.jpg"):
        target = (tmp_path / "maps" / path.relative_to(folder)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(open_image(path))[..., 0]).save(target)
    return tmp_path / "maps"


def opened_with_maps(folder, maps, **changes):
    request = DataRequest(WITH_MAPS, path=str(folder), maps=str(maps), **changes)
    return open_dataset("folder", request)


MIXED = dataclasses.replace(CROP_FLIP, mixup=0.8, cutmix=1.0)


@pytest.mark.parametrize("augment", [CROP_FLIP, MIXED], ids=["crop and flip", "mixed"])
def test_a_map_goes_through_the_same_crop_flip_and_mixing_as_its_image(folder, maps, augment):
    source = opened_with_maps(folder, maps, augment=augment)
    batches = train_batches(source, 8, 0, seed=1, mix=mixing(augment, 10, 0.1))
    inputs = next(iter(batches))["input"]
    assert inputs.shape == (8, 32, 32, 4)
    np.testing.assert_array_equal(inputs[..., 3], inputs[..., 0])
    plain = train_batches(opened(folder, augment=augment), 8, 0, 1, mix=mixing(augment, 10, 0.1))
    np.testing.assert_array_equal(next(iter(plain))["input"], inputs[..., :3])


def test_colour_changes_and_erasing_leave_a_map_as_it_is(folder, maps, monkeypatch):
    from iared2_jax.data import augment as module

    colours = {name: op for name, op in module.OPS.items() if not op.moves}
    moves = {name: op for name, op in module.OPS.items() if op.moves}
    assert sorted(moves) == ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"]
    options = dataclasses.replace(CROP_FLIP, rand_augment=True, erasing=1.0)
    without = [opened_with_maps(folder, maps).train_example(0, i)["input"] for i in range(8)]
    source = opened_with_maps(folder, maps, augment=options)
    monkeypatch.setattr(module, "OPS", colours)
    changed = [source.train_example(0, i)["input"] for i in range(8)]
    for before, after in zip(without, changed, strict=True):
        np.testing.assert_array_equal(after[..., 3], before[..., 3])
        assert (after[..., :3] != before[..., :3]).any()
    # Where an op moves the image, its map goes along; what comes in from outside matters nothing.
    monkeypatch.setattr(module, "OPS", moves)
    source = opened_with_maps(
        folder, maps, augment=dataclasses.replace(CROP_FLIP, rand_augment=True)
    )
    moved = np.stack([source.train_example(0, i)["input"] for i in range(8)]).astype(int)
    inside = np.abs(moved[..., 3] - moved[..., 0]) <= 1
    assert (moved != np.stack(without)).any(axis=(1, 2, 3)).sum() >= 4
    assert 0.5 < inside.mean() < 1
    assert (inside | (moved[..., 3] <= moved[..., 0])).mean() > 0.95


def test_a_map_is_cut_as_an_evaluation_image_is(folder, maps):
    pixels = opened_with_maps(folder, maps).load("val", 6, 0)[0][:6]
    assert pixels.shape == (6, 32, 32, 4)
    np.testing.assert_array_equal(pixels[..., 3], pixels[..., 0])


def test_maps_that_do_not_fit_their_images_are_named(folder, maps):
    path = sorted((maps / "val").rglob("*.png"))[0]
    picture = Image.open(path)

    def refused(sentence):
        with pytest.raises(BadImage, match=sentence) as raised:
            opened_with_maps(folder, maps).load("val", 0, 0)[0][:1]
        assert str(path) in str(raised.value)

    picture.resize((10, 12)).save(path)
    refused("is 10 x 12 px, but its image is 64 x 64: a map must be as large as its image")
    picture.convert("RGB").save(path)
    refused("is a picture in RGB, but a map must be grey")
    path.unlink()
    refused("cannot be read")
    with pytest.raises(UsageError, match="no_folder' is no folder"):
        opened_with_maps(folder, maps / "no_folder")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reduction.selector": "memorability"}, "reduction.selector has .* set config.data.maps"),
        ({"compare.selectors": ("memorability",)}, "compare.selectors has"),
        ({"eval.maps": ("memorability",)}, "eval.maps has"),
        ({"data.maps": "maps"}, "is of the images of folder and imagenet"),
        ({"data.maps": "maps", "data.name": "folder", "mode": "explain"}, "leave it out"),
    ],
)
def test_maps_are_asked_for_where_they_are(tiny_config, options, sentence):
    tiny_config.update_from_flattened_dict(options)
    with pytest.raises(UsageError, match=sentence):
        validate(tiny_config, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_with_maps_has_memorabilitys_rows(folder, maps, tiny_config, tmp_path):
    tiny_config.data.update({"name": "folder", "path": str(folder), "maps": str(maps)})
    tiny_config.data.eval_split, tiny_config.weights = "val", "scratch"
    tiny_config.curriculum = "interpreters"
    tiny_config.compare.selectors, tiny_config.eval.maps = ("memorability",), ("memorability",)
    tiny_config.eval.perturbation = tiny_config.eval.agreement = False
    run(tiny_config, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    kept = results["methods"]["memorability"]["kept_per_group"]
    assert kept == pytest.approx(results["methods"]["iared2"]["kept_per_group"], abs=1 / 64)
    assert (tmp_path / "run" / "figures").is_dir()
