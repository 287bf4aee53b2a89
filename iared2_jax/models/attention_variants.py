"""Cheaper attentions that the paper sets beside dropping tokens: Linformer, Sinkhorn, Routing.

Each mixes the tokens of one row per image, in which every token lies at its own place: CLS and its
like first, then the patch grid; dropped tokens leave holes. Queries, keys and values are those of
plain attention, so a trained ViT's weights fit, and each is plain attention in a limit.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from iared2_jax.errors import UsageError, nearest
from iared2_jax.models.attention import attend
from iared2_jax.models.parameters import LINEAR
from iared2_jax.typing import Array

Heads = Float[Array, "s h c e"]
Windows = Float[Array, "s h u w e"]  # u windows, or clusters, of w places each


class Linformer(nn.Module):
    """Keys and values projected from T tokens to k (Wang et al. 2020, Eq. 7).

        softmax(q (E^T k)^T / sqrt(e)) (F^T v),   E, F [T, k], shared by the heads

    A row of E and F belongs to a place of the image, so dropped tokens are rows left out. With
    k = T and E = F = 1, it is plain attention over all tokens.

    Attributes:
      size: k.
    """

    size: int

    @nn.compact
    def __call__(
        self, q: Heads, k: Heads, v: Heads, valid: Bool[Array, "s c"], prefix: int
    ) -> Heads:
        shape = (k.shape[2], self.size)
        there = valid[:, None, :, None]
        projected = [
            jnp.einsum(
                "shce,cr->shre",
                jnp.where(there, x, 0),
                self.param(name, LINEAR, shape).astype(x.dtype),
            )
            for name, x in (("e", k), ("f", v))
        ]
        return attend(q, *projected, None)[0]


class Sinkhorn(nn.Module):
    """Patches in windows of w, each seeing itself and a mixture of the others (Tay et al. 2020).

    What is mixed into which window is a doubly stochastic matrix, exp(q_u . k_v / sqrt(e)) of the
    windows' mean queries and keys (in the place of their learned sorting network) after seven
    rounds of Sinkhorn's normalisation at temperature .75, without Gumbel noise. A mixed key counts
    as often as what it is mixed of is there. Windows are runs of the patch grid in its order. CLS
    and its like see all, and every window sees them beside each of its two halves, so twice. With
    one window, it is plain attention.

    Attributes:
      size: w, which divides the number of patches.
    """

    size: int
    rounds: int = 7
    temperature: float = 0.75

    @nn.compact
    def __call__(
        self, q: Heads, k: Heads, v: Heads, valid: Bool[Array, "s c"], prefix: int
    ) -> Heads:
        whole = attend(q[:, :, :prefix], k, v, valid)[0]
        there = valid[:, prefix:].astype(jnp.float32)[:, None, :, None]
        own_q, own_k, own_v = (
            rearrange(
                x[:, :, prefix:] * there.astype(x.dtype), "s h (u w) e -> s h u w e", w=self.size
            )
            for x in (q, k, v)
        )
        alive = rearrange(there, "s 1 (u w) 1 -> s 1 u w", w=self.size)
        mixing = self.mixing(own_q, own_k, alive)
        mixed_k, mixed_v = (
            jnp.einsum("shuv,shvwe->shuwe", mixing.astype(x.dtype), x) for x in (own_k, own_v)
        )
        counts = jnp.einsum("shuv,szvw->shuw", mixing, alive)
        # Keys mixed of dropped ones are shorter than what they stand for: as long as the mean.
        scale = jnp.where(counts > 0, 1 / jnp.maximum(counts, 1e-9), 0.0)[..., None]
        mixed_k, mixed_v = (x * scale.astype(x.dtype) for x in (mixed_k, mixed_v))
        ones = jnp.ones((*counts.shape[:3], prefix))
        own_alive = jnp.broadcast_to(alive, counts.shape)
        sizes = jnp.concatenate([ones, counts, ones, own_alive], axis=3)
        y = _attend_in_windows(
            own_q,
            _with_prefix(k, prefix, mixed_k, own_k),
            _with_prefix(v, prefix, mixed_v, own_v),
            sizes=sizes,
        )
        return jnp.concatenate([whole, rearrange(y, "s h u w e -> s h (u w) e")], axis=2)

    def mixing(
        self, q: Windows, k: Windows, alive: Float[Array, "s 1 u w"]
    ) -> Float[Array, "s h u u"]:
        """The doubly stochastic matrix; a window of which nothing is left is mixed into none."""
        count = jnp.maximum(alive.sum(-1), 1.0)[..., None]
        mean_q, mean_k = (x.sum(3).astype(jnp.float32) / count for x in (q, k))
        logits = jnp.einsum("shue,shve->shuv", mean_q, mean_k) * q.shape[-1] ** -0.5
        empty = (alive.sum(-1) == 0)[:, :, None, :]
        logits = jnp.where(empty, -1e9, logits / self.temperature)
        for _ in range(self.rounds):
            logits = logits - jax.nn.logsumexp(logits, axis=-2, keepdims=True)
            logits = jnp.where(empty, -1e9, logits)
            logits = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return jnp.where(empty, 0.0, jnp.exp(logits))


class Routing(nn.Module):
    """Patches attend to those that lie near the same centroid (Roy et al. 2020, section 4.1).

    Queries and keys, of length 1, are clustered by spherical k-means in N / w clusters, head by
    head; each cluster takes its w nearest queries and its w nearest keys (balanced, as theirs). A
    query that several clusters take gets the mean of their answers, one that none takes gets 0.
    The clusters are found anew for each image, in two rounds from the means of neighbours; theirs
    are a running mean over all that was ever seen, and a pure function has no such state. CLS and
    its like see all, and every cluster sees them. With one cluster, it is plain attention.

    Attributes:
      size: w, which divides the number of patches.
    """

    size: int
    rounds: int = 2

    @nn.compact
    def __call__(
        self, q: Heads, k: Heads, v: Heads, valid: Bool[Array, "s c"], prefix: int
    ) -> Heads:
        whole = attend(q[:, :, :prefix], k, v, valid)[0]
        alive = valid[:, None, prefix:]
        patch_q, patch_k, patch_v = (x[:, :, prefix:] for x in (q, k, v))
        near_q, near_k = self.nearest(patch_q, patch_k, alive)
        is_key = jnp.take_along_axis(alive[:, :, None], near_k, axis=3)
        # CLS and its like are keys of every cluster.
        is_key = jnp.pad(is_key, [(0, 0)] * 3 + [(prefix, 0)], constant_values=True)
        y = _attend_in_windows(
            _taken(patch_q, near_q),
            _with_prefix(k, prefix, _taken(patch_k, near_k)),
            _with_prefix(v, prefix, _taken(patch_v, near_k)),
            is_key,
        )
        mean = _mean_by_place(y, near_q, patch_q.shape[2])
        return jnp.concatenate([whole, mean], axis=2)

    def nearest(
        self, q: Heads, k: Heads, alive: Bool[Array, "s 1 n"]
    ) -> tuple[Int[Array, "s h u w"], Int[Array, "s h u w"]]:
        """Places of the w queries, and of the w keys, nearest each centroid."""
        q, k = (_unit(jax.lax.stop_gradient(x).astype(jnp.float32)) for x in (q, k))
        both = jnp.concatenate([q, k], axis=2)
        there = jnp.tile(alive, (1, 1, 2))[..., None]
        centroids = rearrange(q * alive[..., None], "s h (u w) e -> s h u w e", w=self.size).sum(3)
        for _ in range(self.rounds):
            near = jnp.einsum("shne,shue->shnu", both, _unit(centroids))
            own = jax.nn.one_hot(near.argmax(-1), near.shape[-1]) * there
            centroids = jnp.einsum("shnu,shne->shue", own, both)
        found = []
        for x in (q, k):
            near = jnp.einsum("shne,shue->shun", x, _unit(centroids))
            near = jnp.where(alive[:, :, None], near, -jnp.inf)
            found.append(jax.lax.top_k(near, self.size)[1])
        return found[0], found[1]


def _with_prefix(x: Heads, prefix: int, *parts: Windows) -> Float[Array, "s h u keys e"]:
    """Every window's places in all `parts`, before each part the prefix places of x."""
    shape = (*parts[0].shape[:3], prefix, x.shape[-1])
    shared = jnp.broadcast_to(x[:, :, None, :prefix], shape)
    return jnp.concatenate([piece for part in parts for piece in (shared, part)], axis=3)


def _attend_in_windows(
    q: Windows,
    k: Float[Array, "s h u c e"],
    v: Float[Array, "s h u c e"],
    valid: Bool[Array, "s h u c"] | None = None,
    sizes: Float[Array, "s h u c"] | None = None,
) -> Windows:
    """Attention of each window's queries to its own keys; for `valid` and `sizes` see `attend`."""
    # Each window of each head is an image with one head: every one has keys of its own.
    rows = [rearrange(x, "s h u c e -> (s h u) 1 c e") for x in (q, k, v)]
    valid, sizes = (
        None if x is None else rearrange(x, "s h u c -> (s h u) c") for x in (valid, sizes)
    )
    y, _ = attend(*rows, valid, sizes=sizes)
    return y.reshape(q.shape)


def _taken(x: Heads, places: Int[Array, "s h u w"]) -> Windows:
    """The rows of x at the places that each cluster takes."""
    return jnp.take_along_axis(x[:, :, None], places[..., None], axis=3)


def _mean_by_place(answers: Windows, places: Int[Array, "s h u w"], count: int) -> Heads:
    """The mean of the answers that each of `count` places got from the clusters; 0 where none."""
    # Scatter-add in each image and head: a place that several clusters took gets all their answers.
    add = jax.vmap(jax.vmap(lambda totals, place, value: totals.at[place].add(value)))
    shape = (*answers.shape[:2], count)
    places = rearrange(places, "s h u w -> s h (u w)")
    answers = rearrange(answers, "s h u w e -> s h (u w) e")
    total = add(jnp.zeros((*shape, answers.shape[-1]), answers.dtype), places, answers)
    times = add(jnp.zeros(shape), places, jnp.ones(places.shape))
    return total / jnp.maximum(times, 1)[..., None].astype(total.dtype)


def _unit(x: Float[Array, "... e"]) -> Float[Array, "... e"]:
    return x * jax.lax.rsqrt((x**2).sum(-1, keepdims=True) + 1e-12)


VARIANTS: dict[str, type[nn.Module]] = {
    "linformer": Linformer,
    "sinkhorn": Sinkhorn,
    "routing": Routing,
}


@dataclasses.dataclass(frozen=True)
class AttentionVariant:
    """Which attention a backbone's blocks have.

    Attributes:
      name: "dense", or one of `VARIANTS`.
      size: of Linformer, k; of the others, w.
    """

    name: str = "dense"
    size: int = 0

    def module(self, name: str | None = None) -> nn.Module:
        """The linen module that mixes the tokens."""
        return VARIANTS[self.name](self.size, name=name)

    def flops(self, tokens: ArrayLike, width: int, num_patches: int) -> ArrayLike:
        """Multiply-accumulates of the attention of n tokens, of N patches all told; d: the width.

        What these tokens need; gathered execution computes attention over all N places.

        Linformer: two projections and two products, 4 n k d. Sinkhorn: 2 w keys for each token,
        4 n w d, and the mixing of N / w windows of keys and of values, 2 N^2 d / w. Routing: w keys
        for each, 2 n w d, and queries and keys against N / w centroids, in every round and at the
        end, 10 n N d / w.
        """
        if self.name == "dense":
            return 2 * tokens**2 * width
        w, windows = self.size, num_patches / self.size
        if self.name == "linformer":
            return 4 * tokens * w * width
        if self.name == "sinkhorn":
            return 4 * tokens * w * width + 2 * windows * num_patches * width
        return 2 * tokens * w * width + (4 * Routing.rounds + 2) * tokens * windows * width

    def check(self, num_patches: int) -> None:
        """Refuses names and sizes that are none.

        Raises:
          UsageError: one sentence.
        """
        if self.name == "dense":
            return
        if self.name not in VARIANTS:
            raise UsageError(
                f"attention {self.name!r} is unknown{nearest(self.name, ['dense', *VARIANTS])}"
            )
        if self.size < 1:
            raise UsageError(f"attention_size={self.size} of {self.name} must be at least 1")
        if self.name != "linformer" and num_patches % self.size:
            fitting = [w for w in range(2, num_patches + 1) if num_patches % w == 0]
            raise UsageError(
                f"attention_size={self.size} does not divide the {num_patches} patches into "
                f"windows: use one of {', '.join(map(str, fitting))}"
            )


DENSE = AttentionVariant()
