"""What a table is: the runs that it needs, and its rows and columns."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from iared2_jax.tables.presets import Preset
from iared2_jax.tables.runs import Run
from iared2_jax.tables.statistics import mean, paired

# "pixels", "method", "seeds" (those that its figures are of), and by their columns' keys the
# figures: a `Mean` over seeds, or a list of one share per group.
Row = dict[str, Any]
Results = Mapping[str, Mapping[str, Any]]  # of the runs that are there, by name


def plain_row(
    size: int, method: str, runs: Mapping[int | None, tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> Row:
    """A method's accuracy, what it loses, and its FLOPs in per cent of the dense model's.

    Args:
      runs: by seed (None: nothing was drawn), a block of results.json and the "dense" one.
    """
    pairs = list(runs.values())
    row: Row = {
        "pixels": size,
        "method": method,
        "seeds": list(runs),
        "top1": mean([100 * found["top1"] for found, _ in pairs]),
        "lost": mean([100 * (dense["top1"] - found["top1"]) for found, dense in pairs]),
    }
    for kind in ("linear", "full"):
        shares = [100 * found["flops"][kind] / dense["flops"][kind] for found, dense in pairs]
        row[f"{kind}_flops"] = mean(shares)
    return row


def finished_by_key(
    name: Callable[[Any], str], keys: Iterable[Any], results: Results
) -> dict[Any, Mapping[str, Any]]:
    """The results that are there of the runs `name(key)`, by key, e.g. by seed."""
    return {key: results[name(key)] for key in keys if name(key) in results}


def set_beside_ours(rows: Sequence[Row], ours: Row) -> None:
    """Adds to all other rows by how many points ours loses less, seed by seed.

    What no seed changes is compared with every seed of ours; where no seed is shared, with none.
    """
    best = dict(zip(ours["seeds"], ours["lost"].values, strict=True))
    for row in rows:
        if row is ours:
            continue
        theirs = dict(zip(row["seeds"], row["lost"].values, strict=True))
        if None in theirs:
            theirs = dict.fromkeys(best, theirs[None])
        if both := [seed for seed in best if seed in theirs]:
            losses = [theirs[s] for s in both], [best[s] for s in both]
            row["ours_better_by"] = paired(*losses, seeds=both)
    ours["ours_better_by"] = None


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of figures.

    Attributes:
      header: what stands above it. key: of its cells in a `Row`. digits: decimal places.
    """

    header: str
    key: str
    digits: int = 1


# Of `plain_row`.
PLAIN_COLUMNS = (
    Column("top-1, %", "top1"),
    Column("lost, points", "lost"),
    Column("linear FLOPs, %", "linear_flops"),
    Column("full FLOPs, %", "full_flops"),
)
OURS_BETTER_BY = Column("ours better by, points", "ours_better_by")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
      title: a line above it.
      paper: the paper's own figures, in words.
      columns: of figures, after each row's "pixels" and "method".
      runs: (preset, sizes, seeds) to what must have been run, each after the one it starts from.
      rows: (sizes, seeds, results of the runs that are there) to the rows, a method at a size each.
      presets: the names of what it can be made on; the first by default.
      plot: of the rows, to be drawn beside them.
    """

    title: str
    paper: str
    columns: Sequence[Column]
    runs: Callable[[Preset, Sequence[int], Sequence[int]], list[Run]]
    rows: Callable[[Sequence[int], Sequence[int], Results], list[Row]]
    presets: Sequence[str]
    plot: Callable[[Sequence[Row]], Figure] | None = None
