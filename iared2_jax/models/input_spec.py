"""What a model takes in: pictures or clips, their size and patches, how pixels are prepared."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from iared2_jax.typing import Array, Norm

IMAGENET_NORM: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_NORM: Norm = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """The inputs of a model: shape, grid of patches, and preparation of the pixels.

    Patches are numbered row by row; in a clip, the frames of one place follow each other (the order
    of TimeSformer): index = (row * columns + column) * frames + frame.

    Attributes:
      height, width: px, multiples of the patch's.
      channels: 3 for colour, 1 for grey.
      patch: height and width of a patch, px.
      frames: of a clip; None: a picture.
      norm: mean and standard deviation per channel that pixels in [0, 1] are normalised by.
      crop_pct: of an evaluation picture, the share of the shorter edge that the centre crop keeps.
      map_channel: whether a map of the picture, 0 to 1, comes behind its channels. Selectors see
        it (`Memorability`), backbones do not.

    Raises:
      ValueError: sizes that are not positive, that the patch does not divide, or maps of clips.

    Example:
      >>> spec = InputSpec(224, 320, patch=(32, 32))
      >>> spec.shape, spec.grid, spec.num_patches
      ((224, 320, 3), (7, 10), 70)
    """

    height: int = 224
    width: int = 224
    channels: int = 3
    patch: tuple[int, int] = (16, 16)
    frames: int | None = None
    norm: Norm = IMAGENET_NORM
    crop_pct: float = 1.0
    map_channel: bool = False

    def __post_init__(self):
        sizes = (self.height, self.width, self.channels, *self.patch, self.frames or 1)
        if min(sizes) < 1 or self.frames == 0:
            raise ValueError(f"sizes of an input must be positive: {self}")
        if self.height % self.patch[0] or self.width % self.patch[1]:
            raise ValueError(
                f"patches of {self.patch[0]} x {self.patch[1]} px do not divide "
                f"{self.height} x {self.width} px"
            )
        if any(len(values) != self.channels for values in self.norm):
            raise ValueError(f"norm must have a mean and a deviation per channel: {self}")
        if self.map_channel and self.is_clip:
            raise ValueError("maps go with images, but the model takes clips")

    @property
    def is_clip(self) -> bool:
        return self.frames is not None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, px."""
        return self.height, self.width

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels and map), with the frames before them if it is a clip."""
        picture = (self.height, self.width, self.channels + self.map_channel)
        return (self.frames, *picture) if self.frames is not None else picture

    @property
    def kind(self) -> str:
        """What errors call the inputs: "images" or "clips"."""
        return "clips" if self.is_clip else "images"

    @property
    def batch_shape(self) -> str:
        """The shape of a batch in words, e.g. "[B, 224, 224, 3]"."""
        return f"[B, {', '.join(map(str, self.shape))}]"

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches (down, across), with the frames before them if it is a clip."""
        return (self.frames, *self.frame_grid) if self.frames is not None else self.frame_grid

    @property
    def frame_grid(self) -> tuple[int, int]:
        """Patches (down, across) of a picture, or of one frame of a clip."""
        return self.height // self.patch[0], self.width // self.patch[1]

    @property
    def num_patches(self) -> int:
        """N, the tokens that interpreters score."""
        return math.prod(self.grid)

    @property
    def patch_values(self) -> int:
        """Numbers in one patch of one frame: its pixels times the channels."""
        return math.prod(self.patch) * self.channels

    def check(self, inputs: Any) -> None:
        """Refuses an array that is no batch of such inputs.

        Raises:
          ValueError: another shape.
        """
        if tuple(inputs.shape[1:]) != self.shape:
            behind = ", a map behind the colours" if self.map_channel else ""
            raise ValueError(
                f"{self.kind} must be {self.batch_shape}{behind}, got {list(inputs.shape)}"
            )

    def without_map(self, inputs: Array) -> Array:
        """The channels of inputs or pixels that the backbone sees."""
        return inputs[..., : self.channels]

    def to_patches(self, inputs: Float[Array, "b ..."]) -> Float[Array, "b n f"]:
        """The patches of a batch, each a vector (row, column, channel), in the order of the grid.

        Raises:
          ValueError: inputs of another shape.
        """
        self.check(inputs)
        inputs, (p, q) = self.without_map(inputs), self.patch
        if self.is_clip:
            return rearrange(inputs, "b t (h p) (w q) c -> b (h w t) (p q c)", p=p, q=q)
        return rearrange(inputs, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=q)

    def on_grid(self, values: Array) -> Array:
        """Values per patch [.., N] on their grid: [.., h, w], of a clip [.., T, h, w].

        Raises:
          ValueError: not N values.
        """
        if values.shape[-1] != self.num_patches:
            raise ValueError(
                f"there must be {self.num_patches} values, one per patch of {self.grid}, "
                f"got {values.shape[-1]}"
            )
        *frames, h, w = self.grid
        if not frames:
            return values.reshape(*values.shape[:-1], h, w)
        return rearrange(values, "... (h w t) -> ... t h w", h=h, w=w)

    def normalize(self, pixels: Array) -> Float[Array, "b ..."]:
        """Pixels 0..255 to (x / 255 - mean) / std, and a map to x / 255, on the device."""
        inputs = normalize(self.without_map(pixels), self.norm)
        if not self.map_channel:
            return inputs
        maps = pixels[..., self.channels :].astype(jnp.float32) / 255
        return jnp.concatenate([inputs, maps], axis=-1)


def normalize(pixels: Array, norm: Norm) -> Float[Array, "b ..."]:
    """Pixels 0..255 to (x / 255 - mean) / std, with a mean and a deviation per channel."""
    mean, std = (jnp.asarray(values, jnp.float32) for values in norm)
    return (pixels.astype(jnp.float32) / 255 - mean) / std


def clips(
    size: int | tuple[int, int],
    frames: int,
    patch: int | tuple[int, int] = 16,
    channels: int = 3,
    norm: Norm = HALF_NORM,
    crop_pct: float = 1.0,
) -> InputSpec:
    """The spec of clips of so many frames; a size or a patch given as one number is square."""
    spec = images(size, patch, channels, norm, crop_pct)
    return dataclasses.replace(spec, frames=frames)


def images(
    size: int | tuple[int, int],
    patch: int | tuple[int, int] = 16,
    channels: int = 3,
    norm: Norm = IMAGENET_NORM,
    crop_pct: float = 1.0,
) -> InputSpec:
    """The spec of pictures: a size or a patch given as one number is square."""
    height, width = (size, size) if isinstance(size, int) else size
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    return InputSpec(height, width, channels, patch, None, norm, crop_pct)
