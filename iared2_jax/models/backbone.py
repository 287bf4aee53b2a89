"""What a backbone of IA-RED² has to offer, and the parts that all of ours are made of.

The groups and the interpreters (`models/iared2.py`) know of a backbone only what `Backbone` lists;
docs/add_a_backbone.md shows how to add one.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int

from iared2_jax.reduction.layout import Layout
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

    `num_classes`, `dtype` and `attention_kernel` must be fields, for `clone`; others may be what
    they like.

    Attributes:
      image_size, num_classes, embed_dim, num_heads, depth: as everywhere; depth counts the blocks
        that groups are made of.
      num_patches: N, the tokens that interpreters score. num_prefix: tokens before them, never
        dropped, the first of them CLS; 0 if the blocks see patches alone.
      dtype: of the computation. attention_kernel: one of `attention_kernels`.
    """

    image_size: int
    num_classes: int
    embed_dim: int
    num_heads: int
    depth: int
    num_patches: int
    num_prefix: int
    dtype: DTypeLike
    attention_kernel: str
    attention_kernels: tuple[str, ...]
    clone: Callable[..., "Backbone"]

    def embed(self, images: Float[Array, "b height width 3"]) -> Float[Array, "b t d"]:
        """Images to tokens, prefix first, positions added."""

    def run_block(
        self, index: int, x: Float[Array, "b t d"], layout: Layout
    ) -> tuple[Float[Array, "b t d"], Float[Array, "s h c"] | None]:
        """Block `index` (from 0) over tokens that lie as `layout` says.

        With a prefix, also its CLS query's attention, as `layout.attend` returns it; without, None.
        Dropped tokens must not change the others: attention is the only place where tokens meet.
        """

    def classify(
        self, x: Float[Array, "b t d"], alive: Bool[Array, "b n"] | None
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b d"], list[Float[Array, "b h n"]]]:
        """Logits (float32), what the head reads, and the CLS attention of what runs in here.

        alive: which patch tokens of `x` survive, None: all; what lies in the others is not read.
        """

    def block_flops(self, tokens: ArrayLike) -> BlockFlops:
        """The cost of one block that sees so many tokens, prefix included."""

    def other_flops(self, kept: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
        """All but the blocks, (linear, full), where `kept` patch tokens reach `classify`."""


# Added to the attention logits of dropped keys. Finite: a row of -inf would make softmax NaN.
MASKED_LOGIT = -1e9

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
    q: Float[Array, "s h r e"],
    k: Float[Array, "s h c e"],
    v: Float[Array, "s h c e"],
    valid: Bool[Array, "s c"] | None,
) -> tuple[Float[Array, "s h r e"], Float[Array, "s h c"]]:
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


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        d = x.shape[-1]
        x = gelu(TokenDense(self.ratio * d, self.dtype, name="fc1")(x))
        return TokenDense(d, self.dtype, name="fc2")(x)


def to_patches(
    images: Float[Array, "b height width 3"], image_size: int, patch_size: int
) -> Float[Array, "b n f"]:
    """Square patches in rows from the top left, each a vector (row, column, channel).

    Raises:
      ValueError: images of another size.
    """
    expected = (image_size, image_size, 3)
    if images.shape[1:] != expected:
        raise ValueError(f"images must be [B, {expected}], got {images.shape}")
    p = patch_size
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
