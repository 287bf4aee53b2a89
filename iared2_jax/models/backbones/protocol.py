"""What a backbone has to offer: the one contract between vision transformers and token reduction.

docs/add_a_backbone.md shows how to add one.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float

from iared2_jax.models.input_spec import InputSpec
from iared2_jax.models.token_layouts import TokenLayout
from iared2_jax.typing import Array


class BlockFlops(NamedTuple):
    """One block's multiply-accumulates for one image: numbers, or one per image.

    projections: qkv and proj. attention: what grows with the square of the tokens. mlp: the rest.
    """

    projections: ArrayLike
    attention: ArrayLike
    mlp: ArrayLike

    @property
    def linear(self):
        """Without the attention: the paper's convention."""
        return self.projections + self.mlp

    @property
    def full(self):
        return self.linear + self.attention


@runtime_checkable
class Backbone(Protocol):
    """A linen module with these attributes and methods.

    `num_classes`, `dtype` and `attention_kernel` must be fields, for `clone`; so must `input_spec`,
    where `create_model` is to build it at another size.

    Attributes:
      input_spec: the shape and the patches of its inputs; N patch tokens, which interpreters score.
      num_classes, embed_dim, num_heads, depth: as everywhere; depth counts the blocks that groups
        are made of.
      num_prefix: tokens before the patches, never dropped, the first of them CLS; 0 if the blocks
        see patches alone.
      num_prefix_positions: optional; how many of these have a place in `pos_embed`, if not all.
      dtype: of the computation. attention_kernel: one of `attention_kernels`.
      parts: optional; which of its submodules belong to "embedding", to "classifier" (what lies
        between blocks and head) and to "head", if they are not called as in `PARTS`.
      propagates_relevance: optional; True if it is made of modules of `attribution.relevance.RULES`
        alone, so that relevance can be propagated through it.
    """

    input_spec: InputSpec
    num_classes: int
    embed_dim: int
    num_heads: int
    depth: int
    num_prefix: int
    dtype: DTypeLike
    attention_kernel: str
    attention_kernels: tuple[str, ...]
    clone: Callable[..., "Backbone"]

    def embed(self, inputs: Float[Array, "b ..."]) -> Float[Array, "b t d"]:
        """Images or clips to tokens, prefix first, then patches in the order of `InputSpec`."""

    def run_block(
        self, index: int, x: Float[Array, "b t d"], layout: TokenLayout
    ) -> tuple[Float[Array, "b t d"], Float[Array, "s h c"] | None]:
        """Block `index` (from 0) over tokens that lie as `layout` says.

        With a prefix, also its CLS query's attention, as `layout.attend` returns it; without, None.
        Dropped tokens must not change the others: attention is the only place where tokens meet.
        """

    def classify(
        self, x: Float[Array, "b t d"], alive: Bool[Array, "b n"] | None
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b f"], list[Float[Array, "b h n"]]]:
        """Logits (float32), what the head reads, and the CLS attention of what runs in here.

        alive: which patch tokens of `x` survive, None: all; what lies in the others is not read.
        """

    # Optional: `run_attention_half(index, x, layout)` and `run_mlp_half(index, x)`, a block in two
    # steps, for selectors that reduce tokens between them (EViT, ToMe). The first also returns the
    # CLS query's attention and every token's key, the mean over the heads [b, t, e]; its attention
    # must count a key as often as the layout's `sizes` say.

    # Optional: `shows_attention`, False if its blocks have no weights of a CLS query over patches
    # (`attention_variants`); then `run_block` returns None for them, goes by the layout's `places`,
    # and what needs the weights refuses. `final_tokens(x)`, all tokens behind the last block as the
    # head reads them, for DynamicViT's phase; its `classify` then takes shares in [0, 1] for
    # `alive`, and its attention counts keys by sizes [s, c, c] as `Padded` has them.

    # Optional: `classify_features(features)`, the logits of what `classify` returns second; a head
    # can then be trained on cached features (config.supervised.cached_examples).

    def block_flops(self, tokens: ArrayLike) -> BlockFlops:
        """The cost of one block that sees so many tokens, prefix included."""

    def other_flops(self, kept: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
        """All but the blocks, (linear, full), where `kept` patch tokens reach `classify`."""


# The parts of a model that train together, by the names of their submodules and parameters; what is
# called block_<i> is block i. A backbone with other names says so in an attribute `parts`.
PARTS: dict[str, tuple[str, ...]] = {
    "embedding": ("patch_embed", "pos_embed", "time_embed", "cls_token", "dist_token", "reg_token"),
    "classifier": ("norm",),
    "head": ("head", "head_dist"),
}
