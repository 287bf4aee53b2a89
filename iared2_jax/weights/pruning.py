"""Magnitude pruning: the smallest weights of the blocks' linear layers become 0 (paper, Fig. 5).

The zeros lie anywhere ("unstructured"), so a matrix product takes as long as before: what is saved
are multiplications that hardware would have to skip.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from iared2_jax.errors import UsageError

SCOPES = ("layer", "global")
# Of the blocks that groups are made of, the kernels of their linear layers.
_KERNEL = re.compile(r"backbone/block_(\d+)/(attn/qkv|attn/proj|mlp/fc1|mlp/fc2)/kernel")


def prune(variables: Mapping[str, Any], share: float, scope: str = "layer") -> dict[str, Any]:
    """The variables with the smallest |w| of the blocks' linear layers set to 0.

    Biases, norms, embeddings, interpreters and the head stay as they are.

    Args:
      share: of these weights that becomes 0, in [0, 1]; the number is rounded down.
      scope: "layer", as large a share of each layer; "global", the smallest of all layers together.

    Raises:
      UsageError: a share outside [0, 1], an unknown scope, or a backbone without such layers.

    Example:
      >>> import iared2_jax
      >>> _, variables = iared2_jax.create_model("vit_micro")
      >>> shares = nonzero_shares(prune(variables, 0.25))
      >>> sorted(set(shares.values()))
      [0.75]
    """
    if not 0 <= share <= 1:
        raise UsageError(f"share={share} of the weights to prune must lie in [0, 1]")
    if scope not in SCOPES:
        raise UsageError(f"scope={scope!r} is unknown: use one of {', '.join(SCOPES)}")
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    kernels = {path: np.asarray(flat[path]) for path in flat if _KERNEL.fullmatch(path)}
    if not kernels:
        raise UsageError("the backbone has no block_<i> with qkv, proj, fc1, fc2 to prune")
    if scope == "layer":
        pruned = {path: _without_smallest(kernel, share) for path, kernel in kernels.items()}
    else:
        whole = np.concatenate([kernel.ravel() for kernel in kernels.values()])
        ends = np.cumsum([kernel.size for kernel in kernels.values()])[:-1]
        parts = np.split(_without_smallest(whole, share), ends)
        pruned = {
            path: part.reshape(kernel.shape)
            for (path, kernel), part in zip(kernels.items(), parts, strict=True)
        }
    flat |= {path: jnp.asarray(kernel) for path, kernel in pruned.items()}
    return {**variables, "params": traverse_util.unflatten_dict(flat, sep="/")}


def _without_smallest(weights: np.ndarray, share: float) -> np.ndarray:
    count = int(share * weights.size)
    kept = weights.ravel().copy()
    kept[np.argsort(np.abs(kept), kind="stable")[:count]] = 0
    return kept.reshape(weights.shape)


def nonzero_shares(variables: Mapping[str, Any]) -> dict[int, float]:
    """The share of the weights of each block's linear layers that is not 0, by its number."""
    nonzero: dict[int, list[int]] = {}
    for path, kernel in traverse_util.flatten_dict(variables["params"], sep="/").items():
        if found := _KERNEL.fullmatch(path):
            counts = nonzero.setdefault(int(found[1]), [0, 0])
            counts[0] += int(np.count_nonzero(kernel))
            counts[1] += kernel.size
    return {block: there / size for block, (there, size) in sorted(nonzero.items())}
