"""Reader of .npz: plain arrays, whose sizes are checked before memory is taken."""

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from iared2_jax.errors import UsageError

_MAX_BYTES = 16 << 30  # ten times a ViT-L with its optimizer
_MAX_RATIO = 200  # unpacked over packed; weights pack to some tenth at the least
_SMALL = 1 << 24  # bytes that are worth no check: zeros pack well
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name; nothing in it is executed.

    Raises:
      UsageError: the file is damaged, holds objects, or claims sizes that it does not have.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked > min(_MAX_BYTES, max(_SMALL, _MAX_RATIO * path.stat().st_size)):
                raise UsageError(
                    f"{path} would unpack to {unpacked / 2**30:.1f} GiB, which no weights do"
                )
            return {e.filename.removesuffix(".npy"): _read_array(archive, e) for e in entries}
    except UsageError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not a readable .npz of arrays: {error}") from error


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as stream:
        version = npy.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"{entry.filename} is of a version {version} that is not known here")
        shape, fortran, dtype = _HEADERS[version](stream)
        if dtype.hasobject:
            raise ValueError(f"{entry.filename} holds Python objects, not numbers")
        size = math.prod(shape) * dtype.itemsize
        if size > entry.file_size:
            raise ValueError(f"{entry.filename} claims {size} bytes, but has {entry.file_size}")
        content = stream.read(size)
    if len(content) != size:
        raise ValueError(f"{entry.filename} is cut short")
    values = np.frombuffer(content, dtype)
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)
