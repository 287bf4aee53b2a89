"""The plain vision transformer in Flax linen: ViT, DeiT to DeiT-III, DINOv2, joint TimeSformer."""

import functools
import math

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int

from iared2_jax.models import taps
from iared2_jax.models.attention import attend, attend_cudnn
from iared2_jax.models.attention_variants import DENSE, AttentionVariant
from iared2_jax.models.backbones.protocol import BlockFlops
from iared2_jax.models.input_spec import InputSpec, images
from iared2_jax.models.layers import (
    Add,
    LayerScale,
    Mean,
    Mlp,
    Scale,
    TokenDense,
    classifier,
    layer_norm,
)
from iared2_jax.models.parameters import TOKEN, ZEROS
from iared2_jax.models.token_layouts import EVERY_TOKEN, TokenLayout
from iared2_jax.typing import Array


class Attention(nn.Module):
    """Multi-head self-attention over the valid keys.

    Also returns the CLS query's attention, and every token's key, the mean over the heads.
    """

    num_heads: int
    dtype: DTypeLike = jnp.float32
    kernel: str = "einsum"
    variant: AttentionVariant = DENSE
    num_prefix: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], layout: TokenLayout
    ) -> tuple[Float[Array, "b n d"], Float[Array, "s h c"] | None, Float[Array, "b n e"]]:
        d = x.shape[-1]
        x = taps.tap(self, taps.ATTENTION_INPUT, x)
        qkv = TokenDense(3 * d, self.dtype, name="qkv")(x)
        if self.variant.name == "dense":
            y, attention = layout.attend(qkv, self._attend_rows)
        else:
            y, attention = layout.attend_by_place(qkv, self._mix_rows), None
        keys = rearrange(qkv[..., d : 2 * d], "b n (h e) -> b n h e", h=self.num_heads).mean(2)
        return TokenDense(d, self.dtype, name="proj")(y), attention, keys

    def _mix_rows(
        self, qkv: Float[Array, "s c f"], valid: Bool[Array, "s c"]
    ) -> Float[Array, "s c d"]:
        q, k, v = rearrange(qkv, "s c (three h e) -> three s h c e", three=3, h=self.num_heads)
        mixed = self.variant.module(name="mix")(q, k, v, valid, self.num_prefix)
        return rearrange(mixed, "s h c e -> s c (h e)")

    def _attend_rows(
        self,
        qkv: Float[Array, "s c f"],
        valid: Bool[Array, "s c"] | None,
        lengths: Int[Array, " s"] | None,
        sizes: Float[Array, "s c"] | Float[Array, "s c c"] | None = None,
    ) -> tuple[Float[Array, "s c d"], Float[Array, "s h c"]]:
        q, k, v = rearrange(qkv, "s c (three h e) -> three s h c e", three=3, h=self.num_heads)
        # Sizes and scattered valid keys would reach cuDNN as a bias that skips nothing.
        fused = sizes is None and (valid is None or lengths is not None)
        if taps.asked(self, taps.ATTENTION):
            show = functools.partial(taps.tap, self, taps.ATTENTION)
            y, attention = attend(q, k, v, valid, show, sizes)
        elif self.kernel == "cudnn" and fused:
            y, attention = attend_cudnn(q, k, v, lengths)
        else:
            y, attention = attend(q, k, v, valid, sizes=sizes)
        return rearrange(y, "s h c e -> s c (h e)"), attention


class Block(nn.Module):
    """One MSA-FFN block, pre-norm, both halves residual.

    The halves can be run one by one, for what happens to the tokens between them.

    layer_scale: what each half is multiplied by at first, channel by channel; None: by nothing.
    """

    num_heads: int
    mlp_ratio: int = 4
    dtype: DTypeLike = jnp.float32
    attention_kernel: str = "einsum"
    layer_scale: float | None = None
    variant: AttentionVariant = DENSE
    num_prefix: int = 1

    def setup(self):
        """Submodules by the names that files of weights have for them."""
        self.norm1, self.norm2 = layer_norm(self.dtype), layer_norm(self.dtype)
        self.attn = Attention(
            self.num_heads, self.dtype, self.attention_kernel, self.variant, self.num_prefix
        )
        self.mlp = Mlp(self.mlp_ratio, self.dtype)
        if self.layer_scale is not None:
            self.ls1, self.ls2 = LayerScale(self.layer_scale), LayerScale(self.layer_scale)
        self.residual = Add()

    def __call__(
        self, x: Float[Array, "b n d"], layout: TokenLayout = EVERY_TOKEN
    ) -> tuple[Float[Array, "b n d"], Float[Array, "s h c"] | None]:
        x, attention, _ = self.attention_half(x, layout)
        return self.mlp_half(x), attention

    def attention_half(
        self, x: Float[Array, "b n d"], layout: TokenLayout = EVERY_TOKEN
    ) -> tuple[Float[Array, "b n d"], Float[Array, "s h c"] | None, Float[Array, "b n e"]]:
        """x + MSA(LN x), the CLS query's attention, and every token's key."""
        y, attention, keys = self.attn(self.norm1(x), layout)
        y = y if self.layer_scale is None else self.ls1(y)
        return self.residual(x, y), attention, keys

    def mlp_half(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """x + MLP(LN x)."""
        y = self.mlp(self.norm2(x))
        y = y if self.layer_scale is None else self.ls2(y)
        return self.residual(x, y)


POOLS = ("cls", "cls_mean")


def _joined(tokens: list[Float[Array, "..."]]) -> Float[Array, "b t d"]:
    """Tokens one after another, those that all inputs share repeated for each."""
    batch = max(part.shape[0] for part in tokens)
    parts = [jnp.broadcast_to(part, (batch, *part.shape[1:])) for part in tokens]
    return jnp.concatenate(parts, axis=1)


class ViT(nn.Module):
    """A ViT with `num_prefix` tokens before the patches: CLS, DeiT's distillation token, registers.

    For clips it is TimeSformer with joint space-time attention (Bertasius et al. 2021): every frame
    is embedded as a picture is, and every token attends to those of all frames. A patch token gets
    the position embedding of its place and the time embedding of its frame; CLS has no time.

    Attributes:
      input_spec: shape and patches of the inputs, images or clips.
      embed_dim, depth, num_heads, mlp_ratio: the usual.
      num_classes: of the head; a distilled model has two heads, averaged (DeiT, at test time).
      distilled: add the distillation token and its head.
      registers: tokens without a position that follow CLS and that no head reads (Darcet et al.
        2024, "Vision Transformers Need Registers").
      prefix_positions: whether CLS (and the distillation token) have position embeddings.
      layer_scale: see `Block`.
      pool: what the head reads, normalised: "cls"; or "cls_mean", CLS beside the mean of the
        patches, as DINOv2's classifiers do. Of patches that are still there: what was dropped
        is no part of the mean.
      dtype: of the computation; parameters, softmax and logits stay float32.
      attention_kernel: "einsum", or "cudnn" (NVIDIA GPU, half precision).
      attention: "dense", or a cheaper one, which goes by a token's place and shows no weights: see
        `models.attention_variants`.
    """

    input_spec: InputSpec = images(224)
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: int = 4
    num_classes: int = 1000
    distilled: bool = False
    registers: int = 0
    prefix_positions: bool = True
    layer_scale: float | None = None
    pool: str = "cls"
    dtype: DTypeLike = jnp.float32
    attention_kernel: str = "einsum"
    attention: AttentionVariant = DENSE

    attention_kernels = ("einsum", "cudnn")

    @property
    def propagates_relevance(self) -> bool:
        return self.shows_attention

    @property
    def shows_attention(self) -> bool:
        """Whether there are weights of a CLS query over the patches."""
        return self.attention.name == "dense"

    @property
    def num_prefix(self) -> int:
        return self._num_read + self.registers

    @property
    def num_prefix_positions(self) -> int:
        """How many of the prefix tokens have position embeddings, which come first."""
        return self._num_read if self.prefix_positions else 0

    @property
    def _num_read(self) -> int:
        """The prefix tokens that a head reads."""
        return 2 if self.distilled else 1

    def setup(self):
        """Blocks are called block_<i>: what trains, and what files hold, goes by these names."""
        self.attention.check(self.input_spec.num_patches)
        if self.pool not in POOLS or (self.distilled and self.pool != "cls"):
            raise ValueError(f"pool={self.pool!r} must be one of {POOLS}; if distilled, cls")
        self.patch_embed = TokenDense(self.embed_dim, self.dtype)
        self.cls_token = self.param("cls_token", TOKEN, (1, 1, self.embed_dim))
        if self.distilled:
            self.dist_token = self.param("dist_token", TOKEN, (1, 1, self.embed_dim))
        if self.registers:
            self.reg_token = self.param("reg_token", TOKEN, (1, self.registers, self.embed_dim))
        tokens = self.num_prefix_positions + math.prod(self.input_spec.frame_grid)
        self.pos_embed = self.param("pos_embed", TOKEN, (1, tokens, self.embed_dim))
        if self.input_spec.is_clip:
            # Zeros: at first a clip is embedded as its frames are by an image model.
            shape = (1, self.input_spec.frames, self.embed_dim)
            self.time_embed = self.param("time_embed", ZEROS, shape)
        self.blocks = [
            Block(
                self.num_heads,
                self.mlp_ratio,
                self.dtype,
                self.attention_kernel,
                self.layer_scale,
                self.attention,
                self.num_prefix,
                name=f"block_{index}",
            )
            for index in range(self.depth)
        ]
        self.norm = layer_norm(self.dtype)
        self.head = classifier(self.num_classes)
        if self.distilled:
            self.head_dist = classifier(self.num_classes)
        self.add, self.scale, self.mean = Add(), Scale(), Mean()

    def embed(self, inputs: Float[Array, "b ..."]) -> Float[Array, "b t d"]:
        """Images or clips to tokens, prefix first, positions added where there are any."""
        patches = self.patch_embed(self.input_spec.to_patches(inputs))
        read = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        prefix = [token.astype(self.dtype) for token in read]
        positions = self._positions().astype(self.dtype)
        if self.prefix_positions:
            tokens = self.add(_joined([*prefix, patches]), positions)
            if not self.registers:
                return tokens
            prefix, patches = jnp.split(tokens, [self._num_read], axis=1)
            prefix = [prefix]
        else:
            patches = self.add(patches, positions)
        registers = [self.reg_token.astype(self.dtype)] if self.registers else []
        return _joined([*prefix, *registers, patches])

    def _positions(self) -> Float[Array, "1 t d"]:
        """Position and time embeddings, as they are added to the tokens."""
        if not self.input_spec.is_clip:
            return self.pos_embed
        prefix, places = jnp.split(self.pos_embed, [self.num_prefix_positions], axis=1)
        in_clip = places[:, :, None] + self.time_embed[:, None]
        return jnp.concatenate([prefix, rearrange(in_clip, "1 n t d -> 1 (n t) d")], axis=1)

    def run_block(
        self, index: int, x: Float[Array, "b t d"], layout: TokenLayout = EVERY_TOKEN
    ) -> tuple[Float[Array, "b t d"], Float[Array, "s h c"] | None]:
        """Block `index` (0-based, as the paper's Block_0) over the tokens that `layout` has."""
        return self.blocks[index](x, layout)

    def run_attention_half(
        self, index: int, x: Float[Array, "b t d"], layout: TokenLayout = EVERY_TOKEN
    ) -> tuple[Float[Array, "b t d"], Float[Array, "s h c"], Float[Array, "b t e"]]:
        """Block `index` up to its MLP: tokens, the CLS query's attention, and the tokens' keys."""
        return self.blocks[index].attention_half(x, layout)

    def run_mlp_half(self, index: int, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The MLP of block `index`."""
        return self.blocks[index].mlp_half(x)

    def classify(
        self,
        x: Float[Array, "b t d"],
        alive: Bool[Array, "b n"] | Float[Array, "b n"] | None = None,
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b f"], list]:
        """Final norm and head(s): logits (float32), and what is read of tokens: CLS first."""
        if self.pool == "cls_mean":
            x = self.norm(x).astype(jnp.float32)
            mean = self.mean(x[:, self.num_prefix :], alive)
            features = jnp.concatenate([x[:, 0], mean], axis=-1)
            return self.head(features), features, []
        # Only the prefix tokens are read, so only they are normalised.
        x = self.norm(x[:, : self._num_read]).astype(jnp.float32)
        logits = self.head(x[:, 0])
        if self.distilled:
            logits = self.scale(self.add(logits, self.head_dist(x[:, 1])), 0.5)
        return logits, x[:, 0], []

    def final_tokens(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """All tokens behind the last block, normalised as those that the head reads."""
        return self.norm(x).astype(jnp.float32)

    def head_logits(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b classes"]]:
        """The logits of a distilled model's two heads: CLS', and the distillation token's."""
        x = self.norm(x[:, : self._num_read]).astype(jnp.float32)
        return self.head(x[:, 0]), self.head_dist(x[:, 1])

    def classify_features(self, features: Float[Array, "b f"]) -> Float[Array, "b classes"]:
        """The logits of what `classify` says the head reads.

        Raises:
          ValueError: a distilled model's second head reads more.
        """
        if self.distilled:
            raise ValueError("a distilled model has a second head, which reads another token")
        return self.head(features)

    def block_flops(self, tokens: ArrayLike) -> BlockFlops:
        """With n tokens: 4 n d^2, 2 n^2 d (dense), and 2 r n d^2 for an MLP of ratio r."""
        d = self.embed_dim
        attention = self.attention.flops(tokens, d, self.input_spec.num_patches)
        return BlockFlops(4 * tokens * d**2, attention, 2 * self.mlp_ratio * tokens * d**2)

    def other_flops(self, kept: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
        """Patch embedding and head(s)."""
        read = 2 if self.distilled or self.pool == "cls_mean" else 1  # vectors of width embed_dim
        spec = self.input_spec
        cost = spec.num_patches * spec.patch_values * self.embed_dim
        cost += read * self.embed_dim * self.num_classes
        return cost, cost

    def __call__(self, inputs: Float[Array, "b ..."]) -> Float[Array, "b classes"]:
        x = self.embed(inputs)
        for index in range(self.depth):
            x, _ = self.run_block(index, x)
        return self.classify(x)[0]
