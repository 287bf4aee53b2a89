"""The launcher: signals reach the run, its exit codes come through, crashes are started again."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import ROOT

from iared2_jax.command import exit_codes
from iared2_jax.errors import EXIT_CODES, CheckpointError, DataError, Interrupted


@pytest.fixture
def launch(tmp_path):
    """Starts the launcher with a stand-in for Python, whose starts are counted in a file."""

    def start(script: str, name: str = "one_host.sh", *arguments: str) -> subprocess.Popen:
        python = tmp_path / "python"
        python.write_text(f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/starts\n{script}\n')
        python.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python), "XDG_CACHE_HOME": str(tmp_path)}
        with (tmp_path / "said").open("w") as said:
            command = [ROOT / "launch" / name, *arguments, "--config=x"]
            return subprocess.Popen(command, env=environment, stderr=said)

    start.starts = lambda: (tmp_path / "starts").read_text().splitlines()
    return start


@pytest.mark.parametrize("code", sorted(EXIT_CODES.keys() - {1}))
def test_an_end_that_would_repeat_itself_ends_it(launch, code):
    assert launch(f"exit {code}").wait(20) == code
    assert launch.starts() == ["-m iared2_jax.main --config=x"]


@pytest.mark.parametrize("code", [1, 137, 139])
def test_a_crash_is_started_again(launch, tmp_path, code):
    assert launch(f"exit {code}").wait(20) == code
    assert len(launch.starts()) == 4
    assert (tmp_path / "said").read_text().count(f"ended with exit code {code}") == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_run_which_saves_its_state(launch, tmp_path, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("these tests run as a background job, whose children cannot hear Ctrl-C")
    # A run that takes a while to save what it has.
    process = launch(
        f"trap 'sleep 0.3; echo saved > {tmp_path}/saved; exit 75' TERM\n"
        f"touch {tmp_path}/up\nwhile :; do sleep 0.05; done"
    )
    for _ in range(200):
        if (tmp_path / "up").exists():
            break
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert (tmp_path / "saved").exists()
    assert len(launch.starts()) == 1


def test_a_run_killed_while_it_was_asked_to_end_is_not_started_again(launch, tmp_path):
    process = launch(f"trap 'exit 1' TERM\ntouch {tmp_path}/up\nwhile :; do sleep 0.05; done")
    for _ in range(200):
        if (tmp_path / "up").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1
    assert len(launch.starts()) == 1


def test_simulated_devices_take_the_same_python(launch):
    assert launch("exit 0", "simulated_devices.sh", "8").wait(20) == 0
    assert launch.starts() == ["-m iared2_jax.main --config=x"]


def test_one_table_of_exit_codes():
    page = (ROOT / "launch" / "README.md").read_text()
    for code in EXIT_CODES:
        assert re.search(rf"^\| .*\b{code}\b", page, re.M), code
        assert f"{code:3}  " in exit_codes()
    assert (DataError.exit_code, CheckpointError.exit_code, Interrupted.exit_code) == (65, 74, 75)
    assert EXIT_CODES[75] in page
