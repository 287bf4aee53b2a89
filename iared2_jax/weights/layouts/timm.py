"""The layout of PyTorch Image Models, of DeiT's, CaiT's and TimeSformer's .pth, and of ours."""

import math
import re

import numpy as np

from iared2_jax.models.input_spec import InputSpec
from iared2_jax.weights.layouts.base import NamingScheme, Recipe, from_conv, same, transposed


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


def scheme() -> NamingScheme:
    """timm's layout, and TimeSformer's; what in21k files have before the head is not used."""
    divided = r"blocks\.\d+\.temporal_(norm1|attn|fc)\..*"
    return NamingScheme("timm", _timm_recipe, r"pre_logits\..*", divided)
