"""Trains and evaluates what a config says; the same command goes on with a run that was stopped.

    python -m iared2_jax.main --config=configs/cluttered_mnist.py --workdir=runs/demo

With --config.mode=eval it only evaluates config.weights; with --config.mode=explain it writes
heatmaps next to the pictures in config.data.path.
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence

import ml_collections

from iared2_jax import config as config_lib
from iared2_jax.command import Parser, exit_code, exit_codes
from iared2_jax.errors import UsageError, nearest


def _parser() -> Parser:
    parser = Parser(
        prog="python -m iared2_jax.main",
        description=__doc__ + "\nExit codes:\n" + exit_codes(),
        epilog="Any option of the config: --config.KEY=VALUE, e.g. --config.interpreter.steps=50; "
        "all of them, with their defaults, are in iared2_jax/config/defaults.py and, those of a "
        "training phase, in iared2_jax/training/phases/.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="the experiment, e.g. configs/deit_s.py:runlocal")
    parser.add_argument("--workdir", help="where the run lives (default: runs/<its name>)")
    return parser


FLAGS = ("--config", "--workdir", "--help")


def overrides(arguments: Iterable[str], flags: Sequence[str] = FLAGS) -> Iterator[tuple[str, str]]:
    """Pairs (key, text) from --config.KEY=TEXT or --config.KEY TEXT.

    Args:
      flags: of the command; one of them may have been meant by what is no option.

    Raises:
      UsageError: a flag that there is not, or an option without a value.
    """
    rest = iter(arguments)
    for argument in rest:
        flag, equals, text = argument.partition("=")
        if not flag.startswith("--config."):
            raise UsageError(f"there is no flag {flag!r}{nearest(flag, flags)}")
        if not equals:
            text = next(rest, "")
            if not text or text.startswith("--"):  # a shell's variable may have been empty
                raise UsageError(
                    f"{flag} has no value: give {flag}=<value>, or {flag}= to empty it"
                )
        yield flag.removeprefix("--config."), text


def parse(argv: Sequence[str]) -> tuple[ml_collections.ConfigDict, str]:
    """The config and the workdir that a command line names."""
    flags, rest = _parser().parse_known_args(argv)
    changes = dict(overrides(rest))
    if not flags.config:
        raise UsageError("which experiment? Give --config=configs/<name>.py")
    config = config_lib.load(flags.config, changes)
    return config, flags.workdir or f"runs/{config.name}"


def run(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; a mistake of the user's ends in one line. Returns the exit code."""
    # Our own progress, and from others only what matters.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("iared2_jax").setLevel(logging.INFO)

    def command() -> None:
        """What the flags say."""
        config, workdir = parse(sys.argv[1:] if argv is None else argv)
        from iared2_jax.experiment import run as experiment  # slow to import: after the flags

        experiment.run(config, workdir)

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(run())
