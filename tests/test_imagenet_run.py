"""The paper's image experiment from the official tars to a file that timm loads, on a CPU."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ONE_DEVICE, ROOT
from test_imagenet import write_tars

from iared2_jax import load_model
from iared2_jax.data.imagenet import prepare
from iared2_jax.token_reduction.model import KEEP_ALL
from tests import oracles

try:
    from benchmarks import peers

    missing_torch = peers.missing()
except ImportError as error:
    missing_torch = str(error)


def train_and_resume(folder):
    """deit_s:runlocal on a small prepared ImageNet: stopped in its fourth phase, and resumed."""
    write_tars(folder)  # with the CMYK and the PNG special case
    prepare(folder, folder / "data")
    command = [
        sys.executable, "-m", "iared2_jax.main", "--config=configs/deit_s.py:runlocal",
        f"--workdir={folder}/run", f"--config.data.path={folder}/data", "--config.backbone.steps=3",
    ]  # fmt: skip
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE}
    options = dict(cwd=ROOT, env=environment, text=True, stderr=subprocess.STDOUT)
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as first:
        for line in first.stdout:
            said.append(line)
            if line.startswith("backbone 2: step 1/3"):
                first.send_signal(signal.SIGTERM)
    assert first.returncode == 75, "".join(said)
    assert not any(line.startswith("interpreter 3") for line in said), "".join(said)
    second = subprocess.run(command, stdout=subprocess.PIPE, check=False, **options)
    assert second.returncode == 0, second.stdout
    return folder / "run", "".join(said), second.stdout


@pytest.mark.parity
@pytest.mark.timeout(900)
def test_from_the_tars_through_six_phases_to_a_file_that_timm_loads(tmp_path):
    run, first, second = train_and_resume(tmp_path)
    assert "stopped by a signal, state saved" in first
    assert "resuming at step" in second
    assert not any(line.startswith("interpreter 1") for line in second.splitlines())
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 16))
    results = json.loads((run / "results.json").read_text())
    assert results["dense"]["flops"]["full"] == pytest.approx(4.6e9, rel=0.001)
    assert 0 <= results["iared2"]["top1"] <= 1
    assert (run / "figures" / "heatmaps.png").stat().st_size > 10_000
    assert "segmentation" not in results  # nobody has masks of these
    if missing_torch is None:
        loaded_by_timm(run / "weights.safetensors")


def loaded_by_timm(path):
    import torch
    from safetensors.torch import load_file

    module, variables = load_model(path)
    state = load_file(path)
    model = peers.timm().create_model("deit_small_patch16_224", pretrained=False).eval()
    report = model.load_state_dict(state, strict=False)
    assert not report.missing_keys
    assert all(key.startswith("interpreters.") for key in report.unexpected_keys)
    images = oracles.images_for(224)
    with torch.inference_mode():
        theirs = model(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    ours, _ = module.apply(variables, images, KEEP_ALL)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
