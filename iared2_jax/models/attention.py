"""Softmax attention over valid keys: by einsum, and by cuDNN's fused kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Bool, Float, Int

from iared2_jax.typing import Array

# From attention weights to the weights to go on with (`models.taps`).
Tap = Callable[[Array], Array]

# Added to the attention logits of dropped keys. Finite: a row of -inf would make softmax NaN.
MASKED_LOGIT = -1e9

# On a CPU, a tile of logits that stays in its caches. Above this size per image they are computed a
# few queries at a time: 2.3 times as fast for 1,569 tokens (docs/performance.md).
TILE_BYTES = 8 << 20


class Similarity(nn.Module):
    """q k^T / sqrt(e) in float32: the logits of attention."""

    def __call__(
        self, q: Float[Array, "s h r e"], k: Float[Array, "s h c e"]
    ) -> Float[Array, "s h r c"]:
        return jnp.einsum("shqe,shke->shqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)


class Softmax(nn.Module):
    """Softmax over the valid keys (None: all are), each counted as often as `sizes` says."""

    def __call__(
        self,
        logits: Float[Array, "s h r c"],
        valid: Bool[Array, "s c"] | None,
        sizes: Float[Array, "s c"] | Float[Array, "s r c"] | None = None,
    ) -> Float[Array, "s h r c"]:
        logits = _masked(logits, valid)
        if sizes is not None:
            logits = logits + jnp.log(_per_query(sizes))
        return jax.nn.softmax(logits, axis=-1)


def _masked(
    logits: Float[Array, "s h r c"], valid: Bool[Array, "s c"] | None
) -> Float[Array, "s h r c"]:
    """The logits, so low where a key is not valid that its weight is 0."""
    if valid is None:
        return logits
    # A sum, not a select: XLA:CPU takes 40% longer for the whole attention with a select.
    return logits + jnp.where(valid, 0.0, MASKED_LOGIT)[:, None, None, :]


def _exponentials(
    logits: Float[Array, "s h r c"], sizes: Float[Array, "s 1 #r c"] | None
) -> Float[Array, "s h r c"]:
    """exp(logits) times the keys' sizes, over the largest exponential of those that count."""
    if sizes is None:
        return jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    counting = jnp.where(sizes > 0, logits, MASKED_LOGIT)
    largest = jax.lax.stop_gradient(counting.max(axis=-1, keepdims=True))
    # What does not count may be larger. Cut off, or its size's gradient would have no bound. (Not
    # by `minimum`: at a tie, so at the largest that counts, it halves the gradient.)
    return jnp.exp(jnp.where(logits > largest, 0.0, logits - largest)) * sizes


def _per_query(
    sizes: Float[Array, "s c"] | Float[Array, "s r c"],
) -> Float[Array, "s 1 r c"]:
    return sizes[:, None, None, :] if sizes.ndim == 2 else sizes[:, None]


class WeightedSum(nn.Module):
    """The values, summed with the attention's weights."""

    def __call__(
        self, weights: Float[Array, "s h r c"], v: Float[Array, "s h c e"]
    ) -> Float[Array, "s h r e"]:
        return jnp.einsum("shqk,shke->shqe", weights.astype(v.dtype), v)


def attend(
    q: Float[Array, "s h r e"],
    k: Float[Array, "s h c e"],
    v: Float[Array, "s h c e"],
    valid: Bool[Array, "s c"] | None,
    tap: Tap | None = None,
    sizes: Float[Array, "s c"] | Float[Array, "s r c"] | None = None,
) -> tuple[Float[Array, "s h r e"], Float[Array, "s h c"]]:
    """softmax(q k^T / sqrt(e)) v over the valid keys, and the first query's weights (float32).

    Args:
      valid: which keys are real; None: all.
      tap: shows the whole weights [s, h, r, c], and returns those to go on with; None: nobody asks.
      sizes: how many tokens each key stands for, so how often its exponential counts (proportional
        attention, Bolya et al. 2023, Eq. 1, as a factor in place of a logarithm that is added: its
        gradient at 0 is bounded); by query, where there are three axes; None: each for itself.
    """
    if tap is not None:  # step by step, so that attribution sees each
        weights = tap(Softmax()(Similarity()(q, k), valid, sizes))
        return WeightedSum()(weights, v), weights[:, :, 0]
    rows = _queries_at_a_time(*q.shape[:3], k.shape[2])
    if rows < q.shape[2] and (sizes is None or sizes.ndim == 2):
        return _in_tiles(q, k, v, valid, sizes, rows)
    logits = jnp.einsum("shqe,shke->shqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    logits = _masked(logits, valid)
    weights = _exponentials(logits, None if sizes is None else _per_query(sizes))
    total = weights.sum(axis=-1, keepdims=True)
    # Divided by their sum after they met the values: c x e divisions, not c x c.
    y = jnp.einsum("shqk,shke->shqe", weights.astype(v.dtype), v)
    return y / total.astype(v.dtype), weights[:, :, 0] / total[:, :, 0]


def _queries_at_a_time(images: int, heads: int, queries: int, keys: int) -> int:
    """How many queries' logits one tile holds, about; all of them where tiles do not pay."""
    per_query = 4 * heads * keys
    if jax.default_backend() != "cpu" or queries * per_query <= TILE_BYTES:
        return queries
    return min(queries, max(8, TILE_BYTES // (images * per_query)))


def _in_tiles(
    q: Float[Array, "s h r e"],
    k: Float[Array, "s h c e"],
    v: Float[Array, "s h c e"],
    valid: Bool[Array, "s c"] | None,
    sizes: Float[Array, "s c"] | None,
    rows: int,
) -> tuple[Float[Array, "s h r e"], Float[Array, "s h c"]]:
    """`attend`, about `rows` queries at a time. The loop is over queries: images may be sharded."""
    count = q.shape[2]
    tiles = -(-count // rows)
    rows = -(-count // tiles)
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, tiles * rows - count), (0, 0)))
    parts = rearrange(padded, "s h (t r) e -> t s h r e", t=tiles)
    y, first = jax.lax.map(lambda part: attend(part, k, v, valid, sizes=sizes), parts)
    return rearrange(y, "t s h r e -> s h (t r) e")[:, :, :count], first[0]


def attend_cudnn(
    q: Float[Array, "s h c e"],
    k: Float[Array, "s h c e"],
    v: Float[Array, "s h c e"],
    lengths: Int[Array, " s"] | None,
) -> tuple[Float[Array, "s h c e"], Float[Array, "s h c"]]:
    """Attention by cuDNN's fused kernel, which skips what lies beyond `lengths`; half precision."""
    rows = [rearrange(x, "s h c e -> s c h e") for x in (q, k, v)]
    y = jax.nn.dot_product_attention(
        *rows, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    # The kernel gives no weights; one query's cost little, and nothing where nobody reads them.
    valid = None if lengths is None else jnp.arange(k.shape[2]) < lengths[:, None]
    _, first = attend(q[:, :, :1], k, v, valid)
    return rearrange(y, "s c h e -> s h c e"), first
