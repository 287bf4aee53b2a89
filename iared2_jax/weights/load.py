"""Trained weights in and out: other projects' files, and ours.

Ours is timm's naming in safetensors, so that timm reads the backbone; the interpreters lie beside
it under "interpreters.j", and the metadata says which model it is.
"""

import difflib
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from iared2_jax.errors import UsageError
from iared2_jax.models.backbones.cait import CaiT
from iared2_jax.models.backbones.protocol import Backbone
from iared2_jax.models.backbones.vit import ViT
from iared2_jax.models.variants import VARIANTS, get_variant
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.weights.files import read_tensors
from iared2_jax.weights.layouts import (
    NamingScheme,
    Recipe,
    recognise,
    taken_apart,
)

log = logging.getLogger(__name__)

# What a file of ours says of its model, beside what shapes tell.
_TOLD = ("group_sizes", "policy_token", "interpreter_heads", "scale", "init_bias")
_NEAREST = 10  # names that a failure lists


def load_weights(
    module: IARed2, source: str | Path, *, seed: int = 0, fresh_head: bool = True
) -> dict[str, Any]:
    """Variables for `module` with the weights of a file, whoever wrote it.

    Read are timm's ViT, DeiT and CaiT, DeiT's and CaiT's own .pth, transformers' ViT and DeiT,
    vision_transformer's and big_vision's .npz, and this project's own; which of them it is, its
    names tell. Position embeddings are resized where the image size differs; a head for another
    number of classes is left fresh. Interpreters are left fresh unless the file has them.

    Args:
      module: e.g. from `create_module` or `create_model`.
      source: see `weights.files.read_tensors`: a file, a folder, "hf://owner/name", or the
        name of shipped weights.
      seed: of whatever is left fresh.
      fresh_head: whether the head may be left fresh, with a warning; else that is an error, too.

    Returns:
      {"params": ..}, float32.

    Raises:
      UsageError: the file cannot be read or is of no known kind; a parameter finds nothing to be
        filled with, a tensor finds no place, a shape differs, or a value is not finite; or a file
        of ours says that its interpreters belong to another model than this.

    Example:
      >>> variables = load_weights(create_module("vit_micro"), "vit_micro")
      >>> sorted(variables["params"])
      ['backbone', 'interpreter_1', 'interpreter_2', 'interpreter_3']
    """
    tensors, metadata = read_tensors(source)
    tensors = taken_apart(tensors)
    layout = recognise(tensors)
    if layout is None:
        raise UsageError(
            f"{source} is of no kind known here: it has {_some(tensors)}. Known are timm, DeiT and "
            "CaiT, transformers (ViT, DeiT), vision_transformer and big_vision, iared2_jax"
        )
    fresh = traverse_util.flatten_dict(init_variables(module, seed)["params"], sep="/")
    recipes = {path: layout.recipe(path) for path in fresh}
    if has_interpreters(tensors):
        _check_metadata(source, module, metadata.get("create_model"))
    else:
        recipes = {p: recipe for p, recipe in recipes.items() if not p.startswith("interpreter_")}
    _check_names(source, layout, tensors, recipes)
    loaded = {}
    for path, recipe in recipes.items():
        value = _made(source, recipe, tensors)
        if path == "backbone/pos_embed" and value.ndim == 3:
            value = resize_positions(value, module.num_prefix, module.input_spec.num_patches)
        if value.shape == fresh[path].shape:
            loaded[path] = jnp.asarray(value, fresh[path].dtype)
        elif not path.startswith("backbone/head") or value.shape[:-1] != fresh[path].shape[:-1]:
            raise UsageError(
                f"{source} is for another model: {recipe.names[0]} makes {list(value.shape)} of "
                f"{path}, but this model's is {list(fresh[path].shape)}"
            )
    anew = [path for path in recipes if path not in loaded]
    if anew and not fresh_head:
        raise UsageError(
            f"{source} is for {num_classes_of(tensors)} classes, the data have "
            f"{module.backbone.num_classes}: train a head first (--config.curriculum=supervised), "
            "and start from the weights.safetensors of that run"
        )
    if anew:
        log.warning("%s is for other classes: %s start anew", source, " and ".join(anew))
    return {"params": traverse_util.unflatten_dict({**fresh, **loaded}, sep="/")}


def has_interpreters(tensors: Iterable[str]) -> bool:
    """Whether a file of ours has more than the backbone; of others' files none has."""
    return any(name.startswith("interpreters.") for name in tensors)


def _check_metadata(source, module: IARed2, known: Mapping[str, Any] | None) -> None:
    """Shapes do not tell groups, heads or normalisation, but the same weights would mean others."""
    if known is None:
        return
    known = {key: value for key, value in known.items() if key not in ("seed", "dtype")}
    theirs = create_module(**known)
    for field in _TOLD:
        mine, other = getattr(module, field), getattr(theirs, field)
        if mine != other and None not in (mine, other):
            raise UsageError(
                f"{source} was trained with {field}={other}, but this model has {mine}: set "
                "config.model accordingly, or use iared2_jax.load_model"
            )


def _check_names(source, layout: NamingScheme, tensors, recipes) -> None:
    """Every parameter has its tensors, and every tensor its parameter."""
    used = {name for recipe in recipes.values() for name in recipe.names}
    spare = [name for name in tensors if name not in used]
    unused = [name for name in spare if re.fullmatch(layout.unused, name)]
    homeless = sorted((name for name in spare if name not in unused), key=_natural)
    wanted = sorted(used - tensors.keys(), key=_natural)
    if wanted or homeless:
        near = _nearest(wanted[0], homeless or tensors) if wanted else _nearest(homeless[0], used)
        raise UsageError(
            f"{source} ({layout.name}) does not fit the model: it lacks {_some(wanted)} and has no "
            f"place for {_some(homeless)}; nearest: {', '.join(near)}"
        )
    if unused:
        log.info("%s: not used: %s", source, ", ".join(unused))


def _natural(name: str) -> list[Any]:
    """Sorts block 10 after block 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(known), n=_NEAREST, cutoff=0.0)


def _made(source, recipe: Recipe, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """A parameter as the recipe has it, finite."""
    try:
        value = recipe.make(*(tensors[name] for name in recipe.names)).astype(np.float32)
    except (ValueError, IndexError) as error:
        shape = list(tensors[recipe.names[0]].shape)
        raise UsageError(f"{source}: {recipe.names[0]} has the odd shape {shape}") from error
    if not np.isfinite(value).all():
        raise UsageError(f"{source}: {recipe.names[0]} has values that are not finite")
    return value


def resize_positions(
    positions: Float[np.ndarray, "1 t d"], num_prefix: int, num_patches: int
) -> Float[np.ndarray, "1 u d"]:
    """Position embeddings for another grid: bicubic with antialiasing, prefix tokens kept.

    Args:
      positions: of `num_prefix` tokens and a square grid; or of the grid alone (big_vision), where
        the prefix then gets zeros.

    Returns:
      [1, num_prefix + num_patches, d]; unchanged if that is its shape, or no square is found.
    """
    _, have, width = positions.shape
    if have == num_prefix + num_patches:
        return positions
    prefix, grid = positions[:, :num_prefix], positions[:, num_prefix:]
    if math.isqrt(have) ** 2 == have:
        prefix, grid = np.zeros((1, num_prefix, width), np.float32), positions
    n, side = math.isqrt(grid.shape[1]), math.isqrt(num_patches)
    if n * n != grid.shape[1]:
        return positions
    if n != side:
        grid = grid.reshape(1, n, n, width)
        with jax.ensure_compile_time_eval():  # the caller may be tracing
            grid = np.asarray(jax.image.resize(grid, (1, side, side, width), "cubic"))
    return np.concatenate([prefix, grid.reshape(1, num_patches, width)], axis=1)


def load_model(
    source: str | Path, name: str | None = None, **options: Any
) -> tuple[IARed2, dict[str, Any]]:
    """Module and variables for the weights in a file.

    Args:
      source: as for `load_weights`.
      name: which variant they belong to, e.g. "deit_s". Not needed for files of ours, which say
        it, nor where the shapes fit only one.
      **options: `create_model`'s; the file's, or its head's, where they are not given.

    Raises:
      UsageError: as `load_weights`, or if the model cannot be told.

    Example:
      >>> module, variables = load_model("vit_micro")
      >>> module.backbone.embed_dim
      96
    """
    tensors, metadata = read_tensors(source)
    tensors = taken_apart(tensors)
    known = dict(metadata.get("create_model", {}))
    seed = options.pop("seed", known.pop("seed", 0))
    known_name = known.pop("name", None)
    if known_name and (name is None or get_variant(name) is get_variant(known_name)):
        options = {**known, **options}
    name = name or known_name or _variant_of(source, tensors)
    if "num_classes" not in options:
        options["num_classes"] = num_classes_of(tensors)
    warn_if_untrained(source, tensors)
    module = create_module(name, **options)
    return module, load_weights(module, source, seed=seed)


def warn_if_untrained(source: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Says that there are no interpreters in what was read, so that nobody believes random ones."""
    if not has_interpreters(tensors):
        log.warning(
            "%s has no interpreters: they are fresh, and their scores mean nothing before training "
            "(configs/folder.py, curriculum interpreters)", source
        )  # fmt: skip


def _variant_of(source: str | Path, tensors: Mapping[str, np.ndarray]) -> str:
    """The only variant whose backbone has the tensors' shapes."""
    layout = recognise(tensors)
    fitting = [
        name
        for name, variant in VARIANTS.items()
        if layout and _has_shapes_of(variant.backbone, layout, tensors)
    ]
    if len(fitting) == 1:
        return fitting[0]
    which = f"it could be {' or '.join(fitting)}" if fitting else "no named variant has its shapes"
    raise UsageError(f"{source} does not say which model it holds, and {which}: give its name")


def _has_shapes_of(
    backbone: Backbone, layout: NamingScheme, tensors: Mapping[str, np.ndarray]
) -> bool:
    """By some parameters that together tell depth, widths, grid and kind, of our own backbones."""
    if not isinstance(backbone, ViT | CaiT):
        return False
    d, last = backbone.embed_dim, f"block_{backbone.depth - 1}/mlp/fc1/kernel"
    expected = {
        "pos_embed": (1, backbone.num_prefix + backbone.input_spec.num_patches, d),
        "patch_embed/kernel": (backbone.input_spec.patch_values, d),
        last: (d, backbone.mlp_ratio * d),
        f"block_{backbone.depth}/mlp/fc1/kernel": None,
        "class_block_0/gamma_1": None if backbone.num_prefix else (d,),
    }
    for path, shape in expected.items():
        recipe = layout.recipe(f"backbone/{path}")
        there = set(recipe.names) <= tensors.keys()
        found = recipe.make(*(tensors[name] for name in recipe.names)).shape if there else None
        if found != shape:
            return False
    return True


def num_classes_of(tensors: Mapping[str, np.ndarray]) -> int | None:
    """Of the head among a file's tensors; None if there is no head that we know."""
    layout = recognise(tensors)
    names = layout.recipe("backbone/head/bias").names if layout else ()
    return int(tensors[names[0]].shape[0]) if names and names[0] in tensors else None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) + more) if names else "nothing"
