"""Cut-outs: photographs of objects, pasted on photographs of places, with exact masks.

    <path>/<class>/*.png   objects; alpha is where the object is
    <backgrounds>/*.jpg    places without such objects (or *.png)

An object at a random size and place covers a random crop of a background, among fragments of
other objects, which are cut and scaled alike, so that only the whole object tells the class.

Two tasks. "kind": which class; every third object of a class (by name) is kept for the test, so
that what is learned must generalise to objects that training never saw. "object": which object;
then all objects are in both splits. Every third background is kept for the test in both.

Scene k of a split is a pure function of (seed, split, k), whatever was made before it. (Another
version of Pillow may resize a pixel to the next level.)
"""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from iared2_jax.data.images import open_cutout, open_image
from iared2_jax.data.scenes import Scene, corners, others, stacked
from iared2_jax.errors import UsageError, nearest

SPLITS = ("train", "test")
TASKS = ("object", "kind")
OBJECTS, PLACES = (".png",), (".jpg", ".jpeg", ".png")
_EVERY = 3  # every third is kept for the test
_COVERED = 128  # the alpha from which on a pixel is the object's


@dataclasses.dataclass(frozen=True)
class CutoutOptions:
    """How scenes are composed.

    Attributes:
      backgrounds: the folder of places.
      task: one of `TASKS`.
      object_scale: least and greatest length of the object's longer side, over the image's shorter.
      clutter: least and greatest number of fragments.
      fragment_scale: the side of a fragment, over the longer side of the object it is cut from.
    """

    backgrounds: str = ""
    task: str = "object"
    object_scale: tuple[float, float] = (0.4, 0.75)
    clutter: tuple[int, int] = (0, 0)
    fragment_scale: float = 0.35


DEFAULT = CutoutOptions()


@dataclasses.dataclass(frozen=True)
class Cutouts:
    """Objects and backgrounds of a folder each, by split; makes scenes of them.

    Attributes:
      class_names: of the task's classes.
      objects: by split, (file, label) of each.
      backgrounds: by split.
      size: of the scenes, height and width.
      options: how they are composed.
    """

    class_names: tuple[str, ...]
    objects: dict[str, tuple[tuple[Path, int], ...]]
    backgrounds: dict[str, tuple[Path, ...]]
    size: tuple[int, int]
    options: CutoutOptions

    def digest(self) -> str:
        """A digest of the files' names, by split, and of how they are composed."""
        lines = [repr(dataclasses.replace(self.options, backgrounds=""))]
        for split in SPLITS:
            lines += [f"{path.parent.name}/{path.name} {label}"
                      for path, label in self.objects[split]]  # fmt: skip
            lines += [path.name for path in self.backgrounds[split]]
        return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()[:16]

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """Scene `index` of a split, a pure function of its arguments.

        Raises:
          BadImage: a file of it cannot be used.
        """
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        objects, places = self.objects[split], self.backgrounds[split]
        chosen, place = int(rng.integers(len(objects))), int(rng.integers(len(places)))
        canvas = _cropped(_place(places[place]), self.size, rng)
        least, greatest = self.options.object_scale
        side = max(1, round(rng.uniform(least, greatest) * min(self.size)))
        count = int(rng.integers(self.options.clutter[0], self.options.clutter[1] + 1))
        if count:
            for other in others(rng, chosen, len(objects), count):
                fragment = _fragment(objects[other][0], side, self.options.fragment_scale, rng)
                _paste(
                    canvas, fragment, *corners(rng, self.size, fragment.shape[:2], 1)[0].tolist()
                )
        path, label = objects[chosen]
        pixels = _sized(path, side)
        top, left = corners(rng, self.size, pixels.shape[:2], 1)[0].tolist()
        _paste(canvas, pixels, top, left)
        mask = np.zeros(self.size, bool)
        height, width = pixels.shape[:2]
        mask[top : top + height, left : left + width] = pixels[..., 3] >= _COVERED
        return Scene(np.rint(canvas).astype(np.uint8), label, mask)

    def load(
        self, split: str, count: int, seed: int = 0
    ) -> tuple[UInt8[np.ndarray, "n h w 3"], Int[np.ndarray, " n"], Bool[np.ndarray, "n h w"]]:
        """The first `count` scenes of a split: images, labels and exact masks."""
        return stacked(lambda index: self.scene(split, seed, index), count)


def open_cutouts(
    path: str | Path, size: tuple[int, int], options: CutoutOptions = DEFAULT
) -> Cutouts:
    """Lists the objects and backgrounds, looks at every one, and splits them.

    Args:
      path: the folder of classes.
      size: of the scenes, height and width, px.

    Raises:
      UsageError: a folder that is missing or empty, a class that cannot be split, a background
        smaller than the scenes, or an option that makes no sense.
      BadImage: a file that cannot be used, e.g. a cut-out without alpha.
    """
    _check_options(options)
    files = {folder: _listed(folder, OBJECTS) for folder in _folders(Path(path))}
    by_split = {split: [] for split in SPLITS}
    for label, (folder, found) in enumerate(files.items()):
        for file in found:
            _object(file)  # says what is wrong with it, before anything is trained
        if options.task == "kind":
            if len(found) < 2:
                raise UsageError(
                    f"{folder} has one object, which cannot be in training and test: add one, "
                    'remove the class, or take config.data.cutouts.task="object"'
                )
            for split, part in _split(found).items():
                by_split[split] += [(file, label) for file in part]
    names = tuple(folder.name for folder in files)
    if options.task == "object":
        every = [file for found in files.values() for file in found]
        names = tuple(f"{file.parent.name}/{file.stem}" for file in every)
        by_split = {split: [(file, i) for i, file in enumerate(every)] for split in SPLITS}
    if len(names) < 2:
        raise UsageError(f"{path} has one class: there is nothing to tell apart")
    return Cutouts(
        names,
        {split: tuple(found) for split, found in by_split.items()},
        _split(_places(Path(options.backgrounds), size)),
        size,
        options,
    )


def _check_options(options: CutoutOptions) -> None:
    if options.task not in TASKS:
        raise UsageError(
            f"config.data.cutouts.task={options.task!r} is unknown{nearest(options.task, TASKS)}"
        )
    least, greatest = options.object_scale
    if not 0 < least <= greatest <= 1:
        raise UsageError(
            f"config.data.cutouts.object_scale={options.object_scale} must be (least, greatest), "
            "above 0 and at most 1: an object lies inside of its image"
        )
    if not 0 <= options.clutter[0] <= options.clutter[1]:
        raise UsageError(
            f"config.data.cutouts.clutter={options.clutter} must be (least, greatest), from 0 on"
        )
    if not 0 < options.fragment_scale <= 1:
        raise UsageError(
            f"config.data.cutouts.fragment_scale={options.fragment_scale} must be in (0, 1]"
        )


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UsageError(f"{path} is not there: cut-outs must lie in <path>/<class>/*.png")
    found = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise UsageError(f"{path} has no classes: cut-outs must lie in <path>/<class>/*.png")
    return found


def _listed(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = sorted(p for p in folder.iterdir()
                   if p.suffix.lower() in suffixes and not p.name.startswith("."))  # fmt: skip
    if not found:
        raise UsageError(f"{folder} holds no {'/'.join(suffixes)}: fill or remove it")
    return found


def _places(folder: Path, size: tuple[int, int]) -> list[Path]:
    if not folder.parts or not folder.is_dir():
        raise UsageError(
            f"config.data.cutouts.backgrounds={str(folder)!r} is no folder: cut-outs are pasted on "
            "the photographs in it (*.jpg)"
        )
    found = _listed(folder, PLACES)
    if len(found) < 2:
        raise UsageError(f"{folder} has one background: training and test need one each")
    for file in found:
        height, width = _place(file).shape[:2]
        if height < size[0] or width < size[1]:
            raise UsageError(
                f"{file} has {width} x {height} pixels, less than the scenes' {size[1]} x {size[0]}"
                ": remove it, or make the model smaller (config.model.image_size)"
            )
    return found


def _split(files: list[Path]) -> dict[str, tuple[Path, ...]]:
    """Every third file is for the test; of two, the second."""
    kept = set(files[_EVERY - 1 :: _EVERY] or files[-1:])
    return {"train": tuple(f for f in files if f not in kept), "test": tuple(sorted(kept))}


@functools.lru_cache(maxsize=2048)
def _object(path: Path) -> UInt8[np.ndarray, "h w 4"]:
    return open_cutout(path)


@functools.lru_cache(maxsize=256)
def _place(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    return np.asarray(open_image(path))


def _sized(path: Path, side: int) -> UInt8[np.ndarray, "h w 4"]:
    """An object whose longer side is `side` px."""
    pixels = _object(path)
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Pillow weights colours by alpha, so that what is under transparent pixels does not bleed.
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _fragment(
    path: Path, side: int, share: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 4"]:
    """A square out of an object that is scaled as the others are, cut around one of its pixels."""
    pixels = _sized(path, side)
    cut = [min(max(1, round(share * side)), length) for length in pixels.shape[:2]]
    rows, columns = np.nonzero(pixels[..., 3] >= _COVERED)
    middle = int(rng.integers(len(rows))) if len(rows) else None
    center = (0, 0) if middle is None else (rows[middle], columns[middle])
    top, left = (
        min(max(0, at - length // 2), whole - length)
        for at, length, whole in zip(center, cut, pixels.shape[:2], strict=True)
    )
    return pixels[top : top + cut[0], left : left + cut[1]]


def _cropped(
    pixels: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """A random crop of a background in the scenes' aspect, as float32, scaled to their size."""
    zoom = rng.uniform(1, min(have / want for have, want in zip(pixels.shape, size, strict=False)))
    crop = (round(size[0] * zoom), round(size[1] * zoom))
    top, left = corners(rng, pixels.shape[:2], crop, 1)[0].tolist()
    part = Image.fromarray(pixels[top : top + crop[0], left : left + crop[1]])
    return np.asarray(part.resize(size[::-1], Image.Resampling.BICUBIC), np.float32)


def _paste(canvas: np.ndarray, pixels: UInt8[np.ndarray, "h w 4"], top: int, left: int) -> None:
    """Puts pixels over a canvas, by their alpha."""
    height, width = pixels.shape[:2]
    region = canvas[top : top + height, left : left + width]
    alpha = pixels[..., 3:].astype(np.float32) / 255
    region += alpha * (pixels[..., :3] - region)
