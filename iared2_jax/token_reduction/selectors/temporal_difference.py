"""Selection by change: how much a patch of a clip differs from the frame before (Table 3)."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from iared2_jax.token_reduction.selectors.base import Selector
from iared2_jax.token_reduction.selectors.pixels import of_pixels
from iared2_jax.typing import Array

if TYPE_CHECKING:
    from iared2_jax.token_reduction.model import IARed2


@dataclasses.dataclass(frozen=True)
class TemporalDifference(Selector):
    """||e(n, t) - e(n, t - 1)||, e the embedded patch n of frame t; before the first frame, 0.

    e is what the pixels add to the token (`of_pixels`): bias, position and time embedding say
    nothing of the clip. The paper leaves open whether they count.
    """

    def input_scores(
        self, inputs: Float[Array, "b ..."], tokens: Float[Array, "b t d"], model: Any
    ) -> Float[Array, "b n"]:
        """The length of the change of every patch."""
        pixels = of_pixels(inputs, tokens, model)
        frames = model.input_spec.frames
        by_time = rearrange(pixels, "b (n t) d -> b n t d", t=frames)
        before = jnp.pad(by_time, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
        change = jnp.linalg.norm(by_time - before, axis=-1)
        return rearrange(change, "b n t -> b (n t)")

    def check(self, module: "IARed2", keep_ratios: Sequence[float] | None) -> None:
        """Refuses models of images, in which nothing changes."""
        if not module.input_spec.is_clip:
            raise ValueError(
                'selector="temporal_difference" needs clips; this model takes images of one moment'
            )
        super().check(module, keep_ratios)
