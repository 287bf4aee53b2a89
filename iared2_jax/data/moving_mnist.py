"""Moving MNIST: a digit crosses a cluttered canvas, and the class is which way.

The digits, the clutter and the masks of `cluttered_mnist`. One digit moves in one of eight
directions, a few pixels a frame; the fragments stand still. The canvas is a little wider than
high, as videos are, so that there is something to crop.

One frame cannot tell the class: all it has of it is where the digit is, which in the last frame is
a little more often at the right if it moves to the right. Who knew that place exactly would be
right in 32% of the clips (`tests/test_moving_mnist.py`; guessing: 12.5%).

Clip k of a split is a pure function of (seed, split, k), whatever was made before it.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from iared2_jax.data.cluttered_mnist import (
    DIGIT_SIZE,
    MASK_DILATION,
    SPLITS,
    clutter,
    digits,
    ink_mask,
    scaled,
)

SPEED = (6.0, 10.0)  # px a frame
SIZE = (64, 80)  # of a frame, height and width, px
SPREAD = 12.0  # px, standard deviation of the digit's middle halfway through a clip, each way
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
    digit: UInt8[np.ndarray, "s s"]  # alone, with room for its mask around it
    background: UInt8[np.ndarray, "h w"]
    label: int
    corners: Int[np.ndarray, "t 2"]  # the digit's upper left one in each frame, px down and right

    def path_of(self, patch: np.ndarray) -> np.ndarray:
        """The canvas in each frame [t, h, w], with a patch of the digit's size where that is."""
        side, (frames, _), (height, width) = len(patch), self.corners.shape, SIZE
        around = np.zeros((frames, height + 2 * side, width + 2 * side), patch.dtype)
        # What is further out than its own size is out of sight, however far.
        corners = self.corners.clip(-side, SIZE) + side
        for canvas, (top, left) in zip(around, corners, strict=True):
            canvas[top : top + side, left : left + side] = patch
        return around[:, side:-side, side:-side]

    def frames(self) -> UInt8[np.ndarray, "t h w 3"]:
        """The clip: the digit over the background."""
        grey = np.maximum(self.path_of(self.digit), self.background)
        return np.repeat(grey[..., None], 3, axis=-1)


def _motion(split: str, seed: int, index: int, frames: int) -> _Motion:
    pixels, _ = digits(split)
    rng = np.random.default_rng((seed, SPLITS.index(split), index, _CLIP))
    label = int(rng.integers(NUM_CLASSES))
    chosen = int(rng.integers(len(pixels)))
    side = int(rng.integers(DIGIT_SIZE[0], DIGIT_SIZE[1] + 1))
    speed, middle = rng.uniform(*SPEED), np.array(SIZE) / 2 + rng.normal(0, SPREAD, size=2)
    digit = np.pad(scaled(pixels[chosen], side), math.ceil(MASK_DILATION))
    angle = 2 * math.pi * label / NUM_CLASSES
    step = speed * np.array([math.sin(angle), math.cos(angle)])
    from_middle = np.arange(frames)[:, None] - (frames - 1) / 2
    corners = np.floor(middle + step * from_middle - len(digit) / 2).astype(int)
    return _Motion(digit, clutter(pixels, chosen, side, rng, SIZE), label, corners)


def example(split: str, seed: int, index: int, frames: int = 4) -> dict[str, np.ndarray]:
    """Clip `index` as a training example, {"frames": uint8 [T, 64, 80, 3], "label": int32}."""
    motion = _motion(split, seed, index, frames)
    return {"frames": motion.frames(), "label": np.int32(motion.label)}


def clip(split: str, seed: int, index: int, frames: int = 4) -> Clip:
    """Clip `index` with its masks: the digit's ink, dilated by a disc of 3 px."""
    motion = _motion(split, seed, index, frames)
    return Clip(motion.frames(), motion.label, motion.path_of(ink_mask(motion.digit)))


def load(
    split: str, size: int, seed: int = 0, frames: int = 4
) -> tuple[UInt8[np.ndarray, "n t 64 80 3"], Int[np.ndarray, " n"], Bool[np.ndarray, "n t 64 80"]]:
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
      ((2, 4, 64, 80, 3), (2,), (2, 4, 64, 80))
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    clips = [clip(split, seed, index, frames) for index in range(size)]
    return (
        np.stack([c.frames for c in clips]),
        np.array([c.label for c in clips], np.int32),
        np.stack([c.masks for c in clips]),
    )
