"""Small data in the true formats, made from the embedded digits: for trying the machinery.

Scenes of Cluttered MNIST as JPEG files, in which the digits take the names of ImageNet's first ten
classes, and with their masks as ImageNet-Segmentation's file; digits as cut-outs; clips of Moving
MNIST as MP4 files, in which the motions are Kinetics-400's first eight.
"""

import contextlib
import io
import logging
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iared2_jax.data import cluttered_mnist, moving_mnist
from iared2_jax.data.imagenet_segmentation import FILE, hdf5
from iared2_jax.data.videos import pyav
from iared2_jax.errors import UsageError
from iared2_jax.files import cache_folder

log = logging.getLogger(__name__)

TRAIN, VALIDATION = 48, 16  # images


def scenes(split: str, count: int) -> Iterator[tuple[int, bytes]]:
    """(digit, JPEG) of so many scenes."""
    for index in range(count):
        example = cluttered_mnist.example(split, 0, index)
        stream = io.BytesIO()
        Image.fromarray(example["image"]).save(stream, "JPEG", quality=95)
        yield int(example["label"]), stream.getvalue()


def write_official_tars(folder: Path) -> None:
    """ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of scenes, laid out like the official."""
    from iared2_jax.data.imagenet import synsets, validation_synsets  # TFDS is slow to import

    classes: dict[str, list[tuple[str, bytes]]] = {}
    for number, (digit, image) in enumerate(scenes("train", TRAIN), start=1):
        synset = synsets()[digit]
        classes.setdefault(synset, []).append((f"{synset}_{number}.JPEG", image))
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as train:
        for synset, files in sorted(classes.items()):
            _add(train, f"{synset}.tar", _tar(files))
    numbers = {s: [n for n, v in enumerate(validation_synsets(), 1) if v == s] for s in synsets()}
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as validation:
        for digit, image in scenes("test", VALIDATION):
            number = numbers[synsets()[digit]].pop(0)
            _add(validation, f"ILSVRC2012_val_{number:08d}.JPEG", image)


def _tar(files: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files:
            _add(archive, name, content)
    return stream.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _cache() -> Path:
    folder = cache_folder()
    if folder is None:
        raise UsageError("small data are made in the cache: set XDG_CACHE_HOME to a folder")
    return folder


def small_imagenet() -> Path:
    """A prepared `imagenet2012` of a few scenes, in the cache; made where it is not there yet."""
    from iared2_jax.data import imagenet

    folder = _cache() / "small" / "imagenet"
    if not (folder / "imagenet2012" / imagenet.VERSION / "dataset_info.json").is_file():
        log.info("making a small imagenet2012 in %s", folder)
        imagenet.log.setLevel(logging.ERROR)  # it would warn that these tars are not whole
        try:
            with _made_whole(folder) as draft:
                write_official_tars(draft)
                imagenet.prepare(draft, draft)
        finally:
            imagenet.log.setLevel(logging.NOTSET)
    return folder


@contextlib.contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """A draft that becomes `folder` at the end, unless another process was quicker."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
        content = Path(draft) / "content"
        content.mkdir()
        yield content
        with contextlib.suppress(OSError):  # it is there and not empty
            content.rename(folder)


def small_folder() -> Path:
    """A folder with train/<digit>/*.jpg and val/<digit>/*.jpg, in the cache."""
    folder = _cache() / "small" / "folder"
    if not folder.is_dir():
        log.info("making a small folder of images in %s", folder)
        with _made_whole(folder) as draft:
            for split, of_scenes, count in (("train", "train", TRAIN), ("val", "test", VALIDATION)):
                for number, (digit, image) in enumerate(scenes(of_scenes, count)):
                    path = draft / split / str(digit) / f"{number:04d}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(image)
    return folder


def small_cutouts(size: tuple[int, int]) -> tuple[Path, Path]:
    """Folders of cut-outs (digits of three classes) and of backgrounds of a size, in the cache."""
    height, width = size
    folder = _cache() / "small" / f"cutouts_{height}x{width}"
    if not folder.is_dir():
        log.info("making a few small cut-outs in %s", folder)
        with _made_whole(folder) as draft:
            pixels, labels = cluttered_mnist.digits("test")
            for digit in range(3):
                path = draft / "objects" / str(digit)
                path.mkdir(parents=True)
                for number, ink in enumerate(pixels[labels == digit][:3]):
                    colours = np.full((*ink.shape, 3), 80 * digit + 40, np.uint8)
                    cutout = np.concatenate([colours, ink[..., None]], axis=-1)
                    Image.fromarray(cutout).save(path / f"{number}.png")
            (draft / "backgrounds").mkdir()
            rng = np.random.default_rng(0)
            for number in range(3):
                blurred = Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8))
                blurred = blurred.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
                blurred.save(draft / "backgrounds" / f"{number}.png")
    return folder / "objects", folder / "backgrounds"


def write_video(path: Path, frames: np.ndarray, fps: Fraction = Fraction(30)) -> None:
    """Writes frames [t, h, w, 3], whose sides are even, as an H.264 MP4.

    Raises:
      UsageError: PyAV is not installed.
    """
    av = pyav(path)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def small_videos() -> Path:
    """A folder with train.csv, val.csv, classes.txt and the videos that they list, in the cache.

    A video has eight frames in eight and a half seconds: just a clip of TimeSformer's.
    """
    folder = _cache() / "small" / "videos"
    if not folder.is_dir():
        log.info("making a few small videos in %s", folder)
        with _made_whole(folder) as draft:
            names = [name.replace(" ", "_") for name in moving_mnist.CLASS_NAMES]
            names += [f"class_{number}" for number in range(len(names), 400)]
            (draft / "classes.txt").write_text("\n".join(names))
            for split, of_clips, count in (("train", "train", TRAIN), ("val", "test", VALIDATION)):
                clips = [moving_mnist.clip(of_clips, 0, number, 8) for number in range(count)]
                lines = [f"{split}_{i:04d}.mp4 {clip.label}\n" for i, clip in enumerate(clips)]
                (draft / f"{split}.csv").write_text("".join(lines))
                for number, clip in enumerate(clips):
                    path = draft / f"{split}_{number:04d}.mp4"
                    write_video(path, clip.frames, Fraction(30, 32))
    return folder


def write_segmentation(
    path: Path, images: Sequence[np.ndarray], masks: Sequence[np.ndarray]
) -> None:
    """Writes images [h, w, 3] or [h, w] and their masks [h, w] as ImageNet-Segmentation's file is.

    Raises:
      UsageError: h5py is not installed.
    """
    h5py = hdf5(path)

    def cell(place: str, contents: Sequence[Any]) -> Any:
        """A cell of so many arrays."""
        column = file.create_dataset(place, (len(contents), 1), h5py.ref_dtype)
        for row, content in enumerate(contents):
            column[row, 0] = content.ref
        return column

    # MATLAB puts its own header before HDF5's, and what cells hold into one group.
    with h5py.File(path, "w", userblock_size=512) as file:
        kept = file.create_group("#refs#")
        pixels = [kept.create_dataset(f"img{i}", data=image.T) for i, image in enumerate(images)]
        truths = [kept.create_dataset(f"gt{i}", data=mask.T) for i, mask in enumerate(masks)]
        cell("value/img", pixels)
        cell("value/gt", [cell(f"#refs#/cell{i}", [truth]) for i, truth in enumerate(truths)])
    with open(path, "r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM")


def small_segmentation() -> Path:
    """A `gtsegs_ijcv.mat` of a few scenes, in the cache."""
    folder = _cache() / "small" / "segmentation"
    if not folder.is_dir():
        log.info("making a small %s in %s", FILE, folder)
        with _made_whole(folder) as draft:
            made = [cluttered_mnist.scene("test", 0, index) for index in range(VALIDATION)]
            masks = [scene.mask.astype(np.uint8) for scene in made]
            write_segmentation(draft / FILE, [scene.image for scene in made], masks)
    return folder / FILE
