"""One Grain pipeline for training, one padded batching for evaluation."""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from iared2_jax.data.augment import AugmentOptions, mixup_cutmix
from iared2_jax.data.sources import Source

# More examples than any run sees; batches are addressed by their place in this endless stream.
_ENDLESS = 1 << 40
_MIXING = 1  # sets the randomness of a batch apart from that of its first example

Mix = Callable[[dict[str, np.ndarray], np.random.Generator], dict[str, np.ndarray]]


def train_batches(
    source: Source,
    batch_size: int,
    first_example: int,
    seed: int,
    threads: int = 2,
    mix: Mix | None = None,
) -> grain.IterDataset:
    """Batches of training examples: batch i holds examples first + i B .. first + (i + 1) B - 1.

    Example k is a pure function of (seed, k), so a run that stopped after n examples goes on with
    `first_example=n`, and no state of the iterator has to be saved. With `mix`, a batch is one of
    (seed, its first example) and the batch size.
    """

    def example(index: int) -> dict[str, np.ndarray]:
        return source.train_example(seed, first_example + index)

    def mixed(index: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((seed, first_example + index * batch_size, _MIXING))
        return mix(batch, rng)

    dataset = grain.MapDataset.range(0, _ENDLESS).map(example).batch(batch_size)
    if mix is not None:
        dataset = dataset.map_with_index(mixed)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return dataset.to_iter_dataset(options)


def mixing(augment: AugmentOptions, num_classes: int, smoothing: float) -> Mix | None:
    """Mixup and CutMix of a batch, which gets soft "target"s; None if both are off."""
    if not (augment.mixup or augment.cutmix):
        return None

    def mix(batch: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        images, targets = mixup_cutmix(
            batch["image"],
            batch["label"],
            num_classes,
            rng,
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            smoothing=smoothing,
        )
        return {**batch, "image": images, "target": targets}

    return mix


def eval_batches(arrays: dict[str, Any], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one fixed size; the last is padded with copies of row 0.

    Values are arrays, or whatever has a length and takes an array of indices (`EvalImages`).

    `batch["counted"]` is False on padding: sums must leave those rows out, so that every example
    counts exactly once and one compiled program does for all.
    """
    size = len(next(iter(arrays.values())))
    for first in range(0, size, batch_size):
        rows = np.arange(first, first + batch_size)
        shown = np.where(rows < size, rows, 0)
        batch = {key: values[shown] for key, values in arrays.items()}
        yield {**batch, "counted": rows < size}


def shard_batch(batch: dict[str, Any], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Puts a host batch on the devices, rows split over the mesh."""
    return {key: jax.device_put(value, sharding) for key, value in batch.items()}
