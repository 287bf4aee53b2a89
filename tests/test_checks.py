"""Values that cannot mean anything are refused in one sentence, before anything is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config

import iared2_jax
from iared2_jax.config import default_config
from iared2_jax.config.checks import validate
from iared2_jax.config.loading import flatten
from iared2_jax.errors import Interrupted, UsageError
from iared2_jax.experiment import compare
from iared2_jax.experiment.run import train
from iared2_jax.signals import Stop
from iared2_jax.token_reduction.create import create_module
from iared2_jax.token_reduction.selectors import get_selector
from iared2_jax.token_reduction.selectors.pixels import of_pixels

LISTS = [key for key, value in flatten(default_config()).items() if isinstance(value, list)]


@pytest.mark.parametrize("key", LISTS)
def test_a_list_of_something_else_is_refused(key):
    """Whatever the list holds: no value may end in a stack trace."""
    config = load_config("cluttered_mnist", "runlocal")
    for wrong in (("a",), ((1.0,),), (None,)):
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        with section.unlocked():
            section[name] = wrong
        with pytest.raises(UsageError, match=key.replace(".", r"\.")):
            validate(config, 1)


def test_a_budget_goes_with_what_learns_or_is_evaluated_under_one():
    config = load_config("cluttered_mnist", "runlocal")
    config.reduction.keep_ratios = (0.5, 0.4, 0.3)
    with pytest.raises(UsageError, match=r"keep_ratios=.* is a fixed budget, but .*'iared2'"):
        validate(config, 1)
    config.mode = "eval"
    validate(config, 1)
    config.mode, config.curriculum = "train", "selector"
    validate(config, 1)


@pytest.mark.parametrize("change", [{"mode": "explain"}, {"eval.pruning": 2}])
def test_what_goes_by_thresholds_takes_no_budget(change):
    config = load_config("cluttered_mnist", "runlocal")
    config.mode, config.reduction.keep_ratios = "eval", (0.5, 0.4, 0.3)
    config.update_from_flattened_dict(change)
    with pytest.raises(UsageError, match=r"goes by thresholds, not by the fixed budget"):
        validate(config, 1)


def test_two_phases_of_one_name_are_refused():
    """Blocks fine-tuned behind interpreters, and under a selector: both are "backbone 3"."""
    config = load_config("cluttered_mnist", "runlocal")
    config.curriculum = "iared2+selector"
    with pytest.raises(UsageError, match=r"config\.curriculum='iared2\+selector' cannot be"):
        validate(config, 1)


def test_heads_and_masks_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="interpreter_heads=0 must be at least 1"):
        create_module("deit_s", interpreter_heads=0)
    module, variables = iared2_jax.create_model("vit_3_blocks", groups=3)
    n = module.input_spec.num_patches
    for masks in (1, 4):
        with pytest.raises(ValueError, match=f"keep has {masks} masks, the model 3 groups"):
            jax.eval_shape(
                lambda keep: module.apply(variables, jnp.zeros((1, 64, 64, 3)), keep=keep),
                [jnp.ones((1, n), bool)] * masks,
            )


def test_a_group_that_keeps_nothing_has_a_budget_of_one_token():
    shares = compare.kept_shares({"iared2": {"kept": [1.0, 0.1231, 0.0]}})
    assert shares == (1.0, 0.124, 0.001)
    create_module("deit_s").check_budget(shares, get_selector("random"))


def test_pixels_are_compared_in_float32():
    """A difference of two bfloat16 numbers has few digits left."""

    class Model:
        num_prefix = 1

        def embed(self, inputs):
            return jnp.full((1, 3, 1), 1.0, jnp.bfloat16)

    tokens = jnp.full((2, 3, 1), 1.00390625)  # 1 + 2^-8: one digit more than bfloat16 has
    found = of_pixels(jnp.zeros((2, 4)), tokens, Model())
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, 2.0**-8)


@pytest.mark.parametrize("wrong", ["absent", "another's"])
def test_a_wrong_teacher_leaves_no_trace(tiny_config, tmp_path, wrong):
    """The corrected command starts in the same folder."""
    config = tiny_config
    config.curriculum = "distillation"
    config.distillation.teacher = str(tmp_path / "teacher.safetensors")
    if wrong == "another's":
        made = {"name": "vit_3_blocks", "num_classes": 7}
        _, variables = iared2_jax.create_model(**made)
        iared2_jax.save_weights(variables, config.distillation.teacher, {"create_model": made})
    with pytest.raises(UsageError, match="teacher"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_called_from_python_answers_signals(tiny_config, tmp_path, monkeypatch):
    """As its docstring says: also where the caller gave no `stop`."""
    entered, asked, own = [], [], Stop()

    def seen(*arguments):
        asked.append(arguments[-1])
        raise Interrupted("seen")

    monkeypatch.setattr(Stop, "__enter__", lambda self: entered.append(self) or self)
    monkeypatch.setattr("iared2_jax.experiment.run._train_locked", seen)
    for stop in ([], [own]):
        with pytest.raises(Interrupted):
            train(tiny_config, tmp_path, *stop)
    assert asked == [*entered, own]
    assert len(entered) == 1
