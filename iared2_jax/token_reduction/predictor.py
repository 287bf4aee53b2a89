"""DynamicViT's predictor: how sure is a small network that a patch token is needed?"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from iared2_jax.models.layers import Gelu, layer_norm
from iared2_jax.models.parameters import LINEAR, ZEROS
from iared2_jax.typing import Array


class Predictor(nn.Module):
    """Scores every patch token by itself and by the mean of those that are still there.

        z = GELU(W LN(x)),   y_i = [z_i's first half, the alive tokens' mean of its second half]
        logit_i = keep_i - drop_i,   (keep, drop) = MLP(y),   widths d, d/2, d/4, 2

    Rao et al. 2021, "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
    Eq. 1 to 4, where the two outputs go through a softmax: of two, the sigmoid of the difference.
    So it stands in for the paper's `Interpreter`, as one of a single head.

    Attributes:
      init_bias: a constant added to every logit, as of `Interpreter`.
    """

    init_bias: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        num_prefix: int,
        alive: Bool[Array, "b n"] | Float[Array, "b n"] | None = None,
    ) -> Float[Array, "b n 1"]:
        d = x.shape[-1]
        dense = functools.partial(nn.Dense, kernel_init=LINEAR, bias_init=ZEROS, dtype=self.dtype)
        y = layer_norm(self.dtype, name="norm")(x[:, num_prefix:])
        y = Gelu()(dense(d, name="embed")(y))
        own, others = jnp.split(y, [d // 2], axis=-1)
        there = jnp.ones(others.shape[:2], y.dtype) if alive is None else alive.astype(y.dtype)
        mean = jnp.einsum("bn,bnd->bd", there, others) / jnp.maximum(
            there.sum(axis=1, keepdims=True), 1.0
        )
        mean = jnp.broadcast_to(mean[:, None], others.shape)
        y = jnp.concatenate([own, mean], axis=-1)
        y = Gelu()(dense(d // 2, name="fc1")(y))
        y = Gelu()(dense(d // 4, name="fc2")(y))
        keep, drop = jnp.split(dense(2, name="fc3")(y).astype(jnp.float32), 2, axis=-1)
        return keep - drop + self.init_bias


def predictor_flops(tokens, width: int):
    """Multiply-accumulates for `tokens` patch tokens: d^2 + d^2 / 2 + d^2 / 8 + d / 2 each."""
    d = width
    return tokens * (d * d + d * (d // 2) + (d // 2) * (d // 4) + (d // 4) * 2)
