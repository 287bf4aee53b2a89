"""What is timed: a model, images, and thresholds under which they keep so many tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iared2_jax import count_flops, create_model, load_model
from iared2_jax.data.datasets import open_dataset
from iared2_jax.data.request import DataRequest
from iared2_jax.token_reduction.model import KEEP_ALL, IARed2
from iared2_jax.weights.files import read_tensors

# Mean share kept in groups 1, 2, 3: what the paper's FLOPs come to with a first group that keeps
# all (DeiT-S: 0.726 of the dense multiply-adds, interpreters included).
KEPT = (1.0, 0.70, 0.45)
# How much images differ: standard deviation of the share that the second group keeps.
SPREADS = {"even": 0.08, "uneven": 0.15}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Images [M, H, W, 3], per-image thresholds [M, D], and the tokens they keep [M, D]."""

    module: IARed2
    variables: Mapping[str, Any]
    images: np.ndarray
    thresholds: np.ndarray
    counts: np.ndarray
    source: str  # where the counts come from, for the report

    @property
    def possible(self) -> float:
        """Speed-up if time went by multiply-adds: dense full FLOPs over ours, per-image counts."""
        ours = count_flops(self.module, tuple(self.counts.T)).full
        return count_flops(self.module).full / float(np.mean(ours))

    def rows(self, first: int, last: int) -> "Workload":
        """Images `first` to `last`, starting over if there are fewer."""
        rows = np.arange(first, last) % len(self.images)
        return dataclasses.replace(
            self,
            images=self.images[rows],
            thresholds=self.thresholds[rows],
            counts=self.counts[rows],
        )


def drawn_counts(
    num_images: int, num_patches: int, spread: float, kept: Sequence[float] = KEPT, seed: int = 0
) -> np.ndarray:
    """Tokens per image and group [M, D]: shares from a beta distribution, nested.

    The second group keeps Beta(mean kept[1], sd `spread`) of the patches, each later group its
    share of what is left, times 1 + 0.15 * a normal number; the first keeps all if kept[0] is 1.
    """
    rng = np.random.default_rng(seed)
    shares = np.ones((num_images, len(kept)))
    before = np.ones(num_images)
    for group, mean in enumerate(kept):
        if mean < 1 and (before == 1).all():
            size = mean * (1 - mean) / spread**2 - 1
            before = rng.beta(mean * size, (1 - mean) * size, num_images)
        elif mean < 1:
            noise = 1 + 0.15 * rng.standard_normal(num_images)
            before = before * np.clip(mean / kept[group - 1] * noise, 0, 1)
        shares[:, group] = before
    return np.clip(np.round(shares * num_patches), 1, num_patches).astype(int)


def thresholds_for(
    module: IARed2, variables: Mapping[str, Any], images: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Per-image thresholds [M, D] under which image i keeps about counts[i, j] tokens in group j.

    Each threshold lies in the widest gap between neighbouring scores within two ranks of the
    wanted one, so that rounding moves no token across it. Returns them and the counts they give.
    """

    @jax.jit
    def scores(variables, images, thresholds):
        return jnp.stack(module.apply(variables, images, thresholds)[1].scores, axis=1)

    n = module.input_spec.num_patches
    thresholds = np.full((len(images), module.num_groups), KEEP_ALL, np.float32)
    actual = np.full_like(counts, n)
    size = min(16, len(images))
    for group in range(module.num_groups):
        if (counts[:, group] >= n).all():
            continue
        seen = []
        for first in range(0, len(images), size):  # the last piece may overlap the one before
            rows = slice(min(first, len(images) - size), None)
            part = np.asarray(scores(variables, images[rows][:size], thresholds[rows][:size]))
            seen.append(part[first - rows.start :, group])
        for image, row in enumerate(np.concatenate(seen)):
            ordered = -np.sort(-row)
            alive = int((ordered > 0).sum())
            wanted = min(counts[image, group], alive)
            around = np.arange(max(1, wanted - 2), min(alive - 1, wanted + 2) + 1)
            if wanted == alive or not len(around):
                actual[image, group] = alive
                continue
            best = int(around[np.argmax(ordered[around - 1] - ordered[around])])
            thresholds[image, group] = (ordered[best - 1] + ordered[best]) / 2
            actual[image, group] = best
    return thresholds, actual


def synthetic(
    model: str,
    num_images: int,
    spread: str,
    kept: Sequence[float] = KEPT,
    dtype: Any = jnp.float32,
    **options: Any,
) -> Workload:
    """A model with random weights on noise, its counts from a stated distribution.

    options: of `create_model`, e.g. image_size.
    """
    module, variables = create_model(model, groups=len(kept), dtype=dtype, **options)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((num_images, *module.input_spec.shape), np.float32)
    counts = drawn_counts(num_images, module.input_spec.num_patches, SPREADS[spread], kept)
    thresholds, counts = thresholds_for(module, variables, images, counts)
    shares = "/".join(f"{share:g}" for share in kept)
    source = f"random weights; counts drawn: means {shares}, sd {SPREADS[spread]}"
    return Workload(module, variables, images, thresholds, counts, source)


def evaluation_images(path: Path, num_images: int, dtype: Any = jnp.float32):
    """A run's module and variables, normalised evaluation images, their labels, and its config."""
    module, variables = load_model(path)
    module = module.clone(backbone=module.backbone.clone(dtype=dtype))
    config = read_tensors(path)[1]["config"]
    request = DataRequest(
        module.input_spec,
        path=config.get("data.path", ""),
        sampling_rate=config.get("data.sampling_rate", DataRequest.sampling_rate),
    )
    source = open_dataset(config["data.name"], request)
    pixels, labels, _ = source.load(config["data.eval_split"], num_images, config["data.seed"])
    images = module.input_spec.normalize(jnp.asarray(pixels[:num_images]))
    return module, variables, np.asarray(images), labels, config


def from_checkpoint(path: Path, num_images: int, dtype: Any = jnp.float32) -> Workload:
    """A run's model on its own evaluation images, under its own threshold."""
    module, variables, images, _, config = evaluation_images(path, num_images, dtype)
    # The key of files from before the sections.
    threshold = config.get("reduction.threshold", config.get("threshold"))
    keep = jax.jit(lambda v, x: module.apply(v, x, threshold)[1].keep)
    counts = np.concatenate(
        [
            np.stack([k.sum(-1) for k in map(np.asarray, keep(variables, images[i : i + 32]))], 1)
            for i in range(0, len(images), 32)
        ]
    )
    thresholds = np.full(counts.shape, threshold, np.float32)
    about = f"{config['name']}, trained; counts of its {config['data.eval_split']} images"
    return Workload(module, variables, images, thresholds, counts, about)
