"""Moving MNIST: a digit crosses a cluttered canvas, and the class is which way.

The digits, the clutter and the masks of `cluttered_mnist`. One digit moves in one of eight
directions, a few pixels a frame; what leaves the canvas at one edge enters it at the opposite one.
The fragments stand still. So one frame says nothing about the class: the digit's place in it is
uniform whichever way it goes, and a model of single frames can only guess (1 of 8).

Clip k of a split is a pure function of (seed, split, k), whatever was made before it.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from iared2_jax.data.cluttered_mnist import CANVAS, SPLITS, clutter, digits, ink_mask, scaled

DIGIT_SIZE = (24, 32)  # side of the scaled 28x28 digit, px, both ends included
SPEED = (2.0, 4.0)  # px a frame
CLASS_NAMES = (
    "right", "down right", "down", "down left", "left", "up left", "up", "up right",
)  # fmt: skip
NUM_CLASSES = len(CLASS_NAMES)
_CLIP = 1  # sets a clip's randomness apart from that of a scene of Cluttered MNIST


class Clip(NamedTuple):
    """Frames in [0, 255], the direction, and where the digit's ink is in each frame."""

    frames: UInt8[np.ndarray, "t h w 3"]
    label: int
    masks: Bool[np.ndarray, "t h w"]


class _Motion(NamedTuple):
    digit: UInt8[np.ndarray, "h w"]  # alone, in the middle of the canvas
    background: UInt8[np.ndarray, "h w"]
    label: int
    offsets: Int[np.ndarray, "t 2"]  # by which the digit is rolled, px down and right

    def moved(self, canvas: np.ndarray) -> np.ndarray:
        """A canvas with the digit in the middle as it is seen in each frame [t, h, w]."""
        shifts = self.offsets.tolist()
        return np.stack([np.roll(canvas, (down, right), (0, 1)) for down, right in shifts])

    def frames(self) -> UInt8[np.ndarray, "t h w 3"]:
        """The clip: the digit over the background."""
        grey = np.maximum(self.moved(self.digit), self.background)
        return np.repeat(grey[..., None], 3, axis=-1)


def _motion(split: str, seed: int, index: int, frames: int) -> _Motion:
    pixels, _ = digits(split)
    rng = np.random.default_rng((seed, SPLITS.index(split), index, _CLIP))
    label = int(rng.integers(NUM_CLASSES))
    chosen = int(rng.integers(len(pixels)))
    side = int(rng.integers(DIGIT_SIZE[0], DIGIT_SIZE[1] + 1))
    speed, start = rng.uniform(*SPEED), rng.uniform(0, CANVAS, size=2)
    digit = np.zeros((CANVAS, CANVAS), np.uint8)
    edge = (CANVAS - side) // 2
    digit[edge : edge + side, edge : edge + side] = scaled(pixels[chosen], side)
    angle = 2 * math.pi * label / NUM_CLASSES
    step = speed * np.array([math.sin(angle), math.cos(angle)])
    offsets = np.floor(start + step * np.arange(frames)[:, None]).astype(int) % CANVAS
    return _Motion(digit, clutter(pixels, chosen, side, rng), label, offsets)


def example(split: str, seed: int, index: int, frames: int = 8) -> dict[str, np.ndarray]:
    """Clip `index` as a training example, {"frames": uint8 [T, 64, 64, 3], "label": int32}."""
    motion = _motion(split, seed, index, frames)
    return {"frames": motion.frames(), "label": np.int32(motion.label)}


def clip(split: str, seed: int, index: int, frames: int = 8) -> Clip:
    """Clip `index` with its masks: the digit's ink, dilated by a disc of 3 px."""
    motion = _motion(split, seed, index, frames)
    return Clip(motion.frames(), motion.label, motion.moved(ink_mask(motion.digit)))


def load(
    split: str, size: int, seed: int = 0, frames: int = 8
) -> tuple[UInt8[np.ndarray, "n t 64 64 3"], Int[np.ndarray, " n"], Bool[np.ndarray, "n t 64 64"]]:
    """The first `size` clips of a split: frames, labels and exact masks.

    Args:
      split: "train", "validation" or "test"; their digits are disjoint.
      size: how many clips; any number can be made.
      seed: another seed makes other clips from the same digits.
      frames: T, of a clip.

    Raises:
      ValueError: on an unknown split or a size below 1.

    Example:
      >>> clips, labels, masks = load("test", size=2, seed=0)
      >>> clips.shape, labels.shape, masks.shape
      ((2, 8, 64, 64, 3), (2,), (2, 8, 64, 64))
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    clips = [clip(split, seed, index, frames) for index in range(size)]
    return (
        np.stack([c.frames for c in clips]),
        np.array([c.label for c in clips], np.int32),
        np.stack([c.masks for c in clips]),
    )
