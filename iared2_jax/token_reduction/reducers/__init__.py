"""Reducers: what becomes of the tokens that a group does not keep."""

from iared2_jax.errors import UsageError, nearest
from iared2_jax.token_reduction.reducers.base import Reducer
from iared2_jax.token_reduction.reducers.drop import Drop
from iared2_jax.token_reduction.reducers.fuse import Fuse
from iared2_jax.token_reduction.reducers.merge import Merge

REDUCERS: dict[str, Reducer] = {"drop": Drop(), "fuse": Fuse(), "merge": Merge()}


def get_reducer(reducer: str | Reducer) -> Reducer:
    """The reducer of that name, or the one that is given.

    Raises:
      UsageError: there is no such name.
    """
    if not isinstance(reducer, str):
        return reducer
    if reducer not in REDUCERS:
        raise UsageError(f"there is no reducer {reducer!r}{nearest(reducer, REDUCERS)}")
    return REDUCERS[reducer]


__all__ = ["REDUCERS", "Drop", "Fuse", "Merge", "Reducer", "get_reducer"]
