"""DeiT's augmentation: pure, by the papers' definitions, and pixel by pixel what timm does."""

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from benchmarks import peers
from iared2_jax.data import augment
from iared2_jax.data.augment import (
    CROP_FLIP,
    DEIT,
    NONE,
    OPS,
    mixup_cutmix,
    rand_augment,
    random_erasing,
    repeated_example,
)

FILL = augment.IMAGENET_GREY
NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TIMM_NAMES = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


def picture(seed: int = 0, height: int = 40, width: int = 60) -> Image.Image:
    """Smooth colours with some noise in 20..230, wider than high."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(20, 231, (5, 5, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height)), np.int16)
    return Image.fromarray((smooth + rng.integers(-9, 10, smooth.shape)).clip(20, 230).astype("u1"))


@pytest.fixture(scope="module")
def timm_data():
    pytest.importorskip("torch")
    if peers.missing():
        pytest.skip(peers.missing())
    import timm.data  # `missing` has imported it, with stand-ins where torchvision is not there

    return timm.data


def equal(image: Image.Image, expected) -> None:
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


# -- RandAugment.


def test_ops_on_values_are_what_they_say():
    image = picture()
    x = np.asarray(image).astype(int)

    def applied(name, value):
        return OPS[name].apply(image, value, FILL)

    equal(applied("invert", 0), 255 - x)
    equal(applied("posterize", 3), x & 0b11100000)
    equal(applied("posterize", 0), 0 * x)
    equal(applied("posterize", 1), ImageOps.posterize(image, 1))
    equal(applied("solarize", 90), np.where(x < 90, x, 255 - x))
    equal(applied("solarize_add", 99), np.where(x < 128, np.minimum(x + 99, 255), x))
    equal(applied("auto_contrast", 0), ImageOps.autocontrast(image))
    low, high = x.min((0, 1)), x.max((0, 1))
    stretched = np.asarray(applied("auto_contrast", 0))
    np.testing.assert_allclose(stretched, (x - low) / (high - low) * 255, atol=1.01)
    equal(applied("equalize", 0), ImageOps.equalize(image))

    # An enhancement by f blends: (1 - f) * degenerate + f * image.
    grey = image.convert("L")
    degenerates = {
        "color": grey.convert("RGB"),
        "contrast": Image.new("RGB", image.size, (int(np.mean(grey) + 0.5),) * 3),
        "brightness": Image.new("RGB", image.size),
        "sharpness": image.filter(ImageFilter.SMOOTH),
    }
    for name, degenerate in degenerates.items():
        for factor in (0.1, 1.0, 1.9):
            equal(applied(name, factor), Image.blend(degenerate, image, factor))


def test_ops_on_geometry_are_what_they_say():
    """At arguments that map pixel centres to pixel centres, where bicubic interpolates nothing."""
    image = picture()
    x = np.asarray(image)
    rows, columns = np.mgrid[: x.shape[0], : x.shape[1]]

    def gathered(rows, columns):
        inside = (rows >= 0) & (rows < x.shape[0]) & (columns >= 0) & (columns < x.shape[1])
        return np.where(inside[..., None], x[rows * inside, columns * inside], np.uint8(FILL))

    def applied(name, value):
        return OPS[name].apply(image, value, FILL)

    equal(applied("translate_x", 0.1), gathered(rows, columns + 6))  # of 60 px
    equal(applied("translate_y", -0.1), gathered(rows - 4, columns))  # of 40 px
    equal(applied("shear_x", 2), gathered(rows, columns + 2 * rows + 1))
    equal(applied("shear_y", -2), gathered(rows - 2 * columns - 1, columns))
    square = image.crop((0, 0, 40, 40))
    equal(OPS["rotate"].apply(square, 90, FILL), np.rot90(square))  # counter-clockwise
    assert np.asarray(applied("rotate", 30))[0, 0].tolist() == list(FILL)


def test_ranges():
    """Every argument at strengths 0, 0.9 (DeiT's) and 1, with both signs."""
    at = {
        name: [op.argument(s, sign) for s in (0, 0.9, 1) for sign in (-1, 1)]
        for name, op in OPS.items()
    }
    for name in ("auto_contrast", "equalize", "invert"):
        assert at[name] == [0] * 6
    for name, largest in {"rotate": 30, "shear_x": 0.3, "translate_y": 0.45}.items():
        expected = [0, 0, -0.9 * largest, 0.9 * largest, -largest, largest]
        assert at[name] == pytest.approx(expected)
    for name in ("color", "contrast", "brightness", "sharpness"):
        assert at[name] == pytest.approx([1, 1, 0.19, 1.81, 0.1, 1.9])
    assert at["posterize"] == [4, 4, 1, 1, 0, 0]
    assert at["solarize"] == [256, 256, 26, 26, 0, 0]
    assert at["solarize_add"] == [0, 0, 99, 99, 110, 110]


def test_no_op_but_these_changes_nothing_at_strength_0():
    image = picture()
    for name, op in OPS.items():
        same = image == op.apply(image, op.argument(0.0, 1), FILL)
        assert same == (name not in {"auto_contrast", "equalize", "invert", "posterize"}), name


def test_rand_augment_is_a_pure_function_of_the_generator():
    image = picture()
    before = image.copy()
    results = [rand_augment(image, np.random.default_rng(seed)) for seed in (*range(20), 0)]
    equal(image, before)
    equal(results[0], results[-1])
    assert len({result.tobytes() for result in results}) > 10
    assert all(result.size == image.size and result.mode == "RGB" for result in results)


def test_each_layer_is_applied_half_the_time():
    image, rng, draws = picture(height=24, width=24), np.random.default_rng(0), 600
    for layers in (1, 2):
        unchanged = sum(rand_augment(image, rng, layers=layers) == image for _ in range(draws))
        share = 0.5**layers  # here every op changes something
        assert unchanged / draws == pytest.approx(
            share, abs=4 * (share * (1 - share) / draws) ** 0.5
        )
    assert rand_augment(image, rng, layers=0) == image


def test_op_set_and_ranges_are_timms(timm_data, monkeypatch):
    timm = timm_data.auto_augment
    assert list(TIMM_NAMES.values()) == timm._RAND_INCREASING_TRANSFORMS
    assert list(TIMM_NAMES) == list(OPS)
    for sign, uniform in ((-1, 0.9), (1, 0.1)):
        monkeypatch.setattr(timm.random, "random", lambda uniform=uniform: uniform)
        for ours, theirs in TIMM_NAMES.items():
            if (level := timm.LEVEL_TO_ARG[theirs]) is not None:
                for magnitude in np.linspace(0, 10, 41).tolist():
                    (expected,) = level(magnitude, {})
                    assert OPS[ours].argument(magnitude / 10, sign) == expected, ours


@pytest.mark.parametrize("name", OPS)
def test_op_is_timms(timm_data, name):
    theirs = timm_data.auto_augment.NAME_TO_OP[TIMM_NAMES[name]]
    kwargs = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
    for seed, strength in enumerate((0, 0.3, 0.85, 0.9, 1)):
        image = picture(seed)
        for sign in (-1, 1):
            value = OPS[name].argument(strength, sign)
            if name == "posterize" and value == 0:
                continue  # refused by Pillow 13, and so by timm
            args = () if name in ("auto_contrast", "equalize", "invert") else (value,)
            equal(OPS[name].apply(image, value, FILL), theirs(image, *args, **kwargs))


def test_rand_augment_is_timms_given_its_draws(timm_data, monkeypatch):
    timm = timm_data.auto_augment
    transform = timm.rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    )
    changed = 0
    for seed in range(60):
        image, rng = picture(seed), np.random.default_rng(seed)
        chosen, applied = rng.integers(15, size=2), rng.random(2) < 0.5
        magnitudes, signs = rng.normal(9, 0.5, 2), rng.choice((-1, 1), size=2)
        expected = image
        for index, on, magnitude, sign in zip(chosen, applied, magnitudes, signs, strict=True):
            # timm's generator, made to draw these: apply or not, the magnitude, the sign.
            uniforms = iter((0.1 if on else 0.9, 0.9 if sign < 0 else 0.1))
            monkeypatch.setattr(timm.random, "random", lambda uniforms=uniforms: next(uniforms))
            monkeypatch.setattr(timm.random, "gauss", lambda *_, magnitude=magnitude: magnitude)
            expected = transform.ops[index](expected)
        equal(rand_augment(image, np.random.default_rng(seed)), expected)
        changed += expected != image
    assert changed > 30


# -- Random erasing.


def test_erasing_keeps_its_bounds_and_its_frequency():
    height, width, draws = 96, 128, 1200
    constant = np.full((height, width, 3), 254, np.uint8)
    rng, areas, aspects, tops = np.random.default_rng(0), [], [], []
    for _ in range(draws):
        erased = (random_erasing(constant, rng, NORM) != constant).any(-1)
        rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
        if len(rows):
            h, w = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
            assert erased[rows[0] : rows[0] + h, columns[0] : columns[0] + w].mean() > 0.97
            areas.append((h * w) / (height * width))
            aspects.append(h / w)
            tops.append(rows[0] / (height - h))
    assert (constant == 254).all()
    assert len(areas) / draws == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / draws) ** 0.5)
    # Sides are rounded to pixels: at least 9 px here, so by 6 % at most.
    assert 0.02 / 1.06 < min(areas) < 0.04
    assert 0.29 < max(areas) < 1.06 / 3
    assert 0.3 / 1.06 < min(aspects) < 0.4
    assert 2.5 < max(aspects) < 1.06 / 0.3
    assert np.mean(np.log(aspects)) == pytest.approx(0, abs=0.2)  # neither way preferred
    assert np.mean(tops) == pytest.approx(0.5, abs=0.08)


def test_erased_pixels_are_normal_noise_after_normalisation():
    pixels = np.zeros((300, 300, 3), np.uint8)
    norm = ((0.5, 0.4, 0.6), (0.1, 0.08, 0.1))  # 4 standard deviations fit: nothing is clipped
    rng = np.random.default_rng(1)
    result = random_erasing(pixels, rng, norm, probability=1)
    noise = result[result.any(-1)] / 255
    assert len(noise) > 1500
    normalised = (noise - norm[0]) / norm[1]
    np.testing.assert_allclose(normalised.mean(0), 0, atol=0.1)
    np.testing.assert_allclose(normalised.std(0), 1, atol=0.1)
    np.testing.assert_allclose(np.corrcoef(normalised.T), np.eye(3), atol=0.1)
    # With ImageNet's, the documented 3 % are clipped.
    erased = [random_erasing(pixels + np.uint8(7), rng, NORM, probability=1) for _ in range(20)]
    noise = np.concatenate([image[(image != 7).any(-1)] for image in erased])
    assert np.mean((noise == 0) | (noise == 255)) == pytest.approx(0.033, abs=0.005)


def test_erasing_is_a_pure_function_of_the_generator():
    pixels = np.asarray(picture(0, 64, 64))
    one, same, other = (
        random_erasing(pixels, np.random.default_rng(seed), NORM, probability=1)
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert random_erasing(pixels, np.random.default_rng(3), NORM, probability=0) is pixels
    sliver = pixels[:1]  # nothing fits
    assert random_erasing(sliver, np.random.default_rng(3), NORM, probability=1) is sliver


# -- Mixup and CutMix.


LABELS = np.array([0, 3, 3, 1, 4, 2], np.int32)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 12, 16, 3), np.uint8)


def kept_share(targets: np.ndarray, smoothing: float = 0.1) -> float:
    """λ, by row 0, whose label and partner's label (0 and 2) nobody else has."""
    return float((targets[0, 0] - smoothing / 5) / (1 - smoothing))


def test_cutmix_pastes_a_box_of_the_reversed_batch():
    numbered = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None, None, None], IMAGES.shape)
    shares = []
    for seed in range(200):
        images, targets = mixup_cutmix(
            numbered, LABELS, 5, np.random.default_rng(seed), mixup_alpha=0
        )
        assert images.dtype == np.uint8
        pasted = images[0, ..., 0] == 5
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        for i in range(6):  # the same box in all images, of their partners only
            np.testing.assert_array_equal(images[i, ..., 0], np.where(pasted, 5 - i, i))
        if len(rows):
            assert pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        shares.append(1 - pasted.mean())
        assert kept_share(targets) == pytest.approx(shares[-1], abs=1e-6)
    assert min(shares) < 0.4
    assert max(shares) > 0.9


def test_cutmix_of_clips_cuts_the_same_box_in_every_frame():
    clips = np.broadcast_to(
        np.arange(2, dtype=np.uint8)[:, None, None, None, None], (2, 3, 8, 6, 3)
    )
    for seed in range(50):
        rng = np.random.default_rng(seed)
        mixed, targets = mixup_cutmix(clips, np.array([0, 1]), 2, rng, mixup_alpha=0)
        pasted = mixed[0, ..., 0] == 1
        np.testing.assert_array_equal(pasted, np.broadcast_to(pasted[:1], pasted.shape))
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        np.testing.assert_array_equal(pasted[0], rows[:, None] & columns)
        share = 1 - pasted.mean()  # of the labels, without their smoothing
        assert (targets[0, 0] - 0.05) / 0.9 == pytest.approx(share, abs=1e-6)


def test_mixup_is_a_convex_combination():
    for seed in range(20):
        images, targets = mixup_cutmix(
            IMAGES.astype(np.float32), LABELS, 5, np.random.default_rng(seed), cutmix_alpha=0
        )
        lam = kept_share(targets)
        assert images.dtype == targets.dtype == np.float32
        np.testing.assert_allclose(images, lam * IMAGES + (1 - lam) * IMAGES[::-1], atol=1e-3)
        rounded, _ = mixup_cutmix(IMAGES, LABELS, 5, np.random.default_rng(seed), cutmix_alpha=0)
        assert rounded.dtype == np.uint8
        assert np.abs(rounded - images).max() <= 0.5 + 1e-3


def test_targets_are_smoothed_and_sum_to_1():
    for seed in range(50):
        _, targets = mixup_cutmix(IMAGES, LABELS, 5, np.random.default_rng(seed))
        np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
        assert targets.min() == pytest.approx(0.02)
    for options in ({"probability": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}):
        images, targets = mixup_cutmix(IMAGES, LABELS, 5, np.random.default_rng(0), **options)
        np.testing.assert_array_equal(images, IMAGES)
        np.testing.assert_allclose(targets, 0.9 * np.eye(5)[LABELS] + 0.02, rtol=1e-6)


def test_mixing_is_a_pure_function_of_the_generator_and_switches_half_the_time():
    before, cut, draws = IMAGES.copy(), 0, 600
    for seed in range(draws):
        images, _ = mixup_cutmix(IMAGES, LABELS, 5, np.random.default_rng(seed))
        # CutMix takes every pixel from one of the two images, mixup almost none.
        cut += bool(((images[0] == IMAGES[0]) | (images[0] == IMAGES[5])).mean() > 0.9)
    again, _ = mixup_cutmix(IMAGES, LABELS, 5, np.random.default_rng(draws - 1))
    np.testing.assert_array_equal(again, images)
    np.testing.assert_array_equal(IMAGES, before)
    # Mixup with λ within 1/400 of 0 or 1 looks like a cut: Beta(0.8, 0.8) does so in 1.5 %.
    assert cut / draws == pytest.approx(0.5075, abs=4 * (0.25 / draws) ** 0.5)


def test_mixing_is_timms_given_its_draws(timm_data, monkeypatch):
    import torch

    timm = timm_data.mixup
    for seed in range(60):
        cut = seed % 2 == 0
        alphas = {"mixup_alpha": 0.0 if cut else 0.8, "cutmix_alpha": 1.0 if cut else 0.0}
        images, targets = mixup_cutmix(
            IMAGES.astype(np.float32), LABELS, 5, np.random.default_rng(seed), **alphas
        )
        # timm's draws from numpy's global generator, made from a generator in the same state.
        with monkeypatch.context() as patched:
            rng = np.random.default_rng(seed)
            patched.setattr(np.random, "rand", rng.random)
            patched.setattr(np.random, "beta", rng.beta)
            patched.setattr(np.random, "randint", lambda *args, size, rng=rng: rng.integers(*args))
            mix = timm.Mixup(**alphas, label_smoothing=0.1, num_classes=5)
            expected, expected_targets = mix(
                torch.tensor(IMAGES).float().permute(0, 3, 1, 2), torch.tensor(LABELS)
            )
        np.testing.assert_allclose(images, expected.permute(0, 2, 3, 1).numpy(), atol=1e-3)
        np.testing.assert_allclose(targets, expected_targets.numpy(), atol=1e-6)


# -- Repeated augmentation, and the presets.


@pytest.mark.parametrize(("epoch_size", "repeats"), [(12, 3), (13, 3), (14, 3), (2, 3), (7, 1)])
def test_an_epoch_repeats_a_share_of_its_images(epoch_size, repeats):
    epochs = [
        [repeated_example(epoch * epoch_size + i, epoch_size, repeats) for i in range(epoch_size)]
        for epoch in range(3)
    ]
    assert epochs[0] == epochs[1] == epochs[2]  # of another shuffle each
    assert len(set(epochs[0])) == epoch_size  # no copy comes twice
    counts = np.bincount([place for place, _ in epochs[0]])
    assert len(counts) == -(-epoch_size // repeats)
    assert (counts[:-1] == repeats).all()
    assert counts.sum() == epoch_size
    assert {copy for _, copy in epochs[0]} == set(range(min(repeats, epoch_size)))


def test_presets():
    assert (DEIT.erasing, DEIT.mixup, DEIT.cutmix, DEIT.repeats) == (0.25, 0.8, 1.0, 3)
    for preset in (CROP_FLIP, NONE):
        off = (preset.rand_augment, preset.erasing, preset.mixup, preset.cutmix, preset.repeats)
        assert off == (False, 0, 0, 0, 1)
    assert CROP_FLIP.scale == DEIT.scale
    assert (NONE.flip, NONE.scale, NONE.ratio) == (0, (1, 1), (1, 1))
