"""The page docs/add_a_phase.md: its phase trains, and its teacher is saved and restored."""

import re

import jax
import numpy as np
import pytest
from conftest import ROOT, StopAfter
from flax import traverse_util

from iared2_jax.experiment.run import train
from iared2_jax.training.phases import CURRICULA, PHASES


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
def test_a_phase_with_a_teacher_of_its_own(tiny_config, tmp_path):
    tiny_config.curriculum, tiny_config.checkpoint_every = "distilled", 1
    tiny_config.model.groups, tiny_config.interpreter.tau = 1, (2.0,)
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
