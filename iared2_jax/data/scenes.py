"""What composed scenes have in common: an object at a random place, among parts of others."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8


class Scene(NamedTuple):
    """One image: pixels in [0, 255], its class, and where the object is."""

    image: UInt8[np.ndarray, "h w 3"]
    label: int
    mask: Bool[np.ndarray, "h w"]


def others(
    rng: np.random.Generator, chosen: int, total: int, count: int
) -> Int[np.ndarray, " count"]:
    """Random indices, `count` of 0 .. total - 1, other than `chosen`."""
    return (chosen + rng.integers(1, total, size=count)) % total


def corners(
    rng: np.random.Generator, canvas: tuple[int, int], patch: tuple[int, int], count: int
) -> Int[np.ndarray, "count 2"]:
    """Upper left corners (row, column) at which a patch lies inside of a canvas."""
    room = np.array(canvas) - np.array(patch) + 1
    return rng.integers(0, room, size=(count, 2))


def stacked(
    make: Callable[[int], Scene], count: int
) -> tuple[UInt8[np.ndarray, "n h w 3"], Int[np.ndarray, " n"], Bool[np.ndarray, "n h w"]]:
    """Images, labels and masks of scenes 0 .. count - 1.

    Raises:
      ValueError: on a count below 1.
    """
    if count < 1:
        raise ValueError(f"size must be at least 1, got {count}")
    scenes = [make(index) for index in range(count)]
    return (
        np.stack([s.image for s in scenes]),
        np.array([s.label for s in scenes], np.int32),
        np.stack([s.mask for s in scenes]),
    )
