"""One Grain pipeline for training, one padded batching for evaluation."""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from iared2_jax.data.sources import Source
from iared2_jax.typing import Array, Norm

# More examples than any run sees; batches are addressed by their place in this endless stream.
_ENDLESS = 1 << 40


def train_batches(
    source: Source,
    batch_size: int,
    first_example: int,
    seed: int,
    image_size: int,
    threads: int = 2,
) -> grain.IterDataset:
    """Batches of training examples: batch i holds examples first + i B .. first + (i + 1) B - 1.

    Example k is a pure function of (seed, k), so a run that stopped after n examples goes on with
    `first_example=n`, and no state of the iterator has to be saved.
    """

    def example(index: int) -> dict[str, np.ndarray]:
        item = source.train_example(seed, first_example + index)
        return {**item, "image": resized(item["image"], image_size)}

    dataset = grain.MapDataset.range(0, _ENDLESS).map(example).batch(batch_size)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return dataset.to_iter_dataset(options)


def resized(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """`image` at `size` px, bicubic; itself if it has that size."""
    if image.shape[0] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def eval_batches(arrays: dict[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one fixed size; the last is padded with copies of row 0.

    `batch["counted"]` is False on padding: sums must leave those rows out, so that every example
    counts exactly once and one compiled program does for all.
    """
    size = len(next(iter(arrays.values())))
    for first in range(0, size, batch_size):
        rows = np.arange(first, first + batch_size)
        batch = {key: values[np.where(rows < size, rows, 0)] for key, values in arrays.items()}
        yield {**batch, "counted": rows < size}


def normalize(images: UInt8[Array, "b h w 3"], norm: Norm) -> Float[Array, "b h w 3"]:
    """Pixels 0..255 to (x / 255 - mean) / std, on the device."""
    mean, std = (jnp.asarray(values, jnp.float32) for values in norm)
    return (images.astype(jnp.float32) / 255 - mean) / std


def shard_batch(batch: dict[str, Any], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Puts a host batch on the devices, rows split over the mesh."""
    return {key: jax.device_put(value, sharding) for key, value in batch.items()}
