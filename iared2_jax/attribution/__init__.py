"""Maps that say where a model looked, and how good they are."""

from iared2_jax.attribution.methods import METHODS

__all__ = ["METHODS"]
