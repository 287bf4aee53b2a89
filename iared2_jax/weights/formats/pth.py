"""Other people's `.pth` files, read without PyTorch and without running what is in them.

A `.pth` is a zip of raw storages and a pickle that says how to view them. A pickle is a program:
whoever loads one from the internet runs it. So this reader knows the handful of names that tensors
need, answers harmless names with an object that does nothing, and refuses the rest. Sizes and
strides are claims of the file too: each is checked before memory is taken.
"""

import argparse
import io
import logging
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from iared2_jax.errors import UsageError, few

log = logging.getLogger(__name__)

_ZIP = b"PK\x03\x04"
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2)[2:]  # torch's magic number, less the protocol
_MAX_BYTES = 16 << 30  # ten times a ViT-L with its optimizer
_MAX_PICKLE = 16 << 20  # DeiT's is 30 KB; one byte can become an object of 216
_MAX_OBJECTS = 100_000  # a tensor takes 6; a million nested tuples overflow the stack of C
_MAX_EXPANDED = 1 << 20  # elements of a tensor that repeats its storage by a stride of 0
_ENTRIES = ("model", "state_dict", "model_state", "module")
_AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")

_STORAGES = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "BFloat16Storage": "bf16",
    "CharStorage": "|i1", "ShortStorage": "<i2", "IntStorage": "<i4", "LongStorage": "<i8",
    "ByteStorage": "|u1", "BoolStorage": "|b1",
}  # fmt: skip
# What training scripts save beside the weights; nobody here needs the values.
_INERT = re.compile(
    r"argparse\.Namespace|pathlib\.(Posix|Windows)?Path|_codecs\.encode|(__builtin__|builtins)\.set"
    r"|torch\.(Size|device|b?float\d*|double|half|u?int\d*|long|bool)"
    r"|numpy\.(dtype|ndarray|_?core\.multiarray\.(scalar|_reconstruct)|_core\.numeric\._frombuffer)"
)


class _Refusal(Exception):
    """Why a file is not read: the rest of a sentence that `read_pth` begins with its name."""


class _Inert:
    """Stands for an object that is not a tensor, and keeps nothing of it.

    `__setstate__` also protects the class: pickle's BUILD would otherwise set attributes on it.
    """

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict(dict[Any, Any]):
    """OrderedDict without the attributes (`_metadata`) that a pickle may set over its methods."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


class _Tensor(_Inert):
    """torch._utils._rebuild_tensor_v2: a view of a storage, by offset, size and stride."""

    def __new__(cls, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
        if not (isinstance(storage, np.ndarray) and type(size) is type(stride) is tuple) or (
            len(size) != len(stride) or not _are_counts((offset, *size, *stride))
        ):
            raise _Refusal("holds a tensor of no possible shape: it was not loaded")
        if math.prod(size) > max(storage.size, _MAX_EXPANDED):
            raise _Refusal(
                f"holds {storage.size} values for a tensor of shape {_shown(size)}: not loaded"
            )
        if 0 in size:
            return np.zeros(size, storage.dtype)
        if offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= storage.size:
            raise _Refusal("holds a tensor that reaches outside its storage: it was not loaded")
        start, *steps = (n * storage.itemsize for n in (offset, *stride))
        return np.ndarray(size, storage.dtype, storage, start, tuple(steps))


class _Parameter(_Inert):
    """torch._utils._rebuild_parameter: the tensor it holds."""

    def __new__(cls, data: Any, *_: Any) -> Any:
        return data


_KNOWN = {
    "collections.OrderedDict": _Dict,
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_parameter": _Parameter,
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}": dtype for name, dtype in _STORAGES.items()},
}


class _Reader(pickle.Unpickler):
    """Unpickles names of the two lists above only; storages come out of the zip as numpy."""

    def __init__(self, archive: zipfile.ZipFile, top: str, program: bytes) -> None:
        super().__init__(io.BytesIO(program))
        self._archive, self._top = archive, top
        self._storages: dict[tuple[str, str], np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _KNOWN:
            return _KNOWN[full]
        if _INERT.fullmatch(full):
            return _Inert
        raise _Refusal(_holds_code(full))

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, count = pid
        if dtype not in _STORAGES.values() or not isinstance(key, str) or not _are_counts((count,)):
            raise _Refusal("holds a storage of a type that is not known here: it was not loaded")
        if (key, dtype) not in self._storages:
            self._storages[key, dtype] = self._read_storage(key, dtype, count)
        return self._storages[key, dtype]

    def _read_storage(self, key: str, dtype: str, count: int) -> np.ndarray:
        entry = self._archive.getinfo(f"{self._top}/data/{key}")
        stored = np.dtype("<u2" if dtype == "bf16" else dtype)
        if entry.file_size != count * stored.itemsize:
            raise _Refusal(
                f"says that storage {_shown(key)} has {count} values of {stored.itemsize} bytes, "
                f"but holds {entry.file_size} bytes of it: download or save it again"
            )
        values = np.frombuffer(self._archive.read(entry), stored)
        if dtype == "bf16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
            values.flags.writeable = False
        return values


def read_pth(path: str | Path) -> dict[str, Any]:
    """What `torch.save` wrote, with numpy arrays for tensors (bfloat16 as float32); no code is run.

    What is neither a tensor, a number, a string nor a container may come back as an empty stand-in.

    Args:
      path: the checkpoint. Files of PyTorch before 1.6 are not zips; for them torch is needed.

    Returns:
      The saved dict, nested as it was. Arrays may share memory and be read-only.

    Raises:
      UsageError: if there is no such file, it is no checkpoint, cut, damaged, holds code, or claims
        sizes that it does not have.
    """
    path = Path(path)
    try:
        loaded = _read(path)
    except _Refusal as refusal:
        raise UsageError(f"{path} {refusal}") from refusal.__cause__
    except Exception as error:  # a damaged or forged file can raise anything while it is read
        cut = isinstance(error, zipfile.BadZipFile | EOFError)
        verdict = "is cut short or damaged" if cut else "cannot be read"
        raise UsageError(
            f"{path} {verdict} ({_shown(error)}): download or copy it again"
        ) from error
    if not isinstance(loaded, dict):
        raise UsageError(
            f"{path} holds a {type(loaded).__name__}, not a dict of tensors: "
            "torch.save the model's state_dict() instead"
        )
    return loaded


def find_state_dict(
    checkpoint: Mapping[str, Any], ema: bool | None = None
) -> dict[str, np.ndarray]:
    """The weights in what a training script saved.

    Args:
      checkpoint: a dict of arrays, or one that has it under "model", "state_dict", "model_state" or
        "module"; a moving average may be under "model_ema", "state_dict_ema" or "ema".
      ema: whether to take the average; None: only where there is nothing else.

    Raises:
      UsageError: if none of these is a dict of arrays; it names the keys there are.

    Example:
      >>> find_state_dict({"model": {"head.bias": np.zeros(2)}, "epoch": 3})
      {'head.bias': array([0., 0.])}
    """
    raw, average = _first(checkpoint, _ENTRIES), _first(checkpoint, _AVERAGES)
    if ema and average is None:
        raise UsageError(
            f"the checkpoint has no moving average under {', '.join(_AVERAGES)}: leave ema out"
        )
    if raw and average and ema is None:
        log.warning(
            "the checkpoint has weights (%s) and their moving average (%s): the weights are taken; "
            "ema=True takes the average, which is usually the better one", raw, average,
        )  # fmt: skip
    if _is_state_dict(checkpoint) and not ema:
        return dict(checkpoint)
    chosen = average if ema or raw is None else raw
    if chosen is not None:
        return dict(checkpoint[chosen])
    keys = [_shown(key) for key in checkpoint if isinstance(key, str)]
    raise UsageError(
        f"the checkpoint has no weights under {', '.join(_ENTRIES)}, only the keys "
        f"{few(keys, 8, none='(none)')}: pass the dict of tensors itself"
    )


def _first(checkpoint: Mapping[str, Any], entries: tuple[str, ...]) -> str | None:
    """The first of the entries that is a dict of arrays."""
    return next((entry for entry in entries if _is_state_dict(checkpoint.get(entry))), None)


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(k, str) and isinstance(v, np.ndarray) for k, v in value.items())


def _read(path: Path) -> Any:
    if not path.is_file():
        raise _Refusal("is not a file" if path.exists() else "does not exist: check the path")
    if path.stat().st_size > _MAX_BYTES:
        raise _Refusal(f"is over {_MAX_BYTES >> 30} GiB: torch.save the model's state_dict() alone")
    with path.open("rb") as file:
        head = file.read(32)
    if head.startswith(_ZIP):
        return _read_zip(path)
    if head[2:].startswith(_LEGACY):
        return _read_legacy(path)
    raise _Refusal(f"is not a PyTorch checkpoint (it starts with {head[:8]!r}): check the download")


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch.save never compresses: what unpacks to more than the file itself is a bomb.
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or (
            sum(e.file_size for e in entries) > path.stat().st_size
        ):
            raise _Refusal("is compressed, which torch.save never does: save it again")
        tops = [e.filename[:-9] for e in entries if re.fullmatch(r"[^/]+/data\.pkl", e.filename)]
        if len(tops) != 1:
            raise _Refusal("is a zip, but not one of torch.save (no data.pkl): check the file")
        order = f"{tops[0]}/byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise _Refusal("was saved on a big-endian machine: save it again on another")
        program = archive.read(f"{tops[0]}/data.pkl")
        _check_program(program)
        return _Reader(archive, tops[0], program).load()


def _check_program(program: bytes) -> None:
    """Refuses what costs memory out of proportion before the pickle's first step is taken."""
    objects = 0
    if len(program) > _MAX_PICKLE:
        raise _Refusal("holds far more than tensors: torch.save the model's state_dict() alone")
    for opcode, argument, _ in pickletools.genops(program):
        objects += opcode.name.startswith(("REDUCE", "NEWOBJ", "OBJ", "INST", "TUPLE"))
        # The memo is an array as long as its highest index.
        if objects > _MAX_OBJECTS or ("PUT" in opcode.name and argument > len(program)):
            raise _Refusal("holds too many objects: torch.save the model's state_dict() alone")


def _read_legacy(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise _Refusal(
            "is of PyTorch before 1.6, which only PyTorch reads: pip install torch, or load it "
            "elsewhere and torch.save it again"
        ) from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return _as_numpy(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise
        raise _Refusal(_holds_code(code[1])) from error


def _as_numpy(value: Any) -> Any:
    """`value` with numpy arrays for torch's tensors; they are known by their methods."""
    if isinstance(value, dict):
        return {key: _as_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_numpy(item) for item in value]
    if hasattr(value, "detach"):
        value = value.detach()
        return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return value


def _holds_code(name: str) -> str:
    return (
        f"holds code ({_shown(name)}), not only tensors: it was not loaded; "
        "torch.save the model's state_dict() instead"
    )


def _are_counts(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)  # True is no count


def _shown(value: object) -> str:
    """Text of a file as one short printable line: it may be long, or steer a terminal."""
    text = f"{type(value).__name__}: {value}" if isinstance(value, Exception) else str(value)
    return ascii(text)[1:-1][:100]
