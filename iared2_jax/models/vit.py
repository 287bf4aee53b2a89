"""The plain vision transformer (ViT, DeiT, distilled DeiT) in Flax linen.

A backbone of IA-RED² is any linen module with these attributes and methods; the groups and the
interpreters (`models/iared2.py`) know nothing else about it:

    depth, embed_dim, num_heads, num_prefix, num_patches, patch_size, image_size
    embed(images) -> tokens [B, P+N, d]               positions already added
    run_block(index, tokens, layout) -> tokens, attention of the CLS query [B, heads, P+N]
                                        layout: where the tokens lie (reduction/layout.py)
    classify(tokens) -> logits [B, classes], features [B, d]
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from iared2_jax.reduction.layout import EVERY_TOKEN, Layout
from iared2_jax.typing import Array

# Added to the attention logits of dropped keys. Finite: a row of -inf would make softmax NaN.
MASKED_LOGIT = -1e9

ATTENTION_KERNELS = ("einsum", "cudnn")

# DeiT's: its truncated normal is cut at 2.0, a hundred standard deviations out.
kernel_init = nn.initializers.normal(stddev=0.02)


def layer_norm(dtype, name: str | None = None, affine: bool = True) -> nn.LayerNorm:
    """LayerNorm as the published ViTs have it: epsilon 1e-6, the exact (two-pass) variance."""
    return nn.LayerNorm(
        epsilon=1e-6,
        use_fast_variance=False,
        use_bias=affine,
        use_scale=affine,
        dtype=dtype,
        name=name,
    )


class TokenDense(nn.Module):
    """A linear layer over tokens, computed on the flat list of all the batch's tokens.

    The same numbers as `nn.Dense` on [B, N, d]. But the flat weight gradient is a plain matrix
    product, where XLA:CPU would first transpose [B, N, 4d] element by element: the MLP's forward
    and backward pass took 2.5 times as long (docs/decisions.md).
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n features"]:
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        flat = rearrange(x.astype(self.dtype), "b n d -> (b n) d")
        y = flat @ kernel.astype(self.dtype) + bias.astype(self.dtype)
        return rearrange(y, "(b n) f -> b n f", b=x.shape[0])


def gelu(x: Array) -> Array:
    """Exact GELU, x/2 (1 + erf(x / sqrt 2)), in PyTorch's form.

    flax's default is the tanh approximation, 4.7e-4 off the one DeiT was trained with; its exact
    form goes through erfc, which is slower.
    """
    return x * 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def attend(
    q: Float[Array, "s h c e"],
    k: Float[Array, "s h c e"],
    v: Float[Array, "s h c e"],
    valid: Bool[Array, "s c"] | None,
) -> tuple[Float[Array, "s h c e"], Float[Array, "s h c"]]:
    """softmax(q k^T / sqrt(e)) v over the valid keys, and the first query's weights (float32).

    The weights are divided by their sum after they met the values: c x e divisions, not c x c.
    """
    logits = jnp.einsum("shqe,shke->shqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    if valid is not None:
        # A sum, not a select: XLA:CPU takes 40% longer for the whole attention with a select.
        logits = logits + jnp.where(valid, 0.0, MASKED_LOGIT)[:, None, None, :]
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    y = jnp.einsum("shqk,shke->shqe", weights.astype(v.dtype), v)
    return y / total.astype(v.dtype), weights[:, :, 0] / total[:, :, 0]


def attend_cudnn(
    q: Float[Array, "s h c e"],
    k: Float[Array, "s h c e"],
    v: Float[Array, "s h c e"],
    lengths: Int[Array, " s"] | None,
) -> tuple[Float[Array, "s h c e"], Float[Array, "s h c"]]:
    """The same by cuDNN's fused kernel, which skips what lies beyond `lengths`; half precision."""
    rows = [rearrange(x, "s h c e -> s c h e") for x in (q, k, v)]
    y = jax.nn.dot_product_attention(
        *rows, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    # The kernel gives no weights; one query's cost little, and nothing where nobody reads them.
    valid = None if lengths is None else jnp.arange(k.shape[2]) < lengths[:, None]
    _, first = attend(q[:, :, :1], k, v, valid)
    return rearrange(y, "s c h e -> s h c e"), first


class Attention(nn.Module):
    """Multi-head self-attention over the valid keys; also returns the CLS query's attention."""

    num_heads: int
    dtype: DTypeLike = jnp.float32
    kernel: str = "einsum"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], layout: Layout
    ) -> tuple[Float[Array, "b n d"], Float[Array, "s h c"]]:
        d = x.shape[-1]
        qkv = TokenDense(3 * d, self.dtype, name="qkv")(x)
        y, attention = layout.attend(qkv, self._attend_rows)
        return TokenDense(d, self.dtype, name="proj")(y), attention

    def _attend_rows(
        self,
        qkv: Float[Array, "s c f"],
        valid: Bool[Array, "s c"] | None,
        lengths: Int[Array, " s"] | None,
    ) -> tuple[Float[Array, "s c d"], Float[Array, "s h c"]]:
        q, k, v = rearrange(qkv, "s c (three h e) -> three s h c e", three=3, h=self.num_heads)
        if self.kernel == "cudnn" and (valid is None or lengths is not None):
            y, attention = attend_cudnn(q, k, v, lengths)
        else:  # scattered valid keys would reach cuDNN as a bias that skips nothing
            y, attention = attend(q, k, v, valid)
        return rearrange(y, "s h c e -> s c (h e)"), attention


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        d = x.shape[-1]
        x = gelu(TokenDense(self.ratio * d, self.dtype, name="fc1")(x))
        return TokenDense(d, self.dtype, name="fc2")(x)


class Block(nn.Module):
    """One MSA-FFN block, pre-norm, both halves residual."""

    num_heads: int
    mlp_ratio: int = 4
    dtype: DTypeLike = jnp.float32
    attention_kernel: str = "einsum"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], layout: Layout = EVERY_TOKEN
    ) -> tuple[Float[Array, "b n d"], Float[Array, "s h c"]]:
        y, attention = Attention(self.num_heads, self.dtype, self.attention_kernel, name="attn")(
            layer_norm(self.dtype, "norm1")(x), layout
        )
        x = x + y
        x = x + Mlp(self.mlp_ratio, self.dtype, name="mlp")(layer_norm(self.dtype, "norm2")(x))
        return x, attention


class ViT(nn.Module):
    """ViT / DeiT with `num_prefix` tokens before the patches: CLS, and DeiT's distillation token.

    Attributes:
      image_size, patch_size: square, px; the image size is a multiple of the patch size.
      embed_dim, depth, num_heads, mlp_ratio: the usual.
      num_classes: of the head; a distilled model has two heads, averaged (DeiT, at test time).
      distilled: add the distillation token and its head.
      dtype: of the computation; parameters, softmax and logits stay float32.
      attention_kernel: "einsum", or "cudnn" (NVIDIA GPU, half precision).
    """

    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: int = 4
    num_classes: int = 1000
    distilled: bool = False
    dtype: DTypeLike = jnp.float32
    attention_kernel: str = "einsum"

    @property
    def num_prefix(self) -> int:
        return 2 if self.distilled else 1

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def setup(self):
        self.patch_embed = TokenDense(self.embed_dim, self.dtype)
        self.cls_token = self.param("cls_token", kernel_init, (1, 1, self.embed_dim))
        if self.distilled:
            self.dist_token = self.param("dist_token", kernel_init, (1, 1, self.embed_dim))
        tokens = self.num_prefix + self.num_patches
        self.pos_embed = self.param("pos_embed", kernel_init, (1, tokens, self.embed_dim))
        self.blocks = [
            Block(
                self.num_heads,
                self.mlp_ratio,
                self.dtype,
                self.attention_kernel,
                name=f"block_{index}",
            )
            for index in range(self.depth)
        ]
        self.norm = layer_norm(self.dtype)
        self.head = nn.Dense(self.num_classes, kernel_init=kernel_init)
        if self.distilled:
            self.head_dist = nn.Dense(self.num_classes, kernel_init=kernel_init)

    def embed(self, images: Float[Array, "b height width 3"]) -> Float[Array, "b t d"]:
        """Images to tokens, prefix first, positions added."""
        expected = (self.image_size, self.image_size, 3)
        if images.shape[1:] != expected:
            raise ValueError(f"images must be [B, {expected}], got {images.shape}")
        p = self.patch_size
        patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        x = self.patch_embed(patches)
        prefix = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        prefix = jnp.concatenate(prefix, axis=1).astype(self.dtype)
        prefix = jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape[1:]))
        return jnp.concatenate([prefix, x], axis=1) + self.pos_embed.astype(self.dtype)

    def run_block(
        self, index: int, x: Float[Array, "b t d"], layout: Layout = EVERY_TOKEN
    ) -> tuple[Float[Array, "b t d"], Float[Array, "s h c"]]:
        """Block `index` (0-based, as the paper's Block_0) over the tokens that `layout` has."""
        return self.blocks[index](x, layout)

    def classify(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b d"]]:
        """Final norm and head(s): logits (float32) and the CLS feature."""
        # Only the prefix tokens are read, so only they are normalised.
        x = self.norm(x[:, : self.num_prefix]).astype(jnp.float32)
        logits = self.head(x[:, 0])
        if self.distilled:
            logits = (logits + self.head_dist(x[:, 1])) / 2
        return logits, x[:, 0]

    def __call__(self, images: Float[Array, "b height width 3"]) -> Float[Array, "b classes"]:
        x = self.embed(images)
        for index in range(self.depth):
            x, _ = self.run_block(index, x)
        return self.classify(x)[0]
