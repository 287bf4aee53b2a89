"""The budget dial: every target is met, or the sentence says what can be."""

import importlib
import itertools

import jax
import numpy as np
import pytest
from test_ragged import model, some_images

import iared2_jax
from iared2_jax.errors import UsageError
from iared2_jax.fast_inference import budget_curve, calibrate, planner
from iared2_jax.fast_inference.calibrate import BudgetPoint, _for_speed
from iared2_jax.timing import Timing
from iared2_jax.token_reduction.model import KEEP_ALL

# The module; the package's attribute of that name is the function.
calibration = importlib.import_module("iared2_jax.fast_inference.calibrate")


@pytest.fixture(scope="module")
def setting():
    module, variables = model(2)
    images = some_images(24)
    labels = np.asarray(jax.random.randint(jax.random.key(1), (24,), 0, 5))
    return module, variables, images, labels


def flops_at(module, variables, images, thresholds):
    _, out = module.apply(variables, images, thresholds)
    counts = tuple(np.asarray(keep).sum(-1) for keep in out.keep)
    return float(np.mean(iared2_jax.count_flops(module, counts).full))


def test_the_curve_goes_from_everything_to_little(setting):
    module, variables, images, labels = setting
    curve = budget_curve(module, variables, images, labels, points=9, batch_size=10)
    assert curve[0].thresholds == (KEEP_ALL, KEEP_ALL)
    assert curve[0].kept == (1.0, 1.0)
    logits, _ = module.apply(variables, images, execution="dense")
    assert curve[0].accuracy == pytest.approx(float((logits.argmax(-1) == labels).mean()))
    for point in curve:
        assert point.flops == pytest.approx(flops_at(module, variables, images, point.thresholds))
    assert curve[-1].flops < 0.6 * curve[0].flops
    assert all(a.flops >= b.flops for a, b in itertools.pairwise(curve))


def test_without_labels_agreement_counts(setting):
    module, variables, images, _ = setting
    curve = budget_curve(module, variables, images, points=5)
    assert curve[0].accuracy == 1.0
    full, _ = module.apply(variables, images, execution="dense")
    logits, _ = module.apply(variables, images, curve[-1].thresholds)
    agreement = float((logits.argmax(-1) == full.argmax(-1)).mean())
    assert curve[-1].accuracy == pytest.approx(agreement)


def test_target_flops_is_met_closely(setting):
    module, variables, images, labels = setting
    dense = iared2_jax.count_flops(module).full
    for share in (0.9, 0.7, 0.5):
        thresholds = calibrate(module, variables, images, labels, target_flops=share * dense)
        flops = flops_at(module, variables, images, thresholds)
        assert 0.9 * share * dense < flops <= share * dense
    assert calibrate(module, variables, images, target_flops=2 * dense) == (KEEP_ALL, KEEP_ALL)
    with pytest.raises(UsageError, match=r"target_flops=10 cannot be reached: .* still"):
        calibrate(module, variables, images, target_flops=10)


def test_max_accuracy_drop_takes_the_cheapest(setting):
    module, variables, images, labels = setting
    curve = budget_curve(module, variables, images, labels)
    thresholds = calibrate(module, variables, images, labels, max_accuracy_drop=0.1)
    chosen = next(point for point in curve if point.thresholds == thresholds)
    assert chosen.accuracy >= curve[0].accuracy - 0.1
    cheaper = curve[curve.index(chosen) + 1 :]
    assert all(point.accuracy < curve[0].accuracy - 0.1 for point in cheaper)
    assert calibrate(module, variables, images, max_accuracy_drop=1.0) == curve[-1].thresholds
    with pytest.raises(UsageError, match="must not be negative"):
        calibrate(module, variables, images, labels, max_accuracy_drop=-1.0)


def test_target_speed_takes_the_dearest_that_is_fast_enough():
    curve = [BudgetPoint((float(t),), 100.0 - t, (1.0,), 1.0) for t in range(10)]
    speeds = {point.thresholds: 50.0 + 10 * index for index, point in enumerate(curve)}
    assert _for_speed(curve, 75, speeds.__getitem__) is curve[3]
    assert _for_speed(curve, 10, speeds.__getitem__) is curve[0]
    with pytest.raises(UsageError, match=r"cannot be reached: .* it is 140"):
        _for_speed(curve, 141, speeds.__getitem__)


def test_a_setting_is_as_fast_as_its_fastest_execution(setting, monkeypatch):
    """Masked where all is kept, ragged where little is, whatever was planned first."""
    module, variables, images, _ = setting
    seen = []

    def timed(calls, rounds):
        logits = {name: np.asarray(call()) for name, call in calls.items()}
        np.testing.assert_allclose(logits["whole"], logits["ragged"], rtol=1e-4, atol=1e-4)
        seconds = {"whole": 2.0, "ragged": 4.0 if not seen else 1.0}
        seen.append(logits["whole"])
        return {name: Timing(s, s, s, s) for name, s in seconds.items()}

    monkeypatch.setattr(calibration, "interleaved", timed)
    monkeypatch.setattr(
        planner, "plan_groups", lambda request: planner.uniform_plan(request, "padded", 4)
    )
    speed_of = calibration.speed_meter(module, variables, images, 4)
    assert speed_of((KEEP_ALL, KEEP_ALL)) == 4 / 2
    assert speed_of((0.5, 0.5)) == 4 / 1
    assert not np.allclose(*seen)  # each at its own thresholds


@pytest.mark.slow
def test_target_speed_end_to_end(setting):
    module, variables, images, labels = setting
    thresholds = calibrate(
        module, variables, images, labels, target_images_per_second=1.0, batch_size=4
    )
    assert thresholds == (KEEP_ALL, KEEP_ALL)  # anything is that fast


@pytest.mark.parametrize(
    "targets",
    [{}, {"target_flops": 1e6, "max_accuracy_drop": 0.1}, {"target_flops": 1e6, "labels": [1]}],
)
def test_bad_questions(setting, targets):
    module, variables, images, _ = setting
    labels = np.asarray(targets.pop("labels")) if "labels" in targets else None
    with pytest.raises(UsageError, match=r"exactly one of|one class each|at least one"):
        calibrate(module, variables, images, labels, **targets)
