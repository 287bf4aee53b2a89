"""One Grain pipeline for training, one padded batching for evaluation."""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from iared2_jax.data.augment import AugmentOptions, mixup_cutmix
from iared2_jax.data.datasets import Dataset

# More examples than any run sees; batches are addressed by their place in this endless stream.
_ENDLESS = 1 << 40
_MIXING = 1  # sets the randomness of a batch apart from that of its first example

Mix = Callable[[dict[str, np.ndarray], np.random.Generator], dict[str, np.ndarray]]


def train_batches(
    source: Dataset,
    batch_size: int,
    first_example: int,
    seed: int,
    threads: int = 2,
    mix: Mix | None = None,
    host: int = 0,
    hosts: int = 1,
) -> grain.IterDataset:
    """Batches of training examples: batch i holds examples first + i B .. first + (i + 1) B - 1.

    Example k is a pure function of (seed, k), so a run that stopped after n examples goes on with
    `first_example=n`, and no state of the iterator has to be saved. With `mix`, a batch is one of
    (seed, its first example, the batch size and the host).

    Args:
      batch_size: B, over all hosts.
      mix: mixes a host's rows of a batch (see `mixing`).
      host, hosts: this host gets rows host B / hosts and on of every batch; B / hosts of them.

    Raises:
      ValueError: the hosts do not divide the batch.
    """
    rows, rest = divmod(batch_size, hosts)
    if rest or not 0 <= host < hosts:
        raise ValueError(f"host {host} of {hosts} cannot have its share of {batch_size} examples")

    def example(index: int) -> dict[str, np.ndarray]:
        batch, row = divmod(index, rows)
        return source.train_example(seed, first_example + batch * batch_size + host * rows + row)

    def mixed(index: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        first = first_example + index * batch_size + host * rows
        return mix(batch, np.random.default_rng((seed, first, _MIXING)))

    dataset = grain.MapDataset.range(0, _ENDLESS).map(example).batch(rows)
    if mix is not None:
        dataset = dataset.map_with_index(mixed)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return dataset.to_iter_dataset(options)


def mixing(augment: AugmentOptions, num_classes: int, smoothing: float) -> Mix | None:
    """Mixup and CutMix of a batch, which gets soft "target"s; None if both are off."""
    if not (augment.mixup or augment.cutmix):
        return None

    def mix(batch: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Images with each other, labels likewise."""
        images, targets = mixup_cutmix(
            batch["input"],
            batch["label"],
            num_classes,
            rng,
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            smoothing=smoothing,
        )
        return {**batch, "input": images, "target": targets}

    return mix


def eval_batches(arrays: dict[str, Any], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one fixed size; the last is padded with copies of row 0.

    Values are arrays, or whatever has a length and takes an array of indices (`EvalInputs`).

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
