"""Which tokens live (policy, selectors), and how the survivors move (gather)."""

from iared2_jax.reduction import gather, policy, selectors

__all__ = ["gather", "policy", "selectors"]
