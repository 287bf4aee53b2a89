"""Supervised training of the backbone alone, dense."""

from typing import Any

import jax.numpy as jnp
import ml_collections
from jaxtyping import PRNGKeyArray

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


class SupervisedPhase(PhaseKind):
    """Cross-entropy of the plain backbone: all of it moves, or the head on a frozen trunk."""

    section = "supervised"
    reduces = False

    def options(self) -> dict[str, Any]:
        return phase_options(
            epochs=300.0,
            optimizer="adamw",
            learning_rate=5e-4,
            weight_decay=0.05,
            label_smoothing=0.0,
            train_trunk=True,  # False: only the final norm and the head, for a published trunk
        )

    def trains(
        self, options: ml_collections.ConfigDict, group: int, num_groups: int
    ) -> frozenset[Part]:
        if not options.train_trunk:
            return frozenset({("classifier", 0)})
        blocks = {("blocks", number) for number in range(1, num_groups + 1)}
        return frozenset({*blocks, ("embedding", 0), ("classifier", 0)})

    def fixed_groups(self, group: int) -> int:
        return 0

    def loss(
        self, context: PhaseContext, params: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        inputs = batch["input"]
        logits, _ = context.module.apply({"params": params}, inputs, execution="dense")
        loss, metrics = cross_entropy(logits, batch, context.phase.options.label_smoothing)
        return loss, {**metrics, "overflow": jnp.zeros(())}
