"""IA-RED²: interpreters score tokens, groups drop them, the survivors move together."""

from iared2_jax.token_reduction import compaction, policy, reducers, selectors

__all__ = ["compaction", "policy", "reducers", "selectors"]
