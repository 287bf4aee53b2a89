"""A run's directory: one run at a time in it, the config it began with, what it started from."""

import contextlib
import fcntl
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from iared2_jax.config.defaults import RESUMABLE
from iared2_jax.config.loading import as_stored, flatten, weights_of
from iared2_jax.config.migration import CONFIG_VERSION, stored_options
from iared2_jax.data.datasets import Dataset
from iared2_jax.errors import InUseError, UsageError, few
from iared2_jax.experiment.build import load_initial
from iared2_jax.files import write_json
from iared2_jax.token_reduction.create import init_variables
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.training.curriculum import dense_phase
from iared2_jax.training.phases import PHASES, Phase, stages
from iared2_jax.weights.files import locate
from iared2_jax.weights.load import load_weights
from iared2_jax.weights.save import save_weights

_CONFIG, _INITIAL = "config.json", "initial.safetensors"
DENSE = "dense.safetensors"  # the backbone when the phases that drop tokens began
_VERSION, _DATA, _WEIGHTS = "config version", "data found", "weights found"


@contextlib.contextmanager
def locked(folder: Path, name: str = "lock") -> Iterator[None]:
    """The folder as one run's own while the block lasts; made if it is not there.

    Args:
      name: of the file in it that says so.

    Raises:
      InUseError: another run is at work in it.
      UsageError: it is no folder of this machine's file system, or it cannot be written.
    """
    if re.match(r"\w+:/", str(folder)):
        raise UsageError(
            f"workdir {folder} is an address, and a run locks its folder: mount it, and give the "
            "path of the mount"
        )
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((folder / name).open("w"))
            # The kernel lets go of it however the process ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUseError(
                f"another run is at work in {folder}: wait for it, or give another --workdir"
            ) from error
        except OSError as error:
            raise UsageError(
                f"workdir {folder} cannot be written ({error.strerror}): give another --workdir"
            ) from error
        yield


def has_begun(folder: Path) -> bool:
    """Whether a folder is a run's already."""
    return (folder / _CONFIG).exists()


def adopt_config(config: ml_collections.ConfigDict, dataset: Dataset, folder: Path) -> None:
    """Writes config.json into a run's folder; refuses one that holds another run's.

    Options that the run's version did not have are taken to be their defaults, and options that
    have moved are known by both names. The data may lie elsewhere, but not have changed.

    Raises:
      UsageError: the folder is another run's, or its config.json is damaged.
    """
    theirs, found = _read_config(folder)
    mine_found = {_DATA: dataset.fingerprint if _VERSION in found else dataset.summary}
    differ = _differing(config, theirs, RESUMABLE) + [
        f"{key} ({found[key]!r} there, {value!r} here)"
        for key, value in mine_found.items()
        if found.get(key, value) != value
    ]
    if differ:
        raise UsageError(
            f"workdir {folder} holds another run's config: {few(differ)}; give another --workdir"
        )
    write_config(config, dataset, folder, found.get(_WEIGHTS))


def differing_options(config: ml_collections.ConfigDict, folder: Path) -> list[str]:
    """The options in which a run in a folder differs, with both values, so that it cannot go on.

    None, if there is no run.
    """
    return _differing(config, _read_config(folder)[0], RESUMABLE)


def _differing(
    config: ml_collections.ConfigDict, theirs: Mapping[str, Any] | None, ignored: Collection[str]
) -> list[str]:
    """The options of `theirs` that are not those of a config, but for those that are ignored.

    What no phase of the curriculum reads changes nothing either.
    """
    if theirs is None:
        return []
    mine = as_stored(config)
    read = {PHASES[name].section for name, _ in stages(config.curriculum, 1)}
    unused = {kind.section for kind in PHASES.values()} - read
    return [
        f"{key} ({theirs.get(key)!r} there, {mine.get(key)!r} here)"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
        and key not in ignored
        and key.partition(".")[0] not in unused
    ]


def write_config(
    config: ml_collections.ConfigDict, dataset: Dataset, folder: Path, weights: str | None = None
) -> None:
    """Writes config.json: every option, and what data and weights were found."""
    flat = json.loads(json.dumps(flatten(config)))
    found = {_VERSION: CONFIG_VERSION, _DATA: dataset.fingerprint, _WEIGHTS: weights}
    write_json(folder / _CONFIG, {**dict(sorted(flat.items())), **found})


def _read_config(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The options of a run's config.json, of any version, by today's names; and what else it says.

    None and nothing, if there is no run.
    """
    path = folder / _CONFIG
    if not path.exists():
        return None, {}
    try:
        stored = dict(json.loads(path.read_text()))
        found = {key: stored.pop(key) for key in (_VERSION, _DATA, _WEIGHTS) if key in stored}
        later = found.get(_VERSION, 0) > CONFIG_VERSION
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is damaged: delete it, or give another --workdir") from error
    if later:
        raise UsageError(f"{path} was written by a later version of iared2_jax: update this one")
    return stored_options(stored), found


def starting_point(
    config: ml_collections.ConfigDict, module: IARed2, folder: Path
) -> dict[str, Any]:
    """The variables that a run starts from, and is compared with at its end; nothing is written.

    Those of a weights file are taken from the run's own copy, once it has one (`keep_start`), so
    that it can go on without the file.

    Raises:
      UsageError: the weights cannot be used, or the file is not the one that the run began with.
    """
    source, copy = weights_of(config), folder / _INITIAL
    if not source:
        return init_variables(module, config.seed)
    if not copy.exists():
        return load_initial(config, module, source)
    known = _read_config(folder)[1].get(_WEIGHTS)
    now = _digest(source)
    if None not in (known, now) and known != now:
        raise UsageError(
            f"config.weights={source!r} has changed since the run in {folder} began with it: "
            "bring the old file back, or give another --workdir"
        )
    return load_weights(module, copy)


def keep_start(
    config: ml_collections.ConfigDict, module: IARed2, variables: dict[str, Any], folder: Path
) -> None:
    """Copies what a run starts from into its folder, if it comes from a weights file."""
    source, copy = weights_of(config), folder / _INITIAL
    if not source or copy.exists():
        return
    save_weights(variables, copy, spec=module.input_spec)
    stored = json.loads((folder / _CONFIG).read_text())
    write_json(folder / _CONFIG, {**stored, _WEIGHTS: _digest(source)})


def keep_dense(module: IARed2, params: dict[str, Any], folder: Path) -> None:
    """Copies the backbone that a curriculum has trained, before tokens are dropped from it."""
    save_weights({"params": params}, folder / DENSE, interpreters=False, spec=module.input_spec)


def finished_results(
    config: ml_collections.ConfigDict, folder: Path, ignored: Collection[str] = ()
) -> dict[str, Any] | None:
    """The results in a folder, if they are of this config; None: there are none such.

    Args:
      ignored: options that may differ.
    """
    path = folder / "results.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    return None if results_differ(config, results["config"], ignored) else results


def results_differ(
    config: ml_collections.ConfigDict, stored: Mapping[str, Any], ignored: Collection[str] = ()
) -> list[str]:
    """The options in which a `stored` config of results is not this one, with both values.

    What no phase of the curriculum reads may differ, and the options that are `ignored`.
    """
    return _differing(config, stored_options(stored), ignored)


def dense_backbone(
    config: ml_collections.ConfigDict, module: IARed2, plan: list[Phase], folder: Path
) -> dict[str, Any]:
    """The variables of the dense model that a finished run is compared with.

    Those that it started from; or, if its curriculum trained the backbone first, what came of that.
    """
    if dense_phase(plan) is None:
        return starting_point(config, module, folder)
    return load_weights(module, folder / DENSE, seed=config.seed)


def _digest(source: str) -> str | None:
    """The sha256 of a weights file; None if there is none to be read any more."""
    try:
        path = locate(source)
    except UsageError:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
