"""Fine-tuning of the blocks from a group on, under the masks of the interpreters so far."""

import functools
from typing import Any

import jax.numpy as jnp
import ml_collections
from jaxtyping import PRNGKeyArray

from iared2_jax.token_reduction import policy
from iared2_jax.training.phases.base import (
    Batch,
    Metrics,
    Params,
    Part,
    PhaseContext,
    PhaseKind,
    cross_entropy,
    phase_options,
)
from iared2_jax.typing import Array


class BackbonePhase(PhaseKind):
    """Cross-entropy under the greedy masks of interpreters 1..group (paper, section 3.2)."""

    section = "backbone"

    def options(self) -> dict[str, Any]:
        return phase_options(
            epochs=20.0,
            label_smoothing=0.0,
            train_head=False,  # train final norm and head with the blocks, too
        )

    def trains(
        self, options: ml_collections.ConfigDict, group: int, num_groups: int
    ) -> frozenset[Part]:
        classifier = {("classifier", 0), ("head", 0)} if options.train_head else set()
        return frozenset({("blocks", k) for k in range(group, num_groups + 1)} | classifier)

    def loss(
        self, context: PhaseContext, params: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        """Everything before the group's first block is frozen: no gradient is computed there."""
        module, phase, capacities = context.module, context.phase, context.capacities
        apply = functools.partial(module.apply, {"params": params})
        group, thresholds = phase.group, phase.thresholds
        state = apply(group, batch["input"], thresholds, capacities, method="up_to")
        logits = apply(group, state.x, state.alive, method="interpret")
        keep = policy.greedy(logits, state.alive, phase.own_threshold)
        overflow = state.overflow
        if capacities is not None:
            state = apply(state, keep, capacities[group - 1], method="compact")
            keep, overflow = state.alive, overflow + state.overflow
        logits = apply(group, state.x, keep, thresholds, method="onward")
        loss, metrics = cross_entropy(logits, batch, phase.options.label_smoothing)
        kept = (keep.sum(-1) / module.input_spec.num_patches).mean()
        return loss, {**metrics, "keep_rate": kept, "overflow": overflow.sum().astype(jnp.float32)}
