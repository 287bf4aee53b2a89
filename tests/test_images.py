"""Image files: timm's pixels on real photographs, and every bad file refused by name."""

import io
import math
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from iared2_jax.data import images
from iared2_jax.data.images import (
    MAX_PIXELS,
    BadImage,
    eval_transform,
    open_image,
    random_flip,
    random_resized_crop,
)
from iared2_jax.data.inputs import as_inputs
from iared2_jax.errors import UsageError
from iared2_jax.models import input_spec

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
ODD_SIZES = ((457, 301), (301, 457), (225, 225), (640, 223), (97, 1001))  # width, height


def photograph(name: str) -> Image.Image:
    data = pytest.importorskip("skimage.data")
    return Image.fromarray(getattr(data, name)())


def noise(width: int, height: int, channels: tuple[int, ...] = (3,)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, *channels), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A grey PNG that promises width x height pixels and holds none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


# --- The evaluation crop ---


def evaluated(image: Image.Image, size: int, crop_pct: float) -> np.ndarray:
    """timm's evaluation crop, written down straight."""
    scaled = math.floor(size / crop_pct)
    width, height = image.size
    if width < height:
        width, height = scaled, int(scaled * height / width)
    else:
        width, height = int(scaled * width / height), scaled
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.9), (224, 1.0), (384, 1.0)])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_eval_transform_is_timms_on_photographs(name, size, crop_pct):
    photo = photograph(name)
    for image in (photo, *(photo.resize(odd) for odd in ODD_SIZES)):
        pixels = eval_transform(image, size, crop_pct)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, evaluated(image, size, crop_pct))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.9), (224, 0.875), (384, 1.0), (64, 1.25)])
def test_eval_transform_equals_timm_itself(size, crop_pct, interpolation):
    pytest.importorskip("torchvision")
    factory = pytest.importorskip("timm.data.transforms_factory")
    transform = factory.transforms_imagenet_eval(
        size, crop_pct=crop_pct, interpolation=interpolation, normalize=False
    )
    for name in PHOTOGRAPHS:
        photo = photograph(name)
        for image in (photo, *(photo.resize(odd) for odd in ODD_SIZES), photo.resize((1, 1))):
            theirs = transform(image).numpy().transpose(1, 2, 0)
            np.testing.assert_array_equal(
                eval_transform(image, size, crop_pct, interpolation), theirs
            )


class _Draws(random.Random):
    """A NumPy generator as `random`, which timm draws from."""

    def __init__(self, rng):
        super().__init__()
        self.rng = rng

    def uniform(self, low, high):
        return self.rng.uniform(low, high)

    def randint(self, low, high):
        return int(self.rng.integers(low, high + 1))


def test_random_resized_crop_equals_timm_itself(monkeypatch):
    pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm.data.transforms")
    photo = photograph("coffee")
    for seed, size in enumerate(4 * [photo.size, *ODD_SIZES]):  # (97, 1001) takes the fallback
        image = photo.resize(size)
        monkeypatch.setattr(timm, "random", _Draws(np.random.default_rng(seed)))
        crop = timm.RandomResizedCropAndInterpolation(
            96, (0.08, 1), (3 / 4, 4 / 3), interpolation="bicubic"
        )
        ours = random_resized_crop(image, 96, np.random.default_rng(seed))
        np.testing.assert_array_equal(ours, np.asarray(crop(image)))


def test_the_longer_edge_is_truncated_and_half_a_pixel_goes_to_even():
    # 248 x 376.5 -> 376 px: a box that covers 457 / 376 px of the source for each of its own.
    ramp = Image.fromarray(np.tile(np.arange(457) // 2, (301, 1)).astype(np.uint8)).convert("RGB")
    middle = eval_transform(ramp, 224, 0.9, "bilinear")[100, :, 0].astype(float)
    assert np.polyfit(np.arange(224), middle, 1)[0] == pytest.approx(457 / 376 / 2, rel=2e-4)
    columns = Image.fromarray(np.tile(np.arange(7, dtype=np.uint8), (7, 1))).convert("RGB")
    for width, size, first in ((5, 4, 0), (5, 2, 2), (7, 2, 2), (7, 4, 2), (7, 3, 2)):
        image = columns.crop((0, 0, width, width))  # (width - size) / 2 = 0.5, 1.5, 2.5, 1.5, 2
        pixels = eval_transform(image, size, size / width)
        assert pixels[0, :, 0].tolist() == list(range(first, first + size))


def test_what_is_smaller_than_the_crop_is_padded_with_black():
    white = Image.new("RGB", (40, 30), "white")
    pixels = eval_transform(white, 35, 1.25)  # 37 x 28 px of white in 35 x 35
    assert (pixels == 255).all(axis=(1, 2)).nonzero()[0].tolist() == list(range(3, 31))
    assert not pixels[[0, 1, 2, 31, 32, 33, 34]].any()


def test_one_pixel_is_an_image():
    image = open_image(encoded(Image.new("RGB", (1, 1), (9, 120, 255)), "PNG"))
    assert (eval_transform(image, 224, 0.9) == (9, 120, 255)).all()
    rng = np.random.default_rng(0)
    crop = random_resized_crop(image, 32, rng)
    assert (crop == (9, 120, 255)).all()
    assert random_flip(np.asarray(image), rng).shape == (1, 1, 3)


def test_what_cannot_be_transformed_is_said():
    thread = Image.new("RGB", (1, 60_000))
    with pytest.raises(BadImage, match=r"1 x 60000 pixels cannot be resized to 248 x 14880000"):
        eval_transform(thread, 224, 0.9)
    image = Image.new("RGB", (8, 8))
    with pytest.raises(UsageError, match="did you mean 'bicubic'"):
        eval_transform(image, 8, 1.0, "bicubik")
    for size, crop_pct in ((8, 0.0), (8, -1.0), (8, math.nan), (8, 9.0), (0, 1.0)):
        with pytest.raises(UsageError, match=r"crop_pct must be in|size must be"):
            eval_transform(image, size, crop_pct)
    for scale, ratio in (((0.5, 0.1), (1, 1)), ((0, 1), (1, 1)), ((0.1, 1), (2, 1))):
        with pytest.raises(UsageError, match="least, greatest"):
            random_resized_crop(image, 8, np.random.default_rng(0), scale, ratio)


# --- The training crop ---


def test_random_resized_crop_is_a_function_of_the_generator():
    image = noise(75, 50)
    first, again, other = (
        random_resized_crop(image, 32, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("size", [(640, 427), (451, 300), (224, 224), (97, 131)])
def test_random_crops_keep_to_scale_and_ratio(size):
    rng = np.random.default_rng(0)
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    shares = []
    for _ in range(2000):
        left, top, width, height = images._random_box(*size, rng, scale, ratio)
        assert 0 <= left <= left + width <= size[0]
        assert 0 <= top <= top + height <= size[1]
        slack = (1 + 0.5 / width) * (1 + 0.5 / height)  # the box is rounded to pixels
        assert ratio[0] / slack**2 <= width / height <= ratio[1] * slack**2
        shares.append(width * height / (size[0] * size[1]))
        assert scale[0] / slack**2 <= shares[-1] <= scale[1]
    assert min(shares) < 0.1
    assert max(shares) > 0.8


def test_the_fallback_is_the_largest_central_part():
    rng = np.random.default_rng(0)
    two = ((2.0, 2.0), (3 / 4, 4 / 3))  # more than there is: no try succeeds
    assert images._random_box(400, 90, rng, *two) == (140, 0, 120, 90)
    assert images._random_box(90, 400, rng, *two) == (0, 140, 90, 120)
    assert images._random_box(100, 90, rng, *two) == (0, 0, 100, 90)
    assert images._random_box(1, 1, rng, *two) == (0, 0, 1, 1)


@pytest.mark.parametrize("image_size", [(1, 1), (1, 50), (50, 1), (2, 3), (31, 77), (300, 200)])
def test_random_resized_crop_is_always_of_the_size(image_size):
    rng = np.random.default_rng(0)
    for size in (1, 7, 32):
        for _ in range(20):
            pixels = random_resized_crop(noise(*image_size), size, rng)
            assert pixels.shape == (size, size, 3)
            assert pixels.dtype == np.uint8


def test_half_the_images_are_flipped():
    image = np.asarray(noise(4, 2))
    rng = np.random.default_rng(0)
    flipped = 0
    for _ in range(1000):
        result = random_flip(image, rng)
        flipped += not np.array_equal(result, image)
        assert np.array_equal(result, image) or np.array_equal(result, image[:, ::-1])
    assert 450 < flipped < 550
    np.testing.assert_array_equal(random_flip(image, rng, 1.0), image[:, ::-1])
    np.testing.assert_array_equal(random_flip(image, rng, 0.0), image)


# --- Files ---


def test_a_source_is_a_path_or_the_content(tmp_path):
    image = noise(20, 10)
    path = tmp_path / "photo.bin"  # the name does not count
    path.write_bytes(encoded(image, "PNG"))
    for source in (path, str(path), path.read_bytes()):
        opened = open_image(source)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(image))
    jpeg = encoded(image, "JPEG", quality=90)
    with Image.open(io.BytesIO(jpeg)) as reference:
        np.testing.assert_array_equal(np.asarray(open_image(jpeg)), np.asarray(reference))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "PNG"),
        ("L", "JPEG"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("CMYK", "JPEG"),
    ],
)
def test_every_mode_becomes_rgb_as_pillow_converts_it(mode, kind):
    colours = noise(40, 30, (4,))
    image = colours.convert("RGB").convert("P") if mode == "P" else colours.convert(mode)
    content = encoded(image, kind)
    with Image.open(io.BytesIO(content)) as reference:
        assert reference.mode == mode
        expected = np.asarray(reference.convert("RGB"))
    opened = open_image(content)
    assert opened.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(opened), expected)


def test_cmyk_is_neither_inverted_nor_grey():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = np.asarray(open_image(encoded(red, "JPEG", quality=100)))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("transparency", [0, b"\x00\x80\xff"])
def test_a_palette_with_transparency_keeps_its_colours(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    opened = open_image(encoded(image, "PNG", transparency=transparency))
    assert np.asarray(opened).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


def test_16_bit_grey_is_scaled_and_not_clipped():
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    opened = np.asarray(open_image(encoded(Image.fromarray(ramp), "PNG")))
    expected = np.rint(ramp / 257)  # 0..65535 onto 0..255
    for channel in range(3):
        np.testing.assert_array_equal(opened[..., channel], expected)
    upright = open_image(encoded(Image.fromarray(ramp), "PNG"), exif_rotation=True)
    np.testing.assert_array_equal(np.asarray(upright), opened)
    spec = input_spec.images(256)  # and handed in as an image
    as_image = as_inputs(Image.fromarray(ramp), spec)
    np.testing.assert_array_equal(as_image, as_inputs(opened, spec))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_an_option(kind):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    content = encoded(image, kind, exif=exif)
    as_stored = np.asarray(open_image(content))
    assert as_stored.shape == (16, 32, 3)
    assert as_stored[:, :16].min() > 250
    upright = np.asarray(open_image(content, exif_rotation=True))
    assert upright.shape == (32, 16, 3)
    assert upright[:16].min() > 250
    assert upright[16:].max() < 5


def _gif() -> bytes:
    return encoded(noise(8, 8), "GIF", save_all=True, append_images=[noise(8, 8).rotate(90)])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(b"", "is an empty file", id="empty"),
        pytest.param(b"this is not a picture\n", "is neither JPEG nor PNG", id="text"),
        pytest.param(b"\xff\xd8", "is neither JPEG nor PNG", id="two bytes"),
        pytest.param(_gif(), "is neither JPEG nor PNG", id="animated GIF"),
        pytest.param(encoded(noise(8, 8), "BMP"), "is neither JPEG nor PNG", id="BMP"),
        pytest.param(b"\xff\xd8\xff" + 64 * b"x", "is damaged", id="only magic JPEG"),
        pytest.param(b"\x89PNG\r\n\x1a\n", "is damaged", id="only magic PNG"),
        pytest.param(png_header(8, 8), "is damaged", id="PNG without pixels"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence_with_its_name(tmp_path, content, why):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    for source, name in ((path, ""), (str(path), ""), (content, "n01440764/cat.jpg")):
        with pytest.raises(BadImage, match=why) as caught:
            open_image(source, name)
        assert (name or str(path)) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert issubclass(BadImage, UsageError)


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow cannot write WEBP")
def test_webp_is_refused():
    with pytest.raises(BadImage, match="neither JPEG nor PNG"):
        open_image(encoded(noise(8, 8), "WEBP"))


def test_what_is_no_file_is_refused(tmp_path):
    missing = tmp_path / "missing.jpg"
    with pytest.raises(BadImage, match=r"missing.jpg cannot be read \(No such file"):
        open_image(missing)
    with pytest.raises(BadImage, match="cannot be read"):
        open_image(tmp_path)


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {})]
)
def test_a_truncated_file_is_never_half_grey(kind, options):
    image = noise(40, 30)
    content = encoded(image, kind, **options)
    whole = np.asarray(open_image(content))
    refused = 0
    for length in range(0, len(content), 7):
        try:
            opened = np.asarray(open_image(content[:length]))
        except BadImage:
            refused += 1
        else:  # only what stands behind the pixels is missing
            np.testing.assert_array_equal(opened, whole)
    assert refused >= len(range(0, len(content), 7)) - 4


def test_pillows_switch_for_truncated_files_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UsageError, match="LOAD_TRUNCATED_IMAGES is on"):
        open_image(encoded(noise(8, 8), "JPEG"))


@pytest.mark.parametrize("size", [(7072, 7072), (10_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(size):
    # Warnings are errors here: Pillow's own, above 89 million pixels, would fail this.
    start = time.perf_counter()
    with pytest.raises(BadImage, match=rf"bomb.png has {size[0]} x {size[1]} pixels, more than"):
        open_image(png_header(*size), "bomb.png")
    assert time.perf_counter() - start < 0.5  # decoding the second would take 3 s


def test_the_largest_allowed_image_is_not_refused_by_its_size():
    assert MAX_PIXELS == 10_000 * 5_000
    with pytest.raises(BadImage, match="is damaged"):  # it holds no pixels
        open_image(png_header(10_000, 5_000))


def test_a_large_jpeg_is_refused_by_its_header():
    content = bytearray(encoded(noise(16, 16), "JPEG"))
    frame = content.index(b"\xff\xc0") + 5  # SOF0: length, precision, height, width
    content[frame : frame + 4] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(BadImage, match="60000 x 60000"):
        open_image(bytes(content))


def test_a_photograph_goes_from_file_to_pixels():
    data = pytest.importorskip("skimage.data")
    path = Path(data.__file__).parent / "rocket.jpg"
    pixels = eval_transform(open_image(path), 224, 0.9)
    np.testing.assert_array_equal(pixels, evaluated(photograph("rocket"), 224, 0.9))
