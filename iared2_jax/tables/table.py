"""What a table is: the runs that it needs, and its rows and columns."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iared2_jax.tables.runs import Run

# "pixels", "method", "seeds" (those that its figures are of), and by their columns' keys the
# figures: a `Mean` over seeds, or a list of one share per group.
Row = dict[str, Any]
# The config, as the flag --config has it, of images of so many pixels.
ConfigOfSize = Callable[[int], str]
Results = Mapping[str, Mapping[str, Any]]  # of the runs that are there, by name


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of figures.

    Attributes:
      header: what stands above it. key: of its cells in a `Row`. digits: decimal places.
    """

    header: str
    key: str
    digits: int = 1


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
      title: a line above it.
      paper: the paper's own figures, in words.
      columns: of figures, after each row's "pixels" and "method".
      runs: (config, sizes, seeds) to what must have been run, each after the one it starts from.
      rows: (sizes, seeds, results of the runs that are there) to the rows, a method at a size each.
    """

    title: str
    paper: str
    columns: Sequence[Column]
    runs: Callable[[ConfigOfSize, Sequence[int], Sequence[int]], list[Run]]
    rows: Callable[[Sequence[int], Sequence[int], Results], list[Row]]
