"""The alarms: they name the group and what to change, once, and not before the policy had time."""

import logging

import pytest

from iared2_jax.training.curriculum import phases
from iared2_jax.training.monitoring import HealthAlarms


@pytest.fixture
def plan(tiny_config):
    tiny_config.interpreter.steps = 100
    return phases(tiny_config, (2, 2, 2), 50_000)


def raised(caplog, phase, windows):
    alarms = HealthAlarms(phase)
    with caplog.at_level(logging.WARNING, logger="iared2_jax"):
        for step, figures in windows:
            alarms.check(step, {"bad_steps_max": 0.0, **figures})
    return [record.message for record in caplog.records]


def test_a_collapsed_policy_is_reported_once_with_its_group(caplog, plan):
    second = plan[2]
    start = second.first_step
    # The first group has left half of the patches, of which all are kept.
    kept = {"keep_rate": 0.5, "handed_rate": 0.5}
    windows = [(start + step, kept) for step in (20, 60, 80)]
    (message,) = raised(caplog, second, windows)
    assert "interpreter 2 keeps every token" in message
    assert "config.interpreter.tau" in message


def test_dropping_everything_is_reported(caplog, plan):
    (message,) = raised(caplog, plan[0], [(90, {"keep_rate": 0.0, "handed_rate": 1.0})])
    assert "interpreter 1 drops every token" in message


def test_a_healthy_policy_is_not(caplog, plan):
    shares = [(10, 1.0), (60, 0.6), (100, 0.3)]
    windows = [(step, {"keep_rate": share, "handed_rate": 1.0}) for step, share in shares]
    assert raised(caplog, plan[0], windows) == []


def test_non_finite_steps_are_reported_in_every_kind_of_phase(caplog, plan):
    (message,) = raised(caplog, plan[1], [(5, {"bad_steps_max": 2.0})])
    assert "not finite" in message
    assert "config.backbone.learning_rate" in message
