"""Weights as safetensors: this project's own format, and what ships with the package.

One tensor per parameter, named by its path ("backbone/block_0/attn/qkv/kernel"); the metadata says
which model they belong to. A file may hold the backbone alone: the interpreters then keep their
initial values.
"""

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from iared2_jax.errors import UsageError, nearest
from iared2_jax.models.iared2 import IARed2
from iared2_jax.models.registry import create_model

_SHIPPED = importlib.resources.files("iared2_jax") / "pretrained"


def shipped() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(p.name.removesuffix(".safetensors") for p in _SHIPPED.iterdir()
                  if p.name.endswith(".safetensors"))  # fmt: skip


def _locate(source: str | Path) -> Path:
    path = Path(source)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UsageError(f"there is no weights file {path}")
        return path
    if str(source) not in shipped():
        raise UsageError(
            f"weights {str(source)!r} are neither a .safetensors file nor shipped"
            f"{nearest(str(source), shipped())}"
        )
    return Path(str(_SHIPPED / f"{source}.safetensors"))


def read_weights(source: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file by path, and its metadata (a dict, empty if it has none).

    Raises:
      UsageError: if there is no such file or shipped name, or the file is damaged.
    """
    path = _locate(source)
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors, json.loads(metadata.get("iared2_jax", "{}"))


def load_weights(variables: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """`variables` with the parameters of a file put in; interpreters it lacks keep their values.

    Args:
      variables: {"params": ..} as `create_model` returns them.
      source: a .safetensors file of this project, or a shipped name such as "vit_micro".

    Raises:
      UsageError: if the file cannot be read, a backbone parameter is missing from it, one of its
        tensors has no place in the model, a shape differs, or a value is not finite.
    """
    tensors, _ = read_weights(source)
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    missing = [name for name in params if name not in tensors and name.startswith("backbone/")]
    unknown = [name for name in tensors if name not in params]
    if missing or unknown:
        raise UsageError(
            f"{source} does not fit the model: it lacks {_some(missing)} and has no place for "
            f"{_some(unknown)}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != params[name].shape:
            raise UsageError(
                f"{source}: {name} has shape {tensor.shape}, the model's is {params[name].shape}"
            )
        if not np.isfinite(tensor).all():
            raise UsageError(f"{source}: {name} has values that are not finite")
    merged = {k: jax.numpy.asarray(tensors.get(k, v), v.dtype) for k, v in params.items()}
    return {**variables, "params": traverse_util.unflatten_dict(merged, sep="/")}


def load_model(source: str | Path) -> tuple[IARed2, dict[str, Any]]:
    """The trained model in a file that a run wrote: module and variables, as they were.

    Args:
      source: `<workdir>/weights.safetensors`, or a shipped name such as "vit_micro".

    Raises:
      UsageError: as `load_weights`, or if the file does not say which model it holds.

    Example:
      >>> module, variables = load_model("vit_micro")
      >>> module.backbone.embed_dim
      96
    """
    _, metadata = read_weights(source)
    if "create_model" not in metadata:
        raise UsageError(
            f"{source} does not say which model it holds: use create_model, then load_weights"
        )
    module, variables = create_model(**metadata["create_model"])
    return module, load_weights(variables, source)


def save_weights(
    variables: Mapping[str, Any],
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    interpreters: bool = True,
) -> None:
    """Writes the parameters (without the interpreters, if asked) as safetensors, with metadata."""
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    tensors = {
        name: np.ascontiguousarray(value)
        for name, value in params.items()
        if interpreters or name.startswith("backbone/")
    }
    save_file(tensors, path, metadata={"iared2_jax": json.dumps(dict(metadata or {}))})


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) + more) if names else "nothing"
