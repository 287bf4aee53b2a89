"""A table as markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iared2_jax.files import writing
from iared2_jax.report.tables import METHODS
from iared2_jax.tables.presets import Row
from iared2_jax.tables.statistics import Mean

# A column's header, its key in a row, and decimal places.
_COLUMNS = (
    ("top-1, %", "top1", 1),
    ("lost, points", "lost", 1),
    ("linear FLOPs, %", "linear_flops", 1),
    ("full FLOPs, %", "full_flops", 1),
    ("ours better by, points", "ours_better_by", 1),
    ("images/s", "images_per_s", 1),
    ("of possible, %", "of_possible", 0),
)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, header first; a cell without a figure is empty."""
    made = [["pixels", "method", "kept per group", *(header for header, _, _ in _COLUMNS)]]
    for row in rows:
        kept = " / ".join(f"{share:.2f}" for share in row["kept"])
        figures = [
            found.text(digits) if (found := row.get(key)) is not None else ""
            for _, key, digits in _COLUMNS
        ]
        made.append([str(row["pixels"]), METHODS.get(row["method"], row["method"]), kept, *figures])
    return made


def markdown(title: str, lines: Sequence[str], rows: Sequence[Row]) -> str:
    """The page of a table: title, what it is, the table."""
    header, *body = cells(rows)
    table = [header, ["---"] * len(header), *body]
    return "\n".join(
        [f"# {title}", "", *lines, "", *("| " + " | ".join(row) + " |" for row in table), ""]
    )


def comma_separated(rows: Sequence[Row]) -> str:
    """The table as CSV, one line per method, size and seed."""
    out = io.StringIO()
    keys = [key for _, key, _ in _COLUMNS]
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["pixels", "method", "seed", *keys])
    for row in rows:
        for place, seed in enumerate(row["seeds"]):
            figures = [_value(row.get(key), place) for key in keys]
            table.writerow([row["pixels"], row["method"], seed, *figures])
    return out.getvalue()


def _value(found: Mean | None, place: int) -> str:
    """A seed's own figure; what was measured once stands beside the first."""
    there = found is not None and place < len(found.values)
    return f"{found.values[place]:.6g}" if there else ""


def write_table(
    folder: Path, name: str, page: str, rows: Sequence[Row], record: dict[str, Any]
) -> list[Path]:
    """Writes <name>.md, .csv and .json into a folder, and returns where."""
    plain = [
        {key: value._asdict() if isinstance(value, Mean) else value for key, value in row.items()}
        for row in rows
    ]
    texts = {
        "md": page,
        "csv": comma_separated(rows),
        "json": json.dumps({**record, "rows": plain}, indent=1) + "\n",
    }
    paths = []
    for kind, text in texts.items():
        paths.append(folder / f"{name}.{kind}")
        with writing(paths[-1]) as draft:
            draft.write_text(text)
    return paths
