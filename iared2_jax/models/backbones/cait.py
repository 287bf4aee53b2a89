"""CaiT (Touvron et al. 2021, "Going deeper with Image Transformers") in Flax linen.

Blocks of talking-heads attention see patches alone; then two class-attention blocks let a CLS token
read the patches, which they leave as they are. Dropped patches must be masked in both stages, and
within talking heads twice: see `TalkingHeads`.
"""

import functools

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int

from iared2_jax.models import taps
from iared2_jax.models.attention import (
    Similarity,
    Softmax,
    WeightedSum,
    attend,
)
from iared2_jax.models.backbones.protocol import PARTS, BlockFlops
from iared2_jax.models.input_spec import InputSpec, images
from iared2_jax.models.layers import Add, Mlp, Scale, TokenDense, classifier, layer_norm
from iared2_jax.models.parameters import TOKEN, WEIGHT, ZEROS, constant
from iared2_jax.models.token_layouts import EVERY_TOKEN, TokenLayout
from iared2_jax.typing import Array

# What every residual branch is multiplied by at first; of CaiTs of 24 blocks.
LAYER_SCALE = 1e-5

_GAMMA = constant(LAYER_SCALE)


class HeadMix(nn.Module):
    """A linear layer across heads: every pair of query and key apart."""

    num_heads: int

    @nn.compact
    def __call__(self, maps: Float[Array, "s h q k"]) -> Float[Array, "s h q k"]:
        kernel = self.param("kernel", WEIGHT, (self.num_heads, self.num_heads))
        bias = self.param("bias", ZEROS, (self.num_heads,))
        return jnp.einsum("shqk,hg->sgqk", maps, kernel) + bias[:, None, None]


class TalkingHeads(nn.Module):
    """Self-attention whose heads are mixed before and after the softmax."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], layout: TokenLayout) -> Float[Array, "b n d"]:
        d = x.shape[-1]
        x = taps.tap(self, taps.ATTENTION_INPUT, x)
        before, after = (HeadMix(self.num_heads, name=name) for name in ("proj_l", "proj_w"))

        def rows(
            qkv: Float[Array, "s c f"],
            valid: Bool[Array, "s c"] | None,
            lengths: Int[Array, " s"] | None,
        ) -> tuple[Float[Array, "s c d"], Float[Array, "s h c"]]:
            """One row per image; the maps are mixed in float32."""
            q, k, v = rearrange(qkv, "s c (three h e) -> three s h c e", three=3, h=self.num_heads)
            # Masked after the mixing: it would spread what is added for one head's sake over all.
            weights = after(Softmax()(before(Similarity()(q, k)), valid))
            # Once more: the second mixing's bias gives every dropped key a weight.
            if valid is not None:
                weights = weights * valid[:, None, None, :]
            weights = taps.tap(self, taps.ATTENTION, weights)
            y = WeightedSum()(weights, v)
            return rearrange(y, "s h c e -> s c (h e)"), weights[:, :, 0]

        y, _ = layout.attend(TokenDense(3 * d, self.dtype, name="qkv")(x), rows)
        return TokenDense(d, self.dtype, name="proj")(y)


class Block(nn.Module):
    """x += gamma_1 TalkingHeads(LN x); x += gamma_2 MLP(LN x)."""

    num_heads: int
    mlp_ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], layout: TokenLayout = EVERY_TOKEN
    ) -> Float[Array, "b n d"]:
        gammas = [_gamma(self, name, x) for name in ("gamma_1", "gamma_2")]
        attention = TalkingHeads(self.num_heads, self.dtype, name="attn")
        y = attention(layer_norm(self.dtype, "norm1")(x), layout)
        x = Add()(x, Scale()(y, gammas[0]))
        y = Mlp(self.mlp_ratio, self.dtype, name="mlp")(layer_norm(self.dtype, "norm2")(x))
        return Add()(x, Scale()(y, gammas[1]))


class ClassAttention(nn.Module):
    """The CLS token's query over itself and the alive patches; also its weights."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], valid: Bool[Array, "b t"] | None
    ) -> tuple[Float[Array, "b 1 d"], Float[Array, "b h t"]]:
        d = x.shape[-1]
        x = taps.tap(self, taps.ATTENTION_INPUT, x)
        q, k, v = (
            rearrange(
                TokenDense(d, self.dtype, name=name)(tokens),
                "b t (h e) -> b h t e",
                h=self.num_heads,
            )
            for name, tokens in (("q", x[:, :1]), ("k", x), ("v", x))
        )
        show = None
        if taps.asked(self, taps.ATTENTION):
            show = functools.partial(taps.tap, self, taps.ATTENTION)
        y, weights = attend(q, k, v, valid, show)
        y = rearrange(y, "b h t e -> b t (h e)")
        return TokenDense(d, self.dtype, name="proj")(y), weights


class ClassBlock(nn.Module):
    """u = [cls; x]; cls += gamma_1 ClassAttention(LN u); cls += gamma_2 MLP(LN cls)."""

    num_heads: int
    mlp_ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, cls: Float[Array, "b 1 d"], x: Float[Array, "b n d"], valid: Bool[Array, "b t"] | None
    ) -> tuple[Float[Array, "b 1 d"], Float[Array, "b h t"]]:
        gammas = [_gamma(self, name, x) for name in ("gamma_1", "gamma_2")]
        u = layer_norm(self.dtype, "norm1")(jnp.concatenate([cls, x], axis=1))
        y, weights = ClassAttention(self.num_heads, self.dtype, name="attn")(u, valid)
        cls = Add()(cls, Scale()(y, gammas[0]))
        y = Mlp(self.mlp_ratio, self.dtype, name="mlp")(layer_norm(self.dtype, "norm2")(cls))
        return Add()(cls, Scale()(y, gammas[1])), weights


def _gamma(module: nn.Module, name: str, x: Array) -> Array:
    return module.param(name, _GAMMA, (x.shape[-1],)).astype(x.dtype)


class CaiT(nn.Module):
    """CaiT with `depth` talking-heads blocks and `class_depth` class-attention blocks.

    Attributes: as `models.backbones.vit.ViT`'s. The positions have no CLS.
    """

    input_spec: InputSpec = images(224)
    embed_dim: int = 384
    depth: int = 24
    class_depth: int = 2
    num_heads: int = 8
    mlp_ratio: int = 4
    num_classes: int = 1000
    dtype: DTypeLike = jnp.float32
    attention_kernel: str = "einsum"

    num_prefix = 0
    attention_kernels = ("einsum",)
    propagates_relevance = True

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The class-attention blocks train with the classifier."""
        blocks = tuple(f"class_block_{index}" for index in range(self.class_depth))
        return {**PARTS, "classifier": (*PARTS["classifier"], *blocks)}

    def setup(self):
        """Two kinds of blocks: of patches alone, which groups are made of, and those with CLS."""
        self.patch_embed = TokenDense(self.embed_dim, self.dtype)
        self.cls_token = self.param("cls_token", TOKEN, (1, 1, self.embed_dim))
        tokens = self.input_spec.num_patches
        self.pos_embed = self.param("pos_embed", TOKEN, (1, tokens, self.embed_dim))
        options = (self.num_heads, self.mlp_ratio, self.dtype)
        self.blocks = [Block(*options, name=f"block_{index}") for index in range(self.depth)]
        self.class_blocks = [
            ClassBlock(*options, name=f"class_block_{index}") for index in range(self.class_depth)
        ]
        self.norm = layer_norm(self.dtype)
        self.head = classifier(self.num_classes)
        self.add = Add()

    def embed(self, inputs: Float[Array, "b height width c"]) -> Float[Array, "b n d"]:
        """Images to patch tokens, positions added."""
        x = self.patch_embed(self.input_spec.to_patches(inputs))
        return self.add(x, self.pos_embed.astype(self.dtype))

    def run_block(
        self, index: int, x: Float[Array, "b n d"], layout: TokenLayout = EVERY_TOKEN
    ) -> tuple[Float[Array, "b n d"], None]:
        """Talking-heads block `index` (from 0); there is no CLS whose attention could be shown."""
        return self.blocks[index](x, layout), None

    def classify(
        self, x: Float[Array, "b n d"], alive: Bool[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b d"], list[Float[Array, "b h n"]]]:
        """Class attention over the alive patches, final norm, head."""
        valid = None
        if alive is not None:
            x = jnp.where(alive[..., None], x, 0)
            valid = jnp.pad(alive, ((0, 0), (1, 0)), constant_values=True)
        cls = jnp.broadcast_to(self.cls_token.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        attention = []
        for block in self.class_blocks:
            cls, weights = block(cls, x, valid)
            attention.append(weights[..., 1:])
        features = self.norm(cls[:, 0]).astype(jnp.float32)
        return self.head(features), features, attention

    def classify_features(self, features: Float[Array, "b d"]) -> Float[Array, "b classes"]:
        """The logits of what `classify` says the head reads."""
        return self.head(features)

    def block_flops(self, tokens: ArrayLike) -> BlockFlops:
        """A ViT block's, and twice n^2 h^2 for the mixing of h heads."""
        d, mixing = self.embed_dim, 2 * self.num_heads**2
        mlp = 2 * self.mlp_ratio * tokens * d**2
        return BlockFlops(4 * tokens * d**2, (2 * d + mixing) * tokens**2, mlp)

    def other_flops(self, kept: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
        """Patch embedding, class-attention blocks (keys and values of kept + 1 tokens), head."""
        d = self.embed_dim
        spec = self.input_spec
        outer = spec.num_patches * spec.patch_values * d + d * self.num_classes
        block = 2 * (kept + 1) * d**2 + (2 + 2 * self.mlp_ratio) * d**2
        linear = outer + self.class_depth * block
        return linear, linear + self.class_depth * 2 * (kept + 1) * d

    def __call__(self, inputs: Float[Array, "b height width c"]) -> Float[Array, "b classes"]:
        x = self.embed(inputs)
        for index in range(self.depth):
            x, _ = self.run_block(index, x)
        return self.classify(x)[0]
