"""Ways to decode a JPEG and to resize a part of it, for `benchmarks.input_pipeline`.

Each is made by a function, because what it imports may be missing.
"""

import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from iared2_jax.data.images import open_image

Pixels = UInt8[np.ndarray, "h w 3"]
Box = tuple[int, int, int, int]  # left, top, width, height
Picture = Image.Image | Pixels
Decode = Callable[[bytes], Picture]
Resize = Callable[[Picture, Box], Pixels]


def _pil_decoder() -> Decode:
    return lambda content: Image.open(io.BytesIO(content)).convert("RGB")


def _opencv_decoder() -> Decode:
    import cv2

    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION  # as ours ignores it
    return lambda content: cv2.imdecode(np.frombuffer(content, np.uint8), flags)


def _simplejpeg_decoder() -> Decode:
    import simplejpeg

    return simplejpeg.decode_jpeg


def _torchvision_decoder() -> Decode:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(content: bytes) -> Pixels:
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return decode_jpeg(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()

    return decode


def _cut(image: Picture, box: Box) -> Pixels:
    left, top, width, height = box
    if isinstance(image, Image.Image):
        return np.array(image.crop((left, top, left + width, top + height)))
    return image[top : top + height, left : left + width]


def _pil_resizer(size: int) -> Resize:
    def resize(image: Picture, box: Box) -> Pixels:
        if isinstance(image, Image.Image):
            left, top, width, height = box
            part = image.crop((left, top, left + width, top + height))
        else:
            part = Image.fromarray(_cut(image, box))
        return np.array(part.resize((size, size), Image.Resampling.BICUBIC))

    return resize


def _opencv_resizer(size: int, interpolation: str) -> Resize:
    import cv2

    cv2.setNumThreads(1)  # the loader's own threads are the parallelism
    method = getattr(cv2, interpolation)
    return lambda image, box: cv2.resize(_cut(image, box), (size, size), interpolation=method)


def _torch_resizer(size: int) -> Resize:
    """PyTorch's bicubic with antialias, on bytes; torchvision's transforms call the same."""
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(1)

    def resize(image: Picture, box: Box) -> Pixels:
        part = torch.from_numpy(_cut(image, box)).permute(2, 0, 1)[None]
        part = F.interpolate(part, (size, size), mode="bicubic", antialias=True)
        return part[0].permute(1, 2, 0).contiguous().numpy()

    return resize


DECODERS: dict[str, Callable[[], Decode]] = {
    "PIL": _pil_decoder,
    "ours (open_image)": lambda: open_image,
    "OpenCV": _opencv_decoder,
    "simplejpeg": _simplejpeg_decoder,
    "torchvision": _torchvision_decoder,
}
RESIZERS: dict[str, Callable[[int], Resize]] = {
    "PIL bicubic": _pil_resizer,
    "OpenCV area": functools.partial(_opencv_resizer, interpolation="INTER_AREA"),
    "OpenCV cubic": functools.partial(_opencv_resizer, interpolation="INTER_CUBIC"),
    "torch bicubic": _torch_resizer,
}
PAIRS = (  # that are worth a row of their own
    ("PIL", "torch bicubic"),
    ("OpenCV", "OpenCV area"),
    ("OpenCV", "OpenCV cubic"),
    ("OpenCV", "PIL bicubic"),
    ("simplejpeg", "PIL bicubic"),
    ("simplejpeg", "OpenCV area"),
    ("simplejpeg", "torch bicubic"),
    ("torchvision", "torch bicubic"),
)


def installed(makers: Mapping[str, Callable[[], Any]], skipped: dict[str, str]) -> dict[str, Any]:
    """What the makers make; into `skipped`, why one of them cannot."""
    made = {}
    for name, maker in makers.items():
        try:
            made[name] = maker()
        except Exception as error:  # a broken installation raises anything
            reason = str(error).partition("\n")[0]
            skipped[name] = f"{type(error).__name__}: {reason}"
    return made
