"""The layout of mmaction2's TimeSformer (mmcv's transformer layers)."""

import re
from collections.abc import Collection

from iared2_jax.weights.layouts.base import NamingScheme, Recipe, from_conv, same, transposed

_MODULES = {
    "norm1": "norms.0",
    "norm2": "norms.1",
    "attn/qkv": "attentions.0.attn.in_proj_",
    "attn/proj": "attentions.0.attn.out_proj",
    "mlp/fc1": "ffns.0.layers.0.0",
    "mlp/fc2": "ffns.0.layers.1",
}
# Divided space-time attention comes with its norms, the temporal one first.
_DIVIDED_MODULES = _MODULES | {
    "norm1": "attentions.1.norm",
    "norm2": "ffns.0.norm",
    "attn/qkv": "attentions.1.attn.in_proj_",
    "attn/proj": "attentions.1.attn.out_proj",
}
_OUTSIDE = {"patch_embed": "patch_embed.projection", "head": "cls_head.fc_cls"}


def scheme(prefix: str, names: Collection[str]) -> NamingScheme:
    """The layout of a file whose backbone's names begin with `prefix` ("backbone." or nothing)."""
    layers = f"{prefix}transformer_layers.layers"
    is_divided = any(name.startswith(f"{layers}.0.attentions.1.") for name in names)
    modules = _DIVIDED_MODULES if is_divided else _MODULES

    def recipe(path: str) -> Recipe:
        """The recipe by module and leaf: "block_0/norm1", "scale"."""
        module, _, leaf = path.removeprefix("backbone/").rpartition("/")
        if not module:  # "cls_token"
            return Recipe((prefix + leaf,), same)
        make = transposed if leaf == "kernel" else same
        if module == "patch_embed" and leaf == "kernel":
            make = from_conv
        kind = "bias" if leaf == "bias" else "weight"
        if match := re.fullmatch(r"block_(\d+)/(.+)", module):
            theirs = f"{layers}.{match[1]}.{modules.get(match[2], match[2])}"
        else:
            theirs = _OUTSIDE.get(module, module)
            theirs = theirs if module == "head" else prefix + theirs
        dot = "" if theirs.endswith("_") else "."
        return Recipe((f"{theirs}{dot}{kind}",), make)

    divided = rf"{re.escape(layers)}\.\d+\.attentions\.0\..*" if is_divided else r"(?!)"
    return NamingScheme("mmaction2", recipe, divided=divided)
