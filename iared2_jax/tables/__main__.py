"""Makes a table of the paper: the runs that are missing, then markdown, CSV and JSON.

    python -m iared2_jax.tables --table=4 --config.data.path=<objects> \
      --config.data.cutouts.backgrounds=<photographs> --config.weights=<dinov2_vits14>

Each run has a folder of its own below --root, and is what `iared2_jax.main` would make of the same
options, which --config.KEY=VALUE adds to. A run that is there is not made again; one that was
stopped goes on. The same command started several times, e.g. once for each GPU, shares the runs
out (what is timed is then timed beside the others). --dry-run says which runs are missing, and how
long they take. --add keeps the runs of the table that is in --out, whose folders may be on another
machine, beside those asked for; --use=4 takes what it needs of another table there.
"""

import argparse
import dataclasses
import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iared2_jax.command import Parser, exit_code
from iared2_jax.config.checks import validate
from iared2_jax.errors import InUseError, UsageError
from iared2_jax.experiment.run_directory import locked
from iared2_jax.files import writing
from iared2_jax.main import overrides
from iared2_jax.tables.all_tables import TABLES
from iared2_jax.tables.presets import PRESETS, Preset
from iared2_jax.tables.records import (
    NO_TABLE,
    TableRecord,
    check_options,
    read_record,
    run_record,
)
from iared2_jax.tables.runs import (
    PATHS,
    Run,
    check_folder,
    lacks_baselines,
    make,
    missing_runs,
    results_of,
    seconds_of,
)
from iared2_jax.tables.table import Results, Table
from iared2_jax.tables.write import markdown, write_table

log = logging.getLogger("iared2_jax.tables")

_COMPILED = "compiled"  # below the runs' folder
_LOCK = "table.lock"  # in a run's folder; a run's own lock is "lock"
_PATIENCE = 2.0  # seconds between looks at what other processes are at

_SET_BY_TABLES = frozenset({"seed", "curriculum", "mode", "compare.selectors"})


def _default_sizes() -> str:
    return ", ".join(f"{preset.size} ({name})" for name, preset in PRESETS.items())


def _parser() -> Parser:
    parser = Parser(
        prog="python -m iared2_jax.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--table", required=True, choices=TABLES, help="its number in the paper, or a name"
    )
    parser.add_argument("--preset", choices=PRESETS, help="on which data; the table's first")
    parser.add_argument(
        "--sizes", type=int, nargs="+", help=f"of the images, px; else {_default_sizes()}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--root", type=Path, default=Path("runs/tables"), help="the runs' folder")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="the tables' folder")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing; make nothing")
    parser.add_argument(
        "--finished", action="store_true", help="make no run: tabulate those that are there"
    )
    parser.add_argument(
        "--add", action="store_true", help="add to the table in --out, and keep its runs"
    )
    parser.add_argument(
        "--segmentation",
        default="",
        metavar="FILE",
        help="gtsegs_ijcv.mat: what --table=1 --preset=imagenet measures maps on",
    )
    parser.add_argument(
        "--use", nargs="+", default=[], choices=TABLES, help="take runs of these tables in --out"
    )
    return parser


@dataclasses.dataclass(frozen=True)
class _TableCommand:
    """What a command line asks for.

    Attributes:
      given: the user's options. root: the runs' folder, path: the table's JSON file.
      recorded: the runs that a table in --out has, of which nothing need be here but its file.
      sizes, seeds: of all rows, those recorded and those asked for.
      runs: of all rows. asked: of the sizes and seeds on the command line.
    """

    flags: argparse.Namespace
    table: Table
    given: Mapping[str, str]
    root: Path
    path: Path
    recorded: TableRecord
    sizes: Sequence[int]
    seeds: Sequence[int]
    runs: Sequence[Run]
    asked: Sequence[Run]

    def found(self) -> dict[str, dict[str, Any]]:
        """The results of the runs whose folders are below `root`, by name."""
        alone = self.flags.finished  # what was stopped among its baselines is taken as it is
        results = {run.name: results_of(run, self.root, self.given, alone) for run in self.runs}
        return {name: found for name, found in results.items() if found is not None}

    def missing(self) -> list[Run]:
        """The asked runs that are to be made."""
        found = self.found()
        return missing_runs(self.asked, {*self.recorded.runs, *found}, found)


def tabulate(argv: Sequence[str]) -> None:
    """Makes the runs that a command line asks for and that are missing, then their table.

    Raises:
      UsageError: a flag or option that cannot be.
      Interrupted: a signal stopped a run: the same command goes on.
    """
    command = _parsed(argv)
    check_options(command.recorded, command.runs, command.root, command.given)
    missing = command.missing()
    if not command.flags.finished:
        for run in missing:
            check_folder(run, command.root, command.given)
            # Before the first has taken hours.
            validate(run.built(command.root, command.given), device_count=1)
    for run in command.asked:
        log.info("%s", _state(run, command.root, run not in missing))
    log.info("%s", _time_of(missing))
    if command.flags.dry_run:
        return
    if not command.flags.finished:
        _make(missing, command.root, command.given)
    _write(command)


def _parsed(argv: Sequence[str]) -> _TableCommand:
    """The flags and options, checked, and the runs that they ask for."""
    flags, rest = _parser().parse_known_args(argv)
    known = [f"--{name.replace('_', '-')}" for name in vars(flags)]
    given = dict(overrides(rest, known))
    if taken := sorted(given.keys() & _SET_BY_TABLES):
        raise UsageError(
            f"--config.{taken[0]} is set by the table itself, for each of its runs: use --seeds "
            "and --table"
        )
    table = TABLES[flags.table]
    flags.preset = flags.preset or table.presets[0]
    if flags.preset not in table.presets:
        raise UsageError(
            f"--table={flags.table} is made on {' or '.join(table.presets)}, not on {flags.preset}"
        )
    preset = PRESETS[flags.preset]
    if given.get("data.maps"):
        preset = preset.with_maps()
    preset = _with_segmentation(dataclasses.replace(preset, given=given), flags)
    flags.sizes = sorted({*(flags.sizes or [preset.size])})
    flags.seeds = sorted({*flags.seeds})  # as the table's own are: what is timed is the first's
    path = flags.out / flags.preset / f"table_{flags.table}.json"
    recorded = read_record(path) if flags.add else NO_TABLE
    others = [read_record(path.with_name(f"table_{name}.json"), "--use") for name in flags.use]
    sizes = sorted({*recorded.sizes, *flags.sizes})
    seeds = sorted({*recorded.seeds, *flags.seeds})
    preset.check(sizes, seeds)
    runs = table.runs(preset, sizes, seeds)
    for other in others:
        recorded = recorded.with_runs_of(other, {run.name for run in runs})
    names = {run.name for run in table.runs(preset, flags.sizes, flags.seeds)}
    return _TableCommand(
        flags=flags,
        table=table,
        given=given,
        root=flags.root / flags.preset,
        path=path,
        recorded=recorded,
        sizes=sizes,
        seeds=seeds,
        runs=runs,
        asked=[run for run in runs if run.name in names],
    )


def _write(command: _TableCommand) -> None:
    """The table of all runs that are there, with its plot if it has one."""
    found, table = command.found(), command.table
    available = {**command.recorded.results(), **found}
    if not (rows := table.rows(command.sizes, command.seeds, available)):
        raise UsageError(
            "no run is finished yet, so there is nothing to tabulate: leave out --finished"
        )
    line = _published(command)
    lines = [
        f"`{line}`, with the options that say where the data is.",
        "",
        f"The paper's: {table.paper}. Here: means over the seeds, ± half a 95% interval over them.",
        *_left_out(command.runs, available),
    ]
    made = {name: run_record(run, seconds_of(command.root / name)) for name, run in found.items()}
    record = {
        "command": line,
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "runs": {**command.recorded.runs, **made},
    }
    page = markdown(table.title, lines, rows, table.columns)
    for written in write_table(command.path, page, rows, table.columns, record):
        log.info("written: %s", written)
    if table.plot is not None:
        picture = command.path.with_suffix(".png")
        with writing(picture) as draft:
            table.plot(rows).savefig(draft, dpi=120, format="png")
        log.info("written: %s", picture)


def _with_segmentation(preset: Preset, flags: argparse.Namespace) -> Preset:
    """The preset with the file that its maps are measured on, if this table measures any.

    Raises:
      UsageError: the file is not given, or is of no use.
    """
    needed = bool(preset.segmentation) and flags.table == "1"
    if needed and not flags.segmentation:
        raise UsageError(
            f"--table=1 --preset={preset.name} needs --segmentation=<gtsegs_ijcv.mat>: its own "
            "images have no masks"
        )
    if flags.segmentation and not needed:
        raise UsageError(
            f"--segmentation={flags.segmentation} is for --table=1 --preset=imagenet: leave it out"
        )
    return dataclasses.replace(preset, segmentation_path=flags.segmentation)


def _make(missing: Sequence[Run], root: Path, given: Mapping[str, str]) -> None:
    """Makes the runs, but those that another process makes meanwhile: for these it waits."""
    from iared2_jax.fast_inference.accelerated import programs_kept  # slow to import

    left, told = list(missing), set()
    while left:
        ready = [run for run in left if run.start not in {other.name for other in left}]
        made = None
        for run in ready:
            try:
                with locked(root / run.name, _LOCK):
                    if results_of(run, root, given) is None:
                        place = len(missing) - len(left) + 1
                        words = (place, len(missing), run.name, _time_of(left))
                        log.info("run %d of %d, %s; left: %s", *words)
                        # Seeds of a setting run the same programs.
                        with programs_kept(root / _COMPILED):
                            make(run, root, given)
                made = run
                break
            except InUseError:
                if run.name not in told:
                    log.info("%s: another process is at it", run.name)
                told.add(run.name)
        if made is not None:
            left.remove(made)
        else:
            time.sleep(_PATIENCE)


def _state(run: Run, root: Path, finished: bool) -> str:
    if finished:
        return f"{run.name}: there"
    begun = "begun, " if (root / run.name).exists() else ""
    time_left = "its time is not known" if run.minutes is None else _time_of([run])
    return f"{run.name}: {begun}missing, {time_left}"


def _time_of(runs: Sequence[Run]) -> str:
    """About how long runs take, as far as that is known."""
    known = sum(run.minutes for run in runs if run.minutes is not None)
    unknown = sum(run.minutes is None for run in runs)
    words = [f"about {known:.0f} minutes on two CPU cores"] if known or not unknown else []
    words += [f"{unknown} whose time is not known"] if unknown else []
    return ", and ".join(words)


def _left_out(runs: Sequence[Run], available: Results) -> list[str]:
    """The line of a table's page that says what it lacks, if it does."""
    missing = [run.name for run in runs if run.name not in available]
    made = [run for run in runs if run.name in available]
    bare = [run.name for run in made if lacks_baselines(available[run.name])]
    missing += [f"the baselines of {name}" for name in bare]
    return ["", f"Not made yet: {', '.join(missing)}."] if missing else []


def _published(command: _TableCommand) -> str:
    """The command without what says where things lie on this machine."""
    words = [f"--table={command.flags.table}", f"--preset={command.flags.preset}"]
    words += ["--sizes", *map(str, command.sizes), "--seeds", *map(str, command.seeds)]
    words += [f"--config.{key}={text}" for key, text in command.given.items() if key not in PATHS]
    return shlex.join(["python", "-m", "iared2_jax.tables", *words])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("iared2_jax").setLevel(logging.INFO)
    return exit_code(lambda: tabulate(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
