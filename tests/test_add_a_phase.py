"""The page docs/add_a_phase.md: its phase trains, and its teacher is saved and restored."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, StopAfter
from flax import traverse_util

from iared2_jax.config import default_config, load
from iared2_jax.config.checks import validate
from iared2_jax.errors import UsageError
from iared2_jax.experiment.run import train
from iared2_jax.training.phases import CURRICULA, PHASES, BackbonePhase


@pytest.fixture
def _page():
    """The page's kind of phase and curriculum, by name."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add_a_phase.md").read_text(), re.S)
    known = dict(PHASES), dict(CURRICULA)
    try:
        exec(compile(code, "docs/add_a_phase.md", "exec"), {"__name__": "page"})
        yield
    finally:
        for table, before in zip((PHASES, CURRICULA), known, strict=True):
            table.clear()
            table.update(before)


def flat(params):
    return traverse_util.flatten_dict(jax.device_get(params), sep="/")


@pytest.mark.usefixtures("_page")
def test_a_phases_options_are_the_configs():
    """Its own section, set and checked like any other; without the phase there is none."""
    config = load(f"{ROOT}/configs/cluttered_mnist.py", {"distilled.temperature": "4"})
    assert config.distilled.temperature == 4.0
    validate(config, 1)
    with pytest.raises(UsageError, match=r"did you mean 'distilled\.temperature'"):
        load(f"{ROOT}/configs/cluttered_mnist.py", {"distilled.temprature": "4"})
    del PHASES["distilled"]
    with pytest.raises(UsageError, match=r"config\.distilled\.\w+ is not an option"):
        validate(config, 1)
    assert "distilled" not in default_config()


@pytest.mark.slow
@pytest.mark.usefixtures("_page")
def test_a_phase_with_a_teacher_of_its_own(tiny_config, tmp_path):
    tiny_config.curriculum, tiny_config.checkpoint_every = "distilled", 1
    tiny_config.model.groups, tiny_config.interpreter.tau = 1, (2.0,)
    tiny_config.distilled.batch_size, tiny_config.distilled.temperature = 8, 2.0
    tiny_config.distilled.epochs, tiny_config.distilled.steps = 0.0, 2
    whole = train(tiny_config, tmp_path / "whole")
    assert (int(whole.step), whole.extra) == (4, {})
    # Stopped within the phase: the teacher is the model as the phase began, and is restored.
    stopped = train(tiny_config, tmp_path / "stopped", StopAfter(4))
    assert int(stopped.step) == 3
    teacher, now = flat(stopped.extra["teacher"]), flat(stopped.params)
    moved = {path for path in now if not np.array_equal(now[path], teacher[path])}
    assert moved
    assert all(path.startswith("backbone/block_") for path in moved)
    again = train(tiny_config, tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


class MovingTeacher(BackbonePhase):
    """Its teacher is half way between what it was and the model after every step."""

    def initial_extra(self, module, params):
        return {"teacher": jax.tree.map(jnp.copy, params)}

    def next_extra(self, extra, params):
        middle = jax.tree.map(lambda old, new: (old + new) / 2, extra["teacher"], params)
        return {"teacher": middle}


@pytest.mark.slow
def test_a_phases_own_state_moves_with_its_steps(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(PHASES, "moving", MovingTeacher())
    monkeypatch.setitem(CURRICULA, "moving", lambda groups: [("moving", 1)])
    tiny_config.curriculum, tiny_config.checkpoint_every = "moving", 1
    tiny_config.backbone.steps = 3
    params = [flat(train(tiny_config, tmp_path / "run", StopAfter(0)).params)]
    params += [flat(train(tiny_config, tmp_path / "run", StopAfter(1)).params) for _ in range(2)]
    state = train(tiny_config, tmp_path / "run", StopAfter(0))
    teacher = flat(state.extra["teacher"])
    for path, value in teacher.items():
        expected = ((params[0][path] + params[1][path]) / 2 + params[2][path]) / 2
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7, err_msg=path)
    path = "backbone/block_0/mlp/fc1/kernel"
    assert not np.array_equal(teacher[path], params[0][path])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rollouts", 0, r"config\.interpreter\.rollouts=0 must be at least 2"),
        ("reward_denominator", "entring", r"reward_denominator='entring' is unknown"),
        ("log_prob_reduction", "max", r"log_prob_reduction='max' is unknown"),
        ("estimator", "rlo", r"estimator='rlo' is unknown \(did you mean 'rloo'\?\)"),
        ("answer", "probable", r"answer='probable' is unknown \(did you mean 'probability'\?\)"),
        ("lengths", (1.0, 0.0, 1.0), r"lengths=\(1\.0, 0\.0, 1\.0\) must all be above 0"),
    ],
)
def test_values_are_checked_whatever_is_trained(tiny_config, key, value, message):
    """An option that no phase of the curriculum reads is refused all the same."""
    tiny_config.curriculum = "supervised"
    validate(tiny_config, 1)
    tiny_config.interpreter[key] = value
    with pytest.raises(UsageError, match=message):
        validate(tiny_config, 1)
