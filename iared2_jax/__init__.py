"""IA-RED² in JAX/Flax: vision transformers that drop the patches that do not matter.

module, variables = iared2_jax.create_model("deit_s")
logits, out = module.apply(variables, images, thresholds=0.5)
heatmaps = iared2_jax.explain(module, variables, images)
run = iared2_jax.accelerate(module, variables, batch_size=32, images=images)
"""

from iared2_jax import data, ragged, reduction
from iared2_jax.attribution.maps import explain
from iared2_jax.checkpoints.weights import load_model, load_weights, save_weights
from iared2_jax.models.flops import count_flops
from iared2_jax.models.registry import create_model
from iared2_jax.ragged import accelerate, calibrate

__all__ = [
    "accelerate",
    "calibrate",
    "count_flops",
    "create_model",
    "data",
    "explain",
    "load_model",
    "load_weights",
    "ragged",
    "reduction",
    "save_weights",
]
