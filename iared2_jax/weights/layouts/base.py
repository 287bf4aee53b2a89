"""What a layout is: how another project names and shapes the weights of the same backbones.

A layout says, for every parameter of ours, which of its tensors it is made of, and how. So loading
can tell both what is missing and what was left over. Facts: each project's own loading code.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Recipe(NamedTuple):
    """What one of our parameters is made of: `make(*tensors)`, of the tensors with these names."""

    names: tuple[str, ...]
    make: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class NamingScheme:
    """One project's way to name weights.

    Attributes:
      name: for messages.
      recipe: from a parameter's path ("backbone/block_0/attn/qkv/kernel") to what it is made of.
      unused: names of tensors that take no part in the answer.
      torch: whether its kernels lie as PyTorch's, [out, in, ..], or as Flax', [.., in, out].
      divided: names of TimeSformer's temporal attention, which joint attention has no place for.
      joined_positions: whether the position embedding has the prefix tokens, too, before the grid.
      interpolation: how its own code resizes positions, one of `weights.positions.INTERPOLATIONS`.
    """

    name: str
    recipe: Callable[[str], Recipe]
    unused: str = r"(?!)"
    divided: str = r"(?!)"
    joined_positions: bool = True
    torch: bool = True
    interpolation: str = "antialiased"


# -- From their arrays to ours. A linear layer's kernel is [in, out] here, as in Flax.


def same(x: np.ndarray) -> np.ndarray:
    """The array as it is."""
    return x


def transposed(x: np.ndarray) -> np.ndarray:
    """PyTorch's [out, in] to [in, out]."""
    return x.T


def from_conv(x: np.ndarray) -> np.ndarray:
    """PyTorch's [d, c, p, q] to [(p q c), d]; a matrix [d, (p q c)], as of ours, is transposed."""
    return x.T if x.ndim == 2 else x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def rows(x: np.ndarray) -> np.ndarray:
    """The array with all axes but the last in one."""
    return x.reshape(-1, x.shape[-1])


def columns(x: np.ndarray) -> np.ndarray:
    """The array with all axes but the first in one."""
    return x.reshape(x.shape[0], -1)


def joined(*parts: np.ndarray) -> np.ndarray:
    """Query, key and value next to each other, in the last axis."""
    return np.concatenate(parts, axis=-1)


def joined_transposed(*parts: np.ndarray) -> np.ndarray:
    """Query, key and value, each transposed, next to each other."""
    return joined(*(x.T for x in parts))


def cls_with_its_position(path: str, cls_token: str, positions: str) -> Recipe | None:
    """The recipe of a CLS that takes in its position, for a model where it has none of its own.

    None for all parameters but CLS and the positions.
    """
    if path == "cls_token":
        return Recipe((cls_token, positions), lambda cls, places: cls + places[:, :1])
    if path == "pos_embed":
        return Recipe((positions,), lambda places: places[:, 1:])
    return None
