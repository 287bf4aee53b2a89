"""ToMe: tokens that resemble another one most are merged with it."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax.typing import ArrayLike

from iared2_jax.models.backbones.protocol import Backbone
from iared2_jax.token_reduction.matching import bipartite_match
from iared2_jax.token_reduction.selectors.base import Evidence, Selector
from iared2_jax.token_reduction.selectors.budgets import keep_counts
from iared2_jax.token_reduction.state import TokenState

if TYPE_CHECKING:
    from iared2_jax.token_reduction.model import IARed2


@dataclasses.dataclass(frozen=True)
class ToMe(Selector):
    """How little a token resembles its best match, by bipartite soft matching.

    Bolya et al. 2023, "Token Merging: Your ViT But Faster". Every second token may be merged into
    one of the others (`matching.bipartite_match`), and scores (1 - cosine) / 2 of their keys; the
    others stay, and score 2. What is not kept is merged (the reducer "merge"). ToMe merges r tokens
    in every block: a model of one block a group, and `schedules.constant_number`.
    """

    reducer = "merge"

    def scores_after_attention(self, state: TokenState, num_prefix: int) -> Evidence:
        """Scores by the keys of the attention that just ran."""
        match = bipartite_match(state, num_prefix)
        return Evidence(jnp.where(match.is_target, 2.0, (1 - match.similarity) / 2))

    def flops(
        self, backbone: Backbone, entering: Sequence[ArrayLike]
    ) -> tuple[ArrayLike, ArrayLike]:
        """The similarities of half the tokens with the other half, in `full` only."""
        width = backbone.embed_dim // backbone.num_heads
        return 0.0, sum((m / 2) ** 2 * width for m in entering)

    def check(self, module: "IARed2", keep_ratios: Sequence[float] | None) -> None:
        """Refuses budgets that merge more than every second token of a group, too."""
        super().check(module, keep_ratios)
        entering = module.input_spec.num_patches
        for count in keep_counts(keep_ratios, entering):
            # Of places from num_prefix on, those with an odd number are targets.
            least = (entering + module.num_prefix % 2) // 2
            if count < least:
                raise ValueError(
                    f'selector="tome" merges at most every second token of a group: of {entering} '
                    f"tokens {least} stay, but keep_ratios asks for {count}; more groups reach it"
                )
            entering = count
