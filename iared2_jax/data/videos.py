"""Video files to clips: safe decoding by PyAV, TimeSformer's temporal and spatial sampling.

A frame is found by the time it is shown at, not by its number, so that videos of a variable frame
rate are sampled like any other; at a constant rate it is the same.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from iared2_jax.data.images import MAX_PIXELS, eval_transform, with_channels
from iared2_jax.errors import DataError, import_extra
from iared2_jax.models.input_spec import InputSpec

SHORT_SIDE = (256 / 224, 320 / 224)  # of training frames before the crop, over the crop's side
EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
_RATE_FPS = 30  # the frame rate that a sampling rate is counted at


class BadVideo(DataError):
    """A video file that cannot be used; the message names it and says why."""


@dataclasses.dataclass(frozen=True)
class ClipSampling:
    """How the frames of a clip are spread: `frames` of them, `rate` frames apart at 30 a second.

    The defaults are TimeSformer's 8 x 32: 8.5 seconds.
    """

    frames: int = 8
    rate: int = 32

    @property
    def seconds(self) -> float:
        """The stretch of video that a clip covers."""
        return self.frames * self.rate / _RATE_FPS

    def indices(self, times: Float[np.ndarray, " n"], position: float) -> Int[np.ndarray, " t"]:
        """Which frames of a video make the clip.

        Args:
          times: when each frame is shown, s, ascending.
          position: 0: the clip begins with the video, 1: it ends with it. A video that is shorter
            than the clip is shown from its start; what is missing repeats its last frame.

        Source:
          TimeSformer's decoder: start = position * max(length - span, 0), then frames evenly
          spread from there to span - 1, rounded down.
        """
        shown = times - times[0]
        step = float(np.median(np.diff(times))) if len(times) > 1 else 1 / _RATE_FPS
        begin = position * max(shown[-1] + step - self.seconds, 0.0)
        wanted = begin + np.linspace(0, self.seconds - step, self.frames)
        # A millionth of a second: times are rounded to the file's own clock.
        return np.clip(np.searchsorted(shown, wanted + 1e-6, side="right") - 1, 0, len(times) - 1)


def read_clip(
    path: str | Path,
    choose: Callable[[Float[np.ndarray, " n"]], Int[np.ndarray, " t"]],
    threads: str = "NONE",
) -> list[Image.Image]:
    """Some frames of a video, upright, in RGB.

    Args:
      choose: from the times at which frames are shown (s) to the numbers of those to be read,
        ascending; one may be there twice.
      threads: PyAV's `thread_type`: several videos are read at a time, so more threads for each
        only cost (benchmarks/video_input.py).

    Raises:
      BadVideo: the file is not there, no video, a GIF, has no frames, or is damaged or truncated.
      UsageError: PyAV is not installed.
    """
    av = pyav(path)
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            stream.thread_type = threads
            stamps = _timestamps(container, stream, path)
            times = np.array([float(stamp * stream.time_base) for stamp in stamps])
            wanted = [stamps[i] for i in choose(times)]
            found = _decoded(container, stream, set(wanted))
    except OSError as error:
        raise BadVideo(f"{path} cannot be read ({error.strerror})") from error
    except av.error.FFmpegError as error:
        raise BadVideo(f"{path} is damaged, or no video ({error.strerror})") from error
    lost = len(set(wanted) - found.keys())
    if lost:
        raise BadVideo(f"{path} is damaged: {lost} of the {len(wanted)} frames cannot be decoded")
    return [found[stamp] for stamp in wanted]


def pyav(path: str | Path) -> Any:
    """PyAV, for the sake of a file.

    Raises:
      UsageError: it is not installed.
    """
    return import_extra("av", "video", "PyAV", path)


def _video_stream(container: Any, path: str | Path) -> Any:
    if container.format.name == "gif":
        raise BadVideo(f"{path} is a GIF, which is no video here: convert it to MP4")
    if not container.streams.video:
        raise BadVideo(f"{path} has no video in it, only sound")
    stream = container.streams.video[0]
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise BadVideo(f"{path} has frames of more than {MAX_PIXELS / 1e6:g} million pixels")
    return stream


def _timestamps(container: Any, stream: Any, path: str | Path) -> list[int]:
    """When every frame is shown, in the stream's clock, ascending; nothing is decoded."""
    packets = [packet for packet in container.demux(stream) if packet.pts is not None]
    if not packets:
        raise BadVideo(f"{path} has no frames")
    if len(packets) < stream.frames:
        raise BadVideo(
            f"{path} is truncated: {len(packets)} of its {stream.frames} frames are left"
        )
    return sorted({packet.pts for packet in packets})


def _decoded(container: Any, stream: Any, wanted: set[int]) -> dict[int, Image.Image]:
    """The frames with these time stamps, decoded from the last key frame before the first."""
    container.seek(min(wanted), stream=stream)
    found: dict[int, Image.Image] = {}
    for frame in container.decode(stream):
        if frame.pts in wanted:
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            found[frame.pts] = Image.fromarray(np.ascontiguousarray(pixels))
        if len(found) == len(wanted) or (frame.pts or 0) > max(wanted):
            break
    return found


def train_crop(
    frames: Sequence[Image.Image], size: tuple[int, int], rng: np.random.Generator, flip: float
) -> UInt8[np.ndarray, "t h w 3"]:
    """TimeSformer's training crop, the same for all frames: jitter of the scale, crop, flip.

    The shorter side becomes 256..320 px for a crop of 224, evenly drawn (bilinear).
    """
    height, width = size
    jitter = rng.uniform(*SHORT_SIDE)
    w, h = frames[0].size
    enlarge = jitter * max(width / w, height / h)
    w, h = max(width, round(w * enlarge)), max(height, round(h * enlarge))
    left, top = int(rng.integers(w - width + 1)), int(rng.integers(h - height + 1))
    box = (left, top, left + width, top + height)
    resized = (frame.resize((w, h), Image.Resampling.BILINEAR).crop(box) for frame in frames)
    clip = np.stack([np.asarray(frame) for frame in resized])
    return np.ascontiguousarray(clip[:, :, ::-1]) if rng.random() < flip else clip


def read_video(path: str | Path, spec: InputSpec, rate: int = 32) -> UInt8[np.ndarray, "t h w c"]:
    """The start of a video as a model evaluates it: `spec.frames` frames, their centre.

    Args:
      rate: see `ClipSampling`.

    Raises:
      BadVideo: the file cannot be used. UsageError: PyAV is not installed.
    """
    sampling = ClipSampling(spec.frames, rate)
    frames = read_clip(path, lambda times: sampling.indices(times, 0.0))
    return with_channels(centre_crop(frames, spec.size, spec.crop_pct, str(path)), spec.channels)


def is_video(path: str | Path) -> bool:
    """Whether a file's name is that of a video."""
    return Path(path).suffix.lower() in EXTENSIONS


def crop_boxes(size: tuple[int, int], crop: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Upper left corners of `count` crops, evenly spread along the longer side: one is the centre.

    Three are left, centre and right of a wide frame, top, centre and bottom of a high one.

    Args:
      size: height and width of the frame, at least the crop's.

    Example:
      >>> crop_boxes((224, 299), (224, 224), 3)
      [(0, 0), (0, 38), (0, 75)]
    """
    spare = np.array(size) - crop
    centre, along = np.ceil(spare / 2).astype(int), int(np.argmax(spare))
    corners = np.tile(centre, (count, 1))
    if count > 1:
        corners[:, along] = np.ceil(np.linspace(0, spare[along], count))
    return [(int(top), int(left)) for top, left in corners]


def cropped(frames: np.ndarray, corner: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """The part of frames [.., h, w, c] of that size (height, width) below an upper left corner."""
    (top, left), (height, width) = corner, size
    return frames[..., top : top + height, left : left + width, :]


def spatial_crops(
    frames: Sequence[Image.Image], size: tuple[int, int], count: int = 3
) -> UInt8[np.ndarray, "v t h w 3"]:
    """Crops that together see the whole frame: the shorter side resized to the crop's (bilinear).

    Source:
      TimeSformer's test with NUM_SPATIAL_CROPS 3, whose logits are added up.
    """
    (height, width), (w, h) = size, frames[0].size
    enlarge = max(height / h, width / w)
    h, w = max(height, int(h * enlarge)), max(width, int(w * enlarge))
    resized = [frame.resize((w, h), Image.Resampling.BILINEAR) for frame in frames]
    clip = np.stack([np.asarray(frame) for frame in resized])
    return np.stack([cropped(clip, corner, size) for corner in crop_boxes((h, w), size, count)])


def centre_crop(
    frames: Sequence[Image.Image], size: tuple[int, int], crop_pct: float, name: str
) -> UInt8[np.ndarray, "t h w 3"]:
    """Every frame's centre: the shorter side resized to size / crop_pct (bilinear), then a crop."""
    crops = [eval_transform(frame, size, crop_pct, "bilinear", name) for frame in frames]
    return np.stack(crops)
