"""What a plan is wanted for, and where plans are kept."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iared2_jax import files
from iared2_jax.errors import CheckpointError, UsageError
from iared2_jax.fast_inference.forward import ForwardSpec
from iared2_jax.fast_inference.plan import Plan
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array
from iared2_jax.versions import version

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The model, batch, thresholds and sample that a plan is made for.

    Attributes:
      forward, variables: what is to be computed, and the parameters.
      batch_size: images per call and device.
      thresholds: of `images`: one per group [D], or one each per image [m, D].
      images: some dozens of what will be asked, images or clips [m, ..], normalised; not needed
        for a fixed budget.
      devices: all alike; the plan is timed on the first.
    """

    forward: ForwardSpec
    variables: Mapping[str, Any]
    batch_size: int
    thresholds: np.ndarray
    images: Array | None = None
    devices: tuple[jax.Device, ...] = dataclasses.field(
        default_factory=lambda: tuple(jax.devices()[:1])
    )

    @property
    def module(self) -> IARed2:
        return self.forward.module

    @property
    def platform(self) -> str:
        """ "cpu" or "gpu"."""
        return self.devices[0].platform

    @property
    def num_patches(self) -> int:
        return self.module.input_spec.num_patches

    @property
    def most_tokens(self) -> tuple[int, ...]:
        """Tokens with the prefix that an image can have in each group."""
        vit = self.module.backbone
        ratios = self.forward.keep_ratios
        if ratios is None:
            return (vit.num_prefix + self.num_patches,) * self.module.num_groups
        return tuple(vit.num_prefix + k for k in self.module.keep_counts(ratios))

    def key(self) -> dict[str, Any]:
        """All that a plan depends on, but for the images; JSON."""
        interpreters = hashlib.sha256()
        for leaf in jax.tree.leaves(
            {k: v for k, v in self.variables["params"].items() if k != "backbone"}
        ):
            interpreters.update(np.asarray(leaf).tobytes())
        return {
            "module": hashlib.sha256(repr(self.module).encode()).hexdigest()[:16],
            "interpreters": interpreters.hexdigest()[:16],
            "thresholds": np.round(self.thresholds.astype(float), 6).tolist(),
            "keep_ratios": list(self.forward.keep_ratios) if self.forward.keep_ratios else None,
            "selector": repr(self.forward.selector),
            "attention": self.forward.attention,
            "batch_size": self.batch_size,
            "dtype": jnp.dtype(self.module.backbone.dtype).name,
            "device": self.devices[0].device_kind,
            "cores": os.cpu_count() if self.platform == "cpu" else None,
            "devices": len(self.devices),
            "versions": {name: version(name) for name in ("iared2_jax", "jax", "jaxlib")},
        }


def cache_folder(cache_dir: str | Path | None) -> Path | None:
    """Where plans and programs are kept, if they are to be kept."""
    if cache_dir == "auto":
        return files.cache_folder()
    return None if cache_dir is None else Path(cache_dir)


def _path(request: PlanRequest, folder: Path) -> Path:
    key = json.dumps(request.key(), sort_keys=True)
    return folder / "plans" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def cached_plan(request: PlanRequest, folder: Path | None) -> Plan | None:
    """The plan that was kept for the same request."""
    if folder is None or not _path(request, folder).is_file():
        return None
    try:
        plan = Plan.load(_path(request, folder))
    except UsageError as error:
        log.warning("the cached plan cannot be used, a new one replaces it: %s", error)
        return None
    return plan if plan.key == json.loads(json.dumps(request.key())) else None


def keep_plan(request: PlanRequest, plan: Plan, folder: Path | None) -> None:
    """Writes the plan into the cache; one that cannot be written is only worth a warning."""
    if folder is None:
        return
    try:
        plan.save(_path(request, folder))
    except (OSError, CheckpointError) as error:  # of the folder, and of the file
        log.warning("the plan cannot be kept in %s (%s)", folder, error)
