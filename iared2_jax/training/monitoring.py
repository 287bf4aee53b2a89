"""What a run says while it trains: progress, metrics on disk, and alarms."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from iared2_jax.errors import CheckpointError
from iared2_jax.files import refused, write_text

if TYPE_CHECKING:
    from iared2_jax.training.phases import Phase

log = logging.getLogger(__name__)

# The figures worth a place on the progress line, in order, with their short names.
_SHOWN = {
    "loss": "loss",
    "accuracy": "acc",
    "accuracy_sampled": "acc~",
    "keep_rate": "keep",
    "score_mean": "score",
    "score_spread": "±",
    "entropy": "H",
    "reward_spread": "R±",
    "advantage_mean": "A",
    "answers_differ": "differ",
    "gradient_norm": "|g|",
}


class Window:
    """Metrics of the steps since the last report; they stay on the device until asked for."""

    def __init__(self) -> None:
        self._steps: list[dict[str, jax.Array]] = []

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self._steps.append(metrics)

    def means(self) -> dict[str, float]:
        """The mean of every metric over the window, which is emptied.

        A non-finite step counts in `bad_steps_max`, and is left out of the other means.
        """
        steps = [
            {key: float(value) for key, value in metrics.items()}
            for metrics in jax.device_get(self._steps)
        ]
        self._steps = []
        good = [m for m in steps if np.isfinite(list(m.values())).all()]
        figures = {key: float(np.mean([m[key] for m in good])) for key in (good or [{}])[0]}
        figures.pop("bad_steps", None)
        return {**figures, "bad_steps_max": max(m["bad_steps"] for m in steps)}


class MetricWriter:
    """Every metric of a run, as `metrics.jsonl` and as TensorBoard events in the workdir."""

    def __init__(self, workdir: Path, first_step: int) -> None:
        self._path = workdir / "metrics.jsonl"
        self._forget_after(first_step)
        self._file = self._path.open("a")
        # TensorBoard forgets what was logged from purge_step on. The suffix keeps the file names of
        # two starts in one second apart.
        self._board = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=first_step + 1,
            filename_suffix=f".from_{first_step}",
        )

    def _forget_after(self, step: int) -> None:
        """Drops what a run that was killed had logged beyond its last checkpoint."""
        if self._path.exists():
            kept = [json.dumps(line) for line in self._lines() if line["step"] <= step]
            write_text(self._path, "".join(f"{line}\n" for line in kept))

    def _lines(self) -> list[dict[str, Any]]:
        """What has been written so far. Lines that are torn or damaged are left out, and told."""
        found, damaged = [], 0
        for text in self._path.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
                found.append({"step": int(line["step"]), "phase": str(line["phase"]), **line})
            except (ValueError, KeyError, TypeError):
                damaged += 1
        if damaged:
            log.warning("%s: %d damaged lines are left out", self._path, damaged)
        return found

    def windows(self, phase: str) -> list[tuple[int, dict[str, float]]]:
        """What has been written of a phase so far: each window's last step and figures."""
        made = []
        for line in self._lines():
            step, of = line.pop("step"), line.pop("phase")
            if of == phase:
                made.append((step, line))
        return made

    def write(self, step: int, phase: str, figures: dict[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step, "phase": phase, **figures}) + "\n")
            self._file.flush()
            for key, value in figures.items():
                self._board.add_scalar(f"{phase.replace(' ', '_')}/{key}", value, step)
        except OSError as error:
            raise CheckpointError(f"{self._path} {refused(error)}") from error

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()


class Progress:
    """A bar on a terminal, a line per window in a log: phase, step, time left, health."""

    def __init__(self, phase: "Phase", total_steps: int) -> None:
        self._phase, self._total = phase, total_steps
        self._bar: tqdm | None = None
        self._since: tuple[int, float] | None = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._phase.steps, desc=self._phase.name, unit="step", dynamic_ncols=True
            )
        return self

    def show(self, step: int, figures: dict[str, float]) -> None:
        """Reports the window that ended at `step`."""
        health = " ".join(
            f"{short} {figures[key]:.3g}" for key, short in _SHOWN.items() if key in figures
        )
        done = step - self._phase.first_step
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix_str(health)
            return
        log.info("%s: step %d/%d (run %d/%d)%s  %s", self._phase.name, done, self._phase.steps,
                 step, self._total, self._time_left(step), health)  # fmt: skip

    def _time_left(self, step: int) -> str:
        # The first window holds the compilation, so it does not count.
        if self._since is None:
            self._since = (step, time.monotonic())
            return ""
        first, start = self._since
        left = (time.monotonic() - start) / (step - first) * (self._phase.end - step)
        return f" {left:.0f} s left"

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class Profile:
    """If it is on: a trace of five steps, some way after the start, where little compiles."""

    def __init__(self, workdir: Path, on: bool, first_step: int) -> None:
        self._folder = workdir / "profile"
        self._steps = (first_step + 10, first_step + 15) if on else ()
        self._running = False

    def before(self, step: int) -> None:
        """Starts or ends the trace; to be called before every step."""
        if step in self._steps[:1]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step in self._steps[1:]:
            self._end()

    def _end(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info("profile written to %s", self._folder)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()


class HealthAlarms:
    """Says, once per phase, when a policy has collapsed: which group, and what to change.

    And, at the phase's end, whether it has settled.
    """

    def __init__(
        self, phase: "Phase", history: Sequence[tuple[int, dict[str, float]]] = ()
    ) -> None:
        """`history`: windows of the phase before the run was stopped (`MetricWriter.windows`)."""
        self._phase = phase
        self._raised: set[str] = set()
        self._history = [(step, figures) for step, figures in history if len(figures) > 1]

    def check(self, step: int, figures: dict[str, float]) -> None:
        """Looks at one window's figures."""
        section = self._phase.kind.section
        if figures["bad_steps_max"]:
            self._raise(
                "non-finite",
                f"a step up to {step} had a loss or gradient that is not finite, and was not "
                f"applied; if it goes on, lower config.{section}.learning_rate",
            )
        # Keeping everything is how a policy starts, so a collapse is one only later on. A window of
        # bad steps alone has no other figures.
        if len(figures) == 1:
            return
        phase = self._phase
        if step - phase.first_step > phase.steps / 2:
            for name, message in phase.kind.alarms(phase, figures):
                self._raise(name, f"at step {step}, {message}")
        self._history.append((step, figures))
        if step == phase.end:
            last = [(s, f) for s, f in self._history if phase.end - s <= phase.steps / 3]
            for name, message in phase.kind.unsettled(phase, last):
                self._raise(name, message)

    def _raise(self, name: str, message: str) -> None:
        if name not in self._raised:
            self._raised.add(name)
            log.warning("%s: %s", self._phase.name, message)
