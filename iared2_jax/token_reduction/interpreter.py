"""The multi-head interpreter: how informative is each patch token? (paper, Eq. 1)"""

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from iared2_jax.models.layers import layer_norm
from iared2_jax.models.parameters import LINEAR, POLICY_TOKEN, ZEROS
from iared2_jax.typing import Array

POLICY_TOKENS = ("cls", "learned")

# Weights start by `parameters.LINEAR`: the logits with a standard deviation of about 1/3, and the
# scores within a few hundredths of sigmoid(init_bias).


class Keys(nn.Module):
    """The keys k = W x + b of a linear layer, but only as far as a few queries ask for them.

        q . (W x + b) = (W^T q) . x + q . b

    so that a query's every head costs d multiplications per token in place of d^2 / H: of DeiT-S'
    interpreters, and of their time, little is left. Parameters as of `nn.Dense`.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], q: Float[Array, "b h c"]) -> Float[Array, "b n h"]:
        kernel = self.param("kernel", LINEAR, (x.shape[-1], self.features))
        bias = self.param("bias", ZEROS, (self.features,))
        kernel = rearrange(kernel, "d (h c) -> d h c", h=q.shape[1])
        bias = rearrange(bias, "(h c) -> h c", h=q.shape[1])
        asked = jnp.einsum("dhc,bhc->bdh", kernel, q).astype(self.dtype)
        logits = jnp.einsum("bnd,bdh->bnh", x, asked, preferred_element_type=jnp.float32)
        return logits + jnp.einsum("hc,bhc->bh", bias, q)[:, None]


class Interpreter(nn.Module):
    """Scores every patch token against one policy token.

        I_i = 1/H sum_h sigmoid(k_i^h . q^h / sqrt(c) + init_bias),   c = embed_dim / H

    with q from the policy token and k from the patches, both through one LayerNorm without affine.
    Returned are the per-head logits, in float32: the policy takes log I and log(1 - I) from them
    without ever forming an I that has rounded to 0 or 1.

    Attributes:
      num_heads: H; it divides the embedding's width.
      policy_token: "cls", the CLS token at the group's entry, or "learned", one vector per group.
      scale: divide by sqrt(c); the paper's Eq. 1 does not, the authors' tool does.
      init_bias: a constant added to every logit: 0 starts at 0.5, 3 at "keep nearly everything".
    """

    num_heads: int
    policy_token: str = "cls"
    scale: bool = True
    init_bias: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        num_prefix: int,
        alive: Bool[Array, "b n"] | Float[Array, "b n"] | None = None,
    ) -> Float[Array, "b n h"]:
        """The logits; `alive` does not matter: the policy token judges each token alone."""
        d = x.shape[-1]
        norm = layer_norm(self.dtype, affine=False)
        # All tokens at once, prefix included: the next block's norm1 has the same mean and
        # variance, which XLA then computes once.
        normed = norm(x)
        if self.policy_token == "learned":
            policy = norm(self.param("policy_token", POLICY_TOKEN, (1, d)))
        else:
            policy = normed[:, 0]
        q = nn.Dense(d, kernel_init=LINEAR, bias_init=ZEROS, dtype=self.dtype, name="q")(policy)
        q = rearrange(q, "b (h c) -> b h c", h=self.num_heads).astype(jnp.float32)
        q = jnp.broadcast_to(q, (x.shape[0], *q.shape[1:]))
        if self.scale:
            q = q * q.shape[-1] ** -0.5
        logits = Keys(d, self.dtype, name="k")(normed, q) + self.init_bias
        return logits[:, num_prefix:]
