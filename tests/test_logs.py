"""The alarms: they name the group and what to change, once, and not before the policy had time."""

import dataclasses
import logging

import pytest

from iared2_jax.training.curriculum import phases
from iared2_jax.training.monitoring import HealthAlarms, MetricWriter


@pytest.fixture
def plan(tiny_config):
    tiny_config.interpreter.steps = 100
    return phases(tiny_config, (2, 2, 2), 50_000)


def raised(caplog, phase, windows, history=()):
    alarms = HealthAlarms(phase, history)
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


def test_a_budget_for_every_token_is_no_reason_to_drop_any(caplog, plan):
    first, second = plan[0], plan[2]
    budget = first.options.copy_and_resolve_references()
    budget.keep_target = (1.0, 0.5, 0.5)
    everything = {"keep_rate": 1.0, "handed_rate": 1.0}
    first, second = (dataclasses.replace(phase, options=budget) for phase in (first, second))
    assert raised(caplog, first, [(90, everything)]) == []
    (message,) = raised(caplog, second, [(second.first_step + 90, everything)])
    assert "interpreter 2 keeps every token" in message
    assert "raise config.interpreter.target_weight" in message


def test_a_healthy_policy_is_not(caplog, plan):
    shares = [(10, 1.0), (60, 0.6), (100, 0.3)]
    windows = [(step, {"keep_rate": share, "handed_rate": 1.0}) for step, share in shares]
    assert raised(caplog, plan[0], windows) == []


def test_non_finite_steps_are_reported_in_every_kind_of_phase(caplog, plan):
    (message,) = raised(caplog, plan[1], [(5, {"bad_steps_max": 2.0})])
    assert "not finite" in message
    assert "config.backbone.learning_rate" in message


def kept(*shares):
    """Windows of the first phase of a hundred steps, by step and kept share."""
    return [(step, {"keep_rate": share, "handed_rate": 1.0}) for step, share in shares]


def test_a_share_that_still_moves_at_the_end_has_not_settled(caplog, plan):
    (message,) = raised(caplog, plan[0], kept((20, 0.9), (70, 0.72), (80, 0.65), (100, 0.60)))
    assert "interpreter 1 has not settled" in message
    assert "from 0.72 to 0.60" in message
    assert "config.interpreter.steps" in message


def test_what_moved_before_the_last_third_does_not_matter(caplog, plan):
    windows = kept((20, 1.0), (60, 0.4), (70, 0.55), (80, 0.58), (100, 0.56))
    assert raised(caplog, plan[0], windows) == []


def test_a_run_that_goes_on_knows_where_its_shares_were(caplog, plan):
    before = [*kept((70, 0.72)), (75, {"bad_steps_max": 3.0})]
    (message,) = raised(caplog, plan[0], kept((100, 0.60)), before)
    assert "from 0.72 to 0.60" in message


def test_windows_of_a_phase_are_read_back(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        for step, phase, share in ((20, "interpreter 1", 0.9), (40, "backbone 1", 0.8)):
            writer.write(step, phase, {"keep_rate": share})
        assert writer.windows("interpreter 1") == [(20, {"keep_rate": 0.9})]
    with MetricWriter(tmp_path, 30) as writer:  # begins again at step 30
        assert writer.windows("backbone 1") == []


def test_a_damaged_line_costs_no_other(tmp_path, caplog):
    """A disk that was full for a moment leaves two lines in one; the run goes on."""
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(20, "interpreter 1", {"keep_rate": 0.9})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "pha{"step": 60}\n{"step": 80, "phase": "interpreter 1"}\n7\n')
    with MetricWriter(tmp_path, 100) as writer:
        assert "metrics.jsonl: 2 damaged lines are left out" in caplog.text
        assert writer.windows("interpreter 1") == [(20, {"keep_rate": 0.9}), (80, {})]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
