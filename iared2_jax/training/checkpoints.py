"""A run's own state on disk: Orbax checkpoints that are checked before they are believed.

Orbax commits atomically, but it restores flipped bytes as wrong weights without an error, and takes
a stray folder for the newest step. So every committed step is sealed with the sha256 of its files,
and restoring walks the steps downwards to the newest one whose seal holds. This module is the only
one that knows Orbax.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from iared2_jax.errors import CheckpointError
from iared2_jax.files import write_json

log = logging.getLogger(__name__)

_LATE_CALLBACKS = 0.5  # seconds that failed writes may take to say so, each by itself


class RunCheckpoints:
    """The checkpoints of one workdir: `<workdir>/checkpoints/<step>` and `<step>.seal.json`."""

    def __init__(self, workdir: Path, keep: int = 3):
        self._folder = Path(workdir).resolve() / "checkpoints"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._current: int | None = None  # the step on disk that this process wrote or restored

    def steps(self) -> list[int]:
        """Sealed steps, newest first."""
        names = [seal.name.split(".")[0] for seal in self._folder.glob("*.seal.json")]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Writes, commits and seals one step, then deletes all but the newest `keep`.

        Raises:
          CheckpointError: if a parameter is not finite (the older steps stay), or the disk refuses.
        """
        if step == self._current:  # a signal right after a regular save: nothing new to write
            return
        # On the host, so that Orbax does not slice every copy, and compile each slicing.
        state = jax.device_get(state)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.ema))):
            raise CheckpointError(f"step {step} has parameters that are not finite: not saved")
        target = self._folder / str(step)
        try:
            self._remove(step)
            with _quiet():
                self._checkpointer.save(
                    target,
                    ocp.args.Composite(
                        state=ocp.args.StandardSave(_fields(state)), meta=ocp.args.JsonSave(meta)
                    ),
                )
            # The seal appears by a rename, so a step is either sealed whole or not at all.
            write_json(self._seal(step), _digests(target))
        except (OSError, ValueError) as error:  # a full disk is a ValueError to tensorstore
            raise CheckpointError(
                f"checkpoint {target} could not be written ({str(error).rpartition(': ')[2]}): "
                "make room and give the same command again; the older ones are whole"
            ) from error
        self._current = step
        self._delete_old(step)

    def restore_newest(self, target_for: Callable[[int], Any]) -> tuple[Any, int] | None:
        """The newest step that is whole, as (state, step); None if nothing was saved yet.

        Args:
          target_for: step -> the abstract state (shapes, dtypes, shardings) to restore into.

        Raises:
          CheckpointError: if there are checkpoints, but none is whole.
        """
        self._clear_away()
        steps = self.steps()
        for step in steps:
            fault = self._fault(step)
            if fault is None:
                target = target_for(step)
                restored = self._checkpointer.restore(
                    self._folder / str(step),
                    ocp.args.Composite(state=ocp.args.StandardRestore(_fields(target))),
                )
                self._current = step
                return target.replace(**restored["state"]), step
            log.warning("checkpoint %s is damaged (%s): trying the one before", step, fault)
        if steps:
            raise CheckpointError(
                f"no checkpoint in {self._folder} is whole: delete the folder to start over"
            )
        return None

    def _delete_old(self, newest: int) -> None:
        """Deletes all but the `keep` steps up to `newest`; later ones were damaged."""
        kept = [step for step in self.steps() if step <= newest][: self._keep]
        for step in set(self.steps()) - set(kept):
            self._remove(step)

    def _seal(self, step: int) -> Path:
        return self._folder / f"{step}.seal.json"

    def _remove(self, step: int) -> None:
        self._seal(step).unlink(missing_ok=True)  # first, so that no seal outlives its files
        for folder in (str(step), f"{step}.orbax-checkpoint-tmp"):
            shutil.rmtree(self._folder / folder, ignore_errors=True)

    def _clear_away(self) -> None:
        """Removes what a killed save left; names whatever else is there, and leaves it alone.

        Only the run that holds the workdir's lock comes here, so nobody else is writing.
        """
        sealed = {str(step) for step in self.steps()}
        for folder in sorted(p for p in self._folder.iterdir() if p.is_dir()):
            step = folder.name.partition(".orbax-checkpoint-tmp")[0]
            if folder.name in sealed:
                continue
            if step.isdigit() and (step != folder.name or (folder / "state").exists()):
                log.warning("%s was left by a save that did not finish: removed", folder)
                shutil.rmtree(folder, ignore_errors=True)
            else:
                log.warning("ignoring %s: it is not a finished checkpoint of this run", folder)

    def _fault(self, step: int) -> str | None:
        """What is wrong with a sealed step; None if every file is as it was sealed."""
        try:
            expected = json.loads(self._seal(step).read_text())
        except (OSError, ValueError):
            return "its seal cannot be read"
        found = _digests(self._folder / str(step))
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                return f"{name} is missing"
            if found[name] != expected.get(name):
                return f"{name} is not as it was written"
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what libraries print about an error that is about to be raised anyway.

    Orbax and tensorstore save in threads of their own: each would print a traceback above the one
    line that says it all, by Python's hooks or through a logger.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "concurrent.futures")]
    disabled = [logger.disabled for logger in loggers]
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    except Exception:
        time.sleep(_LATE_CALLBACKS)
        raise
    finally:
        sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
        for logger, before in zip(loggers, disabled, strict=True):
            logger.disabled = before


def _fields(state: Any) -> dict[str, Any]:
    """A state's fields by name; without `extra` where there is none, as version 0.1 wrote it."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if not fields.get("extra", True):
        del fields["extra"]
    return fields


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by relative path."""
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digests[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
