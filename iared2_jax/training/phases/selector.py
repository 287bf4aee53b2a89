"""Fine-tuning of the whole backbone under tokens that a given selector keeps."""

import ml_collections
from jaxtyping import PRNGKeyArray

from iared2_jax.training.phases.backbone import BackbonePhase
from iared2_jax.training.phases.base import (
    Batch,
    Metrics,
    Params,
    Part,
    PhaseContext,
    cross_entropy,
)
from iared2_jax.typing import Array


class SelectorPhase(BackbonePhase):
    """Cross-entropy of a backbone whose tokens `config.reduction.selector` chooses.

    How the baselines of Tables 2, 3 and 5 are trained, with the options of `BackbonePhase`, so that
    both sides of a comparison have the same recipe. All blocks move; interpreters do not.
    """

    budgeted = True

    def trains(
        self, options: ml_collections.ConfigDict, group: int, num_groups: int
    ) -> frozenset[Part]:
        return super().trains(options, 1, num_groups)

    def loss(
        self, context: PhaseContext, params: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        """With a fixed budget the counts are known, so dropped tokens are always gathered away."""
        module, phase = context.module, context.phase
        slots = context.capacities or module.slots(phase.keep_ratios, phase.selector)
        logits, out = module.apply(
            {"params": params},
            batch["input"],
            phase.thresholds,
            execution="gathered" if slots else "masked",
            capacities=slots,
            keep_ratios=phase.keep_ratios,
            selector=phase.selector,
        )
        loss, metrics = cross_entropy(logits, batch, phase.options.label_smoothing)
        kept = out.keep[-1].mean()
        overflow = sum(count.sum() for count in out.overflow)
        return loss, {**metrics, "keep_rate": kept, "overflow": overflow}
