"""Scenes of cut-outs: exact masks, disjoint splits, every scene a function of (seed, split, k)."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from iared2_jax.data.cutouts import CutoutOptions, open_cutouts
from iared2_jax.data.datasets import open_dataset
from iared2_jax.data.images import BadImage
from iared2_jax.data.request import DataRequest
from iared2_jax.errors import UsageError
from iared2_jax.models.input_spec import images
from iared2_jax.models.variants import resized

SIZE = (48, 64)
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def write_object(path, colour, shape=(20, 30), alpha=None):
    """An ellipse of one colour in the middle of a PNG, transparent around it."""
    height, width = shape
    y, x = np.mgrid[:height, :width]
    inside = ((y + 0.5) / height - 0.5) ** 2 + ((x + 0.5) / width - 0.5) ** 2 < 0.25
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[..., 3] = 255 * inside if alpha is None else alpha
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.pad(pixels, ((5, 2), (3, 4), (0, 0)))).save(path)


@pytest.fixture
def folders(tmp_path):
    """Three classes of four objects, each of one colour; four grey backgrounds."""
    for name, colour in COLOURS.items():
        for number in range(4):
            write_object(tmp_path / "objects" / name / f"{number}.png", colour, (20 + number, 30))
    (tmp_path / "places").mkdir()
    for number in range(4):
        grey = np.full((100, 120, 3), 100 + 10 * number, np.uint8)
        Image.fromarray(grey).save(tmp_path / "places" / f"{number}.png")
    return tmp_path


def opened(folders, size=SIZE, **options):
    options = CutoutOptions(str(folders / "places"), **options)
    return open_cutouts(folders / "objects", size, options)


def test_a_scene_shows_its_object_where_the_mask_says(folders):
    made = opened(folders, task="kind", object_scale=(0.5, 0.8))
    assert made.class_names == ("blue", "green", "red")
    pixels, labels, masks = made.load("train", 30)
    assert pixels.shape == (30, *SIZE, 3)
    assert set(labels) == {0, 1, 2}
    for image, label, mask in zip(pixels, labels, masks, strict=True):
        colour = COLOURS[made.class_names[label]]
        grey = np.unique(image[~mask & (image.std(axis=-1) == 0)])
        assert len(grey) == 1  # the background is seen elsewhere
        # Inside of the mask at least half of each pixel is the object's, outside at most half.
        share = np.abs(image.astype(float) - grey).sum(-1) / np.abs(np.array(colour) - grey).sum()
        assert (share[mask] > 0.48).all()
        assert (share[~mask] < 0.52).all()
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        longer = max(len(range(rows[0], rows[-1] + 1)), len(range(columns[0], columns[-1] + 1)))
        assert 0.5 * 48 - 3 <= longer <= 0.8 * 48 + 1


def test_a_scene_is_a_function_of_seed_split_and_number(folders):
    made, again = (opened(folders, clutter=(1, 3)) for _ in range(2))
    pixels, labels, masks = made.load("test", 4, seed=3)
    scene = again.scene("test", 3, 2)
    np.testing.assert_array_equal(scene.image, pixels[2])
    np.testing.assert_array_equal(scene.mask, masks[2])
    assert scene.label == labels[2]
    others = [again.scene("test", 4, 2), again.scene("train", 3, 2), again.scene("test", 3, 1)]
    assert all((other.image != pixels[2]).any() for other in others)


def test_splits_share_no_background_and_of_kinds_no_object(folders):
    made = opened(folders, task="kind")
    train, test = (made.objects[split] for split in ("train", "test"))
    assert not {path for path, _ in train} & {path for path, _ in test}
    assert [path.name for path, _ in test] == ["2.png"] * 3  # every third by name
    assert len(train) == 9
    train, test = (made.backgrounds[split] for split in ("train", "test"))
    assert [path.name for path in test] == ["2.png"]
    assert [path.name for path in train] == ["0.png", "1.png", "3.png"]


def test_of_two_objects_the_second_is_for_the_test(folders):
    for number in (2, 3):
        (folders / "objects" / "red" / f"{number}.png").unlink()
    made = opened(folders, task="kind")
    test = [path for path, label in made.objects["test"] if label == 2]
    assert [path.name for path in test] == ["1.png"]


def test_which_object_is_a_class_each_in_both_splits(folders):
    made = opened(folders, task="object")
    assert len(made.class_names) == 12
    assert made.class_names[0] == "blue/0"
    assert made.objects["train"] == made.objects["test"]
    assert not set(made.backgrounds["train"]) & set(made.backgrounds["test"])


def test_clutter_is_of_other_objects_and_under_the_object(folders):
    """Alone of its colour, the object is where its mask is; the fragments are elsewhere."""
    for name in ("blue", "green"):
        for number in range(4):
            (folders / "objects" / name / f"{number}.png").unlink()
        write_object(folders / "objects" / name / "0.png", COLOURS[name])
    for number in (1, 2, 3):
        (folders / "objects" / "red" / f"{number}.png").unlink()
    made = opened(folders, clutter=(3, 3), object_scale=(0.4, 0.4), fragment_scale=0.5)
    coloured = 0
    for index in range(20):
        scene = made.scene("train", 0, index)
        colour = np.array(COLOURS[made.class_names[scene.label].partition("/")[0]])
        is_pure = (scene.image == colour).all(axis=-1)
        assert (scene.mask | ~is_pure).all()
        assert (is_pure & scene.mask).any()
        saturated = scene.image.std(axis=-1) > 60
        coloured += (saturated & ~scene.mask).any()
    assert coloured == 20


def test_size_of_the_clutter_and_of_none(folders):
    assert opened(folders, clutter=(0, 0)).scene("train", 0, 0).mask.any()


def test_the_digest_tells_other_files_and_other_options(folders):
    first = opened(folders)
    assert opened(folders).digest() == first.digest()
    assert opened(folders, clutter=(1, 2)).digest() != first.digest()
    assert opened(folders, task="kind").digest() != first.digest()
    moved = dataclasses.replace(first, options=dataclasses.replace(first.options, backgrounds="x"))
    assert moved.digest() == first.digest()
    (folders / "places" / "3.png").rename(folders / "places" / "4.png")
    assert opened(folders).digest() != first.digest()


# -- What cannot be used: one line that names it.


def no_alpha(folders):
    Image.new("RGB", (20, 20)).save(folders / "objects" / "red" / "1.png")


def all_opaque(folders):
    Image.new("RGBA", (20, 20), (9, 9, 9, 255)).save(folders / "objects" / "red" / "1.png")


def all_clear(folders):
    Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save(folders / "objects" / "red" / "1.png")


def torn(folders):
    path = folders / "objects" / "red" / "1.png"
    path.write_bytes(path.read_bytes()[:60])


def empty_class(folders):
    for number in range(4):
        (folders / "objects" / "red" / f"{number}.png").unlink()


def one_object(folders):
    for number in range(3):
        (folders / "objects" / "red" / f"{number}.png").unlink()


def small_background(folders):
    Image.new("RGB", (63, 60)).save(folders / "places" / "1.png")


def one_background(folders):
    for number in range(3):
        (folders / "places" / f"{number}.png").unlink()


def no_background(folders):
    for number in range(4):
        (folders / "places" / f"{number}.png").unlink()


def no_objects(folders):
    (folders / "objects").rename(folders / "moved")


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (no_alpha, BadImage, "red/1.png has no alpha channel: a cut-out is a PNG whose alpha"),
        (all_opaque, BadImage, "red/1.png is opaque everywhere"),
        (all_clear, BadImage, "red/1.png is transparent everywhere"),
        (torn, BadImage, "red/1.png is damaged"),
        (empty_class, UsageError, "objects/red holds no .png: fill or remove it"),
        (one_object, UsageError, "objects/red has one object, which cannot be in training and te"),
        (small_background, UsageError, "places/1.png has 63 x 60 pixels, less than the scenes' 64"),
        (one_background, UsageError, "places has one background: training and test need one each"),
        (no_background, UsageError, "places holds no .jpg/.jpeg/.png"),
        (no_objects, UsageError, "objects is not there: cut-outs must lie in <path>/<class>"),
    ],
)
def test_what_cannot_be_used_is_named(folders, spoil, error, words):
    spoil(folders)
    with pytest.raises(error, match=words) as caught:
        opened(folders, task="kind")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "kinds"}, "task='kinds' is unknown.*kind"),
        ({"object_scale": (0.5, 1.5)}, "object_scale=.* at most 1"),
        ({"clutter": (3, 1)}, "clutter=.* must be"),
        ({"fragment_scale": 0.0}, "fragment_scale=0.0 must be"),
        ({"backgrounds": ""}, "backgrounds='.' is no folder"),
    ],
)
def test_options_that_make_no_sense(folders, options, words):
    options = {"backgrounds": str(folders / "places"), **options}
    with pytest.raises(UsageError, match=words):
        open_cutouts(folders / "objects", SIZE, CutoutOptions(**options))


# -- As a dataset.


def test_as_a_dataset_at_the_models_size_and_channels(folders):
    options = CutoutOptions(str(folders / "places"), task="kind")
    spec = resized(images(SIZE, 16), channels=1)
    request = DataRequest(spec, str(folders / "objects"), cutouts=options)
    dataset = open_dataset("cutouts", request)
    assert dataset.num_classes == 3
    assert dataset.splits == ("train", "test")
    example = dataset.train_example(0, 5)
    assert example["input"].shape == (*SIZE, 1)
    pixels, labels, masks = dataset.load("test", 3, 0)
    assert (pixels.shape, labels.shape, masks.shape) == ((3, *SIZE, 1), (3,), (3, *SIZE))
    with pytest.raises(UsageError, match="cutouts has no last example"):
        dataset.load("test", 0, 0)


def test_small_cutouts_need_no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dataset = open_dataset("cutouts", DataRequest(images(56, 14), "small"))
    assert dataset.num_classes == 9
    pixels, _, masks = dataset.load("test", 2, 0)
    assert pixels.shape == (2, 56, 56, 3)
    assert masks.any(axis=(1, 2)).all()
