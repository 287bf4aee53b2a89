"""A run that is stopped, killed, damaged or diverging: nothing is lost, nothing bad is kept."""

import dataclasses
import fcntl
import json
import logging
import os
import shutil
import signal
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import StopAfter
from jax.experimental.compilation_cache import compilation_cache
from tensorboardX.proto.event_pb2 import Event

from iared2_jax import main
from iared2_jax.data import datasets
from iared2_jax.errors import CheckpointError, NonFiniteError
from iared2_jax.experiment.build import build_model, build_phases
from iared2_jax.experiment.run import train
from iared2_jax.models import input_spec, variants
from iared2_jax.models.backbones.vit import ViT
from iared2_jax.signals import Stop
from iared2_jax.training import loop
from iared2_jax.training.checkpoints import RunCheckpoints
from iared2_jax.training.monitoring import MetricWriter, Profile, Window
from iared2_jax.training.phases import PHASES, SupervisedPhase
from iared2_jax.training.step import TrainState, data_mesh, initial_state, make_train_step

NANO = ViT(
    input_spec.images(64, 16, norm=input_spec.HALF_NORM),
    embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, num_classes=10,
)  # fmt: skip
# Both kinds of phase twice, 2 steps each.
ARGUMENTS = [
    "--config=configs/cluttered_mnist.py:runlocal", "--config.weights=",
    "--config.model.name=vit_nano", "--config.model.groups=2", "--config.model.group_sizes=()",
    "--config.model.interpreter_heads=0", "--config.interpreter.tau=(2.0,)",
    "--config.model.init_bias=0",
    "--config.checkpoint_every=1", "--config.keep_checkpoints=3",
]  # fmt: skip
STEPS = 8
POISON = 99  # a label that makes the supervised loss NaN


class PoisonablePhase(SupervisedPhase):
    def loss(self, context, params, batch, key):
        value, metrics = super().loss(context, params, batch, key)
        return jnp.where((batch["label"] == POISON).any(), jnp.nan, value), metrics


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder that all workers of a parallel pytest see."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="module", autouse=True)
def _nano(shared):
    """A model that compiles soon, and compiled programs shared by all the runs of this file."""
    options = {
        "jax_compilation_cache_dir": str(shared / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    variant = variants.Variant(NANO, interpreter_heads=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(variants.VARIANTS, "vit_nano", variant)
        patch.setitem(PHASES, "supervised", PoisonablePhase())
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def nano_config(**changes):
    config, _ = main.parse(ARGUMENTS)
    config.update_from_flattened_dict(changes)
    return config


def supervised_config(**changes):
    """One dense phase of 16 steps with a batch of 16, on plain SGD, and a moving average."""
    options = {"steps": 16, "epochs": 0.0, "batch_size": 16, "optimizer": "sgd"}
    options |= {"learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.0, **changes}
    return nano_config(
        curriculum="supervised",
        ema_decay=0.9,
        **{f"supervised.{key}": value for key, value in options.items()},
    )


@pytest.fixture(scope="module")
def finished(shared, tmp_path_factory):
    """The run that was never stopped: its workdir and its final state."""
    own = tmp_path_factory.mktemp("own") / "finished"
    with (shared / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker trains, the next only reads
        state = jax.device_get(train(nano_config(), shared / "finished"))
        shutil.copytree(shared / "finished", own)
    return own, state


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be damaged: it holds the steps 8, 7 and 6."""
    return shutil.copytree(finished[0], tmp_path / "copied")


def assert_same(ours, theirs):
    """Bitwise, in every leaf of the state."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# -- Stop and resume -------------------------------------------------------------------------------


def test_a_run_stopped_after_every_step_ends_bitwise_the_same(finished, tmp_path):
    # So it stops in the middle of each interpreter and backbone phase, and at every border.
    for step in range(1, STEPS + 1):
        state = train(nano_config(), tmp_path, StopAfter(1))
        assert int(state.step) == step
    assert_same(state, finished[1])
    assert rows(tmp_path) == rows(finished[0])
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))
    assert_same(train(nano_config(), tmp_path), finished[1])  # there is nothing left to do


@pytest.mark.slow
def test_a_gathered_run_goes_on_with_the_same_shapes(tmp_path):
    config = nano_config(**{"reduction.train_execution": "gathered"}, **{"model.init_bias": 0.05})
    whole = train(config, tmp_path / "whole")
    stops = [train(config, tmp_path / "stopped", StopAfter(3)) for _ in range(4)]
    state = stops[-1]
    assert 0 < int(stops[0].step) < int(stops[1].step) < STEPS
    assert_same(state, whole)
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    known = json.loads((tmp_path / "stopped" / "capacities.json").read_text())
    assert list(known) == ["interpreter 1", "backbone 1", "interpreter 2", "backbone 2"]
    assert [len(slots) for slots in known.values()] == [0, 1, 1, 2]


def test_a_killed_run_goes_on_from_its_last_checkpoint(finished, copied):
    # Killed after step 8, before its checkpoint, in the middle of a line, and while saving.
    shutil.rmtree(copied / "checkpoints" / "8")
    (copied / "checkpoints" / "8.seal.json").unlink()
    (copied / "checkpoints" / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "pha')
    assert_same(train(nano_config(), copied), finished[1])
    assert rows(copied) == rows(finished[0])
    assert not (copied / "checkpoints" / "8.orbax-checkpoint-tmp").exists()


def test_a_run_asked_to_stop_at_once_takes_no_step(tmp_path):
    stop = Stop()
    stop.request()
    assert int(train(nano_config(), tmp_path, stop).step) == 0


def test_a_signal_ends_the_caching_of_features(tmp_path, monkeypatch):
    """Features of a published model's head take minutes; the same call then begins anew."""
    config = supervised_config(train_trunk=False, cached_examples=64, steps=2)
    stop, seen, batches = Stop(), [], loop._batches

    def stopped_at_the_second(*arguments):
        for number, batch in enumerate(batches(*arguments)):
            seen.append(number)
            if number == 1 and not stop.requested:
                stop.request()
            yield batch

    monkeypatch.setattr(loop, "_batches", stopped_at_the_second)
    assert int(train(config, tmp_path, stop).step) == 0
    assert seen == [0, 1]
    assert int(train(config, tmp_path, Stop()).step) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_once_and_then_means_what_it_did(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


# -- Damaged checkpoints ---------------------------------------------------------------------------


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bytes(checkpoint):
    file = largest_file(checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def truncate(checkpoint):
    file = largest_file(checkpoint)
    file.write_bytes(file.read_bytes()[:-1])


def delete_file(checkpoint):
    largest_file(checkpoint).unlink()


def delete_folder(checkpoint):
    shutil.rmtree(checkpoint)


def empty_seal(checkpoint):
    checkpoint.with_name(f"{checkpoint.name}.seal.json").write_text("")


def test_a_damaged_run_goes_on_from_the_checkpoint_before(finished, copied, caplog):
    flip_bytes(copied / "checkpoints" / "8")
    assert_same(train(nano_config(), copied), finished[1])
    said = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("checkpoint 8 is damaged (state/")
    assert said[0].endswith("is not as it was written): trying the one before")
    assert rows(copied) == rows(finished[0])


def test_a_run_with_nothing_but_damage_is_refused(copied, capsys):
    for step in (6, 7, 8):
        truncate(copied / "checkpoints" / str(step))
    assert main.run([*ARGUMENTS, f"--workdir={copied}"]) == 74
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"iared2_jax: no checkpoint in {copied}/checkpoints is whole: delete")


def small_state(step, value=1.0):
    return TrainState(
        step=jnp.int32(step),
        params={"w": jnp.full((64,), value)},
        opt_state=(),
        ema={},
        bad_steps=jnp.int32(0),
    )


def abstract(state):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)


@pytest.fixture
def checkpoints(tmp_path):
    """Steps 2 and 4, saved and sealed."""
    store = RunCheckpoints(tmp_path, keep=2)
    for step in (1, 2, 4):
        store.save(step, small_state(step), {"step": step})
    assert store.steps() == [4, 2]
    return store


@pytest.mark.parametrize("damage", [flip_bytes, truncate, delete_file, delete_folder, empty_seal])
def test_every_damage_is_found(checkpoints, tmp_path, caplog, damage):
    damage(tmp_path / "checkpoints" / "4")
    state, step = checkpoints.restore_newest(lambda step: abstract(small_state(step)))
    assert (step, int(state.step)) == (2, 2)
    assert len(caplog.records) == 1
    # And it is gone once the run has been there again.
    checkpoints.save(3, small_state(3), {})
    assert checkpoints.steps() == [3, 2]


def test_strays_are_named_and_left_alone(checkpoints, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    (folder / "999").mkdir()
    (folder / "notes.seal.json").write_text("{}")
    _, step = checkpoints.restore_newest(lambda step: abstract(small_state(step)))
    assert step == 4
    assert [r.getMessage() for r in caplog.records] == [
        f"ignoring {folder}/999: it is not a finished checkpoint of this run"
    ]
    assert (folder / "999").is_dir()


def test_what_is_not_finite_is_not_saved(checkpoints):
    with pytest.raises(CheckpointError, match="step 5 has parameters that are not finite"):
        checkpoints.save(5, small_state(5, np.nan), {})
    assert checkpoints.steps() == [4, 2]


def test_a_disk_that_refuses_is_said(checkpoints, monkeypatch):
    def refuse(*_, **__):
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "params.w": No space left on device')

    monkeypatch.setattr(checkpoints._checkpointer, "save", refuse)
    with pytest.raises(CheckpointError, match=r"5 could not be written \(No space left on device"):
        checkpoints.save(5, small_state(5), {})
    assert checkpoints.restore_newest(lambda step: abstract(small_state(step)))[1] == 4


# -- Steps that are not finite ---------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """Poisons the training examples that a predicate names by their index."""
    opener = datasets.OPENERS["cluttered_mnist"]

    def apply(bad):
        def poisoned(wanted):
            source = opener(wanted)

            def example(seed, index):
                item = source.train_example(seed, index)
                return {**item, "label": np.int32(POISON)} if bad(index) else item

            return dataclasses.replace(source, train_example=example)

        monkeypatch.setitem(datasets.OPENERS, "cluttered_mnist", poisoned)

    return apply


def test_single_bad_steps_are_left_out(poison, tmp_path, caplog):
    poison(lambda index: index // 16 in (1, 2))  # steps 2 and 3
    state = train(supervised_config(), tmp_path, StopAfter(4))
    assert (int(state.step), int(state.bad_steps)) == (4, 0)
    history = rows(tmp_path)
    assert [row["bad_steps_max"] for row in history] == [0, 1, 2, 0]
    assert ["loss" in row for row in history] == [True, False, False, True]
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1
    assert "lower config.supervised.learning_rate" in said[0]


def test_ten_bad_steps_in_a_row_end_the_run(poison, tmp_path):
    poison(lambda index: index // 16 >= 3)  # from the fourth step on
    good = train(supervised_config(), tmp_path / "good", StopAfter(3))
    with pytest.raises(NonFiniteError, match="10 steps in a row up to step 13") as end:
        train(supervised_config(), tmp_path / "bad")
    assert end.value.exit_code == 70
    # What was saved meanwhile are the parameters of the third step.
    newest, step = RunCheckpoints(tmp_path / "bad").restore_newest(lambda _: abstract(good))
    assert step == 12
    assert_same(newest.params, good.params)
    expected = good.replace(step=jnp.int32(12), bad_steps=jnp.int32(9))
    assert_same(newest.replace(opt_state=()), expected.replace(opt_state=()))
    # The learning rate goes by the phase's steps, whether they were applied or not.
    assert schedule_counts(newest) == [12]


def _is_schedule(node):
    return isinstance(node, optax.ScaleByScheduleState)


def schedule_counts(state):
    nodes = jax.tree.leaves(state.opt_state, is_leaf=_is_schedule)
    return [int(node.count) for node in nodes if _is_schedule(node)]


def without_schedule(state):
    kept = jax.tree.map(
        lambda node: () if _is_schedule(node) else node, state.opt_state, is_leaf=_is_schedule
    )
    return state.replace(opt_state=kept)


def one_phase(config):
    """The phase of a supervised config, its jitted step, a fresh state and a batch."""
    module, variables = build_model(config)
    phase = build_phases(config, module)[0]
    mesh = data_mesh()
    state = initial_state(variables["params"], phase, module, config.ema_decay)
    images = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), np.uint8)
    batch = {"input": images, "label": np.arange(16, dtype=np.int32) % 10}
    return make_train_step(module, phase, config, mesh), state, batch


def test_a_bad_step_changes_only_the_counters():
    step, state, batch = one_phase(supervised_config())
    state, _ = step(state, batch)
    before = jax.device_get(state)
    bad, metrics = step(state, {**batch, "label": batch["label"] * 0 + POISON})
    assert float(metrics["bad_steps"]) == 1
    assert schedule_counts(before) == [1]
    assert schedule_counts(bad) == [2]
    expected = before.replace(step=np.int32(2), bad_steps=np.int32(1))
    assert_same(without_schedule(bad), without_schedule(expected))
    after, _ = step(bad, batch)
    assert (int(after.step), int(after.bad_steps)) == (3, 0)
    assert np.abs(flat(after.params) - flat(before.params)).max() > 0


# -- Options of a step -----------------------------------------------------------------------------


def flat(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(params))])


def change(config):
    """By how much one step moves all parameters."""
    step, state, batch = one_phase(config)
    before = flat(state.params)
    return flat(step(state, batch)[0].params) - before


def test_micro_batches_make_the_same_update():
    whole, parts = (change(supervised_config(accumulate=n)) for n in (1, 2))
    assert np.abs(whole).max() > 1e-3
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_the_gradient_is_clipped_to_its_norm():
    moved = change(supervised_config(clip_norm=0.01))
    # Plain SGD moves by learning rate times gradient.
    np.testing.assert_allclose(np.linalg.norm(moved), 0.1 * 0.01, rtol=1e-3)


def test_the_moving_average_follows_the_parameters():
    step, state, batch = one_phase(supervised_config())
    before = flat(state.params)
    state, _ = step(state, batch)
    expected = 0.9 * before + 0.1 * flat(state.params)
    np.testing.assert_allclose(flat(state.eval_params), expected, atol=1e-7)


# -- Logs ------------------------------------------------------------------------------------------


def events(folder):
    """The TensorBoard events below a folder: records of length, checksum, event, checksum."""
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_a_log_that_goes_on_has_every_window_once(tmp_path):
    for first, last in ((0, 4), (2, 5)):  # logged up to 4, resumed at 2
        with MetricWriter(tmp_path, first) as writer:
            for step in range(first + 1, last + 1):
                writer.write(step, "backbone 1", {"loss": first + step / 10})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        (1, 0.1), (2, 0.2), (3, 2.3), (4, 2.4), (5, 2.5)
    ]  # fmt: skip
    seen = list(events(tmp_path / "tensorboard"))
    # TensorBoard forgets all from a start mark on, so the mark is the first step that is repeated.
    assert [e.step for e in seen if e.HasField("session_log")] == [1, 3]
    tags = {(value.tag, e.step) for e in seen for value in e.summary.value}
    assert tags == {("backbone_1/loss", step) for step in range(1, 6)}


def test_a_run_writes_tensorboard_files(finished):
    tags = {value.tag for e in events(finished[0] / "tensorboard") for value in e.summary.value}
    assert {"interpreter_1/reward_sampled", "backbone_2/loss"} <= tags


def test_a_window_leaves_bad_steps_out_of_its_means():
    window = Window()
    for loss, bad in ((1.0, 0.0), (np.nan, 1.0), (3.0, 0.0)):
        window.add({"loss": jnp.float32(loss), "bad_steps": jnp.float32(bad)})
    assert window.means() == {"loss": 2.0, "bad_steps_max": 1.0}


@pytest.mark.parametrize(
    ("last", "calls"), [(8, []), (12, ["start", "stop"]), (30, ["start", "stop"])]
)
def test_a_profile_that_began_is_ended(monkeypatch, tmp_path, last, calls):
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: made.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    with Profile(tmp_path, on=True, first_step=0) as profile:
        for step in range(last):
            profile.before(step)
    assert made == calls
