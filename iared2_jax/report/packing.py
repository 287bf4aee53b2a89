"""Maps and pictures as text, for a page that holds them all: bytes in base64, data URIs."""

import base64
import io

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from iared2_jax.models.input_spec import InputSpec

_FRAME, _STRIP = 224, 1024  # px of a shown picture's longer side; of all frames of a clip in a row
TINY = 96  # px; up to here pictures are kept bit by bit
_JPEGS = ((1.0, 85), (1.0, 70), (1.0, 50), (0.7, 50), (0.5, 50))  # scale and quality, best first
_CELLS = 56  # a heatmap is shown on at most 56 x 56 cells


def in_a_row(values: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Values per patch [.., N] as they are shown: [.., rows, columns], a clip's frames in a row."""
    grid = spec.on_grid(values)
    return side_by_side(grid) if spec.is_clip else grid


def side_by_side(values: np.ndarray) -> np.ndarray:
    """[B, .., T, h, w] as [B, .., h, T w]; [B, h, w] as it is."""
    return values if values.ndim == 3 else rearrange(values, "b ... t h w -> b ... h (t w)")


def on_fewer_cells(heatmaps: np.ndarray) -> np.ndarray:
    """Heatmaps [B, .., H, W] on no more than 56 x 56 cells, of all frames together."""
    *leading, height, width = heatmaps.shape
    frames = leading[1] if len(leading) > 1 else 1
    scale = min(1, _CELLS / (height * width * frames) ** 0.5)
    size = max(1, int(height * scale)), max(1, int(width * scale))
    return np.asarray(jax.image.resize(heatmaps, (*leading, *size), "linear"))


def quantised(
    cells: Float[np.ndarray, "b r c"], known: Bool[np.ndarray, "b r c"]
) -> tuple[list[str], Float[np.ndarray, "b 2"]]:
    """Per image its cells as bytes 1..255 (0: not known), and what 1 and 255 stand for."""
    cells = np.nan_to_num(np.asarray(cells, np.float32))
    low = np.where(known, cells, np.inf).min(axis=(1, 2))
    high = np.where(known, cells, -np.inf).max(axis=(1, 2))
    ranges = np.where(known.any(axis=(1, 2))[:, None], np.stack([low, high], axis=1), 0)
    low, high = (ranges[:, i, None, None] for i in range(2))
    share = (cells - low) / np.where(high > low, high - low, 1)
    codes = np.where(known, 1 + np.rint(254 * share.clip(0, 1)), 0).astype(np.uint8)
    return [to_base64(image) for image in codes], ranges


def packed(values: UInt8[np.ndarray, "p n"], bits: int) -> UInt8[np.ndarray, "p m"]:
    """Each row's values, `bits` each, the first in the lowest bits of a byte."""
    per_byte = 8 // bits
    padded = np.pad(values, [(0, 0), (0, -values.shape[1] % per_byte)])
    parts = rearrange(padded, "p (m k) -> p m k", k=per_byte) << (bits * np.arange(per_byte))
    return parts.sum(axis=-1).astype(np.uint8)


def to_base64(values: UInt8[np.ndarray, "..."]) -> str:
    """The bytes of an array as text."""
    return base64.b64encode(values.tobytes()).decode()


def in_colour(pixels: UInt8[np.ndarray, "*b h w c"]) -> UInt8[np.ndarray, "*b h w 3"]:
    """Pixels as they are shown: grey ones in colour, of more channels the first three."""
    return np.repeat(pixels[..., :1], 3, axis=-1) if pixels.shape[-1] < 3 else pixels[..., :3]


def shown_pictures(
    pixels: UInt8[np.ndarray, "b ..."], spec: InputSpec
) -> UInt8[np.ndarray, "b h w 3"]:
    """Inputs as they are shown: in colour, no larger than needed, a clip's frames side by side."""
    colour = in_colour(pixels)
    if spec.is_clip:
        colour = rearrange(colour, "b t h w c -> b h (t w) c")
    scale = min(1, _FRAME / max(spec.size), _STRIP / max(colour.shape[1:3]))
    return np.stack([np.asarray(_scaled(Image.fromarray(image), scale)) for image in colour])


def data_uris(pictures: UInt8[np.ndarray, "b h w 3"], budget: float, tiny: bool) -> list[str]:
    """The pictures in the best quality that fits so many bytes, or else in the worst.

    tiny: they are so small that they may be kept bit by bit.
    """
    uris: list[str] = []
    images = [Image.fromarray(picture) for picture in pictures]
    ways = [(1.0, None)] if tiny else []
    for scale, quality in (*ways, *_JPEGS):
        uris = [_data_uri(_scaled(image, scale), quality) for image in images]
        if sum(map(len, uris)) <= budget:
            break
    return uris


def _data_uri(image: Image.Image, quality: int | None) -> str:
    """A picture as PNG, or as JPEG of that quality."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=quality)
    kind = "png" if quality is None else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    if scale == 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)))
