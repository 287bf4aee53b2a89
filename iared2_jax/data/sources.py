"""The datasets a config can name, behind one small interface."""

import dataclasses
from collections.abc import Callable

import numpy as np

from iared2_jax.data import cluttered_mnist


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset.

    Attributes:
      num_classes, class_names, image_size: what a model has to fit.
      splits: the names that `train_example` and `load` take.
      epoch_size: examples that count as one epoch of training.
      train_example: (seed, index) -> {"image": uint8 [h, w, 3], "label": int32}, a pure function.
      load: (split, size, seed) -> images uint8, labels, masks (bool, or None if there are none).
    """

    num_classes: int
    class_names: tuple[str, ...]
    image_size: int
    splits: tuple[str, ...]
    epoch_size: int
    train_example: Callable[[int, int], dict[str, np.ndarray]]
    load: Callable[[str, int, int], tuple[np.ndarray, np.ndarray, np.ndarray | None]]


SOURCES: dict[str, Source] = {
    "cluttered_mnist": Source(
        num_classes=cluttered_mnist.NUM_CLASSES,
        class_names=cluttered_mnist.CLASS_NAMES,
        image_size=cluttered_mnist.CANVAS,
        splits=cluttered_mnist.SPLITS,
        epoch_size=50_000,  # scenes are made, so this is only a unit
        train_example=lambda seed, index: cluttered_mnist.example("train", seed, index),
        load=cluttered_mnist.load,
    ),
}
