"""Trained weights in: other projects' files, and ours (`weights.save`)."""

import difflib
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from iared2_jax.errors import UsageError, few
from iared2_jax.files import with_tuples
from iared2_jax.models.backbones.cait import CaiT
from iared2_jax.models.backbones.protocol import Backbone
from iared2_jax.models.backbones.vit import ViT
from iared2_jax.models.parameters import natural_order
from iared2_jax.models.variants import VARIANTS, get_variant
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array
from iared2_jax.weights.files import read_tensors
from iared2_jax.weights.layouts import (
    NamingScheme,
    Recipe,
    recognise,
    taken_apart,
)
from iared2_jax.weights.positions import resize_positions, resize_times

log = logging.getLogger(__name__)

# What a file of ours says of its model, beside what shapes tell.
_NOT_IN_SHAPES = (
    "group_sizes",
    "policy_token",
    "interpreter_heads",
    "scale",
    "init_bias",
    "interpreter_kind",
)
_NEAREST = 10  # names that a failure lists


def load_weights(
    module: IARed2,
    source: str | Path,
    *,
    seed: int = 0,
    fresh_head: bool = True,
    ema: bool | None = None,
    interpreters: bool = True,
) -> dict[str, Any]:
    """Variables for `module` with the weights of a file, whoever wrote it.

    Read are timm's ViT, DeiT (I to III), CaiT and DINOv2, and their authors' .pth; TimeSformer's
    .pth; transformers' ViT, DeiT, TimeSformer and DINOv2; mmaction2's TimeSformer;
    vision_transformer's and big_vision's .npz; and this project's own; which of them it is, its
    names tell. An image model's weights make one of clips, whose time embeddings start at zero.
    Position embeddings are resized where the image size differs, as the file's own project does
    it, time embeddings where the number of frames does; a head for another number of classes is
    left fresh. Interpreters are left fresh unless the file has them.

    Args:
      module: e.g. from `create_module` or `create_model`.
      source: see `weights.files.read_tensors`: a file, a folder, "hf://owner/name", or the
        name of shipped weights.
      seed: of whatever is left fresh.
      fresh_head: whether the head may be left fresh, with a warning, where the file has none or one
        for other classes; else that is an error.
      ema: see `weights.files.read_tensors`.
      interpreters: whether to take interpreters that the file has; without, its groups need not be
        this model's.

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
    tensors, metadata = read_tensors(source, ema)
    tensors = taken_apart(tensors)
    if not interpreters:
        tensors = {name: t for name, t in tensors.items() if not has_interpreters([name])}
    layout = _layout_of(source, tensors)
    if layout is None:
        raise UsageError(
            f"{source} is of no kind known here: it has {few(tensors)}. Known are timm, DeiT, "
            "CaiT, TimeSformer and DINOv2 by their authors, transformers (ViT, DeiT, TimeSformer, "
            "DINOv2), mmaction2's TimeSformer, vision_transformer and big_vision, iared2_jax"
        )
    fresh = traverse_util.flatten_dict(init_variables(module, seed)["params"], sep="/")
    recipes = {path: layout.recipe(path) for path in fresh}
    if has_interpreters(tensors):
        _check_metadata(source, module, metadata.get("create_model"))
    else:
        recipes = {p: recipe for p, recipe in recipes.items() if not p.startswith("interpreter_")}
    _check_registers(source, module, layout, tensors)
    headless = _without_head(recipes, tensors)
    mixing = _without_mixing(source, recipes, tensors)
    for path in headless + mixing + _without_time(source, module, recipes, tensors):
        del recipes[path]
    _check_names(source, layout, tensors, recipes)
    loaded = {
        path: value
        for path, recipe in recipes.items()
        if (value := _fitted(source, module, layout, path, recipe, tensors, fresh[path]))
        is not None
    }
    anew = headless + [path for path in recipes if path not in loaded]
    if anew:
        _head_starts_anew(source, module, tensors, anew, fresh_head)
    return {"params": traverse_util.unflatten_dict({**fresh, **loaded}, sep="/")}


def _check_registers(source, module: IARed2, layout: NamingScheme, tensors) -> None:
    """Refuses another number of register tokens, and says which model has as many."""
    name = layout.recipe("backbone/reg_token").names[0]
    theirs = tensors[name].shape[-2] if name in tensors and tensors[name].ndim > 1 else 0
    mine = getattr(module.backbone, "registers", 0)
    if theirs != mine:
        raise UsageError(
            f"{source} has {theirs or 'no'} register tokens, this model {mine or 'none'}: "
            f"use a variant {'with' if theirs else 'without'} registers (dinov2_s14_reg has 4, "
            "dinov2_s14 none)"
        )


def _without_mixing(
    source, recipes: Mapping[str, Recipe], tensors: Mapping[str, np.ndarray]
) -> list[str]:
    """Parameters of another attention than the file's, if it has none of any: they start anew."""
    own = [path for path in recipes if "/attn/mix/" in path]
    if not own or any(name in tensors for path in own for name in recipes[path].names):
        return []
    log.warning("%s: its attention was another; %s start anew", source, few(own))
    return own


def _without_head(recipes: Mapping[str, Recipe], tensors: Mapping[str, np.ndarray]) -> list[str]:
    """The head's parameters, if the file has nothing of any: a backbone for fine-tuning."""
    heads = [path for path in recipes if path.startswith("backbone/head")]
    missing = all(name not in tensors for path in heads for name in recipes[path].names)
    return heads if missing else []


def _without_time(
    source: str | Path,
    module: IARed2,
    recipes: Mapping[str, Recipe],
    tensors: Mapping[str, np.ndarray],
) -> list[str]:
    """The time embedding, if an image model is to become one of clips: it starts at zero."""
    path = "backbone/time_embed"
    if path not in recipes or recipes[path].names[0] in tensors:
        return []
    log.warning(
        "%s is an image model: time embeddings start at zero, so that before training each of the "
        "%d frames counts alike",
        source,
        module.input_spec.frames,
    )
    return [path]


def _head_starts_anew(
    source: str | Path,
    module: IARed2,
    tensors: Mapping[str, np.ndarray],
    anew: list[str],
    allowed: bool,
) -> None:
    """Says that a head is fresh, or refuses it where its answers would be taken for real."""
    classes, mine = num_classes_of(tensors), module.backbone.num_classes
    what = f"is for {classes} classes" if classes else "has no head"
    if not allowed:
        raise UsageError(
            f"{source} {what}, the data have {mine} classes: train a head first "
            "(--config.curriculum=supervised), and start from the weights.safetensors of that run"
        )
    log.warning("%s %s: %s start anew, for %d classes", source, what, " and ".join(anew), mine)


def _fitted(
    source: str | Path,
    module: IARed2,
    layout: NamingScheme,
    path: str,
    recipe: Recipe,
    tensors: Mapping[str, np.ndarray],
    fresh: Array,
) -> Array | None:
    """A parameter from the file, at the model's size; None for a head of other classes.

    Raises:
      UsageError: it is another model's.
    """
    if path == "backbone/patch_embed/kernel":
        _check_patches(source, module, tensors[recipe.names[0]], layout)
    value = _parameter(source, recipe, tensors)
    if path == "backbone/time_embed" and value.ndim == 3:
        value = resize_times(value, fresh.shape[1])
    if path == "backbone/pos_embed" and value.ndim == 3 and value.shape != fresh.shape:
        value = resize_positions(
            value,
            module.input_spec,
            _prefix_positions(module.backbone),
            layout.joined_positions,
            source,
            layout.interpolation,
        )
    if value.shape == fresh.shape:
        return jnp.asarray(value, fresh.dtype)
    if path.startswith("backbone/head") and value.shape[:-1] == fresh.shape[:-1]:
        return None
    raise UsageError(
        f"{source} is for another model: {recipe.names[0]} makes {list(value.shape)} of "
        f"{path}, but this model's is {list(fresh.shape)}"
    )


def _prefix_positions(backbone: Backbone) -> int:
    """How many prefix tokens the position embedding has a place for."""
    return getattr(backbone, "num_prefix_positions", backbone.num_prefix)


def _check_patches(
    source: str | Path, module: IARed2, kernel: np.ndarray, layout: NamingScheme
) -> None:
    """Refuses a patch embedding whose sides or channels differ, though its size may be the same."""
    if kernel.ndim != 4:
        return
    spec, in_flax = module.input_spec, not layout.torch
    p, q, channels = kernel.shape[:3] if in_flax else (*kernel.shape[2:], kernel.shape[1])
    if (p, q, channels) != (*spec.patch, spec.channels):
        raise UsageError(
            f"{source} is for patches of {p} x {q} px with {channels} channels, but this model's "
            f"are {spec.patch[0]} x {spec.patch[1]} px with {spec.channels}: see patch_size and "
            "channels of create_model"
        )


def _layout_of(source: str | Path, tensors: Mapping[str, np.ndarray]) -> NamingScheme | None:
    try:
        return recognise(tensors)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def has_interpreters(tensors: Iterable[str]) -> bool:
    """Whether a file of ours has more than the backbone; of others' files none has."""
    return any(name.startswith("interpreters.") for name in tensors)


def _check_metadata(source, module: IARed2, known: Mapping[str, Any] | None) -> None:
    """Shapes do not tell groups, heads or normalisation, but the same weights would mean others."""
    if known is None:
        return
    known = {key: value for key, value in known.items() if key not in ("seed", "dtype")}
    theirs = create_module(**with_tuples(known))
    fields = [(field, getattr(module, field), getattr(theirs, field)) for field in _NOT_IN_SHAPES]
    both = [getattr(m.backbone, "attention", None) for m in (module, theirs)]
    for field, mine, other in [*fields, ("attention", *both)]:
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
    divided = [name for name in spare if re.fullmatch(layout.divided, name)]
    known = {*unused, *divided}
    homeless = sorted((name for name in spare if name not in known), key=natural_order)
    wanted = sorted(used - tensors.keys(), key=natural_order)
    if wanted or homeless:
        near = _nearest(wanted[0], homeless or tensors) if wanted else _nearest(homeless[0], used)
        raise UsageError(
            f"{source} ({layout.name}) does not fit the model: it lacks {few(wanted)} and has no "
            f"place for {few(homeless)}; nearest: {', '.join(near)}"
        )
    if divided:
        log.warning(
            "%s has divided space-time attention: its temporal layers (%d tensors) have no place in"
            " joint attention, the rest is loaded; fine-tune before you believe its answers",
            source,
            len(divided),
        )
    if unused:
        log.info("%s: not used: %s", source, ", ".join(unused))


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(known), n=_NEAREST, cutoff=0.0)


def _parameter(source, recipe: Recipe, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """A parameter as the recipe has it, finite."""
    kinds = {tensors[name].dtype for name in recipe.names}
    if any(kind.kind in "iub" for kind in kinds):
        raise UsageError(
            f"{source}: {recipe.names[0]} holds {min(map(str, kinds))}, no floats: quantised "
            "weights are not supported"
        )
    try:
        value = recipe.make(*(tensors[name] for name in recipe.names)).astype(np.float32)
    except (ValueError, IndexError) as error:
        shape = list(tensors[recipe.names[0]].shape)
        raise UsageError(f"{source}: {recipe.names[0]} has the odd shape {shape}") from error
    if not np.isfinite(value).all():
        raise UsageError(f"{source}: {recipe.names[0]} has values that are not finite")
    return value


def load_model(
    source: str | Path, name: str | None = None, **options: Any
) -> tuple[IARed2, dict[str, Any]]:
    """Module and variables for the weights in a file.

    Args:
      source: as for `load_weights`.
      name: which variant they belong to, e.g. "deit_s". Not needed for files of ours, which say
        it, nor where the shapes fit only one.
      **options: `create_model`'s; the file's, or its head's, where they are not given. And `ema`,
        see `weights.files.read_tensors`.

    Raises:
      UsageError: as `load_weights`, or if the model cannot be told.

    Example:
      >>> module, variables = load_model("vit_micro")
      >>> module.backbone.embed_dim
      96
    """
    module, variables, tensors = _load_model(source, name, **options)
    warn_if_untrained(source, tensors)
    return module, variables


def load_dense_model(source: str | Path) -> tuple[IARed2, dict[str, Any]]:
    """Module and variables to be run dense: that a file has no interpreters is no warning's worth.

    Raises:
      UsageError: as `load_model`.
    """
    module, variables, _ = _load_model(source)
    return module, variables


def _load_model(
    source: str | Path, name: str | None = None, **options: Any
) -> tuple[IARed2, dict[str, Any], Mapping[str, np.ndarray]]:
    """Module and variables, and the tensors in the file."""
    ema = options.pop("ema", None)
    tensors, metadata = read_tensors(source, ema)
    tensors = taken_apart(tensors)
    known = dict(metadata.get("create_model", {}))
    seed = options.pop("seed", known.pop("seed", 0))
    known_name = known.pop("name", None)
    if known_name is not None and not isinstance(known_name, str):
        raise UsageError(f"{source} says that it is {known_name!r}, which is no name: give one")
    if known_name and (name is None or get_variant(name) is get_variant(known_name)):
        if "attention" in options:  # the file's size is its own attention's
            known.pop("attention_size", None)
        options = {**known, **options}
    name = name or known_name or _variant_of(source, tensors)
    if "num_classes" not in options:
        options["num_classes"] = num_classes_of(tensors)
    try:
        module = create_module(name, **with_tuples(options))
    except (TypeError, ValueError) as error:
        if not known:
            raise
        raise UsageError(
            f"{source} says that it is {known_name!r} with {known}, which cannot be made: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return module, load_weights(module, source, seed=seed, ema=ema), tensors


def warn_if_untrained(source: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Says that there are no interpreters in what was read, so that nobody believes random ones."""
    if not has_interpreters(tensors):
        log.warning(
            "%s has no interpreters: they are fresh, and their scores mean nothing before training "
            "(configs/folder.py, curriculum interpreters)", source
        )  # fmt: skip


def _variant_of(source: str | Path, tensors: Mapping[str, np.ndarray]) -> str:
    """The only variant whose backbone has the tensors' shapes."""
    layout = _layout_of(source, tensors)
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
    """Whether parameters that tell depth, widths, grid and kind are those of our backbone."""
    if not isinstance(backbone, ViT | CaiT):
        return False
    spec, d, last = (
        backbone.input_spec,
        backbone.embed_dim,
        f"block_{backbone.depth - 1}/mlp/fc1/kernel",
    )
    prefix = _prefix_positions(backbone)
    registers = getattr(backbone, "registers", 0)
    expected = {
        "pos_embed": (1, prefix + math.prod(spec.frame_grid), d),
        "reg_token": (1, registers, d) if registers else None,
        "block_0/ls1/gamma": (d,) if getattr(backbone, "layer_scale", None) else None,
        "time_embed": (1, spec.frames, d) if spec.is_clip else None,
        "patch_embed/kernel": (spec.patch_values, d),
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
    """The classes of the head among a file's tensors; None if there is no head that we know."""
    layout = recognise(tensors)
    names = layout.recipe("backbone/head/bias").names if layout else ()
    return int(tensors[names[0]].shape[0]) if names and names[0] in tensors else None
