"""Files that are either as they were or as they shall be, whenever a process ends; the cache."""

import json
import os
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


def cache_folder() -> Path:
    """~/.cache/iared2_jax, or under $XDG_CACHE_HOME: what may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iared2_jax"
