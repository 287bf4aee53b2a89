"""The benchmarks run, and time what they say; no figure is asserted."""

import json

import numpy as np
import pytest

from benchmarks import budget, common, gpu_suite, kernels, policy_gradient, speed
from benchmarks.workload import KEPT, drawn_counts, synthetic
from iared2_jax import create_model, save_weights
from iared2_jax.fast_inference import BudgetPoint, planner
from iared2_jax.fast_inference.forward import ForwardSpec
from iared2_jax.fast_inference.plan_request import PlanRequest
from iared2_jax.token_reduction.estimators import ESTIMATORS


@pytest.mark.parametrize("spread", [0.08, 0.15])
def test_drawn_counts_have_the_stated_means(spread):
    counts = drawn_counts(4000, 196, spread)
    shares = counts / 196
    np.testing.assert_allclose(shares.mean(0), KEPT, atol=0.01)
    np.testing.assert_allclose(shares[:, 1].std(), spread, atol=0.01)
    assert (np.diff(counts, axis=1) <= 0).all()
    assert counts.min() >= 1


def test_thresholds_keep_the_drawn_counts():
    work = synthetic("vit_micro", 20, "uneven")
    drawn = drawn_counts(20, 64, 0.15)
    assert np.abs(work.counts - drawn).max() <= 2
    _, out = work.module.apply(work.variables, work.images, work.thresholds)
    for group, keep in enumerate(out.keep):
        np.testing.assert_array_equal(np.asarray(keep).sum(-1), work.counts[:, group])
    assert 1.2 < work.possible < 1.6
    again = work.rows(15, 25)  # starts over
    np.testing.assert_array_equal(again.counts, np.concatenate([work.counts[15:], work.counts[:5]]))


@pytest.mark.slow
@pytest.mark.timeout(1500)  # it compiles some eighty programs
def test_the_gpu_suite_answers_everywhere(tmp_path):
    """Without a GPU cuDNN's questions fail, each by itself; all others have an answer."""
    out = tmp_path / "suite.json"
    gpu_suite.main(
        ["--models", "vit_micro", "--batch", "2", "--rounds", "1", "--out", str(out),
         "--minutes", "15", "--video", "timesformer_micro", "--shares", "0.35"]
    )  # fmt: skip
    answers = json.loads(out.read_text())["questions"]
    failed = {name for name, answer in answers.items() if "failed" in answer}
    assert failed == {name for name in answers if name.startswith("cudnn")}
    rows = answers["speed vit_micro 2"]["variants"]
    ours = {"dense", "masked", "fixed budget", "ragged, planned"}
    assert ours | {"EViT in JAX", "ToMe in JAX"} <= set(rows)
    for name, row in rows.items():
        assert row["p50_ms"] > 0
        if row["kind"] == "ragged":
            assert row["error"] < 1e-4, name
    assert "x" in answers["speed vit_micro 2"]["verdict"]
    plain, remat = (answers[f"memory timesformer_micro 8, remat {on}"] for on in (False, True))
    assert remat["kept_bytes"] < plain["kept_bytes"] / 4
    assert plain["program_bytes"] > plain["kept_bytes"] > 0
    assert {"lrp", "lime", "forward pass"} <= set(answers["maps vit_micro"])
    few = {"dense", "masked", "ragged, packed", "fixed budget"}
    rivals = {"ragged, planned", "EViT in JAX", "ToMe in JAX"}
    assert set(answers["peers"]["variants"]) == few | rivals
    assert set(answers["quick timesformer_micro 8"]["variants"]) == few
    assert all(row["in_a_row_ms"] > 0 for row in answers["peers"]["variants"].values())
    for precision, errors in answers["agreement"].items():
        assert max(errors.values()) < (0.05 if precision == "bfloat16" else 1e-5)
    assert {"interpreter 1, masked", "backbone 3, gathered"} <= set(answers["train cost"]["steps"])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("batch", [1, 2, 8, 256])
def test_the_layouts_that_are_timed_are_the_planners_own(platform, batch, monkeypatch):
    """A layout that the planner would not try has no plan, and the whole table no answer."""
    monkeypatch.setattr(PlanRequest, "platform", platform)
    module, variables = create_model("vit_3_blocks", groups=3)
    images = np.zeros((2, *module.input_spec.shape), np.float32)
    ask = PlanRequest(
        forward=ForwardSpec(module),
        variables=variables,
        batch_size=batch,
        thresholds=np.full((3,), 0.5),
        images=images,
    )
    candidates = planner._layouts(ask)
    for kind, rows in speed.layouts(batch, platform).values():
        assert (kind, rows) in candidates


def test_kernels_are_counted_once_and_gaps_are_what_lies_between():
    def kernel(name, start, time, pid=1, tid=7):
        return {"ph": "X", "name": name, "ts": start, "dur": time, "pid": pid, "tid": tid}

    def lane(pid, tid, name):
        return {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}

    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        lane(1, 7, "Stream #7(Compute)"),
        lane(1, 8, "Stream #8(Memset)"),
        lane(1, 9, "XLA Ops"),
        lane(2, 7, "Stream"),
        kernel("product", 5000, 1000),
        kernel("norm", 1000, 500),
        kernel("product", 2000, 1000),
        kernel("memset", 2500, 1000, tid=8),  # half of it beside the product
        kernel("product", 1000, 9000, tid=9),
        kernel("python", 0, 9000, pid=2),
        {"ph": "C", "name": "counter", "pid": 1},
    ]
    found = kernels.summary(events, calls=2)
    assert found["kernels"] == 2
    np.testing.assert_allclose(found["busy_ms"], (0.5 + 1.5 + 1) / 2)
    np.testing.assert_allclose(found["gaps_ms"], (5 - 3) / 2)
    assert found["by_name"] == [["product", 1.0, 1.0], ["memset", 0.5, 0.5], ["norm", 0.25, 0.5]]
    assert kernels.summary([], calls=1)["by_name"] == []


def test_break_even_is_where_dropping_begins_to_pay():
    def result(batch, gain):
        return {"batch": batch, "variants": {"ragged, planned": {"over_dense": gain}}}

    assert speed.break_even([result(1, 0.9), result(8, 1.2), result(32, 1.3)]).endswith("8 on")
    assert "no batch" in speed.break_even([result(1, 1.1), result(8, 0.9)])


def test_the_budget_is_drawn(tmp_path):
    points = [
        BudgetPoint((t,) * 3, 1e9 * (1 - t / 2), (1.0, 0.5, 0.4), 0.9 - t / 10, 100 + t)
        for t in (0.1, 0.5, 0.9)
    ]
    budget.draw(points, 1e9, tmp_path / "budget.png")
    assert (tmp_path / "budget.png").stat().st_size > 5000


def test_a_checkpoint_is_timed_on_its_own_images(tmp_path):
    from benchmarks.workload import from_checkpoint

    module, variables = create_model("vit_micro", init_bias=0.05)
    config = {
        "name": "x", "model.name": "vit_micro", "data.name": "cluttered_mnist", "data.seed": 0,
        "data.eval_split": "test", "reduction.threshold": 0.5,
    }  # fmt: skip
    options = {"name": "vit_micro", "groups": 3, "init_bias": 0.05}
    path = tmp_path / "weights.safetensors"
    save_weights(variables, path, {"create_model": options, "config": config})
    work = from_checkpoint(path, 12)
    _, out = work.module.apply(work.variables, work.images, 0.5)
    np.testing.assert_array_equal(np.asarray(out.keep[2]).sum(-1), work.counts[:, 2])
    assert work.module.init_bias == module.init_bias


def test_the_environment_names_device_and_versions():
    found = common.environment()
    assert found["device"]
    assert found["versions"]["jax"]


def test_no_estimator_is_biased_on_the_toy():
    rows = policy_gradient.toy(20_000)
    assert len(rows) == 2 * len(ESTIMATORS)
    for name, row in rows.items():
        assert row["bias"] < 5, name  # its squared error, over what chance alone gives
        assert 1 < row["noise"] < 1000, name


@pytest.mark.slow
@pytest.mark.timeout(900)  # it compiles some twenty programs
def test_the_noise_of_every_estimator_is_written_down(tmp_path):
    out = tmp_path / "noise.json"
    policy_gradient.main(
        ["--batch", "2", "--draws", "4", "--toy_draws", "100", "--out", str(out)]
    )  # fmt: skip
    places = json.loads(out.read_text())["places"]
    assert {"right: rloo", "probability: antithetic, exact saving"} <= set(
        places["demo, as the first interpreter starts"]
    )


@pytest.mark.slow
def test_what_comes_of_a_recipe_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setitem(
        policy_gradient.RECIPES, "the demo's", {"steps": 1, "batch_size": 8, "lengths": (1.0,)}
    )
    out = tmp_path / "outcome.json"
    policy_gradient.main(
        ["--outcome", "--recipes", "the demo's", "--seeds", "0", "--images", "100",
         "--out", str(out)]
    )  # fmt: skip
    (row,) = json.loads(out.read_text())["outcome"].values()
    assert 0 < row["kept"][0] <= 1
    assert 0 <= row["undecided"][0] <= 1
    assert -100 <= row["lost"][0] <= 100
