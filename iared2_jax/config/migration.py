"""Options that have moved: their old names work for one release, with a hint."""

import logging
from collections.abc import Mapping
from typing import Any

import ml_collections

log = logging.getLogger(__name__)

# The version of config.json in a workdir: 0 is that of 0.1, whose options were flat.
CONFIG_VERSION = 1

MOVED_KEYS: dict[str, tuple[str, ...]] = {
    "label_smoothing": ("backbone.label_smoothing", "supervised.label_smoothing"),
    "log_prob_reduction": ("interpreter.log_prob_reduction",),
    "reward_denominator": ("interpreter.reward_denominator",),
    "rollouts": ("interpreter.rollouts",),
    "tau": ("interpreter.tau",),
    "threshold": ("reduction.threshold",),
    "train_execution": ("reduction.train_execution",),
    "train_head": ("backbone.train_head",),
}
_hinted: set[str] = set()


def hint(key: str) -> None:
    """Says once per process what an old name is called now."""
    if key not in _hinted:
        _hinted.add(key)
        new = " and ".join(f"config.{name}" for name in MOVED_KEYS[key])
        log.warning("config.%s is now %s; the old name goes with the next release", key, new)


def adopt_old_names(config: ml_collections.ConfigDict) -> None:
    """Moves options that a config file set by their old names to where they belong now."""
    for key in MOVED_KEYS.keys() & config.keys():
        hint(key)
        value = config[key]
        with config.unlocked():
            del config[key]
            config.update_from_flattened_dict({name: value for name in MOVED_KEYS[key]})


def migrate_flat(values: dict[str, Any]) -> dict[str, Any]:
    """A flat config of any version by the names of today."""
    moved: dict[str, Any] = {}
    for key, value in values.items():
        for name in MOVED_KEYS.get(key, (key,)):
            moved[name] = value
    return moved


def stored_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The flat options of a config that any version wrote as JSON, as this one would write them.

    By today's names; an option that the version did not have is its default.
    """
    from iared2_jax.config.defaults import default_config
    from iared2_jax.config.loading import as_stored  # which imports the names of this module

    return {**as_stored(default_config()), **migrate_flat(dict(values))}
