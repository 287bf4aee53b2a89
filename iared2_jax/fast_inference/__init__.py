"""Ragged execution: dropped tokens buy time. `accelerate` is the way in."""

from iared2_jax.fast_inference.accelerate import accelerate
from iared2_jax.fast_inference.accelerated import Accelerated
from iared2_jax.fast_inference.calibrate import BudgetPoint, budget_curve, calibrate, with_speed
from iared2_jax.fast_inference.plan import GroupPlan, Plan

__all__ = [
    "Accelerated",
    "BudgetPoint",
    "GroupPlan",
    "Plan",
    "accelerate",
    "budget_curve",
    "calibrate",
    "with_speed",
]
