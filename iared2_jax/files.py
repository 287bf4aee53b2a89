"""Files that are either as they were or as they shall be, whenever a process ends."""

import json
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replaces the file by one that holds `text`; its folder must exist."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)


def write_json(path: Path, value: Any) -> None:
    """The same with a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1))
