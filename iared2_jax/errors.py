"""The errors a user can cause, and the exit codes they end a command with.

Each carries one sentence that names the key, file or value and the fix; `main.py` prints it without
a traceback. Everything else is a defect of ours, and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The command, the config or an argument is wrong; nothing was computed or changed."""

    exit_code = 2


class DataError(UsageError):
    """What was read is damaged; the file has to be mended, not the command."""

    exit_code = 65


class NonFiniteError(RuntimeError):
    """Training diverged: too many steps in a row had a loss or gradient that is not finite."""

    exit_code = 70


class CheckpointError(RuntimeError):
    """No usable checkpoint could be written or read."""

    exit_code = 74


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint " (did you mean 'x'?)", or what there is to choose from."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f"; there is {', '.join(known)}" if known else ""
