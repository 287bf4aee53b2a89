"""A config from its file and a command line; what it says, read in one place."""

import ast
import json
import re
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from iared2_jax.config.migration import MOVED_KEYS, adopt_old_names, hint
from iared2_jax.errors import UsageError, nearest
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.models.variants import get_variant, resized

# Options that are lists of names; the other lists are of numbers.
NAME_LISTS = ("eval.maps", "explain.maps", "compare.selectors")


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """The part of `--config=file.py:variant,runlocal` after the colon, typed by its defaults.

    `runlocal` is always there, False unless named. A bare word sets a boolean to True, `key=value`
    sets anything else.

    Raises:
      UsageError: on a key that is not among the defaults, or a value of another type.

    Example:
      >>> parse_arg("runlocal,groups=4", groups=3).groups
      4
    """
    values = {"runlocal": False, **defaults}
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in values:
            raise UsageError(f"the config has no argument {key!r}{nearest(key, values)}")
        kind = type(values[key])
        values[key] = _typed(key, text or ("true" if kind is bool else ""), kind)
    return ml_collections.ConfigDict(values)


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ml_collections.ConfigDict:
    """The config that `file.py:arg` names, with the overrides of a command line put in, as text.

    Written out rather than left to `ml_collections.config_flags`, whose errors are wrapped twice,
    span lines, and hide a missing file until the config is read.

    Raises:
      UsageError: on a file, key or value that is not there or of another type.

    Example:
      >>> load("configs/vit_micro.py:runlocal", {"supervised.steps": "3"}).supervised.steps
      3
    """
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        known = {*Path(path).parent.glob("*.py"), *Path("configs").glob("*.py")}
        hint = nearest(path, map(str, known)) if known else ": give the path of a configs/*.py"
        raise UsageError(f"there is no config {path!r} below {Path.cwd()}{hint}")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise UsageError(f"{path} is not a config: it has no function get_config")
    config = get_config(arg)
    adopt_old_names(config)
    values = flatten(config)
    for key, text in _with_new_names(overrides or {}):
        options = [name for name in values if name.startswith(f"{key}.")]
        if options:
            raise UsageError(f"config.{key} is a section: give one of {', '.join(options)}")
        if key not in values:
            raise UsageError(f"config.{key} is not an option{nearest(key, values)}")
        kind = tuple if isinstance(values[key], list) else type(values[key])
        config.update_from_flattened_dict({key: _typed(f"config.{key}", text, kind)})
    return config.lock()


def _with_new_names(overrides: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The overrides, those by an old name by each of its new ones."""
    for key, text in overrides.items():
        if key in MOVED_KEYS:
            hint(key)
        for name in MOVED_KEYS.get(key, (key,)):
            yield name, text


def _typed(name: str, text: str, kind: type) -> Any:
    """`text` as a value of the type that the option has."""
    of_names = name.removeprefix("config.") in NAME_LISTS
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if of_names and re.match(r"\w", text):
            return tuple(word.strip() for word in text.split(","))  # bare: eval.maps=rollout,lrp
        if kind is tuple:
            return tuple(ast.literal_eval(f"[{text.strip('()[]')}]"))
        return kind(text)
    except (KeyError, ValueError, SyntaxError) as error:
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        listed = "names like rollout,lrp" if of_names else "numbers like 2,4"
        wanted = kinds.get(kind, f"a list of {listed}")
        raise UsageError(f"{name}={text!r} is not {wanted}") from error


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """{"model.name": "deit_s", ..}."""

    def walk(node: ml_collections.ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, ml_collections.ConfigDict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, list(value) if isinstance(value, tuple) else value

    return dict(walk(config, ""))


def as_stored(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The flat options as a JSON file gives them back, e.g. config.json."""
    return json.loads(json.dumps(flatten(config)))


def weights_of(config: ml_collections.ConfigDict) -> str:
    """The source of the config's parameters; "" for random ones."""
    return "" if config.weights == "scratch" else config.weights


def input_spec_of(config: ml_collections.ConfigDict) -> InputSpec:
    """The inputs of the config's model: its variant's, at the sizes that the config gives."""
    spec = get_variant(config.model.name).backbone.input_spec
    return resized(spec, **input_sizes(config), map_channel=bool(config.data.maps))


def input_sizes(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The sizes of the model's inputs as `create_model` takes them; None: the variant's own."""
    return {
        "image_size": tuple(config.model.image_size) or None,
        "patch_size": tuple(config.model.patch_size) or None,
        "channels": config.model.channels or None,
        "num_frames": config.model.num_frames or None,
    }


def model_groups(config: ml_collections.ConfigDict) -> int | tuple[int, ...]:
    """What `create_model` takes as `groups`."""
    return tuple(config.model.group_sizes) or config.model.groups


def reduction_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a model is applied with, so that it drops tokens as `config.reduction` says."""
    return {
        "thresholds": config.reduction.threshold,
        "keep_ratios": tuple(config.reduction.keep_ratios) or None,
        "selector": config.reduction.selector,
    }
