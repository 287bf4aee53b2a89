"""Throughput that can be compared: variants in one process, interleaved, medians."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import numpy as np


class Timing(NamedTuple):
    """Seconds per call: the median, the quartiles and the 95th percentile over the rounds."""

    median: float
    lower: float
    upper: float
    p95: float


Name = TypeVar("Name")


def interleaved(
    variants: Mapping[Name, Callable[[], object]],
    rounds: int | tuple[int, int],
    seconds: float = 0.0,
    primed: float = 0.0,
) -> dict[Name, Timing]:
    """Times every variant once per round, in alternating order; a warm-up round is dropped.

    Each call is waited for. Compare variants only within one call of this function: the machine's
    speed drifts, but all variants drift together.

    Args:
      rounds: how many; or at least and at most, and as many as begin within `seconds` in between.
      primed: seconds; of a variant that takes less, every timed call follows an untimed one. The
        first call after others finds caches cold, and memory given back to the system.
    """
    least, most = (rounds, rounds) if isinstance(rounds, int) else rounds
    names = list(variants)
    times: dict[Name, list[float]] = {name: [] for name in names}
    begun = time.perf_counter()
    for index in range(most + 1):
        if index == 1:
            begun = time.perf_counter()  # the warm-up may have compiled
        elif index > least and time.perf_counter() - begun > seconds:
            break
        for name in names if index % 2 else reversed(names):
            if times[name] and min(times[name]) < primed:
                jax.block_until_ready(variants[name]())
            start = time.perf_counter()
            jax.block_until_ready(variants[name]())
            times[name].append(time.perf_counter() - start)
    quartiles = {name: np.percentile(seen[1:], (50, 25, 75, 95)) for name, seen in times.items()}
    return {name: Timing(*(float(q) for q in values)) for name, values in quartiles.items()}
