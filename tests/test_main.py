"""The command line: every mistake is one line and exit code 2, a signal is a clean stop."""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ONE_DEVICE, ROOT

from iared2_jax import main
from iared2_jax.errors import CheckpointError, Interrupted, NonFiniteError
from iared2_jax.experiment import run as experiment
from iared2_jax.experiment.build import dataset_of
from iared2_jax.experiment.run_directory import adopt_config, locked

DEMO = "--config=configs/cluttered_mnist.py:runlocal"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def refusal(monkeypatch, capsys, tmp_path):
    """Runs a command line that must be refused before anything is computed; the line it says."""

    def train_nothing(*_):
        raise AssertionError("the training began")

    monkeypatch.setattr(experiment, "train_phases", train_nothing)

    def run(*arguments):
        workdir = [] if any("--workdir" in x for x in arguments) else [f"--workdir={tmp_path}/new"]
        assert main.run([*arguments, *workdir]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("iared2_jax: ")
        assert err.count("\n") == 1
        assert not (tmp_path / "new").exists()
        return err

    return run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Give --config=configs/<name>.py"),
        (["--config"], "--config: expected one argument"),
        (["--config=configs/deit.py"], "(did you mean 'configs/deit_s.py'?)"),
        (["--config=config/deit_s.py"], "(did you mean 'configs/deit_s.py'?)"),
        (["--config=configs/deit_s.py:runlokal"], "(did you mean 'runlocal'?)"),
        (["--config=configs/deit_s.py:runlocal=yes"], "runlocal='yes' is not true or false"),
        (["--config=configs/deit_s.py"], "config.data.name='imagenet' needs config.data.path"),
        (["--config=iared2_jax/errors.py"], "iared2_jax/errors.py is not a config"),
        ([DEMO, "--wrkdir=x"], "no flag '--wrkdir' (did you mean '--workdir'?)"),
        ([DEMO, "runs/x"], "no flag 'runs/x'; there is --config"),
        ([DEMO, "--config.interpreter.stepz=3"], "(did you mean 'interpreter.steps'?)"),
        ([DEMO, "--config.modl.name=x"], "(did you mean 'model.name'?)"),
        ([DEMO, "--config.model=x"], "config.model is a section: give one of model."),
        ([DEMO, "--config.seed=abc"], "config.seed='abc' is not a whole number"),
        ([DEMO, "--config.seed", "1.5"], "config.seed='1.5' is not a whole number"),
        ([DEMO, "--config.profile"], "--config.profile has no value"),
        ([DEMO, "--config.weights", "--config.seed=3"], "--config.weights has no value"),
        ([DEMO, "--config.weights", ""], "--config.weights= to empty it"),
        ([DEMO, "--config.eval.maps=rollot"], "config.eval.maps has 'rollot', which is unknown"),
        ([DEMO, "--config.eval.maps=('a"], "is not a list of names like rollout,lrp"),
        (
            [DEMO, "--config.interpreter.tau=x"],
            "config.interpreter.tau='x' is not a list of numbers",
        ),
        ([DEMO, "--config.model.group_sizes=2.5,3.5"], "config.model.group_sizes=[2.5, 3.5]"),
    ],
)
def test_a_command_that_means_nothing_is_refused(refusal, arguments, says):
    assert says in refusal(*arguments)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("interpreter.learning_rate=nan", "config.interpreter.learning_rate=nan is not a finite"),
        ("interpreter.learning_rate=-1", "config.interpreter.learning_rate=-1.0 must not be neg"),
        ("backbone.learning_rate=0", "config.backbone.learning_rate=0.0 would train nothing"),
        ("tau=1,-2,1", "config.interpreter.tau=[1, -2, 1] must not be negative"),
        ("tau=1,2", "give 1 or 3"),
        ("eval.pruning=8 curriculum=supervised", "config.eval.pruning=8 draws curves"),
        ("backbone.batch_size=12", "config.backbone.batch_size=12 must be a multiple of 8"),
        ("backbone.accumulate=2", "a multiple of 16 (8 devices x 2 micro-batches)"),
        ("interpreter.epochs=2", "exactly one of the two must be above 0"),
        ("interpreter.optimizer=adamm", "(did you mean 'adam'?)"),
        ("model.groups=5", "config.model.groups=5, but config.model.group_sizes=[4, 1, 1] lists 3"),
        (
            "model.group_sizes=() model.groups=5",
            "groups=5 does not divide the depth of 6 blocks: use one of [1, 2",
        ),
        ("model.group_sizes=(2,2,1)", "add up to the depth of 6 blocks"),
        ("model.name=vit_mirco", "config.model.name='vit_mirco' is unknown (did you mean 'vit_mi"),
        ("model.num_classes=1000", "set --config.model.num_classes=10"),
        ("model.interpreter_heads=5", "interpreter_heads=5 does not divide the width 96"),
        ("curriculum=iared", "(did you mean 'iared2'?)"),
        ("curriculum=supervised+iared", "config.curriculum='iared' is unknown"),
        ("curriculum=iared2+supervised", "what trains the dense backbone comes before"),
        ("curriculum=iared2+interpreters", "a phase comes once in a run"),
        ("data.eval_split=tset", "(did you mean 'test'?)"),
        ("log_every=0", "config.log_every=0 must be at least 1"),
        ("ema_decay=1", "config.ema_decay=1.0 must be below 1"),
        ("threshold=1", "config.reduction.threshold=1.0 must be between 0 and 1"),
        ("seed=4294967296", "config.seed=4294967296 must be below 2**32"),
        ("weights=nowhere.safetensors", "there is no weights file nowhere.safetensors"),
        ("weights=nowhere", "'nowhere' are neither a file (.safetensors, .npz"),
    ],
)
def test_a_config_that_cannot_run_is_refused(refusal, override, says):
    overrides = [f"--config.{item}" for item in override.split()]
    assert says in refusal(DEMO, "--config.weights=", *overrides)


def test_weights_that_are_damaged_or_do_not_fit_are_refused(refusal, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\xff" * 100)
    assert str(damaged) in refusal(DEMO, f"--config.weights={damaged}")


def test_a_workdir_that_is_a_file_is_refused(refusal, tmp_path):
    (tmp_path / "file").write_text("")
    line = refusal(DEMO, "--config.weights=", f"--workdir={tmp_path}/file")
    assert f"{tmp_path}/file cannot be written" in line
    assert "give another --workdir" in line


@contextlib.contextmanager
def at_work(config, workdir):
    """A run of the config in the workdir, as far as others see it."""
    with locked(workdir):
        adopt_config(config, dataset_of(config), workdir)
        yield


@pytest.fixture
def workdir(tmp_path, tiny_config):
    """A workdir of the demo, and nobody at work there."""
    with at_work(tiny_config, tmp_path / "run"):
        pass
    return tmp_path / "run"


def test_a_workdir_with_another_config_is_refused_by_its_first_keys(refusal, workdir, tiny_config):
    before = (workdir / "config.json").read_text()
    line = refusal(
        DEMO, "--config.model.name=vit_3_blocks", "--config.weights=",
        "--config.data.eval_size=16", "--config.model.group_sizes=()", "--config.seed=1",
        f"--workdir={workdir}",
    )  # fmt: skip
    assert "holds another run's config: seed (0 there, 1 here); give another --workdir" in line
    assert (workdir / "config.json").read_text() == before
    tiny_config.log_every = 7  # what does not change the result may change
    with at_work(tiny_config, workdir):
        assert json.loads((workdir / "config.json").read_text())["log_every"] == 7


def test_a_workdir_with_a_damaged_config_is_refused(refusal, workdir):
    (workdir / "config.json").write_text("{")
    assert f"{workdir}/config.json is damaged" in refusal(
        DEMO, "--config.weights=", f"--workdir={workdir}"
    )


def test_a_workdir_in_use_is_refused(refusal, workdir, tiny_config):
    with at_work(tiny_config, workdir):
        line = refusal(
            DEMO, "--config.weights=", "--config.data.eval_size=16", f"--workdir={workdir}"
        )
    assert f"another run is at work in {workdir}" in line
    with at_work(tiny_config, workdir):  # and free again afterwards
        pass


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (NonFiniteError("diverged"), 70, "iared2_jax: diverged\n"),
        (CheckpointError("none is\nwhole"), 74, "iared2_jax: none is whole\n"),
        (Interrupted("state saved"), 75, "iared2_jax: state saved\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_known_end_has_its_exit_code(monkeypatch, capsys, error, code, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(experiment, "train_and_evaluate", fail)
    assert main.run([DEMO]) == code
    assert capsys.readouterr().err == line


def test_help_says_how(capsys):
    with pytest.raises(SystemExit) as end:
        main.run(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--config", "--workdir", "--config.KEY=VALUE", "70", "75"))


def test_overrides_are_typed_and_the_workdir_has_a_default():
    config, workdir = main.parse(
        [DEMO, "--config.interpreter.tau=0.5,1,2", "--config.seed", "3", "--config.profile=True",
         "--config.weights=", "--config.interpreter.learning_rate=1e-4"]
    )  # fmt: skip
    assert workdir == "runs/cluttered_mnist"
    assert (config.interpreter.tau, config.seed, config.profile, config.weights) == (
        (0.5, 1, 2),
        3,
        True,
        "",
    )
    assert config.interpreter.learning_rate == 1e-4
    assert config.interpreter.steps == 2  # as the config has it


def test_only_our_own_progress_is_printed():
    main.run([])
    for name, level in (("iared2_jax.training.loop", logging.INFO), ("orbax", logging.WARNING)):
        assert logging.getLogger(name).isEnabledFor(level)
    assert not logging.getLogger("absl").isEnabledFor(logging.INFO)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_finishes(tmp_path):
    command = [
        sys.executable, "-m", "iared2_jax.main", "--config=configs/vit_micro.py:runlocal",
        f"--workdir={tmp_path}/run", "--config.supervised.steps=60", "--config.log_every=1",
        "--config.supervised.optimizer=adam",  # compiles sooner
        "--config.eval.figures=0", "--config.eval.page_images=0", "--config.eval.maps=()",
        "--config.eval.speed_batch=0", "--config.eval.agreement=False",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "XLA_FLAGS": ONE_DEVICE,
        "JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        first = []
        for line in process.stderr:
            first.append(line)
            if line.startswith("supervised: step 3/60"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 75
    assert "the same command goes on" in first[-1]
    assert all(line.startswith("supervised: step") for line in first[:-1])
    stopped_at = len(first) - 1
    assert 3 <= stopped_at < 60
    assert not (tmp_path / "run" / "results.json").exists()

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0
    assert f"resuming at step {stopped_at} of 60" in again.stderr
    assert not re.search(r"^[IWE]\d{4} ", again.stderr, re.MULTILINE)  # absl's lines
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 61))
    assert (tmp_path / "run" / "results.json").is_file()
