"""Named arrays from whatever file weights come in. Nothing in a file is ever executed."""

import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from iared2_jax.errors import UsageError, import_extra, nearest
from iared2_jax.weights.formats.npz import read_npz
from iared2_jax.weights.formats.pth import find_state_dict, read_pth
from iared2_jax.weights.formats.safetensors import read_safetensors

_SHIPPED = importlib.resources.files("iared2_jax") / "pretrained"
_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
_HUB = "hf://"

_INDEX = ".index.json"
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# What a Trainer writes beside the weights.
_NO_WEIGHTS = re.compile(
    r"(rng_state|random_states|optimizer|scheduler|scaler|training_args|trainer_state)"
)


def shipped() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(p.name.removesuffix(".safetensors") for p in _SHIPPED.iterdir()
                  if p.name.endswith(".safetensors"))  # fmt: skip


def read_tensors(
    source: str | Path, ema: bool | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a source by name, and what this project wrote beside them (else {}).

    Args:
      source: a .safetensors, .npz or .pth file; a folder that has one; "hf://owner/name" of the
        Hugging Face Hub (extra `hub`); or a shipped name such as "vit_micro". Wrappers' prefixes
        are taken off, shards read together.
      ema: of a .pth that has both, take the moving average (True) or the raw weights (False); None:
        the raw weights, and says so.

    Raises:
      UsageError: there is no such source, or it cannot be read; one sentence.
    """
    tensors, metadata = _read(locate(source), ema)
    return _unwrapped(tensors), metadata


def _read(path: Path, ema: bool | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if path.name.endswith(_INDEX):
        return _read_shards(path, ema), {}
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".npz":
        return read_npz(path), {}
    try:
        return find_state_dict(read_pth(path), ema), {}
    except UsageError as error:
        raise UsageError(str(error).replace("the checkpoint", str(path), 1)) from error


def _read_shards(index: Path, ema: bool | None) -> dict[str, np.ndarray]:
    """The tensors of all files that an index lists."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [index.parent / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is no index of weights files") from error
    for path in paths:
        if not path.is_file():
            raise UsageError(f"{index} lists {path.name}, which is not beside it")
    return {name: value for path in paths for name, value in _read(path, ema)[0].items()}


def _unwrapped(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without what DDP, torch.compile and Lightning put before every name."""

    def shared(prefix: str) -> bool:
        return bool(tensors) and all(name.startswith(prefix) for name in tensors)

    while prefix := next(filter(shared, _WRAPPERS), ""):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


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
    if path.suffix in _SUFFIXES or path.name.endswith(_INDEX):
        if not path.is_file():
            raise UsageError(f"there is no weights file {path}")
        return path
    raise UsageError(
        f"weights {text!r} are neither a file ({', '.join(_SUFFIXES)}) nor a folder, "
        f"hf://owner/name or shipped{nearest(text, shipped())}"
    )


def _only_file(folder: Path) -> Path:
    files = [path for path in folder.iterdir() if not _NO_WEIGHTS.match(path.name)]
    for suffix in _SUFFIXES:  # the safest first: a hub's folder has the same weights in several
        index = [path for path in files if path.name.endswith(f"{suffix}{_INDEX}")]
        found = index or sorted(path for path in files if path.suffix == suffix)
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(
                f"folder {folder} has {len(found)} {suffix} files "
                f"({', '.join(path.name for path in found[:3])}..): name one"
            )
    raise UsageError(f"folder {folder} has no weights in it ({', '.join(_SUFFIXES)})")


def _download(source: str) -> Path:
    hub = import_extra("huggingface_hub", "hub", "the hub", source)
    try:
        folder = hub.snapshot_download(
            source.removeprefix(_HUB), allow_patterns=["*.safetensors", "*.npz", "*.bin"]
        )
    except Exception as error:  # the hub's own, its client's, and the network's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{source} cannot be fetched: {reason}") from error
    return _only_file(Path(folder))
