"""Selectors: what scores the tokens that enter a group. Which of them stay, budgets decide.

A selector is a frozen dataclass in a file of its own; docs/add_a_selector.md shows how to add one.
"""

import warnings

from iared2_jax.errors import UsageError, nearest
from iared2_jax.token_reduction.selectors.attention import Attention
from iared2_jax.token_reduction.selectors.base import Evidence, Selector
from iared2_jax.token_reduction.selectors.budgets import (
    alive_counts,
    first_in_order,
    keep_counts,
    random_like,
    top_k,
    within_budget,
)
from iared2_jax.token_reduction.selectors.by_map import ByMap, Memorability
from iared2_jax.token_reduction.selectors.evit import EViT
from iared2_jax.token_reduction.selectors.interpreter import ByInterpreter
from iared2_jax.token_reduction.selectors.magnitude import Magnitude
from iared2_jax.token_reduction.selectors.random import Random, random_order
from iared2_jax.token_reduction.selectors.temporal_difference import TemporalDifference
from iared2_jax.token_reduction.selectors.tome import ToMe

SELECTORS: dict[str, Selector] = {
    "interpreter": ByInterpreter(),
    "attention": Attention(),
    "random": Random(),
    **{f"attention_block_{block}": Attention(block) for block in range(3)},
    "magnitude": Magnitude(),
    "memorability": Memorability(),
    "temporal_difference": TemporalDifference(),
    "evit": EViT(),
    "tome": ToMe(),
}


def get_selector(selector: str | Selector) -> Selector:
    """The selector of that name, or the one that is given.

    Raises:
      UsageError: there is no such name.
    """
    if isinstance(selector, Selector):
        return selector
    if selector not in SELECTORS:
        raise UsageError(f"there is no selector {selector!r}{nearest(str(selector), SELECTORS)}")
    return SELECTORS[selector]


def asked_selector(selector: str | Selector, score: str | None) -> Selector:
    """The selector of a call that may still give it by its old name, `score`."""
    if score is not None:
        warnings.warn(
            "score= goes with the next release: use selector=", DeprecationWarning, stacklevel=3
        )
        selector = score
    return get_selector(selector)


__all__ = [
    "SELECTORS",
    "Attention",
    "ByInterpreter",
    "ByMap",
    "EViT",
    "Evidence",
    "Magnitude",
    "Memorability",
    "Random",
    "Selector",
    "TemporalDifference",
    "ToMe",
    "alive_counts",
    "asked_selector",
    "first_in_order",
    "get_selector",
    "keep_counts",
    "random_like",
    "random_order",
    "top_k",
    "within_budget",
]
