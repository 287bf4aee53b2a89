"""Layers that all backbones are made of: norm, linear layer over tokens, sums, GELU, MLP.

What needs no parameters is a module, too, where attribution must be able to step in: relevance is
propagated through a sum or a GELU by other rules than gradients are (`attribution.relevance`).
"""

import warnings

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float

from iared2_jax.models import input_spec
from iared2_jax.models.parameters import ONES, WEIGHT, ZEROS, constant
from iared2_jax.typing import Array


class TokenNorm(nn.LayerNorm):
    """LayerNorm of tokens, computed on the flat list of all the batch's tokens.

    The same numbers as `nn.LayerNorm`. But on an H100, XLA's kernel for [256 * 197, d] takes a
    third of the time of the one for [256, 197, d] (docs/performance.md).
    """

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def layer_norm(dtype, name: str | None = None, affine: bool = True) -> TokenNorm:
    """LayerNorm as the published ViTs have it: epsilon 1e-6, the exact (two-pass) variance."""
    return TokenNorm(
        epsilon=1e-6,
        use_fast_variance=False,
        use_bias=affine,
        use_scale=affine,
        scale_init=ONES,
        bias_init=ZEROS,
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
        kernel = self.param("kernel", WEIGHT, (x.shape[-1], self.features))
        bias = self.param("bias", ZEROS, (self.features,))
        flat = rearrange(x.astype(self.dtype), "b n d -> (b n) d")
        y = flat @ kernel.astype(self.dtype) + bias.astype(self.dtype)
        return rearrange(y, "(b n) f -> b n f", b=x.shape[0])


def gelu(x: Array) -> Array:
    """Exact GELU, x/2 (1 + erf(x / sqrt 2)), in PyTorch's form.

    flax's default is the tanh approximation, 4.7e-4 off the one DeiT was trained with; its exact
    form goes through erfc, which is slower.
    """
    return x * 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def classifier(num_classes: int, name: str | None = None) -> nn.Dense:
    """The linear layer from features to logits, in float32."""
    return nn.Dense(num_classes, kernel_init=WEIGHT, bias_init=ZEROS, name=name)


class Gelu(nn.Module):
    """`gelu`, as a module."""

    def __call__(self, x: Array) -> Array:
        return gelu(x)


class Add(nn.Module):
    """x + y: where two branches meet."""

    def __call__(self, x: Array, y: Array) -> Array:
        return x + y


class Scale(nn.Module):
    """x times a constant or a parameter, channel by channel (layer scale)."""

    def __call__(self, x: Array, factor: ArrayLike) -> Array:
        return x * factor


class LayerScale(nn.Module):
    """x times a parameter per channel, `gamma`, which starts small (Touvron et al. 2021, CaiT)."""

    initial: float

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        gamma = self.param("gamma", constant(self.initial), (x.shape[-1],))
        return Scale()(x, gamma.astype(x.dtype))


class Mean(nn.Module):
    """The mean of the tokens that are alive, or alive to a share; 0 where none is."""

    def __call__(
        self,
        x: Float[Array, "b n d"],
        alive: Bool[Array, "b n"] | Float[Array, "b n"] | None = None,
    ) -> Float[Array, "b d"]:
        if alive is None:
            return x.mean(axis=1)
        if jnp.issubdtype(alive.dtype, jnp.floating):
            return (x * alive[..., None]).sum(1) / jnp.maximum(alive.sum(1), 1)[:, None]
        # What lies in dead places may be anything, NaN included.
        there = jnp.where(alive[..., None], x, 0)
        return there.sum(axis=1) / jnp.maximum(alive.sum(axis=1), 1)[:, None]


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        d = x.shape[-1]
        x = Gelu()(TokenDense(self.ratio * d, self.dtype, name="fc1")(x))
        return TokenDense(d, self.dtype, name="fc2")(x)


def to_patches(
    images: Float[Array, "b height width 3"], size: int, patch_size: int
) -> Float[Array, "b n f"]:
    """Square patches of square colour images; deprecated, see `InputSpec.to_patches`."""
    warnings.warn(
        "to_patches(images, size, patch_size) goes with the next release: use "
        "self.input_spec.to_patches(inputs)",
        DeprecationWarning,
        stacklevel=2,
    )
    return input_spec.images(size, patch_size).to_patches(images)


# Other people's backbones start their weights by it; ours by `parameters.WEIGHT`.
kernel_init = WEIGHT
