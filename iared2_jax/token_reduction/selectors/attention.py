"""Selection by attention: what the CLS query attends to, which needs no training."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from iared2_jax.models.backbones.protocol import Backbone
from iared2_jax.token_reduction.selectors.base import Evidence, Selector
from iared2_jax.typing import Array

if TYPE_CHECKING:
    from iared2_jax.token_reduction.model import IARed2


@dataclasses.dataclass(frozen=True)
class Attention(Selector):
    """Mean over heads of the CLS query's attention.

    Attributes:
      block: None: the last block before the group, which costs nothing, and needs a first group
        that keeps all. A number, from 0: the paper's baseline in two passes (Tables 2, 3 and 5):
        the dense backbone runs up to that block only for its map, then tokens are dropped before
        the first block, and all blocks run.
    """

    block: int | None = None

    @property
    def scores_inputs(self) -> bool:
        return self.block is not None

    def input_scores(
        self, inputs: Float[Array, "b ..."], tokens: Float[Array, "b t d"], model: Any
    ) -> Float[Array, "b n"] | None:
        """The map of `block`, from a first pass over all tokens."""
        if self.block is None:
            return None
        return model.cls_attention(tokens, self.block).mean(axis=1)

    def token_scores(
        self,
        group: int,
        x: Float[Array, "s t d"],
        attention: Float[Array, "s h n"] | None,
        alive: Bool[Array, "s n"] | None,
        model: Any,
    ) -> Evidence:
        """The mean over heads of what the CLS query attended to; before any block, all alike."""
        if attention is None:  # nothing has been attended to: all tokens score alike
            return Evidence(jnp.ones((x.shape[0], x.shape[1] - model.num_prefix)))
        return Evidence(attention.mean(axis=1))

    def flops(
        self, backbone: Backbone, entering: Sequence[ArrayLike]
    ) -> tuple[ArrayLike, ArrayLike]:
        """The first pass's cost: the blocks before `block`, its qkv, and the CLS query's row."""
        if self.block is None:
            return 0.0, 0.0
        d, tokens = backbone.embed_dim, backbone.input_spec.num_patches + backbone.num_prefix
        block = backbone.block_flops(tokens)
        linear = self.block * block.linear + 3 * tokens * d**2
        return linear, linear + self.block * (block.full - block.linear) + tokens * d

    def check(self, module: "IARed2", keep_ratios: Sequence[float] | None) -> None:
        """Refuses models without CLS, and budgets that drop before anything was attended to."""
        if not module.num_prefix:
            raise ValueError(
                'selector="attention" needs a CLS token in the blocks; this backbone has none there'
            )
        module.require_attention_weights('selector="attention"')
        if self.block is not None:
            last = module.backbone.depth - 1
            if not 0 <= self.block <= last:
                raise ValueError(f"attention of block {self.block}: there are blocks 0..{last}")
            super().check(module, keep_ratios)
        elif keep_ratios is None or keep_ratios[0] != 1:
            raise ValueError(
                'selector="attention" needs keep_ratios that start with 1: before the first block '
                f"nothing has been attended to; got {keep_ratios}"
            )
