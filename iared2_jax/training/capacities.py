"""Gathered training: how many patch slots each group needs, measured before a phase begins."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iared2_jax.errors import UsageError
from iared2_jax.files import write_json
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.training.phases import Batch, Phase
from iared2_jax.training.phases.base import Capacities

log = logging.getLogger(__name__)

SAMPLE = 256  # images that are counted
HEADROOM = 1.05  # over the most that any of them keeps
STEP = 8  # capacities are multiples of it


def measure_capacities(
    module: IARed2, params: dict[str, Any], phase: Phase, batches: Iterator[Batch]
) -> Capacities:
    """Slots for the masks that are fixed in `phase` (`PhaseKind.fixed_groups`).

    In a phase everything that decides about these masks is frozen, so that an image keeps the same
    tokens from its first step to its last.

    Args:
      batches: of the phase's first images, spread over the devices as its steps take them.
    """
    groups = phase.kind.fixed_groups(phase.group)

    @jax.jit
    def counts(params, inputs):
        _, out = module.apply(
            {"params": params},
            module.input_spec.normalize(inputs),
            phase.thresholds,
            selector=phase.selector,
        )
        return jnp.stack([keep.sum(-1) for keep in out.keep], axis=1)

    seen: list[np.ndarray] = []
    while sum(len(part) for part in seen) < SAMPLE:
        seen.append(np.asarray(counts(params, next(batches)["input"])))
    most = np.concatenate(seen)[:, :groups].max(axis=0)
    slots = -(-(most * HEADROOM) // STEP) * STEP
    return tuple(int(c) for c in np.clip(slots, 1, module.input_spec.num_patches))


def recalled(path: Path, phase: Phase, measure) -> Capacities:
    """The capacities that this run began the phase with, else `measure()`, written down.

    A run that was stopped goes on with the same shapes, and so to the same numbers.

    Raises:
      UsageError: the file is damaged.
    """
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
        if phase.name in known:
            return tuple(int(slots) for slots in known[phase.name])
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is damaged: delete it, and the patch slots are counted anew"
        ) from error
    known[phase.name] = measure()
    write_json(path, known)
    log.info("%s: gathered into %s patch slots", phase.name, known[phase.name])
    return known[phase.name]
