"""Lists of videos (train.csv, val.csv, test.csv) as training clips and evaluation clips.

A line is `path label`, separated by a space or a comma, as TimeSformer's lists of Kinetics-400 are;
paths are relative to the list's folder. `classes.txt` beside them may name the classes, one a line.
"""

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iared2_jax.data.image_files import EXAMPLE, BadExamples, EvalInputs, evenly_spread, shuffled
from iared2_jax.data.images import with_channels
from iared2_jax.data.request import DataRequest
from iared2_jax.data.videos import ClipSampling, read_clip, read_video, spatial_crops, train_crop
from iared2_jax.errors import UsageError, nearest
from iared2_jax.files import read_text

SPLITS = ("train", "val", "test")
CLASSES = "classes.txt"


class VideoList(NamedTuple):
    """A split: the videos and their classes."""

    path: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]

    def digest(self) -> str:
        """Changes with the names and labels of the videos."""
        lines = (f"{file} {label}\n" for file, label in zip(self.files, self.labels, strict=True))
        return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()[:16]


def read_list(folder: Path, split: str) -> VideoList:
    """The videos that a split's list names; they are looked for, not read.

    Raises:
      UsageError: no such split or list, a line that is none, or a video that is not there.
    """
    if split not in SPLITS:
        raise UsageError(f"lists of videos have no split {split!r}{nearest(split, SPLITS)}")
    path = folder / f"{split}.csv"
    try:
        text = read_text(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}): it lists the videos, `path label` a line"
        ) from error
    entries = [_entry(path, i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not entries:
        raise UsageError(f"{path} lists no videos")
    missing = [name for name, _ in entries if not (folder / name).is_file()]
    if missing:
        raise UsageError(
            f"{path} lists {len(missing)} videos that are not there, the first is {missing[0]}: "
            "take their lines out, or bring them"
        )
    files, labels = zip(*entries, strict=True)
    return VideoList(path, files, labels)


def _entry(path: Path, number: int, line: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.*[^\s,])[\s,]+([0-9]+)", line.strip())  # a path may have both in it
    if not found:
        raise UsageError(f"{path}, line {number}: {line.strip()!r} is not `path label`")
    return found[1], int(found[2])


def class_names(folder: Path, training: VideoList) -> tuple[str, ...]:
    """The names in classes.txt, or the numbers up to the largest that is trained."""
    path = folder / CLASSES
    if path.is_file():
        return tuple(line.strip() for line in read_text(path).strip().splitlines())
    return tuple(str(label) for label in range(max(training.labels) + 1))


class VideoFiles:
    """The videos of a folder's lists, made into clips for a model.

    Training clips are cropped as TimeSformer does it (`videos.train_crop`): of the augmentation of
    images they have the flip, mixup and CutMix; its `scale` and `ratio` are not looked at.

    Raises:
      UsageError: a list that cannot be used, a label out of range, or an augmentation of images.
    """

    def __init__(self, request: DataRequest):
        folder, spec = Path(request.path), request.spec
        augment = request.augment
        if augment.rand_augment or augment.erasing or augment.repeats > 1:
            raise UsageError(
                "config.data.augment.rand_augment, erasing and repeats are for images: switch them "
                "off (False, 0, 1)"
            )
        self._folder, self._request = folder, request
        self._sampling = ClipSampling(spec.frames, request.sampling_rate)
        self.training = read_list(folder, "train")
        self.class_names = class_names(folder, self.training)
        self._check_labels(self.training)
        self._bad = BadExamples(request.bad_share, len(self.training.files), "videos")

    def open_split(self, split: str) -> VideoList:
        """A split's list, checked."""
        listed = self.training if split == "train" else read_list(self._folder, split)
        self._check_labels(listed)
        return listed

    def _check_labels(self, listed: VideoList) -> None:
        worst = max(listed.labels)
        if worst >= len(self.class_names):
            name = listed.files[listed.labels.index(worst)]
            raise UsageError(
                f"{listed.path} has the label {worst} ({name}), but there are classes 0.."
                f"{len(self.class_names) - 1}"
            )

    def train_example(self, seed: int, index: int) -> dict[str, np.ndarray]:
        """Example `index` of an endless stream of shuffled epochs; a pure function of both.

        A clip begins anywhere in its video. A video that cannot be used is replaced by the next.

        Raises:
          DataError: too many could not be used.
        """
        spec, listed = self._request.spec, self.training
        size = len(listed.files)
        epoch, place = divmod(index, size)
        order = shuffled(size, seed, epoch)
        rng = np.random.default_rng((seed, index, EXAMPLE))
        position = rng.random()

        def read(row: int) -> tuple[int, list]:
            return row, self._frames(listed.files[row], position)

        row, frames = self._bad.first_good(order, place, read)
        pixels = train_crop(frames, spec.size, rng, self._request.augment.flip)
        label = np.int32(listed.labels[row])
        return {"input": with_channels(pixels, spec.channels), "label": label}

    def _frames(self, file: str, position: float) -> list:
        choose = functools.partial(self._sampling.indices, position=position)
        return read_clip(self._folder / file, choose)

    def load(self, split: str, size: int, seed: int) -> tuple[EvalInputs, np.ndarray, None]:
        """`size` clips, evenly spread over the split (0: all), decoded when they are indexed.

        Each begins with its video, and is its centre, as TimeSformer tests one view; or, if that
        is asked for, one at random, as it watches its own training.
        """
        listed, spec = self.open_split(split), self._request.spec
        random = self._request.clip_view == "random"

        def read(row: int) -> np.ndarray:
            if not random:
                path = self._folder / listed.files[row]
                return read_video(path, spec, self._request.sampling_rate)
            rng = np.random.default_rng((seed, row, EXAMPLE))
            frames = self._frames(listed.files[row], rng.random())
            return with_channels(train_crop(frames, spec.size, rng, flip=0.0), spec.channels)

        rows = evenly_spread(len(listed.files), size)
        return EvalInputs(read, rows), np.array(listed.labels, np.int32)[rows], None

    def load_crops(self, split: str, size: int, seed: int) -> EvalInputs:
        """The same videos as `load`'s, three crops each [3, T, h, w, c], from the video's start."""
        listed, spec = self.open_split(split), self._request.spec

        def read(row: int) -> np.ndarray:
            pixels = spatial_crops(self._frames(listed.files[row], 0.0), spec.size)
            return with_channels(pixels, spec.channels)

        return EvalInputs(read, evenly_spread(len(listed.files), size))

    @property
    def unusable(self) -> int:
        """How many of the training videos this process could not use so far."""
        return self._bad.count
