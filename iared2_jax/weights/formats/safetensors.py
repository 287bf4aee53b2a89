"""Reader of .safetensors, and of what this project wrote beside the tensors."""

import json
import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize

from iared2_jax.errors import UsageError

log = logging.getLogger(__name__)

# NumPy has no bfloat16 of its own.
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file by name, and what this project wrote beside them (else {}).

    Raises:
      UsageError: the file is damaged, or holds a type that is not known here.
    """
    try:
        content = path.read_bytes()
        tensors = {
            name: np.frombuffer(info["data"], _DTYPES[info["dtype"]]).reshape(info["shape"])
            for name, info in deserialize(content)
        }
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors, _own_metadata(path, header)


def _own_metadata(path: Path, header: Any) -> dict[str, Any]:
    """This project's entry among a file's metadata; what another wrote there is ignored."""
    everything = header.get("__metadata__") if isinstance(header, dict) else None
    text = everything.get("iared2_jax") if isinstance(everything, dict) else None
    if text is None:
        return {}
    try:
        metadata = json.loads(text)
    except (TypeError, ValueError):
        metadata = None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("create_model", {}), dict):
        log.warning("%s: its metadata do not say which model it is, and are ignored", path)
        return {}
    return metadata
