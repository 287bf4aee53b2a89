"""Encoded images, from a folder or from records, as training examples and evaluation images."""

import copy
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from iared2_jax.data.augment import rand_augment, random_erasing, repeated_example
from iared2_jax.data.images import (
    eval_transform,
    open_image,
    open_map,
    random_flip,
    random_resized_crop,
    with_channels,
)
from iared2_jax.data.request import DataRequest
from iared2_jax.errors import DataError

log = logging.getLogger(__name__)

BAD_IN_A_ROW = 100  # unreadable images that end a run whatever the share
EXAMPLE = 2  # sets an example's randomness apart from its epoch's order (and from mixing)
THREADS = 8  # that decode evaluation images


class BadExamples:
    """Counts training files that cannot be used, and gives up when they are too many.

    kind: what errors call them.
    """

    def __init__(self, share: float, total: int, kind: str = "images"):
        self._kind = kind
        self._allowed = max(1, int(share * total)) if share else 0
        self._rows: set[int] = set()
        self._in_a_row = 0
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """How many there were so far."""
        return len(self._rows)

    def good(self) -> None:
        """Counts one that was readable."""
        with self._lock:
            self._in_a_row = 0

    def bad(self, row: int, error: DataError) -> None:
        """Counts one that was not; warns once for each.

        Raises:
          DataError: they are more than the share that is allowed, or too many in a row.
        """
        with self._lock:
            self._in_a_row += 1
            if row not in self._rows:
                self._rows.add(row)
                log.warning("training %s: another takes its place: %s", self._kind, error)
            if len(self._rows) > self._allowed or self._in_a_row >= BAD_IN_A_ROW:
                raise type(error)(
                    f"{len(self._rows)} training {self._kind} cannot be used, the last one because "
                    f"{error}: mend them, or raise config.data.bad_share"
                ) from error

    def first_good(self, order: np.ndarray, place: int, read: Callable[[int], Any]) -> Any:
        """`read(row)` of the first row of an epoch's order, from `place` on, that can be used.

        Raises:
          DataError: too many could not be used.
        """
        while True:
            row = int(order[place])
            try:
                found = read(row)
            except DataError as error:
                self.bad(row, error)
                place = (place + 1) % len(order)
            else:
                self.good()
                return found


class ImageFiles:
    """Records {"image": bytes, "label", "file_name"} of a split, made into pixels.

    A split also has `class_names`, `label(i)`, for less than a whole record where it can, and
    `digest()`, which changes with its labels.

    Where the model takes maps, each image's comes with it, through the same crop and flip (and what
    else moves its pixels): <request.maps>/<split>/<file_name, as .png>.
    """

    def __init__(self, records: Sequence, request: DataRequest, split: str = "train"):
        self._records, self._request = records, request
        self._maps = Path(request.maps, split) if request.maps else None
        self.class_names: tuple[str, ...] = tuple(records.class_names)
        self._bad = BadExamples(request.bad_share, len(records))

    def __len__(self) -> int:
        return len(self._records)

    @property
    def content(self) -> str:
        """A digest of the records' names and labels, or of what stands for them."""
        return self._records.digest()

    def train_example(self, seed: int, index: int) -> dict[str, np.ndarray]:
        """Example `index` of an endless stream of shuffled epochs; a pure function of both.

        An unreadable image is replaced by the next readable one of its epoch.

        Raises:
          BadImage: too many were unreadable.
        """
        augment, size = self._request.augment, len(self)
        epoch, k = divmod(index, size)
        place, _ = repeated_example(k, size, augment.repeats)
        order = shuffled(size, seed, epoch)
        record, image, image_map = self._bad.first_good(order, place, self._opened)
        rng = np.random.default_rng((seed, index, EXAMPLE))
        same_draws = copy.deepcopy(rng)
        pixels = self._augmented(image, rng)
        moved = image_map and self._augmented(image_map, same_draws, is_map=True)
        return {"input": self._joined(pixels, moved), "label": np.int32(record["label"])}

    def _opened(self, row: int) -> tuple[dict[str, Any], Image.Image, Image.Image | None]:
        record = self._records[row]
        image = open_image(record["image"], record["file_name"])
        if self._maps is None:
            return record, image, None
        path = (self._maps / record["file_name"]).with_suffix(".png")
        return record, image, open_map(path, image.size)

    def _augmented(
        self, image: Image.Image, rng: np.random.Generator, is_map: bool = False
    ) -> UInt8[np.ndarray, "h w 3"]:
        """An image as it is trained on; a map goes where its image goes, its values stay."""
        spec, augment = self._request.spec, self._request.augment
        pixels = random_resized_crop(image, spec.size, rng, augment.scale, augment.ratio)
        pixels = random_flip(pixels, rng, augment.flip)
        if augment.rand_augment:
            # What comes in from outside the image is the mean, and matters nothing.
            grey = tuple(round(255 * mean) for mean in np.broadcast_to(spec.norm[0], 3))
            fill = (0, 0, 0) if is_map else grey
            moved = rand_augment(Image.fromarray(pixels), rng, fill=fill, moves_only=is_map)
            pixels = np.array(moved)
        if augment.erasing and not is_map:
            pixels = random_erasing(pixels, rng, spec.norm, augment.erasing)
        return pixels

    def evaluation(self, size: int = 0) -> tuple["EvalInputs", np.ndarray]:
        """`size` images, evenly spread over the split, as they are evaluated, and their classes.

        size: 0: all of them.
        """
        rows = evenly_spread(len(self), size)
        with ThreadPoolExecutor(THREADS) as pool:
            labels = pool.map(self._records.label, rows.tolist())
            return EvalInputs(self._evaluated, rows), np.fromiter(labels, np.int32, len(rows))

    def _evaluated(self, row: int) -> UInt8[np.ndarray, "h w c"]:
        record, image, image_map = self._opened(row)
        spec, name = self._request.spec, record["file_name"]
        pixels = eval_transform(image, spec.size, spec.crop_pct, name=name)
        moved = image_map and eval_transform(image_map, spec.size, spec.crop_pct, name=name)
        return self._joined(pixels, moved)

    def _joined(
        self, pixels: UInt8[np.ndarray, "h w 3"], moved: UInt8[np.ndarray, "h w 3"] | None
    ) -> UInt8[np.ndarray, "h w c"]:
        """An image in the model's channels, and behind them its map, if it has one."""
        pixels = with_channels(pixels, self._request.spec.channels)
        return pixels if moved is None else np.concatenate([pixels, moved[..., :1]], axis=-1)


def evenly_spread(total: int, size: int) -> np.ndarray:
    """`size` rows of a split, which may be in the order of classes; 0: all of them."""
    count = min(size, total) if size else total
    return np.arange(count) * total // count


class EvalInputs:
    """Evaluation images or clips that are decoded when they are indexed, as an array would be.

    read: from a row of the split to its pixels.
    """

    def __init__(self, read: Callable[[int], np.ndarray], rows: np.ndarray):
        self._read, self._rows = read, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, which: Any) -> UInt8[np.ndarray, "b ..."]:
        """Pixels of an index, a slice or an array of indices.

        Raises:
          DataError: one of them cannot be used; it is never left out.
        """
        rows = self._rows[which]
        if not rows.ndim:
            return self._read(int(rows))
        with ThreadPoolExecutor(THREADS) as pool:
            return np.stack(list(pool.map(self._read, rows.tolist())))


@functools.lru_cache(maxsize=4)  # the end of one epoch is read together with the next
def shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's examples."""
    return np.random.default_rng((seed, epoch)).permutation(size)


def resized(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    """`image` at `size` (height, width), bicubic; itself if it has that size."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def resized_masks(
    masks: Bool[np.ndarray, "b h w"], size: tuple[int, int]
) -> Bool[np.ndarray, "b height width"]:
    """Masks at `size` (height, width), nearest, as the segmentation protocol has it."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old // new).astype(int)
        for new, old in zip(size, masks.shape[1:], strict=True)
    )
    return masks[:, rows][:, :, columns]
