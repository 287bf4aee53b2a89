"""Agreement: does the network really answer by the patches that it kept?

Other maps are made of a network's inner values afterwards; ours decides what the network sees. So
one can ask the network itself: with the kept patches alone, with the dropped ones alone, with as
many others.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Bool, Float

from iared2_jax.token_reduction.model import IARed2, Thresholds
from iared2_jax.token_reduction.selectors import first_in_order, random_order
from iared2_jax.typing import Array

# What the network is shown, by name. "kept" is what the last group keeps.
SHOWN = ("as_trained", "kept_from_the_start", "dropped_from_the_start", "random_from_the_start")


@functools.partial(jax.jit, static_argnums=0, static_argnames="keep_ratios")
def answers_when_shown(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    key: Array,
    thresholds: Thresholds = 0.5,
    keep_ratios: tuple[float, ...] | None = None,
) -> dict[str, Float[Array, "b classes"]]:
    """The logits by what the network is shown, a name of `SHOWN` each.

    As trained: every group drops its own. Else from the first block to the last the same patches:
    those that the last group keeps, all the others, or as many as it keeps, at random.

    Args:
      key: of the random patches, which are an image's own in any batch.
      thresholds: keep iff score > threshold. keep_ratios: a fixed budget in their place.
    """
    apply = functools.partial(module.apply, variables, inputs)
    logits, out = apply(thresholds, keep_ratios=keep_ratios)
    kept = out.keep[-1]
    order = random_order(key, inputs, module.input_spec.num_patches)
    random = first_in_order(order, kept.sum(axis=-1))

    def shown(patches: Bool[Array, "b n"]) -> Float[Array, "b classes"]:
        """Logits from these patches alone, from the first block to the last."""
        return apply(keep=[patches] * module.num_groups)[0]

    return dict(zip(SHOWN, (logits, shown(kept), shown(~kept), shown(random)), strict=True))
