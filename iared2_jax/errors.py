"""The errors a user can cause, and the exit codes they end a command with.

Each carries one sentence that names the key, file or value and the fix; `main.py` prints it without
a traceback. Everything else is a defect of ours, and keeps its traceback.
"""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UsageError(ValueError):
    """The command, the config or an argument is wrong; nothing was computed or changed."""

    exit_code = 2


class InUseError(UsageError):
    """Another process is at work in a run's folder."""


class DataError(UsageError):
    """What was read is damaged; the file has to be mended, not the command."""

    exit_code = 65


class NonFiniteError(RuntimeError):
    """Training diverged: too many steps in a row had a loss or gradient that is not finite."""

    exit_code = 70


class CheckpointError(RuntimeError):
    """A file could not be written, or there is no usable checkpoint to read."""

    exit_code = 74


class Interrupted(RuntimeError):
    """A signal stopped the command, its state saved: the same command goes on from there."""

    exit_code = 75


# What a command of ours ends with; schedulers and launch/ go by it.
EXIT_CODES: dict[int, str] = {
    0: "done",
    UsageError.exit_code: "the command, the config or an argument is wrong; nothing was changed",
    DataError.exit_code: "a file of the data is damaged: mend it",
    NonFiniteError.exit_code: "training diverged; the last good checkpoint is kept",
    CheckpointError.exit_code: "something could not be written, or no checkpoint be read",
    Interrupted.exit_code: "stopped by a signal, the state saved: the same command goes on",
    130: "interrupted a second time; since the last checkpoint nothing was saved",
    143: "ended by SIGTERM a second time, likewise",
    1: "a defect of this program, with a traceback",
}


def import_extra(module: str, extra: str, called: str, needed_by: object) -> ModuleType:
    """A package that only an extra of ours installs.

    Args:
      called: what people call it. needed_by: the file or source that cannot do without.

    Raises:
      UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        command = f"pip install 'iared2_jax[{extra}]'"
        raise UsageError(f"{needed_by} needs {called}: {command}") from error


def few(items: Iterable[object], most: int = 3, none: str = "nothing") -> str:
    """The first items in words, and how many more there are: "a, b, c and 4 more"."""
    words = [str(item) for item in items]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more if words else none


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint " (did you mean 'x'?)", or what there is to choose from."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f"; there is {', '.join(known)}" if known else ""
