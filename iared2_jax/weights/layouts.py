"""How others name and shape the weights of the same backbones.

A layout says, for every parameter of ours, which of its tensors it is made of, and how. So loading
can tell both what is missing and what was left over. Facts: each project's own loading code.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

from iared2_jax.models.input_spec import InputSpec


class Recipe(NamedTuple):
    """What one of our parameters is made of: `make(*tensors)`, of the tensors with these names."""

    names: tuple[str, ...]
    make: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class NamingScheme:
    """One project's way to name weights.

    Attributes:
      name: for messages.
      recipe: from a parameter's path ("backbone/block_0/attn/qkv/kernel") to what it is made of.
      unused: names of tensors that take no part in the answer.
    """

    name: str
    recipe: Callable[[str], Recipe]
    unused: str = r"(?!)"


def taken_apart(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors; blocks that lie in one array (big_vision's scanned models) one by one."""
    apart: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if "Transformer/encoderblock/" in name:
            for index, block in enumerate(value):
                apart[name.replace("/encoderblock/", f"/encoderblock_{index}/")] = block
        else:
            apart[name] = value
    return apart


def recognise(names: Collection[str]) -> NamingScheme | None:
    """The layout that has such names; None if we know none."""
    for mark, make in _MARKS:
        found = next((match for name in names if (match := re.fullmatch(mark, name))), None)
        if found:
            return make(found[1], names)
    return None


# -- From their arrays to ours. A linear layer's kernel is [in, out] here, as in Flax.


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.T


def _from_conv(x: np.ndarray) -> np.ndarray:
    """PyTorch's [d, c, p, q] to [(p q c), d]; a matrix [d, (p q c)], as of ours, is transposed."""
    return x.T if x.ndim == 2 else x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _rows(x: np.ndarray) -> np.ndarray:
    """All axes but the last in one."""
    return x.reshape(-1, x.shape[-1])


def _columns(x: np.ndarray) -> np.ndarray:
    """All axes but the first in one."""
    return x.reshape(x.shape[0], -1)


def _joined(*parts: np.ndarray) -> np.ndarray:
    """Query, key and value next to each other, in the last axis."""
    return np.concatenate(parts, axis=-1)


def _joined_transposed(*parts: np.ndarray) -> np.ndarray:
    return _joined(*(x.T for x in parts))


# -- PyTorch Image Models, DeiT's and CaiT's own .pth, and ours: the same names, for safetensors.


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
    make = _same
    if path.endswith("/kernel"):
        make = _from_conv if path == "backbone/patch_embed/kernel" else _transposed
    return Recipe((timm_name(path),), make)


def to_timm(path: str, value: np.ndarray, spec: InputSpec | None = None) -> np.ndarray:
    """Our parameter as timm has it: the inverse of its recipe.

    A patch embedding of an unknown `spec` is taken for one of square colour patches, if it can be.
    """
    if path == "backbone/patch_embed/kernel":
        side = math.isqrt(value.shape[0] // 3)
        shape = (side, side, 3) if spec is None else (*spec.patch, spec.channels)
        if math.prod(shape) != value.shape[0]:
            return np.ascontiguousarray(value.T)
        value = value.reshape(*shape, -1).transpose(3, 2, 0, 1)
    elif path.endswith("/kernel"):
        value = value.T
    return np.ascontiguousarray(value)


# -- transformers' ViT and DeiT.

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
_HF_TOKENS = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
}


def _hugging_face(prefix: str, names: Collection[str]) -> NamingScheme:
    heads = {"head": "classifier", "head_dist": "distillation_classifier"}
    if "cls_classifier.weight" in names:
        heads["head"] = "cls_classifier"

    def recipe(path: str) -> Recipe:
        """By module and leaf: "block_0/norm1", "scale"."""
        path = path.removeprefix("backbone/")
        if path in _HF_TOKENS:
            return Recipe((prefix + _HF_TOKENS[path],), _same)
        module, _, leaf = path.rpartition("/")
        kind = "bias" if leaf == "bias" else "weight"
        if module in heads:
            return Recipe((f"{heads[module]}.{kind}",), _same if kind == "bias" else _transposed)
        theirs = next(
            (re.sub(ours, theirs, module) for ours, theirs in _HF_MODULES
             if re.fullmatch(ours, module)), module,
        )  # fmt: skip
        if module.endswith("/qkv"):
            parts = tuple(
                f"{prefix}{theirs.format(part)}.{kind}" for part in ("query", "key", "value")
            )
            return Recipe(parts, _joined if kind == "bias" else _joined_transposed)
        make = {"kernel": _transposed}.get(leaf, _same)
        if module == "patch_embed" and leaf == "kernel":
            make = _from_conv
        return Recipe((f"{prefix}{theirs}.{kind}",), make)

    return NamingScheme("Hugging Face", recipe, r".*pooler\..*|.*mask_token")


# -- vision_transformer's and big_vision's .npz: Flax arrays, heads apart.


class _NpzStyle(NamedTuple):
    """Of a file: what its names begin with, and whose they are."""

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


def _npz(prefix: str, names: Collection[str]) -> NamingScheme:
    big_vision = f"{prefix}pos_embedding" in names
    style = _NpzStyle(prefix, big_vision)
    name = "big_vision" if big_vision else "vision_transformer"
    return NamingScheme(name, functools.partial(_npz_recipe, style), r"opt/state/.*")


def _npz_recipe(style: _NpzStyle, path: str) -> Recipe:
    path = path.removeprefix("backbone/")
    match = re.fullmatch(r"block_(\d+)/(.+)/(kernel|bias|scale)", path)
    if match:
        return _npz_block_recipe(style, int(match[1]), match[2], match[3])
    module, _, leaf = path.rpartition("/")
    name = f"{style.outside(module)}/{leaf}" if module else style.outside(leaf)
    return Recipe((style.prefix + name,), _rows if path == "patch_embed/kernel" else _same)


def _npz_block_recipe(style: _NpzStyle, index: int, module: str, leaf: str) -> Recipe:
    block = f"{style.prefix}Transformer/encoderblock_{index}"
    if module == "attn/qkv":
        parts = (f"{block}/{style.module('attn')}/{p}/{leaf}" for p in ("query", "key", "value"))
        # [d, heads, e] or [heads, e]: heads of one kind next to each other, then the kinds.
        flat = _columns if leaf == "kernel" else np.ravel
        return Recipe(tuple(parts), lambda *parts: _joined(*(flat(x) for x in parts)))
    if module == "attn/proj":
        name = f"{block}/{style.module('attn')}/out/{leaf}"
        return Recipe((name,), _rows if leaf == "kernel" else _same)
    return Recipe((f"{block}/{style.module(module)}/{leaf}",), _same)


_MARKS: tuple[tuple[str, Callable[[str, Collection[str]], NamingScheme]], ...] = (
    (r"()patch_embed\.proj\.weight", lambda prefix, names: NamingScheme("timm", _timm_recipe)),
    (r"(|vit\.|deit\.)embeddings\.patch_embeddings\.projection\.weight", _hugging_face),
    (r"(|.*/)embedding/kernel", _npz),
)
