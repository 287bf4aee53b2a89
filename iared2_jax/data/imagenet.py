"""ImageNet (ILSVRC 2012) as TFDS' `imagenet2012` in array_record, made and read without TensorFlow.

    python -m iared2_jax.data.imagenet --tars=DIR --data_dir=DIR

DIR of the tars holds the official ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar. Records,
keys and order are those of TFDS' own builder, except that its 23 odd images (CMYK, PNG) are
re-encoded by Pillow. That builder needs TensorFlow, and so does any `GeneratorBasedBuilder` once
its shuffle outgrows 1 GB. Here the tars are indexed first, and the shards written one by one in
their final order: images are read where they lie, and there is no temporary copy.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.core.utils import shard_utils
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as stock

from iared2_jax.command import Parser, exit_code
from iared2_jax.errors import DataError, UsageError, nearest

log = logging.getLogger(__name__)

VERSION = "5.1.0"
# Split, its tar, and how many images the official tar holds.
TARS = {
    "train": ("ILSVRC2012_img_train.tar", 1_281_167),
    "validation": ("ILSVRC2012_img_val.tar", 50_000),
}
COMMAND = "python -m iared2_jax.data.imagenet --tars=DIR --data_dir=DIR"
_ENDS = 4096  # bytes of a shard that its digest looks at
_NEW_COPY = "copy it again, or remove its folder and prepare anew"

NOT_RGB_JPEG = frozenset(stock.CMYK_IMAGES + stock.PNG_IMAGES)  # of the train tar


@functools.cache
def synsets() -> tuple[str, ...]:
    """The WordNet ids of the 1000 classes, "n01440764" first; a label is a place in this list."""
    return tuple(tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split())


@functools.cache
def validation_synsets() -> tuple[str, ...]:
    """The synset of ILSVRC2012_val_00000001.JPEG, and so on to 00050000."""
    file = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    return tuple(file.read_text().split())


@functools.cache
def class_names() -> tuple[str, ...]:
    """The classes in words, "tench, Tinca tinca" first, all different."""
    # TFDS has them for another dataset, in the order of `synsets`.
    from tensorflow_datasets.datasets.siscore import labels

    return tuple(labels.IMAGENET_LABELS_LIST)


@dataclasses.dataclass(frozen=True, slots=True)
class _Image:
    """Where a tar holds an image. TFDS takes it for an open file: `read` is all it asks for."""

    tar: Path
    name: str
    synset: str
    offset: int
    size: int

    def read(self) -> bytes:
        with self.tar.open("rb") as stream:
            stream.seek(self.offset)
            content = stream.read(self.size)
        return _rgb_jpeg(content) if self.name in NOT_RGB_JPEG else content


def _rgb_jpeg(content: bytes) -> bytes:
    """The image as TFDS encodes it: RGB, best quality, chroma at half the resolution."""
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
        encoded = io.BytesIO()
        image.convert("RGB").save(encoded, "JPEG", quality=100, subsampling="4:2:0")
    return encoded.getvalue()


def _members(tar: Path, archive: tarfile.TarFile, pattern: str) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        plain = member.isfile() and not member.issparse()
        if not plain or not re.fullmatch(pattern, member.name):
            raise UsageError(f"{tar} holds {member.name!r}, which the official tar does not")
        yield member


def _train_images(tar: Path) -> Iterator[_Image]:
    """The images of a tar of class tars. Only their headers are read."""
    known = frozenset(synsets())
    with tarfile.open(tar, "r:") as archive:
        for class_tar in _members(tar, archive, r"n\d{8}\.tar"):
            synset = class_tar.name.removesuffix(".tar")
            if synset not in known:
                raise UsageError(f"{tar} holds {synset}, which is none of the 1000 classes")
            with tarfile.open(fileobj=archive.extractfile(class_tar), mode="r:") as images:
                for image in _members(tar, images, rf"{synset}_\d+\.JPEG"):
                    offset = class_tar.offset_data + image.offset_data
                    yield _Image(tar, image.name, synset, offset, image.size)


def _validation_images(tar: Path) -> Iterator[_Image]:
    labels = validation_synsets()
    with tarfile.open(tar, "r:") as archive:
        for image in _members(tar, archive, r"ILSVRC2012_val_000[0-5]\d{4}\.JPEG"):
            number = int(image.name[-len("00000001.JPEG") : -len(".JPEG")])
            if not 1 <= number <= len(labels):
                raise UsageError(f"{tar} holds {image.name}, but there are {len(labels)} labels")
            yield _Image(tar, image.name, labels[number - 1], image.offset_data, image.size)


def _index(split: str, tar: Path, images: Callable[[Path], Iterable[_Image]]) -> list[_Image]:
    """All images of a tar in the order of TFDS: by the MD5 of split and key."""

    def place(image: _Image) -> bytes:
        return hashlib.md5((split + image.name).encode(), usedforsecurity=False).digest()

    log.info("%s: looking for images in %s", split, tar)
    try:
        index = sorted(images(tar), key=place)
    except (tarfile.TarError, OSError) as error:
        raise UsageError(f"{tar} is damaged or no tar ({error}): download it again") from error
    if not index:
        raise UsageError(f"{tar} holds no images: download it again")
    for image, following in itertools.pairwise(index):
        if image.name == following.name:
            raise UsageError(f"{tar} holds {image.name} twice: download it again")
    official = TARS[split][1]
    if len(index) != official:
        log.warning("%s: there are %d images, not the official %d", split, len(index), official)
    return index


_Examples = Iterator[tuple[str, dict[str, Any]]]


def _examples(
    split: str, images: Sequence[_Image], start: float, first: int, end: int
) -> _Examples:
    """Key and example of every image of one shard."""
    for image in images[first:end]:
        yield image.name, {"image": image, "label": image.synset, "file_name": image.name}
    total = len(images)
    if first * 20 // total < end * 20 // total:  # every 5 %
        seconds = time.monotonic() - start
        log.info("%s: %d of %d images, %.1f s", split, end, total, seconds)


def _shards(split: str, images: Sequence[_Image]) -> list[Callable[[], _Examples]]:
    """What TFDS asks for to write a split: as many shards as it would make itself."""
    size = sum(image.size for image in images)
    number = shard_utils.ShardConfig.calculate_number_shards(size, len(images))
    bounds = [0, *shard_utils.get_shard_boundaries(len(images), number)]
    shard = functools.partial(_examples, split, images, time.monotonic())
    return [functools.partial(shard, first, end) for first, end in itertools.pairwise(bounds)]


# A second builder of this name, so that TFDS reads what it wrote as its own; TFDS would refuse to
# register it.
with tfds.core.registered.skip_registration():

    class Imagenet2012(tfds.core.ShardBasedBuilder):
        """ImageNet, ILSVRC 2012: `images`, by split, must be set before it is prepared."""

        VERSION = tfds.core.Version(VERSION)
        images: dict[str, list[_Image]]

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(encoding_format="jpeg"),
                        "label": tfds.features.ClassLabel(names=synsets()),
                        "file_name": tfds.features.Text(),
                    }
                ),
                supervised_keys=("image", "label"),
                homepage="https://image-net.org/",
            )

        def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable]]:
            del dl_manager  # there is nothing to download
            return {split: _shards(split, images) for split, images in self.images.items()}


def _clear_leftovers(parent: Path) -> None:
    for leftover in sorted(parent.glob(f"incomplete.*_{VERSION}")):
        log.warning("%s was left by a run that was cut off: removed, starting over", leftover)
        shutil.rmtree(leftover)


def _write(tars: dict[str, Path], data_dir: Path) -> None:
    images = {
        "train": _index("train", tars["train"], _train_images),
        "validation": _index("validation", tars["validation"], _validation_images),
    }
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{data_dir} cannot be made ({error.strerror}): name another") from error
    needed = sum(image.size for index in images.values() for image in index)
    free = shutil.disk_usage(data_dir).free
    if free < needed:
        raise UsageError(f"{data_dir} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} are needed")
    builder = Imagenet2012(data_dir=data_dir)
    builder.images = images
    with contextlib.redirect_stdout(None):  # TFDS would speak of a download
        builder.download_and_prepare(file_format="array_record")


def prepare(tars: Path, data_dir: Path) -> Path:
    """Prepares `imagenet2012` 5.1.0 from the official tars; what is prepared is only checked.

    A run that was cut off leaves nothing but a folder `incomplete.*`, which the next one removes.
    So let no two run at a time on one `data_dir`.

    Args:
      tars: the folder of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.
      data_dir: TFDS' folder; it will have some 145 GB more.

    Returns:
      The folder data_dir/imagenet2012/5.1.0.

    Raises:
      UsageError: if a tar is missing, damaged or not the official one, if there is too little
        space, or if the folder is there and is not a whole array_record dataset.
    """
    folder = data_dir / "imagenet2012" / VERSION
    _clear_leftovers(folder.parent)
    if folder.exists():
        if not (folder / "dataset_info.json").is_file():
            raise UsageError(f"{folder} is there, but is no prepared dataset: remove it")
        for split in TARS:
            log.info("%s: %d images, prepared before", split, len(open_prepared(folder, split)))
        return folder
    paths = {split: tars / name for split, (name, _) in TARS.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise UsageError(f"{' and '.join(missing)} must be in {tars}: see image-net.org/download")
    _write(paths, data_dir)
    for split in TARS:
        open_prepared(folder, split)
    return folder


@dataclasses.dataclass(frozen=True)
class Records(Sequence):
    """A prepared split: [i] -> {"image": JPEG bytes, "label": int, "file_name": str}."""

    _source: Sequence  # with no type of its items: to check one is to read a record
    _shards: tuple[str, ...]
    _ends: tuple[int, ...]  # of the shards, counted in records
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return self._ends[-1]

    def digest(self) -> str:
        """A digest of the shards' sizes and both ends, which differ with their records."""
        digest = hashlib.sha256()
        for shard in self._shards:
            size = Path(shard).stat().st_size
            with open(shard, "rb") as file:
                digest.update(b"%d" % size + file.read(_ENDS))
                file.seek(max(0, size - _ENDS))
                digest.update(file.read(_ENDS))
        return digest.hexdigest()[:16]

    def label(self, index: int) -> int:
        """A record is read as a whole, its label too."""
        return self[index]["label"]

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = index.__index__()
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            record = self._source[index]
        except RuntimeError as error:  # array_record's; it does not say where
            shard = self._shards[bisect.bisect_right(self._ends, index)]
            raise DataError(f"shard {shard} is damaged: {_NEW_COPY}") from error
        return {
            "image": record["image"],
            "label": int(record["label"]),
            "file_name": record["file_name"].decode(),
        }


def _prepared_folder(data_dir: Path) -> Path:
    for folder in (data_dir / "imagenet2012" / VERSION, data_dir / VERSION, data_dir):
        if all((folder / name).is_file() for name in ("dataset_info.json", "features.json")):
            return folder
    raise UsageError(f"there is no prepared imagenet2012 in {data_dir}: run {COMMAND}")


def _file_format(folder: Path) -> str:
    try:
        return json.loads((folder / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
    except ValueError as error:
        raise UsageError(f"{folder}/dataset_info.json is damaged: {_NEW_COPY}") from error


def _check_shard(path: Path, expected: int) -> None:
    """array_record opens a file that is cut, empty or another as one of 0 records."""
    if not path.is_file():
        raise UsageError(f"shard {path} is missing: {_NEW_COPY}")
    # The count is at the end of the file, so it need not read ahead.
    reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
    found = reader.num_records()
    with contextlib.suppress(RuntimeError):  # which it only now raises, of a cut file
        reader.close()
    if found != expected:
        raise UsageError(f"shard {path} holds {found} of {expected} records: {_NEW_COPY}")


def open_prepared(data_dir: Path, split: str) -> Records:
    """Opens a prepared split for random access, after a look at every shard.

    Args:
      data_dir: TFDS' folder, or `imagenet2012` in it, or `imagenet2012/5.1.0`.
      split: "train" or "validation".

    Raises:
      UsageError: if it is not prepared, not as array_record, has other features or no such split,
        or a shard is missing or does not hold as many records as it should.
    """
    folder = _prepared_folder(data_dir)
    if (found := _file_format(folder)) != "array_record":
        raise UsageError(
            f"{folder} is prepared as {found}, which has no random access: with another data_dir, "
            f"run {COMMAND}"
        )
    builder = tfds.builder_from_directory(folder)
    features = builder.info.features
    if (
        set(features) != {"image", "label", "file_name"}
        or tuple(getattr(features["label"], "names", ())) != synsets()
    ):
        raise UsageError(f"{folder} is not imagenet2012: it has other features or classes")
    if split not in builder.info.splits:
        raise UsageError(f"{folder} has no split {split!r}{nearest(split, builder.info.splits)}")
    shards = builder.info.splits[split].file_instructions
    for shard in shards:
        _check_shard(Path(shard.filename), shard.examples_in_shard)
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    ends = itertools.accumulate(shard.examples_in_shard for shard in shards)
    return Records(source, tuple(s.filename for s in shards), tuple(ends), class_names())


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    parser = Parser(prog=COMMAND.partition(" --")[0], description=__doc__.splitlines()[0])
    parser.add_argument("--tars", type=Path, required=True, help="where the official tars are")
    parser.add_argument("--data_dir", type=Path, required=True, help="TFDS' folder, to be filled")

    def command() -> None:
        """What the flags say."""
        flags = parser.parse_args(argv)
        prepare(flags.tars, flags.data_dir)

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
