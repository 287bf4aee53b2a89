"""IA-RED²: interpreters score tokens, groups drop them, the survivors move together."""

from iared2_jax.token_reduction import compaction, masks, policy

__all__ = ["compaction", "masks", "policy"]
