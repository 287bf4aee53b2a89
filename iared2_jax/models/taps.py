"""Taps: what happens inside a model, shown to whoever asks, with gradients; free where nobody does.

A module shows a value with `tap(self, name, value)`. `apply_with_taps` collects what was shown,
`tap_gradients` also differentiates with respect to it. Attention rollout, GradCAM and relevance
propagation (`attribution.relevance`) need no more.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Float

from iared2_jax.models.parameters import natural_order
from iared2_jax.typing import Array

# linen leaves this collection out of `init`, so that taps are no parameters.
_SHOWN = "intermediates"
_OFFSETS = "tap_offsets"

ATTENTION = "attention"
ATTENTION_INPUT = "attention_input"
BLOCK_INPUT = "block_input"


class Taps(NamedTuple):
    """Values of a forward pass, or their gradients, block by block; dense or masked execution.

    Blocks come in the order of their names, numbers as numbers: block_2 before block_10.

    attention: weights [B, heads, queries, keys] of every attention layer, prefix tokens first; of
      CaiT's class-attention blocks, which come last, the CLS query's alone.
    attention_inputs: the normalised tokens that enter every attention layer; of class-attention
      blocks with CLS first.
    block_inputs: tokens [B, P+N, d] that enter each block of the groups.
    inputs: the images or clips themselves.
    """

    attention: tuple[Array, ...]
    attention_inputs: tuple[Array, ...]
    block_inputs: tuple[Array, ...]
    inputs: Array


def asked(module: nn.Module, name: str) -> bool:
    """Whether somebody wants to see the value that `module` shows as `name`."""
    return module.is_mutable_collection(_SHOWN) or module.has_variable(_OFFSETS, name)


def tap(module: nn.Module, name: str, value: Array) -> Array:
    """The value itself, shown to whoever asks; go on with what this returns.

    Its gradient is that of an offset of zero which is added here.
    """
    if module.has_variable(_OFFSETS, name):
        value = value + module.get_variable(_OFFSETS, name)
    module.sow(_SHOWN, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return value


def apply_with_taps(
    module: nn.Module, variables: Mapping[str, Any], inputs: Float[Array, "b ..."], **options: Any
) -> tuple[Array, Any, Taps]:
    """`module.apply(variables, inputs, **options)`, and what was shown on the way.

    Returns:
      Logits, the model's output, and the taps.

    Example:
      >>> import iared2_jax
      >>> module, variables = iared2_jax.create_model("vit_micro")
      >>> _, _, taps = apply_with_taps(module, variables, jnp.zeros([1, 64, 64, 3]))
      >>> len(taps.attention), taps.attention[0].shape, taps.block_inputs[0].shape
      (6, (1, 3, 65, 65), (1, 65, 96))
    """
    (logits, out), shown = module.apply(variables, inputs, **options, mutable=[_SHOWN])
    return logits, out, _in_order(shown[_SHOWN], inputs)


def tap_gradients(
    module: nn.Module,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    objective: Callable[[Float[Array, "b classes"]], Float[Array, " b"]],
    **options: Any,
) -> tuple[Array, Any, Taps, Taps]:
    """The taps of a forward pass, and the gradient of an objective with respect to each.

    Args:
      objective: logits to one number per image, e.g. the logit of a class. Images do not see each
        other, so the gradient of the sum is each image's own.

    Returns:
      Logits, the model's output, the taps, and d objective / d tap, alike in structure.
    """

    def forward(offsets: Mapping[str, Any], inputs: Array):
        everything = {**variables, _OFFSETS: offsets}
        (logits, out), shown = module.apply(everything, inputs, **options, mutable=[_SHOWN])
        return objective(logits).sum(), (logits, out, shown[_SHOWN])

    shapes = jax.eval_shape(lambda: forward({}, inputs)[1][2])
    offsets = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    differentiate = jax.grad(forward, argnums=(0, 1), has_aux=True)
    (gradients, of_inputs), (logits, out, shown) = differentiate(offsets, inputs)
    return logits, out, _in_order(shown, inputs), _in_order(gradients, of_inputs)


def _in_order(tree: Mapping[str, Any], inputs: Array) -> Taps:
    """The values of a collection of taps by kind, in the order of the blocks."""
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    kinds: dict[str, list[Array]] = {ATTENTION: [], ATTENTION_INPUT: [], BLOCK_INPUT: []}
    for path in sorted(flat, key=natural_order):
        kind = re.sub(r"_\d+$", "", path.rpartition("/")[2])
        if kind in kinds:  # modules may sow values of their own, too
            kinds[kind].append(flat[path])
    return Taps(*map(tuple, kinds.values()), inputs)
