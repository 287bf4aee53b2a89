"""The datasets a config can name, behind one small interface."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from iared2_jax.data import (
    cluttered_mnist,
    cutouts,
    imagenet_segmentation,
    moving_mnist,
    video_files,
)
from iared2_jax.data.folder import open_folder
from iared2_jax.data.image_files import EXAMPLE, ImageFiles, resized, resized_masks
from iared2_jax.data.imagenet_segmentation import SegmentationFile, check_split
from iared2_jax.data.images import with_channels
from iared2_jax.data.request import DataRequest
from iared2_jax.data.small import (
    small_cutouts,
    small_folder,
    small_imagenet,
    small_segmentation,
    small_videos,
)
from iared2_jax.data.video_files import VideoFiles
from iared2_jax.data.videos import crop_boxes, cropped
from iared2_jax.errors import UsageError
from iared2_jax.models.input_spec import InputSpec

EPOCH = 50_000  # examples, where there is no end of them: only a unit
SMALL = "small"  # as a path: a few embedded images or videos in the true format


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset, its inputs as the model takes them.

    Attributes:
      class_names: one per class; () where there are no labels.
      splits: the names that `load` takes.
      epoch_size: examples that count as one epoch of training.
      train_example: (seed, index) -> {"input": uint8, shaped as the spec, "label": int32}, a pure
        function.
      open_split: looks at what a split's files are, and refuses what cannot be read later.
      content: tells the training examples' labels from others'; "" if they are made.
      load: (split, size, seed) -> pixels uint8 [size, ..], which may be read only when they are
        indexed; labels, or None; masks (bool [size, h, w], or None). size 0: all of them.
      load_crops: of clips: (split, size, seed) -> pixels [size, crops, ..] of the same examples,
        whose logits are added up for a video's answer.
      unusable: how many training examples could not be used so far.
    """

    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    epoch_size: int
    train_example: Callable[[int, int], dict[str, np.ndarray]]
    load: Callable[..., tuple]
    open_split: Callable[[str], object] = lambda split: None
    content: str = ""
    load_crops: Callable[[str, int, int], Any] | None = None
    unusable: Callable[[], int] = lambda: 0

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """What tells this dataset from others: its classes, how many examples, their labels."""
        return f"{self.summary}, labels {self.content}" if self.content else self.summary

    @property
    def summary(self) -> str:
        """What version 0.1 knew a dataset by: its classes and the length of its epoch."""
        names = hashlib.sha256(os.fsencode("\n".join(self.class_names))).hexdigest()[:8]
        return f"{self.epoch_size} images of {self.num_classes} classes ({names})"


def pictures_of(spec: InputSpec, name: str) -> tuple[int, int]:
    """Height and width of a model's pictures.

    Raises:
      UsageError: the model takes clips.
    """
    if spec.is_clip:
        raise UsageError(f"config.data.name={name!r} has images, but the model takes clips")
    return spec.size


def clips_of(spec: InputSpec, name: str) -> None:
    """Refuses a model of images.

    Raises:
      UsageError: the model takes images.
    """
    if not spec.is_clip:
        raise UsageError(f"config.data.name={name!r} has clips, but the model takes images")


def _at_size(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Colour pictures [.., h, w, 3] at a model's size, in its channels."""
    pictures = pixels.reshape(-1, *pixels.shape[-3:])
    sized = np.stack([resized(picture, spec.size) for picture in pictures])
    return with_channels(sized.reshape(*pixels.shape[:-3], *sized.shape[1:]), spec.channels)


def _refuse_all(name: str, count: int) -> None:
    """Refuses to load every example of data that are made: there is no last one."""
    if not count:
        raise UsageError(f"{name} has no last example: set config.data.eval_size")


def _cluttered_mnist(request: DataRequest) -> Dataset:
    """Cluttered MNIST at the model's size; every index is a scene of its own."""
    pictures_of(request.spec, "cluttered_mnist")
    spec = request.spec

    def train_example(seed: int, index: int) -> dict[str, np.ndarray]:
        """Scene `index` at the model's size."""
        scene = cluttered_mnist.example("train", seed, index)
        return {"input": _at_size(scene["image"], spec), "label": scene["label"]}

    def load(split: str, count: int, seed: int) -> tuple:
        """The first `count` scenes with their masks."""
        _refuse_all("cluttered_mnist", count)
        images, labels, masks = cluttered_mnist.load(split, count, seed)
        return _at_size(images, spec), labels, resized_masks(masks, spec.size)

    return _made(cluttered_mnist, train_example, load)


def _moving_mnist(request: DataRequest) -> Dataset:
    """Moving MNIST, cropped as videos are; every index is a clip of its own."""
    clips_of(request.spec, "moving_mnist")
    spec, frames = request.spec, request.spec.frames
    covering = max(new / old for new, old in zip(spec.size, moving_mnist.SIZE, strict=True))
    size = tuple(round(covering * side) for side in moving_mnist.SIZE)  # of a clip before its crop
    sized = dataclasses.replace(spec, height=size[0], width=size[1], patch=(1, 1))

    def train_example(seed: int, index: int) -> dict[str, np.ndarray]:
        """Clip `index`, cropped at random."""
        clip = moving_mnist.example("train", seed, index, frames)
        pixels, rng = _at_size(clip["frames"], sized), np.random.default_rng((seed, index, EXAMPLE))
        corner = [int(rng.integers(a - b + 1)) for a, b in zip(size, spec.size, strict=True)]
        return {"input": cropped(pixels, corner, spec.size), "label": clip["label"]}

    def load(split: str, count: int, seed: int) -> tuple:
        """The first `count` clips with their masks, cropped at the centre or at random."""
        _refuse_all("moving_mnist", count)
        pixels, labels, masks = moving_mnist.load(split, count, seed, frames)
        flat = resized_masks(masks.reshape(-1, *masks.shape[-2:]), size)
        masks = flat.reshape(*masks.shape[:-2], *size, 1)
        corners = np.tile(crop_boxes(size, spec.size, 1), (count, 1))
        if request.clip_view == "random":
            rng = np.random.default_rng((seed, EXAMPLE))
            corners = rng.integers(np.array(size) - spec.size + 1, size=(count, 2))
        corners = corners.tolist()

        def all_cropped(arrays: np.ndarray) -> np.ndarray:
            """Clips, each cropped at its own corner."""
            pairs = zip(arrays, corners, strict=True)
            return np.stack([cropped(array, corner, spec.size) for array, corner in pairs])

        return all_cropped(_at_size(pixels, sized)), labels, all_cropped(masks)[..., 0]

    def load_crops(split: str, count: int, seed: int) -> np.ndarray:
        """The same clips, each cropped at the left, at the centre and at the right."""
        pixels = _at_size(moving_mnist.load(split, count, seed, frames)[0], sized)
        corners = crop_boxes(size, spec.size, 3)
        return np.stack([cropped(pixels, corner, spec.size) for corner in corners], axis=1)

    made = _made(moving_mnist, train_example, load)
    return dataclasses.replace(made, load_crops=load_crops)


def _made(source: ModuleType, train_example: Callable, load: Callable) -> Dataset:
    return Dataset(
        class_names=source.CLASS_NAMES,
        splits=source.SPLITS,
        epoch_size=EPOCH,
        train_example=train_example,
        load=load,
    )


def _cutouts(request: DataRequest) -> Dataset:
    """Scenes of cut-outs at the model's size; every index is a scene of its own."""
    size, options = pictures_of(request.spec, "cutouts"), request.cutouts
    if request.path == SMALL:
        objects, backgrounds = small_cutouts(size)
        request = dataclasses.replace(request, path=str(objects))
        options = dataclasses.replace(options, backgrounds=str(backgrounds))
    made, channels = cutouts.open_cutouts(request.path, size, options), request.spec.channels

    def train_example(seed: int, index: int) -> dict[str, np.ndarray]:
        """Scene `index`."""
        scene = made.scene("train", seed, index)
        return {"input": with_channels(scene.image, channels), "label": np.int32(scene.label)}

    def load(split: str, count: int, seed: int) -> tuple:
        """The first `count` scenes with their masks."""
        _refuse_all("cutouts", count)
        images, labels, masks = made.load(split, count, seed)
        return with_channels(images, channels), labels, masks

    return Dataset(
        class_names=made.class_names,
        splits=cutouts.SPLITS,
        epoch_size=EPOCH,
        train_example=train_example,
        load=load,
        content=made.digest(),
    )


def _files(
    name: str, open_split: Callable, splits: tuple[str, ...], request: DataRequest
) -> Dataset:
    pictures_of(request.spec, name)
    train = ImageFiles(open_split(Path(request.path), "train"), request)
    if request.maps and not Path(request.maps).is_dir():
        raise UsageError(f"config.data.maps={request.maps!r} is no folder")

    def load(split: str, size: int, seed: int) -> tuple:
        """Evenly spread over the split, which may be in the order of classes."""
        files = ImageFiles(open_split(Path(request.path), split), request, split)
        return (*files.evaluation(size), None)

    return Dataset(
        class_names=train.class_names,
        splits=splits,
        epoch_size=len(train),
        train_example=train.train_example,
        load=load,
        open_split=lambda split: open_split(Path(request.path), split),
        content=train.content,
    )


def _imagenet(request: DataRequest) -> Dataset:
    from iared2_jax.data.imagenet import open_prepared  # TFDS is slow to import

    if request.path == SMALL:
        request = dataclasses.replace(request, path=str(small_imagenet()))
    return _files("imagenet", open_prepared, ("train", "validation"), request)


def _folder(request: DataRequest) -> Dataset:
    if request.path == SMALL:
        request = dataclasses.replace(request, path=str(small_folder()))
    return _files("folder", open_folder, ("train", "val"), request)


def _videos(request: DataRequest) -> Dataset:
    clips_of(request.spec, "videos")
    if request.path == SMALL:
        request = dataclasses.replace(request, path=str(small_videos()))
    files = VideoFiles(request)
    return Dataset(
        class_names=files.class_names,
        splits=video_files.SPLITS,
        epoch_size=len(files.training.files),
        train_example=files.train_example,
        load=files.load,
        open_split=files.open_split,
        content=files.training.digest(),
        load_crops=files.load_crops,
        unusable=lambda: files.unusable,
    )


def _imagenet_segmentation(request: DataRequest) -> Dataset:
    spec = request.spec
    pictures_of(spec, "imagenet_segmentation")
    file = SegmentationFile(small_segmentation() if request.path == SMALL else request.path)

    def train_example(seed: int, index: int) -> dict[str, np.ndarray]:
        """Refuses: this file has no labels."""
        raise UsageError(
            "config.data.name='imagenet_segmentation' has no labels to train with: it is for "
            "config.mode=eval"
        )

    def load(split: str, size: int, seed: int) -> tuple:
        """Evenly spread over the file, with their masks and without labels."""
        check_split(split)
        pixels, masks = file.evaluation(spec, size)
        return pixels, None, masks

    def open_split(split: str) -> None:
        """Looks at every image's and mask's size."""
        check_split(split)
        file.check_images()

    return Dataset(
        class_names=(),
        splits=imagenet_segmentation.SPLITS,
        epoch_size=len(file),
        train_example=train_example,
        load=load,
        open_split=open_split,
    )


OPENERS: dict[str, Callable[[DataRequest], Dataset]] = {
    "cluttered_mnist": _cluttered_mnist,
    "moving_mnist": _moving_mnist,
    "imagenet": _imagenet,
    "folder": _folder,
    "cutouts": _cutouts,
    "videos": _videos,
    "imagenet_segmentation": _imagenet_segmentation,
}
MADE = {"cluttered_mnist", "moving_mnist"}  # those that need no files
WITH_MAPS = {"folder", "imagenet"}  # those that read a map beside each image


def open_dataset(name: str, request: DataRequest) -> Dataset:
    """Opens a dataset, and checks that its files are whole; once per process.

    Raises:
      UsageError: no path, or what is there cannot be used.
    """
    if name not in MADE and not request.path:
        raise UsageError(f"config.data.name={name!r} needs config.data.path=<where its files are>")
    return _opened(OPENERS[name], request)


@functools.lru_cache(maxsize=4)
def _opened(opener: Callable[[DataRequest], Dataset], request: DataRequest) -> Dataset:
    return opener(request)
