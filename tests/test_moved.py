"""Modules and names of version 0.1 import, with a warning that says what they are called now."""

import importlib
import sys

import pytest

import iared2_jax
from iared2_jax._moved import MOVED

# What the documents of 0.1 told users to import, and what scripts of theirs will have.
NAMES = {
    "models.backbone": ["Backbone", "BlockFlops", "attend", "to_patches", "TokenDense", "Mlp"],
    "models.iared2": ["IARed2", "KEEP_ALL"],
    "models.registry": ["VARIANTS", "Variant", "create_model", "create_module", "init_variables"],
    "models.vit": ["ViT"],
    "models.cait": ["CaiT"],
    "models.flops": ["count_flops", "Flops"],
    "checkpoints.weights": ["load_model", "load_weights", "save_weights", "resize_positions"],
    "checkpoints.tensors": ["read_tensors"],
    "checkpoints.run": ["RunCheckpoints"],
    "ragged": ["accelerate", "calibrate", "budget_curve", "Plan", "GroupPlan"],
    "ragged.engine": ["Job", "run_dense"],
    "ragged.question": ["Question"],
    "reduction.gather": ["take_tokens", "partition"],
    "reduction.layout": ["Layout", "Padded", "Packed"],
    "reduction.policy": ["log_prob", "reward"],
    "reduction.selectors": ["top_k", "random_like"],
    "train": ["train", "train_and_evaluate", "evaluate", "run", "build_model"],
    "steps": ["TrainState", "make_train_step"],
    "phases": ["Phase", "phases", "phase_at"],
    "losses": ["Task"],
    "evaluate": ["throughput", "accuracy"],
    "data.sources": ["open_source", "Source", "Wanted"],
    "config_checks": ["validate"],
}


@pytest.fixture
def _forgotten():
    """No old name has been imported before."""
    for name in MOVED:
        if "." not in name:
            vars(iared2_jax).pop(name, None)  # which an earlier import has set
    old = {f"iared2_jax.{name}" for name in MOVED}
    before = {name: sys.modules.pop(name) for name in old & sys.modules.keys()}
    yield
    sys.modules.update(before)


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("name", sorted(MOVED))
def test_every_old_module_imports_with_a_warning(name):
    with pytest.warns(DeprecationWarning, match="is now iared2_jax") as warned:
        module = importlib.import_module(f"iared2_jax.{name}")
    assert any(f"iared2_jax.{name} is now" in str(w.message) for w in warned)
    for attribute in NAMES.get(name, ()):
        assert getattr(module, attribute) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.usefixtures("_forgotten")
def test_rooms_of_before_are_attributes_of_the_package():
    with pytest.warns(DeprecationWarning, match="fast_inference"):
        assert iared2_jax.ragged.accelerate is iared2_jax.accelerate
    with pytest.raises(AttributeError, match="no attribute 'ragged_'"):
        _ = iared2_jax.ragged_


def test_public_names_are_there():
    for name in iared2_jax.__all__:
        assert getattr(iared2_jax, name) is not None
