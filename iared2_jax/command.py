"""What the project's commands share: a mistake of the user's ends in one line and an exit code."""

import argparse
import sys
from collections.abc import Callable

from iared2_jax.errors import EXIT_CODES, CheckpointError, Interrupted, NonFiniteError, UsageError


class Parser(argparse.ArgumentParser):
    """argparse's, whose mistakes are like all others."""

    def error(self, message: str) -> None:
        raise UsageError(message)


def exit_code(command: Callable[[], object]) -> int:
    """Runs it; the errors of `errors.py` are printed without a traceback, others keep theirs."""
    try:
        command()
    except (UsageError, NonFiniteError, CheckpointError, Interrupted) as error:
        print("iared2_jax:", " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def exit_codes() -> str:
    """The table of exit codes, a line each."""
    return "\n".join(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items())
