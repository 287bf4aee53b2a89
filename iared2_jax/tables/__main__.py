"""Makes a table of the paper: the runs that are missing, then markdown, CSV and JSON.

    python -m iared2_jax.tables --table=4 --config.data.path=<objects> \
      --config.data.cutouts.backgrounds=<photographs> --config.weights=<dinov2_vits14>

Each run has a folder of its own below --root, and is what `iared2_jax.main` would make of the same
options, which --config.KEY=VALUE adds to. A run that is there is not made again; one that was
stopped goes on. --dry-run says which runs are missing, and how long they take.
"""

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from iared2_jax.command import Parser, exit_code
from iared2_jax.errors import UsageError
from iared2_jax.main import overrides
from iared2_jax.tables.presets import PRESETS, TABLES
from iared2_jax.tables.runs import (
    PATHS,
    Run,
    check_folder,
    make,
    results_of,
    seconds_of,
    without_paths,
)
from iared2_jax.tables.write import markdown, write_table

log = logging.getLogger("iared2_jax.tables")

# What a run's results.json holds that has a place of its own in the table's.
_BESIDE_RESULTS = ("config", "versions")
_SET_BY_TABLES = frozenset({"seed", "curriculum", "mode", "compare.selectors"})


def _parser() -> Parser:
    parser = Parser(
        prog="python -m iared2_jax.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--table", required=True, choices=TABLES, help="its number in the paper")
    parser.add_argument("--preset", default="cutouts", choices=PRESETS, help="on which data")
    parser.add_argument("--sizes", type=int, nargs="+", default=[112], help="of the images, px")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--root", type=Path, default=Path("runs/tables"), help="the runs' folder")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="the tables' folder")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing; make nothing")
    parser.add_argument(
        "--finished", action="store_true", help="make no run: tabulate those that are there"
    )
    return parser


def tabulate(argv: Sequence[str]) -> None:
    """What the flags say.

    Raises:
      UsageError: a flag or option that cannot be, or a run that another process is at.
      Interrupted: a signal stopped a run: the same command goes on.
    """
    flags, rest = _parser().parse_known_args(argv)
    known = [f"--{name.replace('_', '-')}" for name in vars(flags)]
    given = dict(overrides(rest, known))
    if taken := sorted(given.keys() & _SET_BY_TABLES):
        raise UsageError(
            f"--config.{taken[0]} is set by the table itself, for each of its runs: use --seeds "
            "and --table"
        )
    table = TABLES[flags.table]
    runs = table.runs(PRESETS[flags.preset], flags.sizes, flags.seeds)
    root = flags.root / flags.preset
    found = {run.name: results_of(run, root, given) for run in runs}
    missing = [run for run in runs if found[run.name] is None]
    if not flags.finished:
        for run in missing:
            check_folder(run, root, given)
    for run in runs:
        log.info("%s", _state(run, root, run not in missing))
    log.info("about %.0f minutes on two CPU cores", sum(run.minutes for run in missing))
    if flags.dry_run:
        return
    for place, run in enumerate([] if flags.finished else missing, 1):
        left = sum(later.minutes for later in missing[place - 1 :])
        log.info("run %d of %d, %s; about %.0f minutes left", place, len(missing), run.name, left)
        make(run, root, given)
        found[run.name] = results_of(run, root, given)
    there = {name: results for name, results in found.items() if results is not None}
    rows = table.rows(flags.sizes, flags.seeds, there)
    command = _published(flags, given)
    lines = [
        f"`{command}`, with the options that say where the data is.",
        "",
        f"The paper's: {table.paper}. Here: means over the seeds, ± half a 95% interval over them.",
        *_left_out(runs, there),
    ]
    record = {
        "command": command,
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "runs": {
            name: {
                "seconds": round(seconds_of(root / name)) or None,
                "config": without_paths(results["config"]),
                "versions": results["versions"],
                "results": {
                    key: value for key, value in results.items() if key not in _BESIDE_RESULTS
                },
            }
            for name, results in there.items()
        },
    }
    folder = flags.out / flags.preset
    folder.mkdir(parents=True, exist_ok=True)
    page = markdown(table.title, lines, rows, table.columns)
    name = f"table_{flags.table}"
    for path in write_table(folder, name, page, rows, table.columns, record):
        log.info("written: %s", path)


def _state(run: Run, root: Path, finished: bool) -> str:
    if finished:
        return f"{run.name}: there"
    begun = "begun, " if (root / run.name).exists() else ""
    return f"{run.name}: {begun}missing, about {run.minutes:.0f} minutes"


def _left_out(runs: Sequence[Run], there: dict[str, object]) -> list[str]:
    missing = [run.name for run in runs if run.name not in there]
    return ["", f"Not made yet: {', '.join(missing)}."] if missing else []


def _published(flags: argparse.Namespace, given: Mapping[str, str]) -> str:
    """The command without what says where things lie on this machine."""
    words = [f"--table={flags.table}", f"--preset={flags.preset}"]
    for name in ("sizes", "seeds"):
        words += [f"--{name}", *map(str, getattr(flags, name))]
    words += [f"--config.{key}={text}" for key, text in given.items() if key not in PATHS]
    return shlex.join(["python", "-m", "iared2_jax.tables", *words])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("iared2_jax").setLevel(logging.INFO)
    return exit_code(lambda: tabulate(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
