"""How a group's surviving tokens lie in memory while its blocks run, under static shapes.

A block is linear layers, which see one token at a time, and attention, which sees one image at a
time. Only attention has to know the layout:

- `Padded`: one row per image, as long as the longest; short rows end in padding.
- `Packed`: one list of all images' tokens; it is spread into rows for attention alone. Attention is
  8% of a DeiT-S block's multiply-adds, so 92% of them are spent on no padding.

A layout offers `spread` (to one row per image), `real` (which of these places hold tokens) and
`attend` (attention, row by row).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from iared2_jax.typing import Array

# What attention does with one row per image: (qkv [s, c, 3d], valid, lengths) -> the answers
# [s, c, d], and the first query's weights [s, heads, c]. Where tokens stand for several, it gets
# their sizes [s, c] as a fourth argument.
Core = Callable[..., tuple[Array, Array]]


class Places(NamedTuple):
    """Where tokens lie in the whole image.

    of [s, c]: of the `total` places, prefix first, which is each token's.
    """

    of: Int[Array, "s c"]
    total: int


class Padded(NamedTuple):
    """One row per image.

    valid [s, c]: which tokens are real; None: all of them.
    lengths [s]: how many, if the real ones come first in every row; None: not known.
    sizes [s, c]: how many tokens each stands for, where some were merged; None: each for itself.
      [s, c, c]: how often each counts, by who asks.
    places: for attentions that go by a token's place; None: each token is at its own.
    """

    valid: Bool[Array, "s c"] | None = None
    lengths: Int[Array, " s"] | None = None
    sizes: Float[Array, "s c"] | Float[Array, "s c c"] | None = None
    places: "Places | None" = None

    @property
    def real(self) -> Bool[Array, "s c"] | None:
        """Which places of the rows hold tokens; None: all."""
        return self.valid

    def spread(self, x: Float[Array, "s c f"]) -> Float[Array, "s c f"]:
        """The tokens in one row per image: as they are."""
        return x

    def attend(
        self, qkv: Float[Array, "s c f"], core: Core
    ) -> tuple[Float[Array, "s c d"], Float[Array, "s h c"]]:
        """Attention as it is."""
        if self.sizes is None:
            return core(qkv, self.valid, self.lengths)
        return core(qkv, self.valid, self.lengths, self.sizes)

    def attend_by_place(
        self, qkv: Float[Array, "s c f"], core: Callable[[Array, Array], Array]
    ) -> Float[Array, "s c d"]:
        """Attention over rows in which every token lies at its own place; holes are not valid.

        Args:
          core: (qkv [s, total, f], valid [s, total]) -> the answers [s, total, d].

        Raises:
          ValueError: tokens have sizes.
        """
        if self.sizes is not None:
            raise ValueError(
                'tokens that count more than once, or to a share, need attention="dense": '
                "another has no weights for them"
            )
        valid = jnp.ones(qkv.shape[:2], bool) if self.valid is None else self.valid
        if self.places is None:
            return core(qkv, valid)
        images = jnp.arange(qkv.shape[0])[:, None]
        # What is not valid may claim another's place: it is written behind the last one, nowhere.
        to = jnp.where(valid, self.places.of, self.places.total)
        shape = (qkv.shape[0], self.places.total)
        rows = jnp.zeros((*shape, qkv.shape[-1]), qkv.dtype).at[images, to].set(qkv, mode="drop")
        there = jnp.zeros(shape, bool).at[images, to].set(True, mode="drop")
        return jnp.take_along_axis(core(rows, there), self.places.of[..., None], axis=1)


class Rows(NamedTuple):
    """Some neighbouring images of a list: each one's tokens by their places in it [s, c]."""

    slots: Int[Array, "s c"]
    valid: Bool[Array, "s c"]
    lengths: Int[Array, " s"]

    def spread(self, x: Float[Array, "1 t f"]) -> Float[Array, "s c f"]:
        """The tokens in one row per image; padding is 0, whatever a neighbour's tokens hold."""
        return jnp.where(self.valid[..., None], x[0][self.slots], 0)


class Packed(NamedTuple):
    """One list of `t` places for the tokens of some images, image after image.

    For attention the images are taken in a few `blocks`, each with rows as long as its own longest
    image needs: with images in the order of their lengths, that is little padding.

    home [t]: where each place's answer lies, in the rows of all blocks one after another.
    """

    blocks: tuple[Rows, ...]
    home: Int[Array, " t"]

    @property
    def real(self) -> Bool[Array, "s c"]:
        """Which places of the rows hold tokens."""
        return _stacked([rows.valid for rows in self.blocks], axis=1)

    def spread(self, x: Float[Array, "1 t f"]) -> Float[Array, "s c f"]:
        """The tokens in one row per image, all as long as the longest block's."""
        return _stacked([rows.spread(x) for rows in self.blocks], axis=1)

    def attend(
        self, qkv: Float[Array, "1 t f"], core: Core
    ) -> tuple[Float[Array, "1 t d"], Float[Array, "s h c"]]:
        """Attention block by block; the answers back in the list."""
        answers, weights = zip(
            *(core(rows.spread(qkv), rows.valid, rows.lengths) for rows in self.blocks),
            strict=True,
        )
        flat = jnp.concatenate([y.reshape(-1, y.shape[-1]) for y in answers])
        return flat[self.home][None], _stacked(weights, axis=2)


TokenLayout = Padded | Packed

EVERY_TOKEN = Padded()


def _stacked(parts: Sequence[Array], axis: int) -> Array:
    """Along the first axis, after padding `axis` to the longest with zeros."""
    longest = max(part.shape[axis] for part in parts)
    widths = [[(0, 0)] * part.ndim for part in parts]
    for width, part in zip(widths, parts, strict=True):
        width[axis] = (0, longest - part.shape[axis])
    return jnp.concatenate([jnp.pad(p, w) for p, w in zip(parts, widths, strict=True)])


def padded(lengths: Int[Array, " s"], row_length: int) -> Padded:
    """Rows of `row_length` tokens of which the first `lengths` are real."""
    return Padded(jnp.arange(row_length) < lengths[:, None], lengths)


def list_places(
    lengths: Int[Array, " s"], total: int
) -> tuple[Int[Array, " t"], Int[Array, " t"], Bool[Array, " t"]]:
    """What lies in each of `total` places of a list of images' tokens, image after image.

    Returns:
      The image, which of its tokens, and whether there is one. Places beyond the last token count
      on as if the last image were longer.
    """
    ends = jnp.cumsum(lengths)
    place = jnp.arange(total)
    image = jnp.minimum((place[:, None] >= ends).sum(-1), lengths.shape[0] - 1)
    return image, place - (ends - lengths)[image], place < ends[-1]


def packed(lengths: Int[Array, " s"], total: int, row_lengths: Sequence[int]) -> Packed:
    """A list of `total` places, for images in as many equal blocks as there are `row_lengths`.

    The lengths must add up to no more than `total`, and none exceed its block's row length.
    """
    per_block = lengths.shape[0] // len(row_lengths)
    image, column, _ = list_places(lengths, total)
    starts = jnp.cumsum(lengths) - lengths
    # Where each image's row begins, and how long it is, among the rows of all blocks.
    row_length = jnp.repeat(jnp.asarray(row_lengths), per_block)
    row_start = jnp.cumsum(row_length) - row_length
    blocks = []
    for block, length in enumerate(row_lengths):
        own = slice(block * per_block, (block + 1) * per_block)
        columns = jnp.arange(length)
        slots = jnp.minimum(starts[own, None] + columns, total - 1)
        blocks.append(Rows(slots, columns < lengths[own, None], lengths[own]))
    home = row_start[image] + jnp.minimum(column, row_length[image] - 1)
    return Packed(tuple(blocks), home)
