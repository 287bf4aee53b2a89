"""ImageNet-Segmentation: images with masks of their object, in one MATLAB file, `gtsegs_ijcv.mat`.

A MATLAB 7.3 file is HDF5, which keeps MATLAB's arrays transposed. /value/img and /value/gt are
(N, 1) references: the first to an image (3, width, height), uint8 (grey: (width, height)), the
second to a cell (1, 1), a reference to the mask (width, height) of 0 and 1. There are no labels.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from iared2_jax.data.image_files import EvalInputs, evenly_spread
from iared2_jax.data.images import MAX_PIXELS, with_channels
from iared2_jax.errors import DataError, UsageError, import_extra, nearest
from iared2_jax.models.input_spec import InputSpec

log = logging.getLogger(__name__)

FILE = "gtsegs_ijcv.mat"
SPLITS = ("all",)
_IMAGES, _MASKS = "/value/img", "/value/gt"
_OLD = b"MATLAB 5.0 MAT-file"  # what MATLAB's other format starts with
_MAGIC = b"\x89HDF\r\n\x1a\n"
_HEADER = 512  # bytes that MATLAB puts before HDF5's own
_DAMAGE = (OSError, KeyError, ValueError, RuntimeError)  # what h5py raises on damaged files


class SegmentationFile:
    """The images and masks of the file, read one at a time.

    Raises:
      UsageError: there is no such file, or h5py is not installed.
      DataError: it is none of the kind, or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        _check_kind(self.path)
        with self._open() as file:
            images, masks = (file.get(key) for key in (_IMAGES, _MASKS))
            shapes = [part.shape for part in (images, masks) if _is_cell(part)]
            if len(shapes) < 2 or set(shapes) != {(len(images), 1)}:
                raise DataError(
                    f"{path} has {_described(images)} at {_IMAGES} and {_described(masks)} at "
                    f"{_MASKS}, not a cell of shape (images, 1) at both: it is another file than "
                    f"{FILE}"
                )
            self._images, self._masks = images[:, 0], masks[:, 0]  # references

    def __len__(self) -> int:
        return len(self._images)

    @contextlib.contextmanager
    def _open(self, what: str = "") -> Iterator[Any]:
        """The file, for one reading of `what`; threads may have it open at the same time."""
        h5py = hdf5(self.path)
        with _damage_named(self.path, what), h5py.File(self.path, "r") as file:
            yield file

    def check_images(self) -> None:
        """Looks at the kind and size of every image and mask; their pixels are not read.

        Raises:
          DataError: one cannot be used, or the two differ in size.
        """
        with self._open() as file:
            for index in range(len(self)):
                with _damage_named(self.path, f"image {index}"):
                    self._mask_in(file, index)

    def _name(self, index: int) -> str:
        return f"{self.path}: image {index} (counted from 0)"

    def _image_in(self, file: Any, index: int) -> Any:
        image = file[self._images[index]]
        if not _is_image(image):
            raise DataError(
                f"{self._name(index)} is {_described(image)}, not uint8 of shape (3, width, "
                f"height) or (width, height), of at most {MAX_PIXELS / 1e6:g} million pixels"
            )
        return image

    def _mask_in(self, file: Any, index: int) -> Any:
        image, cell = self._image_in(file, index), file[self._masks[index]]
        mask = file[cell[0, 0]] if _is_cell(cell) else cell
        if mask is cell or not _is_mask(mask):
            raise DataError(
                f"{self._name(index)} has as its mask {_described(mask)}, not an array of shape "
                f"(width, height) in a cell: it is another file than {FILE}"
            )
        if mask.shape != image.shape[-2:]:
            raise DataError(
                f"{self._name(index)} has {_size(image)} pixels, its mask {_size(mask)}: the two "
                "must be of one size"
            )
        return mask

    def image(self, index: int) -> Image.Image:
        """An image in RGB; grey becomes three equal channels.

        Raises:
          DataError: it cannot be read.
        """
        with self._open(f"image {index}") as file:
            pixels = self._image_in(file, index)[()]
        return Image.fromarray(np.ascontiguousarray(pixels.T)).convert("RGB")

    def mask(self, index: int) -> Bool[np.ndarray, "h w"]:
        """An image's mask, True where its object is.

        Raises:
          DataError: it cannot be read, or has other values than 0 and 1.
        """
        with self._open(f"the mask of image {index}") as file:
            values = self._mask_in(file, index)[()].T
        if not np.isin(values, (0, 1)).all():
            others = ", ".join(f"{value:g}" for value in np.setdiff1d(values, (0, 1))[:3])
            raise DataError(
                f"{self._name(index)} has a mask with other values than 0 and 1 ({others}): say "
                "which of them are foreground by writing 1 for these and 0 for the others"
            )
        return values == 1

    def evaluation(
        self, spec: InputSpec, size: int = 0
    ) -> tuple[EvalInputs, Bool[np.ndarray, "n h w"]]:
        """`size` images, evenly spread over the file (0: all), at a model's size, and their masks.

        As published, the aspect is not kept: images are resized bilinearly, masks to the nearest
        pixel. An image without foreground counts, and is warned of.

        Raises:
          DataError: a mask cannot be used, or none of them has a foreground.
        """
        rows = evenly_spread(len(self), size)
        masks = np.stack([_nearest(self.mask(row), spec.size) for row in rows.tolist()])
        empty = np.flatnonzero(~masks.any(axis=(1, 2)))
        if len(empty) == len(rows):
            raise DataError(
                f"{self.path} has no foreground in any of the {len(rows)} masks, so no map can "
                f"find it: it is another file than {FILE}"
            )
        if len(empty):
            log.warning("%s: %d of %d masks have no foreground, the first is that of image %d; "
                        "all their pixels count as background",
                        self.path, len(empty), len(rows), rows[empty[0]])  # fmt: skip

        def read(row: int) -> UInt8[np.ndarray, "h w c"]:
            image = self.image(row).resize(spec.size[::-1], Image.Resampling.BILINEAR)
            return with_channels(np.asarray(image), spec.channels)

        return EvalInputs(read, rows), masks


def hdf5(path: str | Path) -> Any:
    """h5py, for the sake of a file.

    Raises:
      UsageError: it is not installed.
    """
    return import_extra("h5py", "segmentation", "h5py", path)


def check_split(split: str) -> None:
    """Refuses any split but the only one.

    Raises:
      UsageError: another.
    """
    if split not in SPLITS:
        raise UsageError(
            f"imagenet_segmentation has no split {split!r}{nearest(split, SPLITS)}: it is for "
            "evaluation, whole"
        )


def _check_kind(path: Path) -> None:
    """Tells from its first bytes whether a file can be read at all."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: config.data.path must name the file itself, {FILE}")
    try:
        with open(path, "rb") as stream:
            start = stream.read(_HEADER + len(_MAGIC))
    except FileNotFoundError as error:
        raise UsageError(f"{path} is not there: config.data.path must name {FILE}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error
    if start.startswith(_OLD):
        raise DataError(
            f"{path} is of MATLAB's old format: load it in MATLAB, and write it again with "
            "save(..., '-v7.3')"
        )
    if _MAGIC not in (start[: len(_MAGIC)], start[_HEADER:]):
        cut = start.startswith(b"MATLAB 7.3") or not start
        why = "is truncated" if cut else "is no MATLAB 7.3 (HDF5) file"
        raise DataError(f"{path} {why}: bring {FILE} again")


@contextlib.contextmanager
def _damage_named(path: Path, what: str) -> Iterator[None]:
    """What h5py raises on damaged files becomes a `DataError` that names what was read."""
    try:
        yield
    except UsageError:
        raise
    except _DAMAGE as error:
        why = " ".join(str(error).split())
        raise DataError(
            f"{path} is truncated or damaged{what and f', at {what}'} ({why}): bring {FILE} again"
        ) from error


def _form(found: Any) -> tuple[str, tuple[int, ...]]:
    """The kind of numbers ("O": references) and the shape of an array; ("", ()) for all else."""
    dtype = getattr(found, "dtype", None)
    return ("", ()) if dtype is None else (dtype.kind, found.shape)


def _is_cell(found: Any) -> bool:
    kind, shape = _form(found)
    return kind == "O" and len(shape) == 2 and math.prod(shape) > 0


def _is_image(found: Any) -> bool:
    _, shape = _form(found)
    sided = len(shape) == 2 or (len(shape) == 3 and shape[0] == 3)
    return sided and found.dtype == np.uint8 and 0 < math.prod(shape[-2:]) <= MAX_PIXELS


def _is_mask(found: Any) -> bool:
    kind, shape = _form(found)
    return kind in tuple("biuf") and len(shape) == 2


def _described(found: Any) -> str:
    kind, shape = _form(found)
    if not kind:
        return "nothing" if found is None else "no array"
    return f"{'a cell' if kind == 'O' else found.dtype} of shape {shape}"


def _size(array: Any) -> str:
    return " x ".join(map(str, array.shape[-2:]))


def _nearest(mask: Bool[np.ndarray, "h w"], size: tuple[int, int]) -> Bool[np.ndarray, "h2 w2"]:
    """A mask at `size` (height, width), as Pillow resizes it."""
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST)) == 1
