"""The layouts of vision_transformer's and big_vision's .npz: Flax arrays, heads apart."""

import functools
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from iared2_jax.weights.layouts.base import NamingScheme, Recipe, columns, joined, rows, same


def taken_apart(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors with a name for each block, also where all blocks lay in one array.

    As they do in big_vision's scanned models.
    """
    apart: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if "Transformer/encoderblock/" in name:
            for index, block in enumerate(value):
                apart[name.replace("/encoderblock/", f"/encoderblock_{index}/")] = block
        else:
            apart[name] = value
    return apart


class _NpzStyle(NamedTuple):
    """How a file's names begin, and whose they are."""

    prefix: str
    big_vision: bool

    def module(self, ours: str) -> str:
        """What a module of a block is called: big_vision counts the modules anew."""
        attention, norm2, mlp = (0, 1, 0) if self.big_vision else (1, 2, 3)
        return {
            "norm1": "LayerNorm_0",
            "norm2": f"LayerNorm_{norm2}",
            "attn": f"MultiHeadDotProductAttention_{attention}",
            "mlp/fc1": f"MlpBlock_{mlp}/Dense_0",
            "mlp/fc2": f"MlpBlock_{mlp}/Dense_1",
        }.get(ours, ours)

    def outside(self, ours: str) -> str:
        """What lies outside of the blocks is called."""
        # big_vision adds positions before it joins CLS.
        joined = "Transformer/posembed_input/pos_embedding"
        return {
            "cls_token": "cls",
            "pos_embed": "pos_embedding" if self.big_vision else joined,
            "patch_embed": "embedding",
            "norm": "Transformer/encoder_norm",
        }.get(ours, ours)


def scheme(prefix: str, names: Collection[str]) -> NamingScheme:
    """The layout of a file whose names begin with `prefix`; whose it is, the names tell."""
    big_vision = f"{prefix}pos_embedding" in names
    style = _NpzStyle(prefix, big_vision)
    name = "big_vision" if big_vision else "vision_transformer"
    recipe = functools.partial(_npz_recipe, style)
    unused = rf"opt/state/.*|{re.escape(prefix)}pre_logits/.*"
    return NamingScheme(name, recipe, unused, joined_positions=not big_vision, torch=False)


def _npz_recipe(style: _NpzStyle, path: str) -> Recipe:
    path = path.removeprefix("backbone/")
    match = re.fullmatch(r"block_(\d+)/(.+)/(kernel|bias|scale)", path)
    if match:
        return _npz_block_recipe(style, int(match[1]), match[2], match[3])
    module, _, leaf = path.rpartition("/")
    name = f"{style.outside(module)}/{leaf}" if module else style.outside(leaf)
    return Recipe((style.prefix + name,), rows if path == "patch_embed/kernel" else same)


def _npz_block_recipe(style: _NpzStyle, index: int, module: str, leaf: str) -> Recipe:
    block = f"{style.prefix}Transformer/encoderblock_{index}"
    if module == "attn/qkv":
        parts = (f"{block}/{style.module('attn')}/{p}/{leaf}" for p in ("query", "key", "value"))
        # [d, heads, e] or [heads, e]: heads of one kind next to each other, then the kinds.
        flat = columns if leaf == "kernel" else np.ravel
        return Recipe(tuple(parts), lambda *parts: joined(*(flat(x) for x in parts)))
    if module == "attn/proj":
        name = f"{block}/{style.module('attn')}/out/{leaf}"
        return Recipe((name,), rows if leaf == "kernel" else same)
    return Recipe((f"{block}/{style.module(module)}/{leaf}",), same)
