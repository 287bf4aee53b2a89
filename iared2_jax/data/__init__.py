"""Datasets, and the pipeline that feeds them to a model."""

from iared2_jax.data import cluttered_mnist

__all__ = ["cluttered_mnist"]
