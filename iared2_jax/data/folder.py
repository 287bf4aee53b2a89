"""A folder of images by class: root/train/<class>/*.jpg and root/val/<class>/*.jpg.

ImageNet's own validation folder is flat: val/ILSVRC2012_val_00000001.JPEG and so on. TFDS carries
the synset of each, so that only `train` has to be in class folders. The devkit's ids are no labels
(they follow an order of their own); if its list is there, it must say the same. For other flat
folders, `val_synsets.txt` gives the class of each file, in the order of their names.
"""

import collections
import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from iared2_jax.errors import DataError, UsageError, nearest
from iared2_jax.files import read_text

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png")
SPLITS = {"train": "train", "val": "val", "validation": "val"}  # and their folders
LAYOUT = "root/train/<class>/*.jpg and root/val/<class>/*.jpg"
CLASS_LIST = "val_synsets.txt"
DEVKIT_LIST = "ILSVRC2012_validation_ground_truth.txt"
_IMAGENET_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@dataclasses.dataclass(frozen=True)
class Folder(Sequence):
    """A split: [i] -> {"image": JPEG or PNG bytes, "label": int, "file_name": "class/name.jpg"}."""

    class_names: tuple[str, ...]
    _path: Path
    _files: tuple[str, ...]
    _labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self._files)

    def digest(self) -> str:
        """A digest of the files' names, in their folders, and of their labels."""
        lines = (f"{file} {label}\n" for file, label in zip(self._files, self._labels, strict=True))
        digest = hashlib.sha256()
        for line in lines:  # a name may be in no Unicode
            digest.update(os.fsencode(line))
        return digest.hexdigest()[:16]

    def label(self, index: int) -> int:
        """The class of an image, without reading it."""
        return self._labels[index]

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = index.__index__()
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        name = self._files[index]
        try:
            content = (self._path / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self._path / name} cannot be read ({error.strerror})") from error
        return {"image": content, "label": self._labels[index], "file_name": name}


def _visible(folder: Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:  # unlike Path's, they know what they are
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(shown, key=lambda entry: entry.name)


def _is_image(entry: os.DirEntry) -> bool:
    return Path(entry.name).suffix.lower() in EXTENSIONS and entry.is_file()


def _report_left_out(split: Path, left_out: Iterable[os.DirEntry]) -> None:
    kinds = collections.Counter(
        "folder" if entry.is_dir() else Path(entry.name).suffix or "no extension"
        for entry in left_out
    )
    if kinds:
        named = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        log.warning("%s: %d entries are no %s, and were left out: %s",
                    split, kinds.total(), "/".join(EXTENSIONS), named)  # fmt: skip


def _classes(split: Path) -> tuple[str, ...]:
    if not split.is_dir():
        raise UsageError(f"{split} is not there: images must lie in {LAYOUT}")
    return tuple(entry.name for entry in _visible(split) if entry.is_dir())


def _shown(names: Iterable[str]) -> tuple[str, ...]:
    """Names that can be printed: bytes that are no Unicode (of Latin-1, say) as \\xe9."""
    return tuple(os.fsencode(name).decode("utf-8", "backslashreplace") for name in names)


def _in_class_folders(split: Path, found: Sequence[str], classes: Sequence[str]) -> Folder:
    """The images of the class folders `found`."""
    labels = {name: label for label, name in enumerate(classes)}
    left_out = [entry for entry in _visible(split) if not entry.is_dir()]
    files: list[str] = []
    for name in found:
        if name not in labels:
            raise UsageError(f"{split} has a class {name!r} that is not in {split.parent}/train")
        content = _visible(split / name)
        images = [f"{name}/{entry.name}" for entry in content if _is_image(entry)]
        if not images:
            raise UsageError(f"{split / name} holds no {'/'.join(EXTENSIONS)}: fill or remove it")
        left_out += [entry for entry in content if not _is_image(entry)]
        files += images
    _report_left_out(split, left_out)
    found_labels = (labels[file.partition("/")[0]] for file in files)
    return Folder(_shown(classes), split, tuple(files), tuple(found_labels))


def _lines(path: Path, expected: int) -> list[str]:
    lines = read_text(path).strip().splitlines()
    if len(lines) != expected:
        raise UsageError(f"{path} has {len(lines)} lines for {expected} images")
    return [line.strip() for line in lines]


def _imagenet_classes(split: Path, files: Sequence[str]) -> list[str]:
    """The synsets of ImageNet's validation images, from the number in their names."""
    from iared2_jax.data.imagenet import validation_synsets  # slow to import: TFDS

    synsets = validation_synsets()
    numbers = [int(match[1]) for file in files if (match := _IMAGENET_NAME.fullmatch(file))]
    if len(numbers) < len(files) or not all(1 <= number <= len(synsets) for number in numbers):
        raise UsageError(
            f"{split} has no class folders, and not all its files are named as ImageNet's: write "
            f"their classes, one a line in the order of their names, to {split.parent / CLASS_LIST}"
        )
    devkit = split.parent / DEVKIT_LIST
    if devkit.exists():
        pairs = set(zip(_lines(devkit, len(synsets)), synsets, strict=True))
        if not len(pairs) == len({number for number, _ in pairs}) == len(set(synsets)):
            raise UsageError(f"{devkit} is not the official list: replace or remove it")
    return [synsets[number - 1] for number in numbers]


def _flat(split: Path, classes: Sequence[str]) -> Folder:
    """The images of a validation folder without class folders."""
    content = _visible(split)
    files = [entry.name for entry in content if _is_image(entry)]
    if not files:
        raise UsageError(f"{split} holds neither class folders nor images")
    _report_left_out(split, [entry for entry in content if not _is_image(entry)])
    given = split.parent / CLASS_LIST
    named = _lines(given, len(files)) if given.exists() else _imagenet_classes(split, files)
    labels = {name: label for label, name in enumerate(classes)}
    for file, name in zip(files, named, strict=True):
        if name not in labels:
            raise UsageError(f"{split / file} is of class {name!r}, which is not in train")
    return Folder(_shown(classes), split, tuple(files), tuple(labels[name] for name in named))


def open_folder(root: Path, split: str) -> Folder:
    """Opens one split of a folder of images; they are listed, not read.

    Args:
      root: holds `train`, whose folders, sorted by name, are the classes, and `val`, with folders
        of the same names, or flat (see the module).
      split: "train", or "val" (or "validation").

    Raises:
      UsageError: on an unknown split, a missing folder, no classes, an empty class folder, a class
        in val that is not in train, or a list that is missing or of the wrong length.
    """
    if split not in SPLITS:
        raise UsageError(f"a folder has no split {split!r}{nearest(split, SPLITS)}")
    classes = _classes(root / "train")
    if not classes:
        raise UsageError(f"{root / 'train'} has no classes: images must lie in {LAYOUT}")
    if SPLITS[split] == "train":
        return _in_class_folders(root / "train", classes, classes)
    found = _classes(root / "val")
    if found:
        return _in_class_folders(root / "val", found, classes)
    return _flat(root / "val", classes)
