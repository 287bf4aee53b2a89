"""A run's directory and its modes: what is adopted, carried along, kept, and refused in time."""

import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from conftest import ONE_DEVICE, ROOT, StopAfter, load_config
from flax import traverse_util

from iared2_jax import config as config_lib
from iared2_jax import create_model, files, main, save_weights
from iared2_jax.config.migration import adopt_old_names
from iared2_jax.data import small
from iared2_jax.errors import CheckpointError, UsageError
from iared2_jax.experiment.build import build_module, build_phases, dataset_of
from iared2_jax.experiment.run import train, train_and_evaluate
from iared2_jax.experiment.run_directory import (
    adopt_config,
    dense_backbone,
    locked,
    starting_point,
)
from iared2_jax.weights.load import load_model, load_weights
from iared2_jax.weights.save import timm_tensors

# What the demo's config said then.
OLD_RECIPE = {
    "interpreter.estimator": "self_critical",
    "interpreter.answer": "right",
    "interpreter.exact_saving": "false",
    "interpreter.rollouts": "2",
    "interpreter.tau": "(40.0, 3.0, 100.0)",
    "interpreter.learning_rate": "1.5e-3",
    "backbone.learning_rate": "1.5e-4",
}


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


DEMO = "configs/cluttered_mnist.py:runlocal"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


# -- Workdirs of the version before ----------------------------------------------------------------


@pytest.fixture
def old_workdir(tmp_path):
    """A run of version 0.1.0, killed behind its fifth step of twelve."""
    zipfile.ZipFile(ROOT / "tests/fixtures/workdir_0.1.0.zip").extractall(tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.slow
def test_a_run_of_version_0_1_goes_on_to_the_same_parameters(old_workdir, caplog):
    config = config_lib.load(DEMO, {"weights": "", "data.eval_size": "16", **OLD_RECIPE})
    caplog.set_level("INFO", "iared2_jax")
    state = train(config, old_workdir)
    assert "resuming at step 5 of 12" in caplog.text
    assert int(state.step) == 12
    expected = json.loads((ROOT / "tests/fixtures/workdir_0.1.0_end.json").read_text())
    found = timm_tensors({"params": jax.device_get(state.params)})
    assert found.keys() == expected.keys()
    # On the machine that wrote the fixture they are bitwise the same.
    for name, value in found.items():
        x = np.asarray(value, np.float64).ravel()
        numbers = [x.mean(), x.std(), x @ np.cos(np.arange(x.size))]
        np.testing.assert_allclose(numbers, expected[name], rtol=2e-3, atol=2e-5, err_msg=name)
    lines = (old_workdir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 13))


def test_a_real_difference_to_an_old_run_is_refused(old_workdir):
    given = {key: value for key, value in OLD_RECIPE.items() if key != "interpreter.tau"}
    given |= {"weights": "", "data.eval_size": "16", "tau": "1.0,"}
    config = config_lib.load(DEMO, given)
    with pytest.raises(UsageError, match=r"interpreter\.tau \(\[40\.0, 3\.0, 100\.0\] there"):
        train(config, old_workdir)


def test_options_that_a_run_did_not_know_are_their_defaults(tmp_path, tiny_config):
    dataset = dataset_of(tiny_config)
    adopt_config(tiny_config, dataset, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["explain.upright"], stored["model.channels"]  # as if they were new
    (tmp_path / "config.json").write_text(json.dumps(stored))
    adopt_config(tiny_config, dataset, tmp_path)
    stored["model.channels"] = 1
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=r"model\.channels \(1 there, 0 here\)"):
        adopt_config(tiny_config, dataset, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**stored, "config version": 99}))
    with pytest.raises(UsageError, match="later version"):
        adopt_config(tiny_config, dataset, tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"config version": "x"}', "{", "[[1]]"])
def test_a_config_that_is_none_is_damaged(tmp_path, tiny_config, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json is damaged: delete it|another run's"):
        adopt_config(tiny_config, dataset_of(tiny_config), tmp_path)


def test_old_names_of_options_work_with_a_hint(tmp_path, caplog):
    config = config_lib.load(DEMO, {"tau": "2.0,3.0,4.0", "label_smoothing": "0.2"})
    assert config.interpreter.tau == (2.0, 3.0, 4.0)
    assert config.backbone.label_smoothing == config.supervised.label_smoothing == 0.2
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from iared2_jax.config import default_config\n"
        "def get_config(arg=None):\n"
        "    config = default_config()\n"
        "    config.threshold, config.train_head = 0.25, True\n"
        "    return config\n"
    )
    config = config_lib.load(str(mine))
    assert (config.reduction.threshold, config.backbone.train_head) == (0.25, True)
    assert "threshold" not in config
    config = config_lib.default_config()
    config.rollouts = 3
    adopt_old_names(config)
    assert config.interpreter.rollouts == 3


# -- What a run starts from ------------------------------------------------------------------------


@pytest.fixture
def weights_run(tmp_path):
    """A config whose weights are a file, and that file."""
    source = tmp_path / "mine.safetensors"
    save_weights(create_model("vit_3_blocks", seed=3)[1], source, interpreters=False)
    config = load_config("cluttered_mnist", "runlocal")
    config.model.name, config.weights, config.data.eval_size = "vit_3_blocks", str(source), 8
    config.eval.figures = config.eval.speed_batch = 0
    config.curriculum, config.model.group_sizes = "interpreters", ()
    return config, source


@pytest.mark.slow
def test_a_run_goes_on_and_is_evaluated_without_its_weights_file(weights_run, tmp_path):
    config, source = weights_run
    train(config, tmp_path / "run", StopAfter(2))
    source.rename(tmp_path / "away.safetensors")
    train_and_evaluate(config, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["dense"]["top1"] >= 0
    # A config.json that was deleted, as its damage would ask for, is written again.
    (tmp_path / "run" / "config.json").unlink()
    train(config, tmp_path / "run")
    # What it was compared with is what it started from.
    original = starting_point(config, build_module(config), tmp_path / "run")
    expected = create_model("vit_3_blocks", seed=3)[1]["params"]["backbone"]
    jax.tree.map(np.testing.assert_array_equal, original["params"]["backbone"], expected)


@pytest.mark.slow
def test_a_head_and_then_interpreters_in_one_run(weights_run, tmp_path):
    """The dense row is the backbone with its trained head; a run that was stopped knows it, too."""
    config, source = weights_run
    config.curriculum = "supervised+interpreters"
    config.supervised.train_trunk, config.supervised.cached_examples = False, 16
    config.supervised.batch_size, config.supervised.learning_rate = 8, 0.1
    config.supervised.epochs, config.supervised.steps = 0.0, 4
    train(config, tmp_path / "run", StopAfter(5))
    train_and_evaluate(config, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "group_1" in results["segmentation"]
    module = build_module(config)
    plan = build_phases(config, module)
    dense = flat(dense_backbone(config, module, plan, tmp_path / "run")["params"]["backbone"])
    start = flat(load_weights(module, source)["params"]["backbone"])
    trained = flat(load_model(tmp_path / "run" / "weights.safetensors")[1]["params"]["backbone"])
    for path, values in dense.items():
        np.testing.assert_array_equal(values, trained[path])
        assert np.array_equal(values, start[path]) != path.startswith("head"), path


def test_weights_that_changed_meanwhile_are_not_taken(weights_run, tmp_path):
    config, source = weights_run
    train(config, tmp_path / "run", StopAfter(0))
    save_weights(create_model("vit_3_blocks", seed=4)[1], source, interpreters=False)
    with pytest.raises(UsageError, match="has changed since the run"):
        train(config, tmp_path / "run")


def test_missing_validation_images_are_noticed_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for damage, words in (
        (lambda val: shutil.rmtree(val), "val is not there"),
        (lambda val: [shutil.rmtree(c) for c in val.iterdir()], "neither class folders nor images"),
        (lambda val: next(val.iterdir()).rename(val / "zebra"), "a class 'zebra'"),
    ):
        images = tmp_path / "images"
        shutil.rmtree(images, ignore_errors=True)
        shutil.copytree(small.small_folder(), images)
        damage(images / "val")
        config = load_config("folder", "model=deit_ti,runlocal")
        config.data.path = str(images)
        config.interpreter.batch_size = config.backbone.batch_size = 8
        with pytest.raises(UsageError, match=words):
            train_and_evaluate(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


# -- Evaluation ------------------------------------------------------------------------------------


def evaluation(workdir, *more):
    return main.run([
        f"--config={DEMO}", f"--workdir={workdir}", "--config.mode=eval",
        "--config.data.eval_size=8", "--config.eval.speed_batch=0", *more,
    ])  # fmt: skip


@pytest.mark.slow
def test_an_evaluation_that_fails_leaves_the_one_before(tmp_path, capsys):
    folder = tmp_path / "eval"
    assert evaluation(tmp_path) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert (folder / "figures" / "heatmaps.png") in before
    for wrong in ("--config.weights=nowhere", "--config.seed=-1", "--config.data.eval_split=x"):
        assert evaluation(tmp_path, wrong) == 2
    with locked(folder):
        assert evaluation(tmp_path) == 2
        assert "another run is at work" in capsys.readouterr().err
        assert (folder / "lock").exists()
    assert {path: path.read_bytes() for path in before} == before
    assert evaluation(tmp_path, "--config.seed=1", "--config.eval.figures=0") == 0
    assert json.loads((folder / "config.json").read_text())["seed"] == 1
    assert not list((folder / "figures").iterdir())  # none of the evaluation before


# -- The disk, names, folders ----------------------------------------------------------------------


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_text("old")

    def refuse(tensors, draft, metadata):
        draft.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("iared2_jax.weights.save.save_file", refuse)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors could not be written \(No"):
        save_weights(create_model("vit_micro")[1], path)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]
    assert path.read_text() == "old"


def test_a_full_disk_ends_a_run_in_one_line(tmp_path):
    """No file may grow beyond 1 MB: checkpoints cannot be written."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from iared2_jax import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "sys.exit(main.run(sys.argv[1:]))\n"
    )
    arguments = [f"--config={DEMO}", "--config.weights=", "--config.checkpoint_every=1"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments, f"--workdir={tmp_path}/run"],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": ONE_DEVICE},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 74, ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("iared2_jax: ")]
    assert "could not be written (" in line
    assert "make room" in line


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3:/bucket/run"])
def test_a_workdir_that_is_an_address_is_refused(address, capsys, tmp_path, monkeypatch):
    assert main.run([f"--config={ROOT}/{DEMO}", f"--workdir={address}"]) == 2
    assert "mount it" in capsys.readouterr().err
    assert not list(ROOT.glob("gs:*"))


def test_class_folders_whose_names_are_no_unicode(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(small.small_folder(), tmp_path / "images")
    for split in ("train", "val"):
        folder = os.fsencode(tmp_path / "images" / split)
        os.rename(folder + b"/7", folder + b"/caf\xe9")
    config = load_config("folder", "model=deit_ti,runlocal")
    config.data.path = str(tmp_path / "images")
    dataset = dataset_of(config)
    assert "caf\\xe9" in dataset.class_names
    (tmp_path / "run").mkdir()
    for _ in range(2):
        adopt_config(config, dataset, tmp_path / "run")
    print(dataset.fingerprint, dataset.class_names)


def test_without_a_home_there_is_no_cache(monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    assert files.cache_folder() is None
    assert "nothing is cached: set XDG_CACHE_HOME" in caplog.text
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        small.small_folder()
