"""Selection by a map from outside: memorability (MemNet's place), saliency, a detector's heat.

`Memorability` takes maps that lie in files, `ByMap` a function that makes them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Float

from iared2_jax.token_reduction.selectors.base import Selector
from iared2_jax.typing import Array

if TYPE_CHECKING:
    from iared2_jax.token_reduction.model import IARed2


@dataclasses.dataclass(frozen=True)
class ByMap(Selector):
    """The mean over a patch of a map of the image.

    The map is made of what the model sees, so it is cropped and flipped as that is.

    Attributes:
      maps: from normalised images [b, H, W, C] to [b, H, W], the higher the more a pixel matters.
        The same function means the same compiled program, so do not make a new one for each call.
      on_host: it is no JAX: it is called with NumPy arrays, while the device waits.
    """

    maps: Callable[[Float[Array, "b h w c"]], Float[Array, "b h w"]]
    on_host: bool = False

    def input_scores(
        self, inputs: Float[Array, "b ..."], tokens: Float[Array, "b t d"], model: Any
    ) -> Float[Array, "b n"]:
        """Every patch's mean.

        Raises:
          ValueError: the maps are of another size than the images.
        """
        inputs = model.input_spec.without_map(inputs)
        expected = inputs.shape[:-1]
        if self.on_host:
            like = jax.ShapeDtypeStruct(expected, jnp.float32)
            found = jax.pure_callback(self._checked, like, inputs, vmap_method="sequential")
        else:
            found = self.maps(inputs)
            _check_shape(found.shape, expected)
        return _means_of_patches(found, model)

    def _checked(self, inputs: Array) -> Float[np.ndarray, "b h w"]:
        found = np.asarray(self.maps(np.asarray(inputs)), np.float32)
        _check_shape(found.shape, inputs.shape[:-1])
        return found

    def check(self, module: "IARed2", keep_ratios: Sequence[float] | None) -> None:
        """Refuses models of clips, too."""
        if module.input_spec.is_clip:
            raise ValueError("the selector ByMap is of images, but the model takes clips")
        super().check(module, keep_ratios)


@dataclasses.dataclass(frozen=True)
class Memorability(Selector):
    """The mean over a patch of the map that comes with the image (`InputSpec.map_channel`).

    Named by the paper's MemNet, but of any model: the map is read from a file
    (`config.data.maps`), and cropped, flipped and mixed as its image is.
    """

    def input_scores(
        self, inputs: Float[Array, "b ..."], tokens: Float[Array, "b t d"], model: Any
    ) -> Float[Array, "b n"]:
        """Every patch's mean."""
        return _means_of_patches(inputs[..., -1], model)

    def check(self, module: "IARed2", keep_ratios: Sequence[float] | None) -> None:
        """Refuses models whose inputs have no map, too."""
        if not module.input_spec.map_channel:
            raise ValueError(
                "the selector memorability needs a map behind the colours of every image: set "
                "config.data.maps, or create_model(.., map_channel=True)"
            )
        super().check(module, keep_ratios)


def _means_of_patches(maps: Float[Array, "b h w"], model: Any) -> Float[Array, "b n"]:
    height, width = model.input_spec.patch
    maps = maps.astype(jnp.float32)
    return reduce(maps, "b (n p) (m q) -> b (n m)", "mean", p=height, q=width)


def _check_shape(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise ValueError(f"ByMap's maps must be {list(expected)}, got {list(found)}")
