"""The options of a run: their defaults, how they are loaded, and what is refused."""

from iared2_jax.config.defaults import default_config, from_scratch, imagenet, runlocal
from iared2_jax.config.loading import flatten, load, parse_arg

__all__ = [
    "default_config",
    "flatten",
    "from_scratch",
    "imagenet",
    "load",
    "parse_arg",
    "runlocal",
]
