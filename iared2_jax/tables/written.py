"""A written table: the runs that it was made of, so that others can be added to them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from iared2_jax.errors import UsageError
from iared2_jax.tables.runs import PATHS, Run, finished

_RECORD_KEYS = ("config", "versions", "results")


class Written(NamedTuple):
    """What a table's JSON file says of its runs.

    Attributes:
      runs: a record of each, by name (`run_record`).
      sizes: of the images, px.
      seeds: of the rows, in order.
    """

    runs: Mapping[str, Mapping[str, Any]]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]

    def results_of(self, run: Run, root: Path, given: Mapping[str, str]) -> dict[str, Any] | None:
        """A run's results, as its results.json had them; None if there are none of its options."""
        if run.name not in self.runs:
            return None
        record = self.runs[run.name]
        results = {**record["results"], "config": record["config"], "versions": record["versions"]}
        return results if finished(run, root, given, results) else None


NOTHING = Written({}, (), ())


def read_table(path: Path) -> Written:
    """The runs of a table's JSON file.

    Raises:
      UsageError: there is no such file, or it is none that `python -m iared2_jax.tables` wrote.
    """
    try:
        stored = json.loads(path.read_text())
        runs = dict(stored["runs"])
        complete = all(record.keys() >= {*_RECORD_KEYS} for record in runs.values())
        sizes = {int(row["pixels"]) for row in stored["rows"]}
        seeds = {int(seed) for row in stored["rows"] for seed in row["seeds"] if seed is not None}
    except FileNotFoundError as error:
        raise UsageError(f"--add: there is no {path} to add to: leave --add out") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path) from error
    if not complete:
        raise _damaged(path)
    return Written(runs, tuple(sorted(sizes)), tuple(sorted(seeds)))


def _damaged(path: Path) -> UsageError:
    return UsageError(f"--add: {path} is damaged: bring it back, or leave --add out")


def run_record(results: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What a table's JSON file says of a run: what it took, its options, versions and results."""
    own = {key: value for key, value in results.items() if key not in ("config", "versions")}
    return {
        "seconds": round(seconds) or None,
        "config": {key: value for key, value in results["config"].items() if key not in PATHS},
        "versions": results["versions"],
        "results": own,
    }
