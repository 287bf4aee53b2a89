"""Which tokens live (policy, selectors), and how the survivors move (gather)."""

from iared2_jax.reduction import gather, layout, policy, selectors

__all__ = ["gather", "layout", "policy", "selectors"]
