"""What users hand in works, or is refused in one sentence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import iared2_jax
from iared2_jax.data.inputs import as_inputs
from iared2_jax.errors import UsageError
from iared2_jax.fast_inference import GroupPlan, Plan
from iared2_jax.models.input_spec import HALF_NORM, InputSpec, images

SPEC = images(64, 8, norm=HALF_NORM)


@pytest.fixture(scope="module")
def micro():
    return iared2_jax.load_model("vit_micro")


@pytest.fixture(scope="module")
def scenes():
    """Pixels and labels."""
    pixels, labels, _ = iared2_jax.data.cluttered_mnist.load("test", 9)
    return pixels, labels


@pytest.fixture(scope="module")
def run(micro):
    plan = Plan(4, tuple(GroupPlan("padded", 4, ((4 * 65, 65),)) for _ in range(3)))
    return iared2_jax.accelerate(*micro, 4, plan=plan, cache_dir=None)


@pytest.fixture
def photo(tmp_path):
    """A picture that a camera turned: what is stored lies on its side."""
    upright = np.zeros((96, 64, 3), np.uint8)
    upright[:32] = 200  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    path = tmp_path / "phone.jpg"
    Image.fromarray(np.rot90(upright).copy()).save(path, quality=95, exif=exif)
    return path, upright


def test_all_kinds_become_the_same_inputs(scenes, tmp_path):
    pixels, _ = scenes
    expected = np.asarray(SPEC.normalize(pixels[:2]))
    assert as_inputs(expected, SPEC) is expected  # a batch in place is not touched
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for path, image in zip(paths, pixels, strict=False):
        Image.fromarray(image).save(path)
    for given in (
        pixels[:2],
        list(pixels[:2]),
        [expected[0], pixels[1]],
        [Image.fromarray(image) for image in pixels[:2]],
        paths,
        [str(paths[0]), Image.fromarray(pixels[1])],
        (expected[:1], expected[1]),
    ):
        np.testing.assert_allclose(as_inputs(given, SPEC), expected, atol=1e-6)
    for one in (expected[0], pixels[0], Image.fromarray(pixels[0]), paths[0]):
        np.testing.assert_allclose(as_inputs(one, SPEC), expected[:1], atol=1e-6)


def test_pixels_of_another_size_are_cropped_like_a_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    expected = as_inputs(tmp_path / "large.png", SPEC)
    for given in (pixels, pixels[None], Image.fromarray(pixels)):
        np.testing.assert_array_equal(as_inputs(given, SPEC), expected)


BAD = [
    (np.zeros((2, 64, 64, 3), np.int32), "int32: give uint8 pixels"),
    (np.zeros((2, 64, 64, 3), bool), "bool: give uint8"),
    (np.zeros((2, 64, 64, 3), complex), "complex128"),
    (np.zeros((2, 32, 64, 3), np.float32), r"\[2, 32, 64, 3\], but the model takes \[B, 64, 64, 3"),
    (np.zeros((2, 3, 64, 64), np.float32), r"\[2, 3, 64, 64\]"),
    (np.zeros((0, 64, 64, 3), np.float32), "at least one"),
    (np.zeros((64, 64), np.float32), r"\[64, 64\]"),
    (np.zeros((2, 64, 64, 4), np.uint8), "colour images of any size"),
    ([], "the list is empty"),
    (None, "images are NoneType"),
    ({"image": 1}, "images are dict"),
    ([np.zeros((64, 64, 3), np.float32), 3], "images are int"),
]


@pytest.mark.parametrize(("given", "words"), BAD, ids=[words for _, words in BAD])
def test_what_shows_no_image_is_refused_everywhere(micro, run, given, words):
    for use in (
        functools.partial(iared2_jax.explain, *micro),
        run,
        functools.partial(iared2_jax.calibrate, *micro, target_flops=1e9),
    ):
        with pytest.raises(UsageError, match=words):
            use(given)
    if given is not None:  # None plans later
        with pytest.raises(UsageError, match=words):
            iared2_jax.accelerate(*micro, 4, images=given, cache_dir=None)


def test_a_picture_is_no_clip(scenes):
    clips = InputSpec(64, 64, patch=(8, 8), frames=4)
    for given in (scenes[0], Image.fromarray(scenes[0][0])):
        with pytest.raises(UsageError, match=r"clips|takes"):
            as_inputs(given, clips)


def test_more_images_than_the_batch_are_split(micro, run, scenes):
    pixels, _ = scenes
    inputs = np.asarray(SPEC.normalize(pixels))
    masked, _ = jax.jit(micro[0].apply)(micro[1], inputs)
    for given in (inputs, pixels, jnp.asarray(inputs)):
        logits, there = run(given)
        np.testing.assert_allclose(logits, masked, rtol=1e-4, atol=1e-4)
        assert [keep.shape for keep in there.keep] == [(9, 64)] * 3
        np.testing.assert_array_equal(there.overflow[0], np.zeros(9))
    each = np.linspace(0.2, 0.8, 27, dtype=np.float32).reshape(9, 3)
    logits, there = run(inputs, each)
    for keep, expected in zip(
        there.keep, micro[0].apply(micro[1], inputs, each)[1].keep, strict=True
    ):
        np.testing.assert_array_equal(keep, expected)
    with pytest.raises(UsageError, match="thresholds are for 5 images, the call has 9"):
        run(inputs, each[:5])


def test_without_images_the_first_call_gives_the_plan(micro, scenes, caplog, tmp_path, monkeypatch):
    from iared2_jax.fast_inference import planner

    made = []

    def plan_groups(request):
        """Timing the layouts takes half a minute: here is a plan."""
        made.append(request.images)
        plan = tuple(GroupPlan("padded", 4, ((4 * 65, 65),)) for _ in range(3))
        return Plan(4, plan, key=request.key())

    monkeypatch.setattr(planner, "plan_groups", plan_groups)
    run = iared2_jax.accelerate(*micro, 4, cache_dir=tmp_path)
    assert (run.plan, run.compiled, run.usage) == (None, None, [])
    caplog.set_level("INFO", "iared2_jax")
    logits, _ = run(scenes[0][:6])
    inputs = np.asarray(SPEC.normalize(scenes[0][:6]))
    np.testing.assert_array_equal(made[0], inputs)
    np.testing.assert_allclose(logits, micro[0].apply(micro[1], inputs)[0], rtol=1e-4, atol=1e-4)
    assert "planned from the first call's 6 images" in str(run.plan)
    assert "planned from the first call's 6 images in" in caplog.text
    run(scenes[0])
    assert len(made) == 1  # once
    assert run.compiled is not None
    # The next process finds the plan, and where it comes from.
    again = iared2_jax.accelerate(*micro, 4, cache_dir=tmp_path)
    assert again.plan == run.plan


def test_a_compiled_run_is_not_compiled_again(run, scenes):
    inputs = np.asarray(SPEC.normalize(scenes[0][:4]))
    with pytest.raises(UsageError, match="compiled already"):
        jax.jit(lambda x: run(x)[0])(inputs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named(micro, scenes, value):
    inputs = np.asarray(SPEC.normalize(scenes[0])).copy()
    inputs[[2, 7], 0, 0, 0] = value
    for use in (
        functools.partial(iared2_jax.explain, *micro),
        functools.partial(iared2_jax.calibrate, *micro, target_flops=1e9),
        lambda images: iared2_jax.accelerate(*micro, 4, images=images, cache_dir=None),
    ):
        with pytest.raises(UsageError, match="images 2, 7 have values that are not finite"):
            use(inputs)


LABELS = [
    (lambda y: y.astype(float), "labels are float64"),
    (lambda y: y[:, None], r"labels are \[9, 1\]"),
    (lambda y: y[:5], r"labels are \[5\], but there are 9 images"),
    (lambda y: y - 1, "go from -1"),
    (lambda y: np.arange(9) + 2, "go from 2 to 10, but the model's classes from 0 to 9: are they"),
]


@pytest.mark.parametrize(("change", "words"), LABELS, ids=[words for _, words in LABELS])
def test_labels_that_are_no_classes_are_refused(micro, scenes, change, words):
    pixels, labels = scenes
    labels = np.where(labels == labels.min(), 0, labels)
    with pytest.raises(UsageError, match=words):
        iared2_jax.calibrate(*micro, pixels, change(labels), max_accuracy_drop=0.1)


def test_calibration_at_chance_is_warned_of(micro, scenes, caplog):
    pixels, labels = scenes
    shifted = (labels + 1) % 10
    iared2_jax.calibrate(*micro, pixels, shifted, target_flops=30e6)
    assert "with all tokens kept the accuracy is only" in caplog.text
    caplog.clear()
    iared2_jax.calibrate(*micro, pixels, labels, target_flops=30e6)
    assert "with all tokens" not in caplog.text


def test_thresholds_that_do_not_fit_the_groups(micro, run, scenes):
    pixels, _ = scenes
    inputs = SPEC.normalize(pixels[:2])
    for use in (
        lambda: micro[0].apply(micro[1], inputs, (0.5, 0.4)),
        lambda: iared2_jax.explain(*micro, pixels, thresholds=(0.5, 0.4)),
        lambda: run(pixels, (0.5, 0.4)),
        lambda: iared2_jax.accelerate(*micro, 4, (0.5, 0.4), images=pixels, cache_dir=None),
    ):
        with pytest.raises(ValueError, match="thresholds must be one number, 3"):
            use()


def test_pixels_are_not_taken_for_inputs(micro, scenes):
    pixels, _ = scenes
    with pytest.raises(ValueError, match=r"uint8, but must be normalised: module\.input_spec"):
        micro[0].apply(micro[1], pixels)


def test_sizes_of_nothing(micro, scenes):
    for use in (
        lambda: iared2_jax.accelerate(*micro, 0, images=scenes[0]),
        lambda: iared2_jax.calibrate(*micro, scenes[0], target_flops=1e9, batch_size=0),
    ):
        with pytest.raises(UsageError, match="batch_size=0 must be"):
            use()


def test_a_phones_picture_is_explained_upright(micro, photo):
    path, upright = photo
    expected = as_inputs(upright, SPEC)
    np.testing.assert_allclose(as_inputs(path, SPEC), expected, atol=0.05)
    np.testing.assert_allclose(as_inputs(Image.open(path), SPEC), expected, atol=0.05)
    sideways = as_inputs(path, SPEC, upright=False)
    np.testing.assert_allclose(sideways, np.rot90(expected, axes=(1, 2)), atol=0.05)
    heatmaps = [iared2_jax.explain(*micro, path, group=1, upright=u) for u in (True, False)]
    assert float(jnp.abs(heatmaps[0] - heatmaps[1]).max()) > 0.01
