"""Kinds of training phases, by name: each owns its loss, its section of the config, its alarms.

docs/add_a_phase.md shows how to add one.
"""

from collections.abc import Callable

from iared2_jax.training.phases.backbone import BackbonePhase
from iared2_jax.training.phases.base import Batch, Metrics, Params, Phase, PhaseContext, PhaseKind
from iared2_jax.training.phases.distillation import DistillationPhase
from iared2_jax.training.phases.dynamicvit import DynamicViTPhase
from iared2_jax.training.phases.interpreter import InterpreterPhase
from iared2_jax.training.phases.selector import SelectorPhase
from iared2_jax.training.phases.supervised import SupervisedPhase

PHASES: dict[str, PhaseKind] = {
    "interpreter": InterpreterPhase(),
    "backbone": BackbonePhase(),
    "selector": SelectorPhase(),
    "supervised": SupervisedPhase(),
    "distillation": DistillationPhase(),
    "dynamicvit": DynamicViTPhase(),
}


def _iared2(num_groups: int) -> list[tuple[str, int]]:
    """The paper's: for each group its interpreter, then the blocks from there on."""
    return [(kind, j) for j in range(1, num_groups + 1) for kind in ("interpreter", "backbone")]


def _interpreters(num_groups: int) -> list[tuple[str, int]]:
    """The first halves only: the backbone's weights are untouched (Table 4)."""
    return [("interpreter", j) for j in range(1, num_groups + 1)]


def _selector(num_groups: int) -> list[tuple[str, int]]:
    """All blocks under the tokens that config.reduction.selector keeps (Table 3's baselines)."""
    return [("selector", num_groups)]


def _supervised(num_groups: int) -> list[tuple[str, int]]:
    """The backbone alone, dense: how a backbone is trained at first."""
    return [("supervised", 0)]


def _distillation(num_groups: int) -> list[tuple[str, int]]:
    """The backbone alone, dense, by a teacher's answers: the paper's teacher-student row."""
    return [("distillation", 0)]


def _dynamicvit(num_groups: int) -> list[tuple[str, int]]:
    """Interpreters and all blocks at once, by Gumbel-softmax."""
    return [("dynamicvit", num_groups)]


# By the name in config.curriculum: a number of groups to kinds of phases and their groups.
CURRICULA: dict[str, Callable[[int], list[tuple[str, int]]]] = {
    "iared2": _iared2,
    "interpreters": _interpreters,
    "selector": _selector,
    "supervised": _supervised,
    "distillation": _distillation,
    "dynamicvit": _dynamicvit,
}


def curricula_of(curriculum: str) -> list[str]:
    """The names that config.curriculum has: one, or several joined by "+"."""
    return curriculum.split("+")


def stages(curriculum: str, num_groups: int) -> list[tuple[str, int]]:
    """The kinds of phases of a curriculum, each with its group; of "a+b" those of a, then of b."""
    names = curricula_of(curriculum)
    return [stage for name in names for stage in CURRICULA[name](num_groups)]


__all__ = [
    "CURRICULA",
    "PHASES",
    "BackbonePhase",
    "Batch",
    "DistillationPhase",
    "DynamicViTPhase",
    "InterpreterPhase",
    "Metrics",
    "Params",
    "Phase",
    "PhaseContext",
    "PhaseKind",
    "SelectorPhase",
    "SupervisedPhase",
    "curricula_of",
    "stages",
]
