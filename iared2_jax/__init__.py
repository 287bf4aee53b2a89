"""IA-RED² in JAX/Flax: vision transformers that drop the patches that do not matter.

module, variables = iared2_jax.create_model("deit_s")
logits, out = module.apply(variables, images, thresholds=0.5)
heatmaps = iared2_jax.explain(module, variables, images)
run = iared2_jax.accelerate(module, variables, batch_size=32, images=images)
"""

import importlib
from typing import Any

from iared2_jax import _moved, data, fast_inference, token_reduction
from iared2_jax.attribution.maps import explain
from iared2_jax.evaluation.compare_maps import compare_maps
from iared2_jax.fast_inference import accelerate, calibrate
from iared2_jax.token_reduction.create import create_model
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.versions import version as _version
from iared2_jax.weights.load import load_model, load_weights
from iared2_jax.weights.save import save_weights

__all__ = [
    "accelerate",
    "calibrate",
    "compare_maps",
    "count_flops",
    "create_model",
    "data",
    "explain",
    "fast_inference",
    "load_model",
    "load_weights",
    "save_weights",
    "token_reduction",
]

__version__ = _version("iared2_jax")

_moved.install()


def __getattr__(name: str) -> Any:
    """`iared2_jax.ragged` and other names of before, with a DeprecationWarning."""
    if name in _moved.MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
