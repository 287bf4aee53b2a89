"""Accuracy over FLOPs by dropping tokens, by pruning weights, and by both (paper, Fig. 5)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.token_reduction.model import KEEP_ALL, IARed2
from iared2_jax.weights.pruning import nonzero_shares, prune

SHARES = tuple(round(0.1 * step, 1) for step in range(1, 9))  # of weights set to 0, on a curve
# From the threshold of all groups, and the share of weights set to 0, to what that gives.
Measure = Callable[[float, float], "PruningPoint"]
Variables = Mapping[str, Any]
# From variables and the threshold of all groups to what every image gives: its "answer" [M], the
# tokens "kept" [M, D] and their "scores" [M, D, N].
Answers = Callable[[Variables, float], Mapping[str, np.ndarray]]


class PruningPoint(NamedTuple):
    """What one setting gives, on the images it was measured with.

    threshold: of all groups; `KEEP_ALL` drops no token. share: of the blocks' weights that are 0.
    linear: mean linear multiply-accumulates per image, of weights that are not 0. accuracy: share
    of right answers.
    """

    threshold: float
    share: float
    linear: float
    accuracy: float


def pruned_linear_flops(
    module: IARed2, kept: Sequence[Any], nonzero: Mapping[int, float]
) -> float | np.ndarray:
    """Linear multiply-accumulates per image, where a weight of 0 costs nothing.

    The sum over blocks of (tokens) (weights that are not 0), and all else as `count_flops` has it.

    Args:
      kept: patch tokens in each group, numbers or arrays. nonzero: see `nonzero_shares`.
    """
    vit, block = module.backbone, 0
    saved = 0.0
    for size, count in zip(module.group_sizes, kept, strict=True):
        cost = vit.block_flops(np.asarray(count, np.float64) + vit.num_prefix).linear
        for _ in range(size):
            saved = saved + (1 - nonzero[block]) * cost
            block += 1
    return np.asarray(count_flops(module, tuple(kept), interpreters=False).linear) - saved


def measure_fn(
    module: IARed2, variables: Variables, answers: Answers, labels: np.ndarray, scope: str = "layer"
) -> tuple[Measure, np.ndarray]:
    """The function that measures a setting, and all scores there are, for thresholds to choose.

    Args:
      answers: of the images, by the model. labels: the right ones [M]. scope: see `prune`.
    """

    @functools.cache
    def pruned(share: float) -> tuple[dict[str, Any], dict[int, float]]:
        """The variables, and the shares of their weights that are left."""
        made = prune(variables, share, scope)
        return made, nonzero_shares(made)

    @functools.cache  # both walks of a curve's start, and a greedy one, ask for some twice
    def measure(threshold: float, share: float) -> PruningPoint:
        """One setting."""
        own, nonzero = pruned(share)
        found = answers(own, threshold)
        cost = pruned_linear_flops(module, tuple(found["kept"].T), nonzero)
        accuracy = float((found["answer"] == labels).mean())
        return PruningPoint(threshold, share, float(np.mean(cost)), accuracy)

    scores = answers(variables, KEEP_ALL)["scores"]
    return measure, scores[scores > 0]


def thresholds_of(scores: np.ndarray, count: int) -> list[float]:
    """Thresholds that drop evenly more of the tokens, from few of them to most."""
    levels = np.quantile(scores, np.linspace(0, 1, count + 2)[1:-1])
    return sorted(set(map(float, levels)))


def pruning_curves(
    measure: Measure, thresholds: Sequence[float], shares: Sequence[float]
) -> dict[str, list[PruningPoint]]:
    """Dropping alone ("tokens"), pruning alone ("weights"), and both, dearest first.

    Both: from nothing dropped and nothing pruned on, the next threshold or the next share,
    whichever loses less accuracy for the FLOPs that it saves, until there is no next of either.

    Args:
      thresholds, shares: ascending; `KEEP_ALL` and 0 come before them.
    """
    dropped, removed = [KEEP_ALL, *thresholds], [0.0, *shares]
    start = measure(KEEP_ALL, 0.0)
    tokens = [start, *(measure(threshold, 0.0) for threshold in thresholds)]
    weights = [start, *(measure(KEEP_ALL, share) for share in shares)]
    both, token_step, weight_step = [start], 0, 0
    while token_step < len(thresholds) or weight_step < len(shares):
        steps = []
        if token_step < len(thresholds):
            steps.append((token_step + 1, weight_step))
        if weight_step < len(shares):
            steps.append((token_step, weight_step + 1))
        found = {step: measure(dropped[step[0]], removed[step[1]]) for step in steps}
        token_step, weight_step = min(found, key=lambda step: _price(both[-1], found[step]))
        both.append(found[token_step, weight_step])
    return {"tokens": tokens, "weights": weights, "both": both}


def _price(before: PruningPoint, after: PruningPoint) -> float:
    """The accuracy that a step loses per multiply-accumulate that it saves."""
    saved = before.linear - after.linear
    return (before.accuracy - after.accuracy) / saved if saved > 0 else np.inf
