"""Layouts: how other projects name and shape the weights of the same backbones, a file for each."""

import re
from collections.abc import Callable, Collection

from iared2_jax.errors import UsageError
from iared2_jax.weights.layouts import huggingface, jax_npz, mmaction, timm
from iared2_jax.weights.layouts.base import NamingScheme, Recipe
from iared2_jax.weights.layouts.jax_npz import taken_apart
from iared2_jax.weights.layouts.timm import timm_name, to_timm

# What marks a layout, with the prefix of its names as a group; and the layout.
_MARKS: tuple[tuple[str, Callable[[str, Collection[str]], NamingScheme]], ...] = (
    (r"()patch_embed\.proj\.weight", lambda prefix, names: timm.scheme(names)),
    (
        r"(|vit\.|deit\.|timesformer\.|dinov2\.|dinov2_with_registers\.)"
        r"embeddings\.patch_embeddings\.projection\.weight",
        huggingface.scheme,
    ),
    (r"(|backbone\.)patch_embed\.projection\.weight", mmaction.scheme),
    (r"(|.*/)embedding/kernel", jax_npz.scheme),
)

# What no backbone here has, by a name that only models with it have.
_NOT_YET = (
    (r"(.*\.)?mlp\.(w12|weights_in)\.weight", "SwiGLU in place of an MLP (DINOv2's giant)"),
    (r"(.*[./])?(attn_pool|MAPHead_0|head\.probe)\b.*",
     "a head that pools by attention (SigLIP, whose answers are sigmoids)"),
)  # fmt: skip


def recognise(names: Collection[str]) -> NamingScheme | None:
    """The layout that has such names; None if we know none.

    Raises:
      UsageError: it is known, and not supported.
    """
    for mark, part in _NOT_YET:
        if any(re.fullmatch(mark, name) for name in names):
            raise UsageError(f"these weights have {part}, which no backbone here has")
    for mark, make in _MARKS:
        found = next((match for name in names if (match := re.fullmatch(mark, name))), None)
        if found:
            return make(found[1], names)
    return None


__all__ = ["NamingScheme", "Recipe", "recognise", "taken_apart", "timm_name", "to_timm"]
