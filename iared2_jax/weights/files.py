"""Named arrays from whatever file weights come in. Nothing in a file is ever executed."""

import importlib.resources
import json
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize

from iared2_jax.errors import UsageError, nearest
from iared2_jax.weights.formats.pth import find_state_dict, read_pth

_SHIPPED = importlib.resources.files("iared2_jax") / "pretrained"
_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
_HUB = "hf://"

# Of safetensors; NumPy has no bfloat16 of its own.
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


def shipped() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(p.name.removesuffix(".safetensors") for p in _SHIPPED.iterdir()
                  if p.name.endswith(".safetensors"))  # fmt: skip


def read_tensors(source: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a source by name, and what this project wrote beside them (else {}).

    Args:
      source: a .safetensors, .npz or .pth file; a folder that has one; "hf://owner/name" of the
        Hugging Face Hub (extra `hub`); or a shipped name such as "vit_micro".

    Raises:
      UsageError: there is no such source, or it cannot be read; one sentence.
    """
    path = locate(source)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path), {}
    try:
        return find_state_dict(read_pth(path)), {}
    except UsageError as error:
        raise UsageError(str(error).replace("the checkpoint", str(path), 1)) from error


def locate(source: str | Path) -> Path:
    """The file that a source names, fetched if need be.

    Raises:
      UsageError: there is none.
    """
    text = str(source)
    if text.startswith(_HUB):
        return _download(text)
    if text in shipped():
        return Path(str(_SHIPPED / f"{text}.safetensors"))
    path = Path(source)
    if path.is_dir():
        return _only_file(path)
    if path.suffix in _SUFFIXES:
        if not path.is_file():
            raise UsageError(f"there is no weights file {path}")
        return path
    raise UsageError(
        f"weights {text!r} are neither a file ({', '.join(_SUFFIXES)}) nor a folder, "
        f"hf://owner/name or shipped{nearest(text, shipped())}"
    )


def _only_file(folder: Path) -> Path:
    for suffix in _SUFFIXES:  # the safest first: a hub's folder has the same weights in several
        found = sorted(path for path in folder.iterdir() if path.suffix == suffix)
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(
                f"folder {folder} has {len(found)} {suffix} files "
                f"({', '.join(path.name for path in found[:3])}..): name one"
            )
    raise UsageError(f"folder {folder} has no weights in it ({', '.join(_SUFFIXES)})")


def _download(source: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # only for hf://
    except ImportError as error:
        raise UsageError(f"{source} needs the hub: pip install 'iared2_jax[hub]'") from error
    try:
        folder = snapshot_download(
            source.removeprefix(_HUB), allow_patterns=["*.safetensors", "*.npz", "*.bin"]
        )
    except Exception as error:  # the hub's own, its client's, and the network's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{source} cannot be fetched: {reason}") from error
    return _only_file(Path(folder))


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        content = path.read_bytes()
        tensors = {
            name: np.frombuffer(info["data"], _DTYPES[info["dtype"]]).reshape(info["shape"])
            for name, info in deserialize(content)
        }
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = json.loads(header.get("__metadata__", {}).get("iared2_jax", "{}"))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors, metadata


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here: np.load forgets to close a file that is no zip.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not a readable .npz of arrays: {error}") from error
