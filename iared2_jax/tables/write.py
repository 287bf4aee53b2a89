"""A table as markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iared2_jax.files import writing
from iared2_jax.tables.statistics import Mean
from iared2_jax.tables.table import Column, Row


def cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    """The table as text, header first; a cell without a figure is empty."""
    made = [["pixels", "method", *(column.header for column in columns)]]
    for row in rows:
        figures = [_text(row.get(column.key), column.digits) for column in columns]
        made.append([str(row["pixels"]), row["method"], *figures])
    return made


def _text(found: Mean | Sequence[float] | None, digits: int) -> str:
    if found is None:
        return ""
    if isinstance(found, Mean):
        return found.text(digits)
    return " / ".join(f"{share:.{digits}f}" for share in found)


def markdown(
    title: str, lines: Sequence[str], rows: Sequence[Row], columns: Sequence[Column]
) -> str:
    """The page of a table: title, what it is, the table."""
    header, *body = cells(rows, columns)
    table = [header, ["---"] * len(header), *body]
    return "\n".join(
        [f"# {title}", "", *lines, "", *("| " + " | ".join(row) + " |" for row in table), ""]
    )


def comma_separated(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The table as CSV, one line per method, size and seed; without what is a list."""
    out = io.StringIO()
    lists = {key for row in rows for key, value in row.items() if type(value) is list}
    keys = [column.key for column in columns if column.key not in lists]
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["pixels", "method", "seed", *keys])
    for row in rows:
        for place, seed in enumerate(row["seeds"]):
            figures = [_value(row.get(key), place, seed) for key in keys]
            table.writerow([row["pixels"], row["method"], seed, *figures])
    return out.getvalue()


def _value(found: Mean | None, place: int, seed: int | None) -> str:
    """A seed's own figure, if it has one; of what no seed changes, set beside ours, the mean."""
    if found is None:
        return ""
    if found.seeds is None:  # all of the row's, in its order
        return f"{found.values[place]:.6g}"
    if seed is None:
        return f"{found.value:.6g}"
    own = dict(zip(found.seeds, found.values, strict=True))
    return f"{own[seed]:.6g}" if seed in own else ""


def write_table(
    path: Path,
    page: str,
    rows: Sequence[Row],
    columns: Sequence[Column],
    record: dict[str, Any],
) -> list[Path]:
    """Writes the table as path, which ends in .json, and beside it .csv and .md; returns where."""
    plain = [
        {key: value._asdict() if isinstance(value, Mean) else value for key, value in row.items()}
        for row in rows
    ]
    texts = {
        "md": page,
        "csv": comma_separated(rows, columns),
        "json": json.dumps({**record, "rows": plain}, indent=1) + "\n",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, text in texts.items():
        paths.append(path.with_suffix(f".{kind}"))
        with writing(paths[-1]) as draft:
            draft.write_text(text)
    return paths
