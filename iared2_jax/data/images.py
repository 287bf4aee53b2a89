"""Image files to pixels: safe opening, timm's evaluation crop, torchvision's training crop.

An image file comes from anyone, so what is opened is decided from its first bytes, and how large
it may become from its header, before a pixel is decoded.
"""

import math
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from iared2_jax.errors import DataError, UsageError, nearest
from iared2_jax.models.input_spec import normalize as normalize  # where it was in 0.1

MAX_PIXELS = 50_000_000  # the largest image that is decoded, or made by a resize

# Pillow's own classes and not `Image.open`: that warns of a decompression bomb, or raises, before
# the header can be looked at, and opens JPEGs with a second picture behind the first as MPO.
_READERS = {b"\xff\xd8\xff": JpegImageFile, b"\x89PNG\r\n\x1a\n": PngImageFile}
# What Pillow's readers raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, struct.error, zlib.error)
_TRIES = 10  # random crops drawn before the central one is taken


class BadImage(DataError):
    """An image file that cannot be used; the message names it and says why."""


def open_image(
    source: str | Path | bytes, name: str = "", exif_rotation: bool = False
) -> Image.Image:
    """The picture of a JPEG or PNG file, in RGB.

    Colours become what `.convert("RGB")` of Pillow makes of them: transparency is dropped, an ICC
    profile is not applied. Only 16-bit grey differs: Pillow would clip it to white, here it is
    round(value / 257). (Pillow itself reads 16-bit colour by its high byte.) Of an animated PNG it
    is the default picture.

    Args:
      source: the path of the file, or its content.
      name: what errors call the image; the path by default.
      exif_rotation: turn the picture upright by its EXIF orientation. Off by default, because the
        ImageNet loaders of timm and torchvision ignore it, and published accuracies with them.

    Returns:
      The picture, decoded; the file is closed.

    Raises:
      BadImage: if the file cannot be read, is neither JPEG nor PNG, has more than `MAX_PIXELS`
        pixels, or is truncated or damaged.
      UsageError: if `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is on.
    """
    return to_rgb(_opened(source, name, exif_rotation))


def open_cutout(path: str | Path) -> UInt8[np.ndarray, "h w 4"]:
    """A PNG's colours and alpha, cropped to what is not wholly transparent.

    Raises:
      BadImage: as `open_image`; or the file has no alpha, or one that shows nothing or hides
        nothing, so that it does not say where the object is.
    """
    image = _opened(path)
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        raise BadImage(f"{path} has no alpha channel: a cut-out is a PNG whose alpha is the object")
    pixels = np.asarray(image.convert("RGBA"))
    rows, columns = (np.flatnonzero(pixels[..., 3].any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise BadImage(f"{path} is transparent everywhere: there is no object in it")
    if pixels[..., 3].min() == 255:
        raise BadImage(f"{path} is opaque everywhere: its alpha does not say where the object is")
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def open_map(path: str | Path, size: tuple[int, int]) -> Image.Image:
    """A grey PNG (or JPEG), in RGB, that says how much each pixel of an image matters: 0 to 255.

    Args:
      size: width and height of its image, px.

    Raises:
      BadImage: as `open_image`; or it is in colour, or of another size than its image.
    """
    image = _opened(path)
    if not image.mode.startswith(("L", "I", "1")):
        raise BadImage(f"{path} is a picture in {image.mode}, but a map must be grey")
    if image.size != size:
        raise BadImage(
            f"{path} is {image.width} x {image.height} px, but its image is {size[0]} x {size[1]}: "
            "a map must be as large as its image"
        )
    return to_rgb(image)


def _opened(source: str | Path | bytes, name: str = "", exif_rotation: bool = False) -> Image.Image:
    """The decoded picture, in the mode of its file; see `open_image`."""
    name = name or ("the image" if isinstance(source, bytes) else str(source))
    if ImageFile.LOAD_TRUNCATED_IMAGES:  # Pillow has no such switch for one image alone
        raise UsageError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which turns truncated images half grey"
            " without an error: set it to False"
        )
    try:
        with BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
            magic = stream.read(8)
            stream.seek(0)
            readers = [_READERS[start] for start in _READERS if magic.startswith(start)]
            if not readers:
                raise BadImage(f"{name} is {'neither JPEG nor PNG' if magic else 'an empty file'}")
            image = readers[0](stream)  # reads the header
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(
                    f"{name} has {image.width} x {image.height} pixels, more than the"
                    f" {MAX_PIXELS / 1e6:g} million allowed"
                )
            image.load()
            return ImageOps.exif_transpose(image) if exif_rotation else image
    except BadImage:
        raise
    except _DAMAGE as error:
        unread = isinstance(error, OSError) and error.errno is not None  # by the operating system
        why = f"cannot be read ({error.strerror})" if unread else f"is damaged ({error})"
        raise BadImage(f"{name} {why}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in RGB, its 16-bit grey scaled to 8 bits (Pillow itself would clip it to white)."""
    if image.mode.startswith("I"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # 65535 = 257 * 255: no ties
        image = Image.fromarray(grey.astype(np.uint8))
    if "transparency" in image.info:  # changes no pixel in RGB, but Pillow may warn of it
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def eval_transform(
    image: Image.Image,
    size: int | tuple[int, int],
    crop_pct: float,
    interpolation: str = "bicubic",
    name: str = "the image",
) -> UInt8[np.ndarray, "h w 3"]:
    """The centre of an RGB image as timm evaluates it: the shorter edge resized, then a crop.

    The shorter edge becomes floor(size / crop_pct) px, the longer one keeps the aspect, rounded
    down. Where that is smaller than the crop (crop_pct > 1) the rest is black. For a crop that is
    not square, the image becomes the smallest of its aspect that covers floor(size / crop_pct).

    Args:
      image: an RGB image of any size.
      size: of the result, px: its side, or (height, width).
      crop_pct: share of the shorter edge that is kept, from the model's timm config.
      interpolation: "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos".
      name: what errors call the image.

    Returns:
      The pixels, 0..255.

    Raises:
      UsageError: if `size`, `crop_pct` or `interpolation` cannot be used.
      BadImage: if the image is so elongated that it would pass `MAX_PIXELS` once resized.

    Source:
      timm 1.x, `transforms_imagenet_eval` with crop_mode "center"; torchvision's `Resize` and
      `CenterCrop` on PIL images.
    """
    method = _resampling(interpolation)
    height, width = _height_and_width(size)
    if not 0 < crop_pct <= min(height, width):
        raise UsageError(f"crop_pct must be in (0, size], got {crop_pct} for the size {size}")
    w, h = _covering(image.size, math.floor(width / crop_pct), math.floor(height / crop_pct))
    if w * h > MAX_PIXELS:
        raise BadImage(
            f"{name} of {image.width} x {image.height} pixels cannot be resized to"
            f" {w} x {h}, more than the {MAX_PIXELS / 1e6:g} million pixels allowed"
        )
    image = image.resize((w, h), method)
    left, top = _margin(w, width), _margin(h, height)
    return np.array(image.crop((left, top, left + width, top + height)))  # black where outside


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UsageError(f"size must be >= 1, got {size}")
    return height, width


def _covering(image: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """The smallest size of the image's aspect that covers `width` x `height`, as timm rounds it."""
    if width == height:
        long = int(width * max(image) / min(image))
        return (width, long) if image[0] <= image[1] else (long, width)
    ratio = min(image[0] / width, image[1] / height)
    return round(image[0] / ratio), round(image[1] / ratio)


def _margin(length: int, size: int) -> int:
    """What torchvision cuts off before a centred crop; negative where it pads."""
    # Python's round, and so torchvision's, takes a half to the even neighbour.
    return round((length - size) / 2) if length >= size else -((size - length) // 2)


def _resampling(interpolation: str) -> Image.Resampling:
    known = {method.name.lower(): method for method in Image.Resampling}
    if interpolation not in known:
        raise UsageError(f"no interpolation {interpolation!r}{nearest(interpolation, known)}")
    return known[interpolation]


def random_resized_crop(
    image: Image.Image,
    size: int | tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
) -> UInt8[np.ndarray, "h w 3"]:
    """A random part of an RGB image, resized: the usual ImageNet training crop.

    Args:
      image: an RGB image of any size.
      size: of the result, px: its side, or (height, width).
      rng: where the randomness comes from; the result is a pure function of its state.
      scale: least and greatest area of the part, as a share of the image.
      ratio: least and greatest width / height of the part, drawn evenly in its logarithm.
      interpolation: as in `eval_transform`.

    Returns:
      The pixels, 0..255.

    Raises:
      UsageError: if an argument cannot be used.

    Source:
      Szegedy et al., "Going Deeper with Convolutions" (2015), section 6; torchvision's and timm's
      `RandomResizedCrop`: 10 tries, then the largest central part within `ratio`.
    """
    method = _resampling(interpolation)
    height, width = _height_and_width(size)
    if not (0 < scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1]):
        raise UsageError(
            f"scale and ratio must be (least, greatest) above 0; got {scale} and {ratio}"
        )
    left, top, w, h = _random_box(*image.size, rng, scale, ratio)
    # Cropped first: resize(box=...) would let pixels from outside the box into its edges.
    part = image.crop((left, top, left + w, top + h))
    return np.array(part.resize((width, height), method))


def _random_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part of a `width` x `height` image."""
    for _ in range(_TRIES):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(rng.integers(free + 1)) for free in (height - h, width - w))
            return left, top, w, h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def random_flip(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, probability: float = 0.5
) -> UInt8[np.ndarray, "h w 3"]:
    """`image`, or with `probability` its mirror image (left and right exchanged)."""
    return np.ascontiguousarray(image[:, ::-1]) if rng.random() < probability else image


def with_channels(
    pixels: UInt8[np.ndarray, "*b h w 3"], channels: int
) -> UInt8[np.ndarray, "*b h w c"]:
    """Colour pixels with as many channels as a model takes: 3 as they are, 1 as Pillow's grey.

    Grey is (299 R + 587 G + 114 B) / 1000, rounded as `.convert("L")` does.

    Raises:
      UsageError: another number of channels, which no image file has.
    """
    if channels == 3:
        return pixels
    if channels != 1:
        raise UsageError(
            f"images have 1 or 3 channels, the model takes {channels}: set config.model.channels"
        )
    weights = np.array([19595, 38470, 7471], np.uint32)  # of 65536
    return ((pixels @ weights + 0x8000) >> 16).astype(np.uint8)[..., None]
