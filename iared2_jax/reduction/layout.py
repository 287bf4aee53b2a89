"""How a group's surviving tokens lie in memory while its blocks run, under static shapes.

A block is linear layers, which see one token at a time, and attention, which sees one image at a
time. Only attention has to know the layout:

- `Padded`: one row per image, as long as the longest; short rows end in padding.
- `Packed`: one list of all images' tokens; it is spread into rows for attention alone. Attention is
  8% of a DeiT-S block's multiply-adds, so 92% of them are spent on no padding.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from iared2_jax.typing import Array


class Padded(NamedTuple):
    """One row per image.

    valid [s, c]: which tokens are real; None: all of them.
    lengths [s]: how many, if the real ones come first in every row; None: not known.
    """

    valid: Bool[Array, "s c"] | None = None
    lengths: Int[Array, " s"] | None = None

    def spread(self, x: Float[Array, "s c f"]) -> Float[Array, "s c f"]:
        """To one row per image: as it is."""
        return x

    def collect(self, x: Float[Array, "s c f"]) -> Float[Array, "s c f"]:
        """Back from one row per image: as it is."""
        return x


class Packed(NamedTuple):
    """One list of `t` places for the tokens of `s` images, image after image.

    lengths [s]: each image's tokens. slots [s, c]: the place of its c-th token. home [t]: where
    that place lies among the s * c. valid [s, c]: which slots are real.
    """

    lengths: Int[Array, " s"]
    slots: Int[Array, "s c"]
    home: Int[Array, " t"]
    valid: Bool[Array, "s c"]

    def spread(self, x: Float[Array, "1 t f"]) -> Float[Array, "s c f"]:
        """To one row per image; padding is 0, whatever a neighbour's tokens hold."""
        return jnp.where(self.valid[..., None], x[0][self.slots], 0)

    def collect(self, x: Float[Array, "s c f"]) -> Float[Array, "1 t f"]:
        """Back into the list; places that hold no token repeat some other."""
        return x.reshape(-1, x.shape[-1])[self.home][None]


Layout = Padded | Packed

EVERY_TOKEN = Padded()


def padded(lengths: Int[Array, " s"], row_length: int) -> Padded:
    """Rows of `row_length` tokens of which the first `lengths` are real."""
    return Padded(jnp.arange(row_length) < lengths[:, None], lengths)


def packed(lengths: Int[Array, " s"], total: int, row_length: int) -> Packed:
    """A list of `total` places; `lengths` must add up to no more, and none exceed `row_length`."""
    ends = jnp.cumsum(lengths)
    starts = ends - lengths
    column = jnp.arange(row_length)
    place = jnp.arange(total)
    image = jnp.minimum((place[:, None] >= ends).sum(-1), len(lengths) - 1)
    home = image * row_length + jnp.minimum(place - starts[image], row_length - 1)
    return Packed(
        lengths=lengths,
        slots=jnp.minimum(starts[:, None] + column, total - 1),
        home=home,
        valid=column < lengths[:, None],
    )
