"""The layout of transformers' ViT, DeiT, TimeSformer and DINOv2."""

import re
from collections.abc import Collection

from iared2_jax.weights.layouts.base import (
    NamingScheme,
    Recipe,
    cls_with_its_position,
    from_conv,
    joined,
    joined_transposed,
    same,
    transposed,
)

_HF_MODULES = (
    (r"block_(\d+)/norm1", r"encoder.layer.\1.layernorm_before"),
    (r"block_(\d+)/norm2", r"encoder.layer.\1.layernorm_after"),
    (r"block_(\d+)/attn/qkv", r"encoder.layer.\1.attention.attention.{}"),
    (r"block_(\d+)/attn/proj", r"encoder.layer.\1.attention.output.dense"),
    (r"block_(\d+)/mlp/fc1", r"encoder.layer.\1.intermediate.dense"),
    (r"block_(\d+)/mlp/fc2", r"encoder.layer.\1.output.dense"),
    (r"patch_embed", "embeddings.patch_embeddings.projection"),
    (r"norm", "layernorm"),
)
_DINOV2_MODULES = (
    (r"block_(\d+)/(norm[12]|mlp/fc[12])", r"encoder.layer.\1.\2"),
    (r"block_(\d+)/ls([12])", r"encoder.layer.\1.layer_scale\2"),
)
_HF_TOKENS = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "time_embed": "embeddings.time_embeddings",
}


def scheme(prefix: str, names: Collection[str]) -> NamingScheme:
    """The layout of a file whose names begin with `prefix` ("vit.", "timesformer.", ..)."""
    heads = {"head": "classifier", "head_dist": "distillation_classifier"}
    if "cls_classifier.weight" in names:
        heads["head"] = "cls_classifier"
    is_dinov2 = f"{prefix}encoder.layer.0.layer_scale1.lambda1" in names
    modules = (*_DINOV2_MODULES, *_HF_MODULES) if is_dinov2 else _HF_MODULES
    has_registers = prefix + _HF_TOKENS["reg_token"] in names
    joint_qkv = f"{prefix}encoder.layer.0.attention.attention.qkv.weight" in names  # TimeSformer's

    def recipe(path: str) -> Recipe:
        """The recipe by module and leaf: "block_0/norm1", "scale"."""
        path = path.removeprefix("backbone/")
        tokens = (prefix + _HF_TOKENS[name] for name in ("cls_token", "pos_embed"))
        if has_registers and (joint := cls_with_its_position(path, *tokens)):
            return joint
        if path in _HF_TOKENS:
            return Recipe((prefix + _HF_TOKENS[path],), same)
        module, _, leaf = path.rpartition("/")
        kind = {"bias": "bias", "gamma": "lambda1"}.get(leaf, "weight")
        if module in heads:
            return Recipe((f"{heads[module]}.{kind}",), same if kind == "bias" else transposed)
        theirs = next(
            (re.sub(ours, theirs, module).replace("/", ".") for ours, theirs in modules
             if re.fullmatch(ours, module)), module,
        )  # fmt: skip
        if module.endswith("/qkv") and joint_qkv:
            theirs = theirs.format("qkv")
        elif module.endswith("/qkv"):
            parts = tuple(
                f"{prefix}{theirs.format(part)}.{kind}" for part in ("query", "key", "value")
            )
            return Recipe(parts, joined if kind == "bias" else joined_transposed)
        make = {"kernel": transposed}.get(leaf, same)
        if module == "patch_embed" and leaf == "kernel":
            make = from_conv
        return Recipe((f"{prefix}{theirs}.{kind}",), make)

    divided = r".*encoder\.layer\.\d+\.temporal_(layernorm|attention|dense)\..*"
    return NamingScheme(
        "Hugging Face",
        recipe,
        r".*pooler\..*|.*mask_token",
        divided,
        joined_positions=not has_registers,
        interpolation="plain" if is_dinov2 and not has_registers else "antialiased",
    )
