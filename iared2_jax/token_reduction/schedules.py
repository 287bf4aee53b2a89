"""Schedules: how many tokens each group keeps, as `keep_ratios`, by the rules of published methods.

Example:
  >>> import iared2_jax
  >>> from iared2_jax.token_reduction import schedules
  >>> module = iared2_jax.create_model("deit_s", groups=12)[0]  # ToMe: a block a group
  >>> ratios = schedules.constant_number(196, groups=12, number=13)
  >>> module.keep_counts(ratios, "merge")
  (183, 170, 157, 144, 131, 118, 105, 92, 79, 66, 53, 40)
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from iared2_jax.errors import UsageError
from iared2_jax.token_reduction.create import split_into_groups
from iared2_jax.token_reduction.flops import Flops, count_flops
from iared2_jax.token_reduction.model import IARed2

Ratios = tuple[float, ...]


def constant_number(num_patches: int, groups: int, number: float) -> Ratios:
    """`number` tokens fewer in every group, as ToMe's r per block, as long as half of them stay.

    Args:
      number: of 3.5, every second group loses 3 and every other 4.

    Raises:
      UsageError: the number is negative.
    """
    if number < 0:
        raise UsageError(f"number={number} tokens fewer per group must be at least 0")
    counts, count = [], num_patches
    for group in range(1, groups + 1):
        count = max(num_patches - math.floor(group * number + 0.5), math.ceil(count / 2))
        counts.append(count)
    return tuple(count / num_patches for count in counts)


def constant_rate(num_patches: int, groups: int, rate: float, extra_tokens: int = 1) -> Ratios:
    """All of the first group, and of what each later one is handed `rate`, as EViT does.

    Args:
      extra_tokens: what is made of the others, and handed on: EViT's fused token.

    Raises:
      UsageError: the rate is not in (0, 1].

    Example:
      >>> [round(196 * ratio) for ratio in constant_rate(196, groups=4, rate=0.7)]
      [196, 138, 98, 70]
    """
    _check_share("rate", rate)
    counts = [num_patches]
    for group in range(1, groups):
        handed = counts[-1] + (extra_tokens if group > 1 else 0)
        counts.append(math.ceil(round(rate * handed, 6)))
    return tuple(count / num_patches for count in counts)


def cosine(groups: int, last: float) -> Ratios:
    """Shares that fall along half a cosine, from all of the first group to `last` of the last.

    Raises:
      UsageError: the share is not in (0, 1], or there is one group only.

    Example:
      >>> [round(ratio, 2) for ratio in cosine(groups=5, last=0.2)]
      [1.0, 0.88, 0.6, 0.32, 0.2]
    """
    _check_share("last", last)
    if groups < 2:
        raise UsageError(f"groups={groups}: a schedule from first to last needs at least 2")
    waves = [(1 + math.cos(math.pi * group / (groups - 1))) / 2 for group in range(groups)]
    return tuple(last + (1 - last) * wave for wave in waves)


class Published(NamedTuple):
    """How a method spends its budget in its paper.

    Attributes:
      groups: (depth) -> the number of groups of blocks.
      schedule: (num_patches, groups, strength) -> `keep_ratios`; a strength in [0, 1], and the
        greater it is, the fewer tokens are kept.
    """

    groups: Callable[[int], int]
    schedule: Callable[[int, int, float], Ratios]


def _evit(num_patches: int, groups: int, strength: float) -> Ratios:
    return constant_rate(num_patches, groups, max(1 - strength, 1 / num_patches))


def _tome(num_patches: int, groups: int, strength: float) -> Ratios:
    return constant_number(num_patches, groups, strength * num_patches / 2)


PUBLISHED: dict[str, Published] = {
    # Of 12 blocks, the first of every three; of another depth, as many groups up to 4 as divide it.
    "evit": Published(lambda depth: max(g for g in (1, 2, 3, 4) if depth % g == 0), _evit),
    "tome": Published(lambda depth: depth, _tome),  # in every block
}


def published_budget(module: IARed2, selector: str, target: float) -> tuple[int, Ratios]:
    """How EViT or ToMe would spend a share of the dense model's linear FLOPs on this backbone.

    Args:
      selector: a name of `PUBLISHED`. target: the share, e.g. 0.7.

    Returns:
      How many groups, for `create_model`, and their `keep_ratios`: the nearest that there is. (EViT
      drops nothing in its first group, so it cannot be as cheap as ToMe.)
    """
    groups, schedule = PUBLISHED[selector]
    count, n = groups(module.backbone.depth), module.input_spec.num_patches
    own = module.clone(group_sizes=split_into_groups(module.backbone.depth, count))
    return count, at_linear_flops(own, selector, lambda s: schedule(n, count, s), target)


def flops_of(module: IARed2, keep_ratios: Sequence[float], selector: str) -> Flops:
    """Multiply-accumulates per image under a fixed budget, by the selector and its own reducer."""
    return count_flops(module, module.slots(keep_ratios, selector), selector=selector)


def linear_share(module: IARed2, keep_ratios: Sequence[float], selector: str) -> float:
    """The linear FLOPs of `flops_of`, as a share of the dense model's."""
    return flops_of(module, keep_ratios, selector).linear / count_flops(module).linear


def at_linear_flops(
    module: IARed2, selector: str, schedule: Callable[[float], Ratios], target: float
) -> Ratios:
    """The budget of a family of schedules whose linear FLOPs come nearest to a share of the dense.

    Args:
      schedule: from a number in [0, 1], how much is dropped, to the budget; the more, the cheaper.
      target: the share, e.g. 0.7. Where even the most that it drops costs more: just that.
    """

    def share(strength: float) -> float:
        return linear_share(module, schedule(strength), selector)

    low, high = 0.0, 1.0  # the share falls between them, from more than the target to less
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > target else (low, middle)
    nearest = min((low, high), key=lambda strength: abs(share(strength) - target))
    return schedule(nearest)


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UsageError(f"{name}={value} must be a share in (0, 1]")
