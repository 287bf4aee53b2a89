"""Multiply-accumulates per image, in the field's two conventions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from iared2_jax.models.backbones.protocol import Backbone
from iared2_jax.models.variants import get_variant
from iared2_jax.token_reduction.create import split_into_groups
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.token_reduction.selectors import ByInterpreter, Selector, get_selector


class Flops(NamedTuple):
    """Multiply-accumulates per image: numbers, or one per image.

    linear: linear layers only (patch embedding, qkv, proj, MLP, head): the paper's convention.
    full: plus QK^T and AV, plus the interpreters.
    """

    linear: float | np.ndarray
    full: float | np.ndarray


def count_flops(
    model: str | IARed2 | Backbone,
    kept: Sequence[ArrayLike] | None = None,
    *,
    group_sizes: Sequence[int] | None = None,
    interpreters: bool | None = None,
    selector: str | Selector = "interpreter",
) -> Flops:
    """The cost of one image in which group j's blocks see `kept[j]` patch tokens.

    Blocks cost what the backbone's `block_flops` says for kept + prefix tokens, and the choice of
    tokens what the selector's `flops` says. If it looks behind the attention of a group's first
    block, that attention still sees what the group before kept.

    Args:
      model: a variant's name, or a module.
      kept: patch tokens in each group, numbers or arrays (one entry per image). None: the plain
        dense backbone.
      group_sizes: blocks in each group; by default the module's own, or as many equal groups as
        `kept` has entries.
      interpreters: count what the choice of tokens costs; by default if `kept` is given.
      selector: what chooses them, see `selectors.SELECTORS`.

    Raises:
      UsageError: an unknown name, or groups that do not fit the depth.
      ValueError: `kept` outside 0..N, or not one entry per group.

    Example:
      >>> dense = count_flops("deit_s")
      >>> round(dense.linear / 1e9, 2), round(dense.full / 1e9, 2)
      (4.24, 4.6)
    """
    if isinstance(model, IARed2):
        backbone, own_groups, kind = model.backbone, model.group_sizes, model.interpreter_kind
    else:
        backbone = get_variant(model).backbone if isinstance(model, str) else model
        own_groups, kind = None, "attention"
    n = backbone.input_spec.num_patches
    if interpreters is None:
        interpreters = kept is not None
    if kept is None:
        kept = (n,) * len(group_sizes or own_groups or (1,))
    sizes = split_into_groups(backbone.depth, group_sizes or own_groups or len(kept))
    if len(sizes) != len(kept):
        raise ValueError(f"kept has {len(kept)} entries, but there are {len(sizes)} groups")
    kept = [np.asarray(count, np.float64) for count in kept]
    if any((count < 0).any() or (count > n).any() for count in kept):
        raise ValueError(f"kept must be in 0..{n} patch tokens, in every group")

    selector, entering = get_selector(selector), (np.float64(n), *kept[:-1])
    if isinstance(selector, ByInterpreter):
        selector = ByInterpreter(kind)
    linear, full = backbone.other_flops(kept[-1])
    for blocks, count, before in zip(sizes, kept, entering, strict=True):
        block = backbone.block_flops(count + backbone.num_prefix)
        linear = linear + blocks * block.linear
        full = full + blocks * block.full
        if selector.after_attention:
            first = backbone.block_flops(before + backbone.num_prefix)
            more = first.projections - block.projections
            linear, full = linear + more, full + more + first.attention - block.attention
    if interpreters:
        linear_cost, full_cost = selector.flops(backbone, entering)
        linear, full = linear + linear_cost, full + full_cost
    return Flops(*(float(x) if np.ndim(x) == 0 else x for x in (linear, full)))
