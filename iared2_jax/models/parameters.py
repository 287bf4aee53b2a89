"""What is to be known of a parameter, declared where the parameter is: how it starts, if it decays.

An `Initial` is a linen initialiser that also draws on the host and says whether weight decay acts.
Plain linen initialisers work, too: such a parameter starts as they say, and decays if it is a
matrix called "kernel".

`declared(module, shape)` collects the `Initial` of every parameter without computing anything:

1. It runs `module.init` under `jax.eval_shape`, so that all values are shapes.
2. Linen calls each parameter's initialiser there. In this one call (`_boxing` is set) an `Initial`
   gives its value in a box, `_Box`, with itself beside it. Linen knows such boxes, `AxisMetadata`
   (its own hold sharding axes): modules see the value, the returned tree keeps the box.
3. The tree is flattened to a dict, path -> (shape, `Initial`), and the boxes are gone.

Everywhere else an `Initial` gives the bare value, so parameters and checkpoints have no boxes.
"""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.core import meta
from jaxtyping import PRNGKeyArray
from scipy import special

from iared2_jax.typing import Array

# Whether an `Initial` boxes its values; a context variable, so each thread has its own.
_boxing: contextvars.ContextVar[bool] = contextvars.ContextVar("boxing", default=False)

# (generator, shape) -> initial values.
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Initial:
    """The distribution a parameter starts from, and whether weight decay acts on it.

    Attributes:
      distribution: a linen initialiser, for `module.init`.
      draw: the same on the host: any device starts alike, and nothing is compiled.
      decays: whether weight decay (and Muon, which is for matrices) takes it for a weight.
    """

    distribution: Callable[..., Array]
    draw: Draw
    decays: bool = False

    def __call__(self, key: PRNGKeyArray, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        value = self.distribution(key, tuple(shape), dtype)
        return _Box(value, self) if _boxing.get() else value


class _Box(meta.AxisMetadata):
    """A parameter's value with the `Initial` it came from; linen hands modules the bare value."""

    def __init__(self, value: Any, initial: Initial):
        self.value, self.initial = value, initial

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "_Box":
        return _Box(val, self.initial)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "_Box":
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "_Box":
        return self


# The `Initial` is part of the tree's structure, which `jax.eval_shape` hands through as it is.
jax.tree_util.register_pytree_node(
    _Box, lambda x: ((x.value,), x.initial), lambda initial, leaf: _Box(*leaf, initial)
)


@contextlib.contextmanager
def _boxed_values() -> Iterator[None]:
    """Within this context, an `Initial` boxes its values."""
    token = _boxing.set(True)
    try:
        yield
    finally:
        _boxing.reset(token)


def declared(
    module: nn.Module, shape: tuple[int, ...]
) -> dict[str, tuple[jax.ShapeDtypeStruct, Initial | None]]:
    """Every parameter's shape and `Initial` (None: it has another initialiser), by its path.

    Args:
      shape: of one input, without the batch.

    Example:
      >>> from iared2_jax.models.variants import get_variant
      >>> found = declared(get_variant("vit_micro").backbone, (64, 64, 3))
      >>> shape, initial = found["block_0/norm1/scale"]
      >>> shape.shape, initial.decays
      ((96,), False)
    """
    with _boxed_values():
        tree = jax.eval_shape(
            lambda key: module.init(key, jnp.zeros((1, *shape))), jax.random.key(0)
        )
    flat = traverse_util.flatten_dict(
        tree["params"], sep="/", is_leaf=lambda _, node: isinstance(node, _Box)
    )
    return {
        path: (leaf.value, leaf.initial) if isinstance(leaf, _Box) else (leaf, None)
        for path, leaf in flat.items()
    }


def natural_order(path: str) -> list[Any]:
    """A sort key for names with numbers in them: block_10 comes after block_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def decays(path: str, shape: tuple[int, ...], initial: Initial | None) -> bool:
    """Whether weight decay acts on a parameter: as declared, else on matrices called "kernel"."""
    if initial is not None:
        return initial.decays
    return len(shape) == 2 and path.endswith("/kernel")


def _fan_in_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(-1, 1, shape) / shape[0] ** 0.5


def constant(value: float) -> Initial:
    """A parameter that starts at one value everywhere."""
    return Initial(nn.initializers.constant(value), lambda rng, shape: np.full(shape, value))


def normal(std: float, decays: bool = False) -> Initial:
    """Normal numbers around 0."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """One uniform number each, by the inverse distribution."""
        return std * special.ndtri(rng.uniform(special.ndtr(-8), special.ndtr(8), shape))

    return Initial(nn.initializers.normal(stddev=std), draw, decays)


ZEROS = Initial(nn.initializers.zeros, lambda rng, shape: np.zeros(shape))
ONES = Initial(nn.initializers.ones, lambda rng, shape: np.ones(shape))

# DeiT's standard deviation; its truncated normal is cut at 2.0, a hundred of them out.
WEIGHT = normal(0.02, decays=True)
TOKEN = normal(0.02)  # CLS, positions: vectors that are added, whatever their shape

# PyTorch's default for a linear layer, U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
LINEAR = Initial(
    nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), _fan_in_uniform, decays=True
)
POLICY_TOKEN = Initial(nn.initializers.normal(1.0), lambda rng, shape: rng.normal(size=shape))
