"""Softmax attention over valid keys: by einsum, and by cuDNN's fused kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Bool, Float, Int

from iared2_jax.typing import Array

# From attention weights to the weights to go on with (`models.taps`).
Tap = Callable[[Array], Array]

# Added to the attention logits of dropped keys. Finite: a row of -inf would make softmax NaN.
MASKED_LOGIT = -1e9


def attend(
    q: Float[Array, "s h r e"],
    k: Float[Array, "s h c e"],
    v: Float[Array, "s h c e"],
    valid: Bool[Array, "s c"] | None,
    tap: Tap | None = None,
) -> tuple[Float[Array, "s h r e"], Float[Array, "s h c"]]:
    """softmax(q k^T / sqrt(e)) v over the valid keys, and the first query's weights (float32).

    Args:
      valid: which keys are real; None: all.
      tap: shows the whole weights [s, h, r, c], and returns those to go on with; None: nobody asks.
    """
    logits = jnp.einsum("shqe,shke->shqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    if valid is not None:
        # A sum, not a select: XLA:CPU takes 40% longer for the whole attention with a select.
        logits = logits + jnp.where(valid, 0.0, MASKED_LOGIT)[:, None, None, :]
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    if tap is not None:
        weights = tap(weights / total)
        return jnp.einsum("shqk,shke->shqe", weights.astype(v.dtype), v), weights[:, :, 0]
    # Divided by their sum after they met the values: c x e divisions, not c x c.
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
