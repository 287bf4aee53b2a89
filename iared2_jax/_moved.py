"""Modules that were renamed: their old names import for one release, with a DeprecationWarning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from typing import Any

# Old name: the modules that its names are in now, both below `iared2_jax`.
MOVED: dict[str, tuple[str, ...]] = {
    "capacities": ("training.capacities",),
    "checkpoints": ("weights",),
    "checkpoints.layouts": ("weights.layouts",),
    "checkpoints.pth": ("weights.formats.pth",),
    "checkpoints.run": ("training.checkpoints",),
    "checkpoints.tensors": ("weights.files",),
    "checkpoints.weights": ("weights.load", "weights.save", "weights.positions"),
    "config_checks": ("config.checks",),
    "data.sources": ("data.datasets", "data.request"),
    "evaluate": ("evaluation.evaluators",),
    "logs": ("training.monitoring",),
    "losses": ("training.phases", "training.phases.base"),
    "models.backbone": ("models.backbones.protocol", "models.layers", "models.attention"),
    "models.cait": ("models.backbones.cait",),
    "models.flops": ("token_reduction.flops",),
    "models.iared2": ("token_reduction.model",),
    "models.interpreter": ("token_reduction.interpreter",),
    "models.registry": ("token_reduction.create", "models.variants"),
    "models.vit": ("models.backbones.vit",),
    "optim": ("training.optimizers",),
    "phases": ("training.curriculum", "training.phases"),
    "ragged": ("fast_inference",),
    "ragged.accelerate": ("fast_inference.accelerate", "fast_inference.accelerated"),
    "ragged.calibrate": ("fast_inference.calibrate",),
    "ragged.engine": (
        "fast_inference.engine",
        "fast_inference.forward",
        "fast_inference.group",
        "fast_inference.sub_batches",
    ),
    "ragged.plan": ("fast_inference.plan",),
    "ragged.planner": ("fast_inference.planner",),
    "ragged.question": ("fast_inference.plan_request",),
    "reduction": ("token_reduction",),
    "reduction.gather": ("token_reduction.compaction",),
    "reduction.layout": ("models.token_layouts",),
    "reduction.policy": ("token_reduction.policy",),
    "reduction.selectors": ("token_reduction.selectors",),
    "steps": ("training.step",),
    "train": ("experiment.run", "experiment.build", "training.loop"),
}
# Old name of what a module defines: the new one.
RENAMED = {
    "Job": "ForwardSpec",
    "Layout": "TokenLayout",
    "Question": "PlanRequest",
    "Source": "Dataset",
    "Task": "PhaseContext",
    "Wanted": "DataRequest",
    "open_source": "open_dataset",
    "partition": "kept_first",
}
_PACKAGE = __name__.rpartition(".")[0]


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module by its old name, as one that takes every attribute from the new ones."""

    def find_spec(
        self, name: str, path: Any, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        old = name.removeprefix(f"{_PACKAGE}.")
        if old == name or old not in MOVED:
            return None
        is_package = any(other.startswith(f"{old}.") for other in MOVED)
        return importlib.machinery.ModuleSpec(name, self, is_package=is_package)

    def exec_module(self, module: types.ModuleType) -> None:
        """Fills the module: it warns, and hands on every attribute of the new ones."""
        names = MOVED[module.__name__.removeprefix(f"{_PACKAGE}.")]
        homes = [importlib.import_module(f"{_PACKAGE}.{name}") for name in names]
        warnings.warn(
            f"{module.__name__} is now {' and '.join(home.__name__ for home in homes)}; the old "
            "name goes with the next release",
            DeprecationWarning,
            stacklevel=_importer_depth(),
        )

        def attribute(name: str) -> object:
            for home in homes:
                for known in (name, RENAMED.get(name, name)):
                    if hasattr(home, known):
                        return getattr(home, known)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = attribute


def _importer_depth() -> int:
    """How many frames above the caller the import statement is: behind importlib's own."""
    depth, frame = 2, sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        depth, frame = depth + 1, frame.f_back
    return depth


def install() -> None:
    """Lets the old names be imported; once per process."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        # First: a folder that an update left behind, with nothing but caches in it, would be found.
        sys.meta_path.insert(0, _MovedModules())
