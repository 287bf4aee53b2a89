"""Means over seeds with their intervals, and paired differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats


class Mean(NamedTuple):
    """A mean over seeds.

    Attributes:
      value: the mean. half: half of its 95% interval by Student's t; None for one value.
      values: all of them, in the seeds' order.
      seeds: those that they are of, where these may be fewer than the row's; None: they are all.
    """

    value: float
    half: float | None
    values: tuple[float, ...]
    seeds: tuple[int, ...] | None = None

    def text(self, digits: int) -> str:
        """ "84.5 ±0.3"; of one value only the value."""
        spread = "" if self.half is None else f" ±{self.half:.{digits}f}"
        return f"{self.value:.{digits}f}{spread}"


def mean(values: Sequence[float], seeds: Sequence[int] | None = None) -> Mean:
    """The mean, with t(.975, n - 1) s / sqrt(n) to both sides.

    Raises:
      ValueError: there are none.
    """
    if not len(values):
        raise ValueError("the mean of no values")
    n, half = len(values), None
    if n > 1:
        half = float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    of = None if seeds is None else tuple(seeds)
    return Mean(float(np.mean(values)), half, tuple(map(float, values)), of)


def paired(
    ours: Sequence[float], theirs: Sequence[float], seeds: Sequence[int] | None = None
) -> Mean:
    """The mean difference, ours - theirs, seed by seed.

    Raises:
      ValueError: there are not as many of both.
    """
    return mean([a - b for a, b in zip(ours, theirs, strict=True)], seeds)
