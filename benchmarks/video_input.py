"""How fast we read clips, per core, for PyAV's thread settings; decord and torchcodec beside it.

    python -m benchmarks.video_input --videos=16

Videos of the size of Kinetics-400's as TimeSformer prepares them (shorter side 256, 10 s at 30 a
second, H.264), made from photographs of scikit-image under a moving window, so that there is motion
to encode. A clip is 8 frames in 8.5 s, cropped as for training. "Per core and s" is per second of
processor time, over all threads: it is what a busy loader gets. The files stay in the page cache.

What is compared where it is installed: `pip install decord torchcodec`.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import common
from benchmarks.decoders import installed
from benchmarks.input_pipeline import photographs
from iared2_jax.data.small import write_video
from iared2_jax.data.videos import ClipSampling, read_clip, train_crop
from iared2_jax.report.tables import as_text

HEIGHT, WIDTH, FRAMES = 256, 340, 300
SAMPLING = ClipSampling()
Read = Callable[[Path, float], list[Image.Image]]


def write_videos(folder: Path, count: int) -> list[Path]:
    """Videos in which a window moves and zooms over a photograph."""
    paths = []
    for index, (_, photograph) in enumerate(photographs(count)):
        rng = np.random.default_rng(index)
        (left, top), (to_left, to_top) = rng.uniform(0, 0.3, (2, 2)) * photograph.size
        frames = []
        for t in np.linspace(0, 1, FRAMES):
            side = 0.5 + 0.2 * t
            x, y = left + t * (to_left - left), top + t * (to_top - top)
            box = (x, y, x + side * photograph.width, y + side * photograph.height)
            window = photograph.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, box)
            frames.append(np.asarray(window))
        paths.append(folder / f"{index:04d}.mp4")
        write_video(paths[-1], np.stack(frames))
    return paths


def _ours(threads: str) -> Read:
    def read(path: Path, position: float) -> list[Image.Image]:
        choose = functools.partial(SAMPLING.indices, position=position)
        return read_clip(path, choose, threads)

    return read


def _wanted(count: int, position: float) -> np.ndarray:
    return SAMPLING.indices(np.arange(count) / 30, position)


def _decord() -> Read:
    import decord

    def read(path: Path, position: float) -> list[Image.Image]:
        video = decord.VideoReader(str(path), num_threads=1)
        frames = video.get_batch(_wanted(len(video), position)).asnumpy()
        return [Image.fromarray(frame) for frame in frames]

    return read


def _torchcodec() -> Read:
    from torchcodec.decoders import VideoDecoder

    def read(path: Path, position: float) -> list[Image.Image]:
        video = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
        wanted = _wanted(video.metadata.num_frames, position)
        frames = video.get_frames_at(wanted.tolist()).data.numpy()
        return [Image.fromarray(frame) for frame in frames]

    return read


READERS: dict[str, Callable[[], Read]] = {
    **{f"ours, PyAV threads {name}": functools.partial(_ours, name) for name in
       ("NONE", "SLICE", "FRAME", "AUTO")},
    "decord": _decord,
    "torchcodec": _torchcodec,
}  # fmt: skip


def measure(read: Read, paths: Sequence[Path], threads: int) -> dict[str, float]:
    """Clips a second, by the clock and per second of processor time, through `threads` readers."""

    def clip(index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        return train_crop(read(paths[index], rng.random()), (224, 224), rng, 0.5)

    cpu, clock = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        count = sum(1 for _ in pool.map(clip, range(len(paths))))
    return {
        "clips_per_second": count / (time.perf_counter() - clock),
        "clips_per_core_second": count / (time.process_time() - cpu),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__)
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="readers at a time")
    flags = parser.parse_args(argv)
    skipped: dict[str, str] = {}
    readers = installed(READERS, skipped)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in readers}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_videos(Path(folder), flags.videos)
        size = float(np.mean([path.stat().st_size for path in paths]))
        first = {name: np.stack(read(paths[0], 0.5)) for name, read in readers.items()}
        for number in range(flags.rounds + 1):  # the first warms up
            for name in list(readers)[:: 1 if number % 2 else -1]:
                found = measure(readers[name], paths, flags.threads)
                rounds[name] += [found] if number else []
    ours = first[next(iter(readers))].astype(int)
    results = {
        name: {
            **{key: float(np.median([r[key] for r in seen])) for key in seen[0]},
            "grey_levels_from_ours": float(np.abs(first[name] - ours).mean()),
        }
        for name, seen in rounds.items()
    }
    rows = [["reader", "clips/s", "per core and s", "grey levels from ours"]]
    for name, row in results.items():
        figures = (row["clips_per_second"], row["clips_per_core_second"])
        rows.append([name, *(f"{x:.2f}" for x in figures), f"{row['grey_levels_from_ours']:.2f}"])
    title = f"{flags.videos} videos of {size / 1e3:.0f} kB, {flags.threads} readers at a time"
    print(as_text((title, rows)))
    for name, reason in skipped.items():
        print(f"  {name}: {reason}")
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.video_input --videos={flags.videos}",
        **common.environment(),
        **common.installed("av"),
        "threads": flags.threads,
        "bytes": size,
        "skipped": skipped,
        "results": results,
    }
    common.write(flags.out or common.RESULTS / "video_input_cpu.json", result)


if __name__ == "__main__":
    main()
