"""Layer-wise relevance propagation (LRP): a class's logit, handed back layer by layer.

Relevance R of a layer's outputs z = f(x) is shared out among its inputs by what each contributed:
R_x = x * vjp(f, x)(R / z). That is one vector-Jacobian product (`share_out`), and all rules below
are made of it. Relevance travels where gradients travel: while the model is differentiated, linen's
interception puts a rule in the place of each layer's derivative, so that `jax.grad` carries
relevance, and the gradient of a tap (`models.taps`) is the relevance there.

The rules are those of Chefer et al. 2021 ("Transformer Interpretability Beyond Attention
Visualization"): alpha = 1, biases take nothing, and of two branches that meet the sums are kept.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from iared2_jax.errors import UsageError, nearest
from iared2_jax.models.attention import Similarity, Softmax, WeightedSum
from iared2_jax.models.backbones.cait import HeadMix
from iared2_jax.models.backbones.protocol import PARTS
from iared2_jax.models.layers import Add, Gelu, Mean, Scale, TokenDense, TokenNorm
from iared2_jax.models.taps import Taps, tap_gradients
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array

# "conserving": positive and negative inputs of a linear layer share one denominator, so that no
# relevance is made or lost. "plain": each is normalised by itself, which may double what comes in
# at every layer; it is what the published tables call LRP and partial LRP.
RULE_SETS = ("conserving", "plain")

_SMALLEST = 1e-9


def share_out(f: Callable[..., Array], relevance: Array, *operands: Array) -> tuple[Array, ...]:
    """The relevance of f(*operands), shared among the operands: x * vjp(f, x)(R / f(x)) each."""
    z, pull_back = jax.vjp(f, *operands)
    return tuple(x * g for x, g in zip(operands, pull_back(_ratio(relevance, z)), strict=True))


def _ratio(a: Array, b: Array) -> Array:
    """a / b, moved away from a denominator of 0; 0 where b is 0."""
    b = b + jnp.where(b < 0, -_SMALLEST, _SMALLEST) * (b != 0)
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


# -- Rules: (rule set, relevance of the output, *operands) -> the relevance of each operand.


def _identity(_: str, relevance: Array, x: Array) -> tuple[Array, ...]:
    """All of it passes: softmax, GELU, LayerNorm and scales see one thing at a time."""
    return (relevance,)


def _linear(contract: Callable[[Array, Array], Array]):
    """A layer whose `contract(x, kernel)` is linear in both; biases take nothing.

    With x+ and x-, W+ and W- the positive and negative parts, what speaks for the output is
    x+ W+ + x- W- = (x W + |x| |W|) / 2.
    """

    def linear(rules: str, relevance: Array, x: Array, kernel: Array) -> tuple[Array, ...]:
        """Shares by what speaks for each output: of both signs together, or of each by itself."""
        nothing = jnp.zeros_like(kernel)
        if rules == "conserving":

            def speaking_for(x: Array, size: Array) -> Array:
                return (contract(x, kernel) + contract(size, jnp.abs(kernel))) / 2

            return sum(share_out(speaking_for, relevance, x, jnp.abs(x))), nothing
        parts = ((jnp.maximum, jnp.maximum(kernel, 0)), (jnp.minimum, jnp.minimum(kernel, 0)))
        shares = [
            share_out(lambda part, w=w: contract(part, w), relevance, clip(x, 0))[0]
            for clip, w in parts
        ]
        return sum(shares), nothing

    return linear


def _mix(rules: str, relevance: Array, maps: Array, kernel: Array) -> tuple[Array, ...]:
    """Talking heads' mixing: in proportion, whatever its sign.

    What enters are logits, which may all be negative: nothing would speak for such an output, and
    its relevance would be lost.
    """
    shares = share_out(lambda x: jnp.einsum("shqk,hg->sgqk", x, kernel), relevance, maps)
    return *shares, jnp.zeros_like(kernel)


def _pixels(_: str, relevance: Array, x: Array, kernel: Array) -> tuple[Array, ...]:
    """The z^B rule, of a layer that reads pixels between a least and a greatest value."""
    axes = tuple(range(1, x.ndim))
    low = jnp.broadcast_to(x.min(axes, keepdims=True), x.shape)
    high = jnp.broadcast_to(x.max(axes, keepdims=True), x.shape)

    def above_the_bounds(x: Array, low: Array, high: Array) -> Array:
        return x @ kernel - low @ jnp.maximum(kernel, 0) - high @ jnp.minimum(kernel, 0)

    shares = share_out(above_the_bounds, relevance, x, low, high)
    return sum(shares), jnp.zeros_like(kernel)


def _sum(rules: str, relevance: Array, x: Array, y: Array) -> tuple[Array, ...]:
    """Two branches that meet: in proportion, entry by entry.

    Conserving: then rescaled, image by image, since entries that nearly cancel out get shares
    that explode: each branch has as much in all as the size of its first share says.
    """
    shares = share_out(jnp.add, relevance, x, y)
    if rules == "plain":
        return shares
    axes = tuple(range(1, x.ndim))
    sums = [share.sum(axes, keepdims=True) for share in shares]
    whole = _ratio(relevance.sum(axes, keepdims=True), sum(map(jnp.abs, sums)))
    return tuple(
        share * _ratio(jnp.abs(total) * whole, total)
        for share, total in zip(shares, sums, strict=True)
    )


def _mean(_: str, relevance: Array, x: Array) -> tuple[Array, ...]:
    """A mean over tokens: to each as its size says, since shares of either sign would explode."""
    return share_out(lambda size: size.sum(axis=1), relevance, jnp.abs(x))


def _product(f: Callable[[Array, Array], Array]):
    """A product of two activations: half the relevance to each operand."""

    def product(_: str, relevance: Array, x: Array, y: Array) -> tuple[Array, ...]:
        """Each operand's share, halved."""
        return tuple(share / 2 for share in share_out(f, relevance, x, y))

    return product


_dense = _linear(lambda x, kernel: x @ kernel)
_similarity = _product(lambda q, k: jnp.einsum("shqe,shke->shqk", q, k))
_weighted = _product(lambda weights, v: jnp.einsum("shqk,shke->shqe", weights, v))

# How relevance passes each kind of layer; those with a kernel hand it to their rule.
RULES: dict[type[nn.Module], Callable[..., tuple[Array, ...]]] = {
    TokenDense: _dense,
    nn.Dense: _dense,
    HeadMix: _mix,
    Add: _sum,
    Similarity: _similarity,
    WeightedSum: _weighted,
    Softmax: _identity,
    Gelu: _identity,
    Scale: _identity,
    Mean: _mean,
    nn.LayerNorm: _identity,
    TokenNorm: _identity,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_rule(rule: Callable[..., tuple[Array, ...]], y: Array, *operands: Array) -> Array:
    """A layer's output `y`; on the way back, `rule(R, *operands)` goes to the operands."""
    return y


def _with_rule_backward(rule, operands, relevance):
    return jnp.zeros_like(relevance), *rule(relevance, *operands)


_with_rule.defvjp(lambda rule, y, *operands: (y, operands), _with_rule_backward)


def _interceptor(rules: str, embedding: tuple[str, ...]):
    """What linen calls in place of each module's methods: the same outputs, other derivatives."""

    def call(function: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        """The method, and the rule of its module."""
        module, y = context.module, function(*args, **kwargs)
        rule = RULES.get(type(module))
        if context.method_name != "__call__" or rule is None:
            return y
        if rule is _dense and module.name in embedding:
            rule = _pixels
        if rule in (_similarity, _weighted):
            operands = args
        elif rule is _sum:
            operands = jnp.broadcast_arrays(*args)
        elif rule in (_identity, _mean):
            operands = args[:1]
        else:
            operands = (args[0], module.get_variable("params", "kernel"))
        y = jax.lax.stop_gradient(y)  # the rule is the only way back
        return _with_rule(functools.partial(rule, rules), y, *operands)

    return call


def propagate_relevance(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    objective: Callable[[Float[Array, "b classes"]], Float[Array, " b"]],
    rules: str = "conserving",
) -> Taps:
    """The relevance of everything that taps show, pixels included, in the dense backbone.

    All of it starts as 1 at the logit that `objective` picks. In float32, whatever the model's
    dtype: relevance spans many orders of magnitude.

    Args:
      rules: one of `RULE_SETS`.

    Returns:
      Relevance with the shapes of `Taps`. With the conserving rules the tokens that enter each
      block have 1 in all per image; where CLS comes later (CaiT), they and CLS. Pixels lack what
      positions and prefix tokens took. What is exactly 0 takes nothing: a product of zeros loses
      its share.

    Raises:
      UsageError: no such rules, or a backbone of layers that have no rule here.
    """
    if rules not in RULE_SETS:
        raise UsageError(f"there are no rules {rules!r}{nearest(rules, RULE_SETS)}")
    backbone = module.backbone
    module.require_attention_weights("this map")
    if not getattr(backbone, "propagates_relevance", False):
        raise UsageError(
            f"relevance cannot be propagated through {type(backbone).__name__}: make its layers of "
            "the modules in attribution.relevance.RULES and set propagates_relevance = True on it"
        )
    module = module.clone(backbone=backbone.clone(dtype=jnp.float32), remat=False)
    parts = {**PARTS, **getattr(backbone, "parts", {})}
    with nn.intercept_methods(_interceptor(rules, parts["embedding"])):
        *_, relevance = tap_gradients(module, variables, inputs, objective, execution="dense")
    return relevance
