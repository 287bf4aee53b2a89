"""What a written table records of its runs: enough to add others to them on another machine."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from iared2_jax.errors import UsageError, few
from iared2_jax.tables.runs import PATHS, Run, differing_results

_BESIDE_RESULTS = ("config", "versions")  # of results.json: they have a place of their own


class TableRecord(NamedTuple):
    """The runs of a table's JSON file.

    Attributes:
      runs: a record of each, by name (`run_record`).
      sizes: of the images, px. seeds: of the rows.
    """

    runs: Mapping[str, Mapping[str, Any]]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]

    def with_runs_of(self, other: "TableRecord", names: Collection[str]) -> "TableRecord":
        """Also the runs of another table that are among `names`; its own go before them."""
        shared = {name: run for name, run in other.runs.items() if name in names}
        return self._replace(runs={**shared, **self.runs})

    def results(self) -> dict[str, dict[str, Any]]:
        """What each run's results.json held, by name; the places of files aside."""
        return {
            name: {**record["results"], **{key: record[key] for key in _BESIDE_RESULTS}}
            for name, record in self.runs.items()
        }


NO_TABLE = TableRecord({}, (), ())


def run_record(results: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What a table's JSON file says of a run: the time it took, its options, versions, results."""
    return {
        "seconds": round(seconds) or None,
        "config": {key: value for key, value in results["config"].items() if key not in PATHS},
        "versions": results["versions"],
        "results": {key: value for key, value in results.items() if key not in _BESIDE_RESULTS},
    }


def read_record(path: Path, flag: str = "--add") -> TableRecord:
    """The record in a table's JSON file.

    Args:
      flag: that asks for it, for messages.

    Raises:
      UsageError: there is no such file, or it is none that `python -m iared2_jax.tables` wrote.
    """
    try:
        stored = json.loads(path.read_text())
        record = TableRecord(
            dict(stored["runs"]),
            tuple(sorted({int(row["pixels"]) for row in stored["rows"]})),
            tuple(
                sorted({int(s) for row in stored["rows"] for s in row["seeds"] if s is not None})
            ),
        )
        record.results()
    except FileNotFoundError as error:
        raise UsageError(f"{flag}: there is no {path}: leave {flag} out") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{flag}: {path} is damaged: bring it back, or leave {flag} out"
        ) from error
    return record


def check_options(
    record: TableRecord, runs: Sequence[Run], root: Path, given: Mapping[str, str]
) -> None:
    """Refuses to add runs of one recipe to a table of another.

    Raises:
      UsageError: one sentence that names the options.
    """
    for run in runs:
        if run.name not in record.runs:
            continue
        if differ := differing_results(run, root, given, record.runs[run.name]["config"]):
            raise UsageError(
                f"in the table that is there, {run.name} has other options: {few(differ)}; "
                "give another --out, or leave --add and --use out"
            )
