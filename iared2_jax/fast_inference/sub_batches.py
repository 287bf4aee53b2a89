"""A model that runs as a whole, some images at a time: what ragged execution is compared with."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float, Int

from iared2_jax.fast_inference.forward import ForwardSpec
from iared2_jax.fast_inference.plan import Plan
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.token_reduction.output import Output
from iared2_jax.typing import Array

# Tokens times width: with the four times wider layer of their MLPs, 6 MiB of float32.
_CACHED_VALUES = 400_000


def run_whole(
    forward: ForwardSpec,
    plan: Plan,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    thresholds: Float[Array, "b D"],
    size: Int[Array, ""],
) -> tuple[Float[Array, "b classes"], Output, list[Int[Array, " shapes"]]]:
    """Masked or gathered execution, as the plan says, `plan.masked_rows` images at a time."""
    module = forward.with_kernel(plan.attention_kernel).module
    options = {"keep_ratios": forward.keep_ratios, "selector": forward.selector}
    if plan.execution == "gathered":
        slots = module.slots(forward.keep_ratios, forward.selector)
        options |= {"execution": "gathered", "capacities": slots}

    def some(inputs, thresholds):
        """The logits and output of one sub-batch; what `run_ragged` leaves at 0 is 0 here, too."""
        logits, out = module.apply(variables, inputs, thresholds, **options)
        entering = [True, *(keep[..., None] for keep in out.keep)]
        of_alive = tuple(
            jnp.where(alive, values, 0)
            for alive, values in zip(entering, out.interpreter_logits, strict=False)
        )
        out = out.replace(interpreter_logits=of_alive)
        return logits, out if forward.attention else out.replace(attention=())

    return *in_sub_batches(some, plan.masked_rows, inputs, thresholds), []


def run_dense(
    module: IARed2,
    rows: int,
    variables: Mapping[str, Any],
    images: Float[Array, "b ..."],
) -> Float[Array, "b classes"]:
    """Logits of the dense model, `rows` images at a time: the baseline, as fast as it can be."""

    def forward(images):
        return module.apply(variables, images, execution="dense")[0]

    return in_sub_batches(forward, rows, images)


def sub_batch_sizes(batch_size: int, platform: str) -> list[int]:
    """Images at a time that may be fastest, largest first: a CPU's caches hold only a few."""
    # On a GPU a quarter of 256 images at a time takes 1.2 times as long (docs/performance.md).
    divisors = (1, 2, 4) if platform == "cpu" else (1, 2)
    sizes = {max(1, batch_size // divisor) for divisor in divisors}
    if platform == "cpu":
        sizes |= {size for size in (4, 8) if size < batch_size}
    return sorted(sizes, reverse=True)


def rows_in_cache(module: IARed2, batch_size: int, platform: str) -> int:
    """Images at a time, of so many, whose tokens a CPU's caches hold; all of them elsewhere.

    Of ViT-S 16 at 65 tokens, 4 at 257. For what is not planned by measuring: evaluations, features.
    """
    if platform != "cpu":
        return batch_size
    tokens = module.num_prefix + module.input_spec.num_patches
    most = max(1, round(_CACHED_VALUES / (tokens * module.backbone.embed_dim)))
    return -(-batch_size // -(-batch_size // most))  # sub-batches of like size


def as_caches_hold(module: IARed2, forward: Callable[..., Any], *arrays: Any) -> Any:
    """`forward(*arrays)`, as many rows at a time as the caches hold: `in_sub_batches`."""
    rows = rows_in_cache(module, len(jax.tree.leaves(arrays)[0]), jax.default_backend())
    return in_sub_batches(forward, rows, *arrays)


def in_sub_batches(forward: Callable[..., Any], rows: int, *arrays: Any) -> Any:
    """`forward(*arrays)`, `rows` images at a time: a whole batch may not fit into the caches.

    An end that does not fill a sub-batch is padded with zeros, and cut off again.

    Args:
      arrays: [b, ..], or trees of such.
    """
    b = jax.tree.leaves(arrays)[0].shape[0]
    if not 0 < rows < b:
        return forward(*arrays)

    def cut(x):
        x = jnp.pad(x, ((0, -b % rows), *((0, 0),) * (x.ndim - 1)))
        return rearrange(x, "(c r) ... -> c r ...", r=rows)

    result = jax.lax.map(lambda parts: forward(*parts), jax.tree.map(cut, arrays))
    return jax.tree.map(lambda x: rearrange(x, "c r ... -> (c r) ...")[:b], result)
