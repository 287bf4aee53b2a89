"""The layout of PyTorch Image Models, of the authors' .pth that it grew from, and of ours.

The authors are DeiT's (I to III), CaiT's, TimeSformer's and DINOv2's.
"""

import math
import re
from collections.abc import Collection

import numpy as np

from iared2_jax.models.input_spec import InputSpec
from iared2_jax.weights.layouts.base import (
    NamingScheme,
    Recipe,
    cls_with_its_position,
    from_conv,
    same,
    transposed,
)


def timm_name(path: str) -> str:
    """What timm calls the parameter at `path`; interpreters, which it lacks, are "interpreters.j".

    Example:
      >>> timm_name("backbone/block_0/attn/qkv/kernel")
      'blocks.0.attn.qkv.weight'
    """
    name = path.removeprefix("backbone/")
    for ours, theirs in (
        ("class_block_", "blocks_token_only."),
        ("block_", "blocks."),
        ("interpreter_", "interpreters."),
        ("patch_embed/", "patch_embed.proj/"),
    ):
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    name = re.sub(r"/(kernel|scale)$", "/weight", name)
    return name.replace("/", ".")


def _timm_recipe(path: str) -> Recipe:
    make = same
    if path.endswith("/kernel"):
        make = from_conv if path == "backbone/patch_embed/kernel" else transposed
    return Recipe((timm_name(path),), make)


def to_timm(path: str, value: np.ndarray, spec: InputSpec | None = None) -> np.ndarray:
    """Our parameter as timm has it: the inverse of its recipe.

    A patch embedding of an unknown `spec` is taken for one of square colour patches, if it can be.
    """
    if path == "backbone/patch_embed/kernel":
        side = round((value.shape[0] / 3) ** 0.5)
        shape = (side, side, 3) if spec is None else (*spec.patch, spec.channels)
        if math.prod(shape) != value.shape[0]:
            return np.ascontiguousarray(value.T)
        value = value.reshape(*shape, -1).transpose(3, 2, 0, 1)
    elif path.endswith("/kernel"):
        value = value.T
    return np.ascontiguousarray(value)


def scheme(names: Collection[str]) -> NamingScheme:
    """timm's layout, or what in it the authors' files have otherwise; their names tell.

    What in21k files have before the head, and DINOv2's mask token, take no part in an answer.
    """
    divided = r"blocks\.\d+\.temporal_(norm1|attn|fc)\..*"
    unused = r"pre_logits\..*|mask_token"
    if "mask_token" in names:
        with_registers = "register_tokens" in names
        return NamingScheme(
            "DINOv2's authors",
            _registers_recipe if with_registers else _timm_recipe,
            unused,
            joined_positions=not with_registers,
            interpolation="antialiased" if with_registers else "offset",
        )
    if "blocks.0.gamma_1" in names and "blocks_token_only.0.gamma_1" not in names:
        return NamingScheme("DeiT-III's authors", _deit3_recipe, unused)
    return NamingScheme("timm", _timm_recipe, unused, divided)


def _registers_recipe(path: str) -> Recipe:
    """DINOv2 with registers, whose CLS has a position of its own."""
    if path == "backbone/reg_token":
        return Recipe(("register_tokens",), same)
    joint = cls_with_its_position(path.removeprefix("backbone/"), "cls_token", "pos_embed")
    return joint or _timm_recipe(path)


def _deit3_recipe(path: str) -> Recipe:
    """The layer scales lie in the blocks themselves, as CaiT's do."""
    if match := re.fullmatch(r"backbone/block_(\d+)/ls([12])/gamma", path):
        return Recipe((f"blocks.{match[1]}.gamma_{match[2]}",), same)
    return _timm_recipe(path)
