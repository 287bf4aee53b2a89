"""A table's runs: which there are, which are missing, and how one is made."""

import dataclasses
import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from iared2_jax.config.loading import flatten, load
from iared2_jax.errors import UsageError, few
from iared2_jax.experiment.run_directory import (
    differing_options,
    finished_results,
    results_differ,
)
from iared2_jax.files import write_json

# Where files lie is no part of what a run measures, and is not published.
PATHS = ("weights", "distillation.teacher", "data.path", "data.maps", "data.cutouts.backgrounds")
# What decides how soon a run is done; the numbers are the same up to rounding.
_PACE = ("data.threads", "reduction.train_execution")
WEIGHTS = "weights.safetensors"
_SECONDS = "seconds.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a table, in a folder of its own.

    Attributes:
      name: of its folder, e.g. "interpreters-2".
      config: as the flag --config of `iared2_jax.main` has it.
      options: what is set in it, by key, as text.
      own: what goes before the user's options: what makes this run the one that its row names, and
        where other data lies.
      start: the run whose weights it starts from; "": those that the user gives, or its config.
      distils: whether those are its teacher instead.
      ignored: prefixes of options that may differ in a finished run: they do not change what it
        measures.
      minutes: about what it takes on two CPU cores, for the plan; None: nobody knows.
    """

    name: str
    config: str
    options: Mapping[str, str]
    own: Mapping[str, str] = dataclasses.field(default_factory=dict)
    start: str = ""
    distils: bool = False
    ignored: tuple[str, ...] = ()
    minutes: float | None = None

    def built(self, root: Path, given: Mapping[str, str]) -> ml_collections.ConfigDict:
        """The run's config. given: the user's options, which go before the table's but `own`."""
        options = {**self.options, **given, **self.own}
        if self.start:
            options["weights"] = str(root / self.start / WEIGHTS)
        if self.distils and "weights" in options:
            options["distillation.teacher"] = options.pop("weights")
        return load(self.config, options)


def results_of(
    run: Run, root: Path, given: Mapping[str, str], without_baselines: bool = False
) -> dict[str, Any] | None:
    """A finished run's results; None if it is missing, unfinished, or of other options.

    Args:
      without_baselines: what was stopped among its baselines counts as finished, too.
    """
    config = run.built(root, given)
    folder = root / run.name / ("eval" if config.mode == "eval" else "")
    found = finished_results(config, folder, _ignored(run, config))
    return None if found and not without_baselines and lacks_baselines(found) else found


def lacks_baselines(results: Mapping[str, Any]) -> bool:
    """Whether a run was stopped among its baselines, which come last, and bring "methods"."""
    return bool(results["config"].get("compare.selectors")) and "methods" not in results


def differing_results(
    run: Run, root: Path, given: Mapping[str, str], stored: Mapping[str, Any]
) -> list[str]:
    """The options in which a `stored` config of results is not the run's, with both values."""
    config = run.built(root, given)
    return results_differ(config, stored, _ignored(run, config))


def _ignored(run: Run, config: ml_collections.ConfigDict) -> list[str]:
    """The options that change nothing of what a run measures."""
    free = (*PATHS, *_PACE)
    return [key for key in flatten(config) if key in free or key.startswith(run.ignored)]


def missing_runs(
    runs: Sequence[Run], found: Collection[str], with_weights: Collection[str]
) -> list[Run]:
    """The runs to be made, in their order: those not found, and what these start from.

    Args:
      found: names of runs whose results are there.
      with_weights: those whose weights are there as well.
    """
    missing: list[Run] = []
    starts: set[str] = set()
    for run in reversed(runs):  # each comes after the one that it starts from
        if run.name not in (with_weights if run.name in starts else found):
            missing.insert(0, run)
            starts.add(run.start)
    return missing


def check_folder(run: Run, root: Path, given: Mapping[str, str]) -> None:
    """Refuses a run's folder that holds another recipe's.

    Raises:
      UsageError: one sentence that names the options.
    """
    config, folder = run.built(root, given), root / run.name
    # What an evaluation has written is simply written again.
    if config.mode == "train" and (differ := differing_options(config, folder)):
        raise UsageError(
            f"{folder} was made with other options: {few(differ)}; move it away, or give another "
            "--root"
        )


def make(run: Run, root: Path, given: Mapping[str, str]) -> None:
    """Trains and evaluates a run; if it was stopped, from where it was.

    Raises:
      UsageError: as `iared2_jax.main` would say it.
      Interrupted: a signal stopped it: the same call goes on.
    """
    from iared2_jax.experiment.run import run as run_config  # slow to import

    folder, started = root / run.name, time.monotonic()
    try:
        run_config(run.built(root, given), folder)
    finally:
        if folder.exists():
            write_json(folder / _SECONDS, seconds_of(folder) + time.monotonic() - started)


def seconds_of(folder: Path) -> float:
    """What a run has taken so far, all calls together; 0 if it was not made by a table."""
    path = folder / _SECONDS
    return float(json.loads(path.read_text())) if path.exists() else 0.0
