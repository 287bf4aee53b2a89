"""The paper's tables: the runs that each needs, those that are missing, and what came of all.

The command is `python -m iared2_jax.tables`, see `__main__`.
"""
