"""EViT: the tokens that CLS attends to most, the others fused into one."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from iared2_jax.token_reduction.selectors.base import Evidence, Selector
from iared2_jax.token_reduction.state import TokenState

if TYPE_CHECKING:
    from iared2_jax.token_reduction.model import IARed2


@dataclasses.dataclass(frozen=True)
class EViT(Selector):
    """Mean over heads of the CLS query's attention, in the group's first block.

    Liang et al. 2022, "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations". What is not kept is fused into one further token (the reducer "fuse"). Theirs
    are four groups of three blocks, of which the first keeps all: `schedules.constant_rate`.
    """

    reducer = "fuse"

    def scores_after_attention(self, state: TokenState, num_prefix: int) -> Evidence:
        """What the CLS query attended to just now."""
        return Evidence(state.attention.mean(axis=1))

    def check(self, module: "IARed2", keep_ratios: Sequence[float] | None) -> None:
        """Refuses models without CLS, too."""
        if not module.num_prefix:
            raise ValueError(
                'selector="evit" needs a CLS token in the blocks; this backbone has none there'
            )
        super().check(module, keep_ratios)
