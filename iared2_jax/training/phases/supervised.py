"""Supervised training of the backbone alone, dense; or of its head, on a trunk that stays."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import PRNGKeyArray

from iared2_jax.errors import UsageError
from iared2_jax.fast_inference.sub_batches import as_caches_hold
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.training.phases.base import (
    Batch,
    Metrics,
    Params,
    Part,
    PhaseContext,
    PhaseKind,
    cross_entropy,
    phase_options,
    whole_backbone,
)
from iared2_jax.typing import Array


class SupervisedPhase(PhaseKind):
    """Cross-entropy of the plain backbone: all of it moves, or the head on a frozen trunk."""

    section = "supervised"
    reduces = False

    def options(self) -> dict[str, Any]:
        """How a backbone is trained from scratch (DeiT's 300 epochs), and what may stay frozen."""
        return phase_options(
            epochs=300.0,
            optimizer="adamw",
            learning_rate=5e-4,
            weight_decay=0.05,
            label_smoothing=0.0,
            train_trunk=True,  # False: only the head, on the published trunk's features
            # Of a frozen trunk: run it once, over so many training examples, and train the head on
            # their features, shuffled anew in every epoch; 0: over every batch as it comes.
            cached_examples=0,
        )

    def check_options(self, options: ml_collections.ConfigDict) -> None:
        """Refuses to cache the features of a trunk that moves, and too few of them for a batch."""
        cached = options.cached_examples
        if cached and options.train_trunk:
            raise UsageError(
                f"config.supervised.cached_examples={cached} needs a trunk that stays as it is: "
                "set --config.supervised.train_trunk=False"
            )
        if 0 < cached < options.batch_size or cached < 0:
            raise UsageError(
                f"config.supervised.cached_examples={cached} must be 0, or at least one batch "
                f"(config.supervised.batch_size={options.batch_size})"
            )

    def trains(
        self, options: ml_collections.ConfigDict, group: int, num_groups: int
    ) -> frozenset[Part]:
        if not options.train_trunk:
            return frozenset({("head", 0)})
        return whole_backbone(num_groups)

    def fixed_groups(self, group: int) -> int:
        return 0

    def stream(
        self,
        context: PhaseContext,
        params: Params,
        batches: Callable[[int], Iterator[Batch]],
        step: int,
    ) -> Iterator[Batch]:
        """Training batches, or batches of features that are computed first.

        A run that goes on computes them anew: they are of the phase's first examples.
        """
        options = context.phase.options
        if not options.cached_examples:
            return super().stream(context, params, batches, step)
        examples = batches(context.phase.first_example)
        cache = _features_of(context, params, examples, options.cached_examples)
        return _shuffled(cache, options.batch_size, step)

    def loss(
        self, context: PhaseContext, params: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        """Cross-entropy of images, or of the features that `stream` has put in their place."""
        module, variables = context.module, {"params": params}
        if "features" in batch:
            logits = module.apply(variables, batch["features"], method="classify_features")
        else:
            logits, _ = module.apply(variables, batch["input"], execution="dense")
        loss, metrics = cross_entropy(logits, batch, context.phase.options.label_smoothing)
        return loss, {**metrics, "overflow": jnp.zeros(())}


def _features_of(
    context: PhaseContext, params: Params, examples: Iterator[Batch], count: int
) -> dict[str, np.ndarray]:
    """What the head reads of the first `count` examples, with their labels (and soft targets)."""
    module, variables = context.module, {"params": params}

    @functools.partial(jax.jit, static_argnames="alone")
    def features(variables: dict[str, Params], inputs: Array, alone: bool) -> Array:
        def some(inputs):
            pixels = module.input_spec.normalize(inputs)
            return module.apply(variables, pixels, execution="dense")[1].features

        return as_caches_hold(module, some, inputs) if alone else some(inputs)

    parts: list[dict[str, Any]] = []
    while sum(len(part["label"]) for part in parts) < count:
        batch = dict(next(examples))
        inputs = batch.pop("input")
        # What lies on several devices is not taken apart again.
        alone = not isinstance(inputs, jax.Array) or len(inputs.sharding.device_set) == 1
        batch["features"] = features(variables, inputs, alone=alone)
        if not parts:
            _check_head(module, variables, batch["features"], count)
        parts.append(jax.device_get(batch))
    return {key: np.concatenate([part[key] for part in parts])[:count] for key in parts[0]}


def _check_head(module: IARed2, variables: dict[str, Params], features: Array, count: int) -> None:
    """Refuses a model whose head needs more than its features."""
    head = functools.partial(module.apply, method="classify_features")
    try:
        jax.eval_shape(head, variables, features)
    except ValueError as error:
        raise UsageError(
            f"config.supervised.cached_examples={count}: {error}; set it to 0"
        ) from error


def _shuffled(cache: dict[str, np.ndarray], batch_size: int, step: int) -> Iterator[Batch]:
    """Whole batches in a new order in every epoch, from the batch of step `step` on."""
    size = len(cache["label"])
    in_epoch = size // batch_size
    while True:
        epoch, place = divmod(step, in_epoch)
        order = np.random.default_rng(epoch).permutation(size)
        rows = order[place * batch_size : (place + 1) * batch_size]
        yield {key: values[rows] for key, values in cache.items()}
        step += 1
