"""How fast and how exactly we read images, next to PIL, other decoders and tf.data.

    python -m benchmarks.input_pipeline --images=256

JPEGs of the size of ImageNet's, made from photographs of scikit-image, are read through
`open_dataset("folder", ...)`, so the real reader is timed; the files stay in the page cache, so the
disk is not. "Per core and s" is per second of processor time, over all threads: the figure that a
busy machine disturbs least. All loaders take the same random crops. DeiT was trained on Pillow's
antialiased bicubic pixels, so each loader has its distance from them: the pick needs both.

What is compared where it is installed:
`pip install opencv-python-headless simplejpeg tensorflow-cpu` (simplejpeg is libjpeg-turbo).
"""

import dataclasses
import functools
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from PIL import Image, features

from benchmarks import common
from benchmarks.decoders import (
    DECODERS,
    PAIRS,
    RESIZERS,
    Box,
    Decode,
    Picture,
    Pixels,
    Resize,
    installed,
)
from iared2_jax.data import image_files, pipeline
from iared2_jax.data.augment import CROP_FLIP, DEIT, AugmentOptions
from iared2_jax.data.datasets import Dataset, open_dataset
from iared2_jax.data.images import _random_box, open_image, random_flip, random_resized_crop
from iared2_jax.data.request import DataRequest
from iared2_jax.models.variants import Variant, get_variant
from iared2_jax.report.tables import as_text
from iared2_jax.timing import Timing, interleaved

WIDTH, HEIGHT, MEAN_BYTES = 500, 375, 110_000  # ImageNet's, on average
PHOTOGRAPHS = (
    "astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry"
)  # fmt: skip
CLASSES = 1000  # of the mixed targets

PLAIN = "PIL, as one writes it"
OURS = "ours, without Grain"
CLOSE = 0.5  # mean grey levels from Pillow's bicubic that a decoder may differ
WORTH = 1.1  # times Pillow's speed from which another dependency pays

Load = Callable[[int], Pixels]


# -- The images.


class Jpegs(NamedTuple):
    """The files, in class folders below root/train; crop i, and whether it is mirrored."""

    root: Path
    paths: list[Path]
    quality: int
    boxes: list[Box]
    flips: list[bool]

    def mean_bytes(self) -> float:
        """Of a file."""
        return float(np.mean([path.stat().st_size for path in self.paths]))


def photographs(count: int) -> Iterator[tuple[str, Image.Image]]:
    """Names and varied crops of the photographs, all `WIDTH` x `HEIGHT`."""
    import skimage.data  # of the extra "test"

    sources = [(name, Image.fromarray(getattr(skimage.data, name)())) for name in PHOTOGRAPHS]
    rng = np.random.default_rng(0)
    for index in range(count):
        name, source = sources[index % len(sources)]
        width = int(rng.uniform(0.6, 1) * min(source.width, source.height * WIDTH / HEIGHT))
        height = width * HEIGHT // WIDTH
        left, top = rng.integers(source.width - width + 1), rng.integers(source.height - height + 1)
        box = (left, top, left + width, top + height)
        yield name, source.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    return stream.getvalue()


def write_jpegs(root: Path, count: int) -> Jpegs:
    """`count` files, of two neighbouring qualities that bring the mean size to ImageNet's."""
    made = list(photographs(count))
    sample = [image for _, image in made[: 4 * len(PHOTOGRAPHS)]]
    means = {q: np.mean([len(_jpeg(image, q)) for image in sample]) for q in range(85, 100)}
    quality = max((q for q, mean in means.items() if mean <= MEAN_BYTES), default=85)
    paths, boxes, flips, written = [], [], [], 0
    for index, (name, image) in enumerate(made):
        path = root / "train" / name / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        written += path.write_bytes(_jpeg(image, quality + (written < MEAN_BYTES * index)))
        rng = _rng(index)
        paths.append(path)
        boxes.append(_random_box(WIDTH, HEIGHT, rng, CROP_FLIP.scale, CROP_FLIP.ratio))
        flips.append(bool(rng.random() < CROP_FLIP.flip))  # as `random_flip` draws it
    return Jpegs(root, paths, quality, boxes, flips)


def _rng(index: int) -> np.random.Generator:
    return np.random.default_rng((0, index))


# -- Loaders: one image after the other.


def plain(jpegs: Jpegs, size: int, index: int) -> Pixels:
    """The loop that one writes first."""
    left, top, width, height = jpegs.boxes[index]
    image = Image.open(jpegs.paths[index]).convert("RGB")
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    if jpegs.flips[index]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def ours_alone(jpegs: Jpegs, size: int, index: int) -> Pixels:
    """Our functions, without the threads around them."""
    rng = _rng(index)
    return random_flip(random_resized_crop(open_image(jpegs.paths[index]), size, rng), rng)


def paired(jpegs: Jpegs, decode: Decode, resize: Resize, index: int) -> Pixels:
    """A decoder with a resizer."""
    pixels = resize(decode(jpegs.paths[index].read_bytes()), jpegs.boxes[index])
    return np.ascontiguousarray(pixels[:, ::-1]) if jpegs.flips[index] else pixels


def grey_levels(pixels: Iterable[Pixels], reference: Sequence[Pixels]) -> float:
    """Mean absolute difference, 0..255."""
    pairs = zip(pixels, reference, strict=True)
    return float(np.mean([np.abs(one.astype(int) - other).mean() for one, other in pairs]))


# -- Pipelines: batches, prepared by threads.


def our_training(
    source: Dataset, augment: AugmentOptions, batch: int, threads: int, count: int
) -> None:
    """Reads `count` images as training does, and not one more.

    Training's stream has no end, and its threads read ahead of the last batch that is asked for:
    they would take the time of whatever is measured next.
    """
    mix = pipeline.mixing(augment, CLASSES, smoothing=0.1)
    with mock.patch.object(pipeline, "_ENDLESS", count):
        batches = iter(pipeline.train_batches(source, batch, 0, 0, threads, mix))
    assert sum(len(made["input"]) for made in batches) == count


def tf_dataset(jpegs: Jpegs, size: int, batch: int, exact: bool, threads: int, count: int) -> Any:
    """tf.data, decoding only the crop: as most people write it, or `exact`, as Pillow does."""
    import tensorflow as tf

    def load(path: Any, box: Any, flip: Any) -> Any:
        dct = "INTEGER_ACCURATE" if exact else ""  # the default is fast
        image = tf.image.decode_and_crop_jpeg(tf.io.read_file(path), box, 3, dct_method=dct)
        image = tf.image.resize(image, (size, size), "bicubic", antialias=exact)
        image = tf.saturate_cast(tf.round(image), tf.uint8)
        return tf.cond(flip, lambda: image[:, ::-1], lambda: image)

    boxes = [(top, left, height, width) for left, top, width, height in jpegs.boxes]
    paths = [str(path) for path in jpegs.paths]
    data = tf.data.Dataset.from_tensor_slices((paths, np.int32(boxes), jpegs.flips))
    data = data.repeat().take(count).map(load, num_parallel_calls=threads).batch(batch)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    return data.prefetch(2).with_options(options)


# -- What is timed.


@dataclasses.dataclass
class Timed:
    """A call that processes `images` images, and the processor time of every such call."""

    table: str
    name: str
    call: Callable[[], object]
    images: int
    threads: int = 1
    grey_levels: float | None = None
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)

    def __call__(self) -> None:
        start = time.process_time()  # of all threads
        self.call()
        self.cpu_seconds.append(time.process_time() - start)

    def row(self, timing: Timing) -> dict[str, Any]:
        """For the JSON."""
        cpu = float(np.median(self.cpu_seconds[1:]))  # without the warm-up
        return {
            "name": self.name,
            "threads": self.threads,
            "images": self.images,
            "images_per_second": self.images / timing.median,
            "images_per_second_p25": self.images / timing.upper,
            "images_per_second_p75": self.images / timing.lower,
            "images_per_core_second": self.images / cpu,
            "ms_per_image": 1000 * timing.median / self.images,
            "grey_levels_from_pil": self.grey_levels,
        }


def timed_loaders(jpegs: Jpegs, size: int, count: int, skipped: dict[str, str]) -> Iterator[Timed]:
    """Whole loaders; then their decoding and their resizing alone."""
    decoders = installed(DECODERS, skipped)
    resizers = installed(
        {k: functools.partial(make, size) for k, make in RESIZERS.items()}, skipped
    )
    loaders: dict[str, Load] = {
        PLAIN: functools.partial(plain, jpegs, size),
        OURS: functools.partial(ours_alone, jpegs, size),
    }
    for decoder, resizer in PAIRS:
        if decoder in decoders and resizer in resizers:
            loaders[f"{decoder} + {resizer}"] = functools.partial(
                paired, jpegs, decoders[decoder], resizers[resizer]
            )
    everything = range(len(jpegs.paths))
    reference = [loaders[PLAIN](index) for index in everything]
    for name, load in loaders.items():
        off = grey_levels(map(load, everything), reference)
        yield Timed("loaders", name, functools.partial(_each, load, count), count, 1, off)

    contents = [path.read_bytes() for path in jpegs.paths[:count]]
    for name, decode in decoders.items():
        alone = functools.partial(_decode, decode, contents)
        yield Timed("decode only", name, functools.partial(_each, alone, count), count)
    pictures = [open_image(content) for content in contents]
    arrays = [np.array(picture) for picture in pictures]
    for name, resize in resizers.items():
        shown = pictures if name == "PIL bicubic" else arrays  # what its decoder gives
        alone = functools.partial(_resize, resize, shown, jpegs.boxes)
        yield Timed("resize only", name, functools.partial(_each, alone, count), count)


def _decode(decode: Decode, contents: Sequence[bytes], index: int) -> Picture:
    return decode(contents[index])


def _resize(resize: Resize, shown: Sequence[Picture], boxes: Sequence[Box], index: int) -> Pixels:
    return resize(shown[index], boxes[index])


def _each(load: Load, count: int) -> None:
    for index in range(count):
        load(index)


def timed_pipelines(
    jpegs: Jpegs, variant: Variant, batch: int, batches: int, skipped: dict[str, str]
) -> Iterator[Timed]:
    """Ours and tf.data; each thread has `batches` to read."""
    spec, cores = variant.backbone.input_spec, len(os.sched_getaffinity(0))
    size = spec.height
    several = [(threads, threads * batches * batch) for threads in sorted({1, 2, cores})]
    wanted = DataRequest(spec, str(jpegs.root))
    deit = dataclasses.replace(wanted, augment=DEIT)
    for name, asked in (("ours, crop + flip", wanted), ("ours, DeiT's augmentation", deit)):
        source = open_dataset("folder", asked)
        for threads, count in several:
            call = functools.partial(our_training, source, asked.augment, batch, threads, count)
            yield Timed("pipelines", name, call, count, threads)

    count = min(len(jpegs.paths) // batch, cores * batches) * batch
    images, _, _ = open_dataset("folder", wanted).load("train", count, 0)
    call = functools.partial(_read, lambda: pipeline.eval_batches({"image": images}, batch))
    yield Timed("pipelines", "ours, evaluation", call, count, image_files.THREADS)

    reference = [plain(jpegs, size, index) for index in range(len(jpegs.paths))]
    for name, exact in (("tf.data", False), ("tf.data, as exact as Pillow", True)):
        make = functools.partial(tf_dataset, jpegs, size, batch, exact)
        once = installed({name: functools.partial(make, 1, len(reference))}, skipped).get(name)
        if once is not None:
            off = grey_levels((x for part in once.as_numpy_iterator() for x in part), reference)
            for threads, count in several:
                call = functools.partial(_read, functools.partial(iter, make(threads, count)))
                yield Timed("pipelines", name, call, count, threads, off)


def _read(batches: Callable[[], Iterable[Any]]) -> None:
    for _ in batches():
        pass


# -- The report.


def verdict(loaders: Sequence[dict[str, Any]]) -> str:
    """Which decoder to pick: the fastest whose pixels are those that DeiT was trained on."""
    speed = {row["name"]: row["images_per_core_second"] for row in loaders}
    gain = {name: rate / speed[PLAIN] for name, rate in speed.items()}
    off = {row["name"]: row["grey_levels_from_pil"] for row in loaders}
    others = [name for name in speed if name not in (PLAIN, OURS)]
    close = [name for name in others if off[name] <= CLOSE]
    best = max(close, key=gain.__getitem__, default=PLAIN)
    if gain[best] >= WORTH:
        said = f"Pick {best}: {gain[best]:.2f} times the images per core of the plain PIL loader"
        said += f", {off[best]:.2f} grey levels from its pixels"
    else:
        said = f"Stay with Pillow: no other loader here within {CLOSE} grey levels of its pixels"
        said += f" is {WORTH} times as fast per core"
    fastest = max(others, key=gain.__getitem__, default=best)
    if gain[fastest] > max(gain[best], WORTH):
        said += f"; {fastest} is the fastest, {gain[fastest]:.2f} times,"
        said += f" but {off[fastest]:.2f} grey levels off"
    return said + "."


def _table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "",
        "threads",
        "images/s",
        "quartiles",
        "per core and s",
        "ms each",
        "grey levels off",
    ]
    lines = [header]
    for row in rows:
        off = row["grey_levels_from_pil"]
        lines.append(
            [
                row["name"],
                str(row["threads"]),
                f"{row['images_per_second']:.0f}",
                f"{row['images_per_second_p25']:.0f} .. {row['images_per_second_p75']:.0f}",
                f"{row['images_per_core_second']:.0f}",
                f"{row['ms_per_image']:.2f}",
                "-" if off is None else f"{off:.2f}",
            ]
        )
    return as_text((title, lines))


def _versions() -> dict[str, str]:
    names = ("pillow", "grain", "opencv-python-headless", "opencv-python", "simplejpeg")
    return {
        "libjpeg-turbo in pillow": str(features.version("libjpeg_turbo")),
        **common.installed(*names, "torchvision", "tensorflow", "tensorflow-cpu"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=int, default=256, help="JPEGs that are made")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=4, help="for each thread, a call")
    parser.add_argument("--rounds", type=int, default=9)
    flags = parser.parse_args(argv)
    if flags.images < flags.batch:
        parser.error("--images must fill a --batch")
    variant = get_variant(flags.model)
    size = variant.backbone.input_spec.height
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        jpegs = write_jpegs(Path(folder), flags.images)
        mean = jpegs.mean_bytes()
        one_thread = min(flags.images, flags.batch * flags.batches)
        calls = [*timed_pipelines(jpegs, variant, flags.batch, flags.batches, skipped)]
        calls += timed_loaders(jpegs, size, one_thread, skipped)
        timings = interleaved(dict(enumerate(calls)), flags.rounds)
    tables: dict[str, list[dict[str, Any]]] = {}
    for index, timed in enumerate(calls):
        tables.setdefault(timed.table, []).append(timed.row(timings[index]))
    said = verdict(tables["loaders"])
    files = f"{WIDTH} x {HEIGHT} JPEGs of {mean / 1000:.0f} kB to {size} px"
    for title, rows in tables.items():
        print(_table(f"{title}, {files}", rows), flush=True)
    for name, reason in skipped.items():
        print(f"skipped: {name} ({reason})")
    print(said, flush=True)
    environment = common.environment()
    environment["versions"] |= _versions()
    common.write(
        flags.out or common.RESULTS / "input_pipeline_cpu.json",
        {
            "command": f"python -m benchmarks.input_pipeline --images={flags.images}",
            **environment,
            "files": {
                "images": flags.images,
                "width": WIDTH,
                "height": HEIGHT,
                "mean_bytes": mean,
                "quality": jpegs.quality,
                "subsampling": "4:2:0",
            },
            "image_size": size,
            "batch": flags.batch,
            "rounds": flags.rounds,
            **{title.replace(" ", "_"): rows for title, rows in tables.items()},
            "skipped": skipped,
            "verdict": said,
        },
    )


if __name__ == "__main__":
    main()
