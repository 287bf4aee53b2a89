"""The paper's baseline map: what the CLS query attends to in one block of the dense backbone."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Float

from iared2_jax.errors import UsageError
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array


def raw_attention(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    block: int = 1,
) -> Float[Array, "b n"]:
    """CLS-to-patch attention, mean over heads; of a distilled model's two tokens, CLS alone.

    Args:
      block: from 0, or from the end if negative; the paper takes Block_1. Where the groups' blocks
        have no CLS (CaiT), the class-attention blocks are counted.

    Raises:
      UsageError: there is no such block.
    """
    maps = attention_of_blocks(module, variables, inputs)
    if not -len(maps) <= block < len(maps):
        raise UsageError(
            f"block must be in 0..{len(maps) - 1}, got {block}"
            if maps
            else "this backbone has no CLS query whose attention could be shown"
        )
    return maps[block]


@functools.partial(jax.jit, static_argnums=0)
def attention_of_blocks(
    module: IARed2, variables: Mapping[str, Any], inputs: Float[Array, "b ..."]
) -> list[Float[Array, "b n"]]:
    """Every block's map; compiled once per model."""
    _, out = module.apply(variables, inputs, execution="dense")
    return [rows.mean(axis=1) for rows in out.attention]
