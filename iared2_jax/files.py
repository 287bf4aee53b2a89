"""Atomic writes: a file is as it was or as it shall be, whenever a process ends. The cache folder.

And `with_tuples`, for what comes back from JSON.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from safetensors import SafetensorError

from iared2_jax.errors import CheckpointError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A draft to be written in place of `path`, which it replaces at the end of the block.

    Raises:
      CheckpointError: the disk is full, or refuses; the draft is gone, what was at `path` stays.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")  # two processes may write it
    try:
        yield draft
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise CheckpointError(f"{path} {refused(error)}") from error


def refused(error: Exception) -> str:
    """Why a file could not be written, as the end of a sentence that begins with its name."""
    reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
    return f"could not be written ({reason}): make room, and give the same command again"


def write_text(path: Path, text: str) -> None:
    """Replaces the file by one that holds `text`; its folder must exist."""
    with writing(path) as draft:
        # What is no Unicode, as a file name of another encoding, comes back as it was.
        draft.write_text(text, encoding="utf-8", errors="surrogateescape")


def read_text(path: Path) -> str:
    """A file's text; what is no Unicode, as a file name of another encoding, stays as it is."""
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, value: Any) -> None:
    """The same with a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1))


def cache_folder() -> Path | None:
    """~/.cache/iared2_jax, or under $XDG_CACHE_HOME: what may be deleted at any time.

    None, with a warning, where there is no home directory.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "iared2_jax"
    try:
        return Path.home() / ".cache" / "iared2_jax"
    except RuntimeError:
        log.warning("there is no home directory, so nothing is cached: set XDG_CACHE_HOME")
        return None


def with_tuples(options: Mapping[str, Any] | ml_collections.ConfigDict) -> dict[str, Any]:
    """Options whose lists are tuples: JSON, and a config from a command line, have none.

    Example:
      >>> with_tuples({"size": [2, 3], "name": "x"})
      {'size': (2, 3), 'name': 'x'}
    """
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
