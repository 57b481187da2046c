"""Arrays of `.npz` and `.npy` files; what a header declares is compared with what the file holds before it is read.

`numpy.load` believes the headers: a file of 5 MB can ask for 4 GiB, and a damaged one fails in a dozen ways. Here the
sizes that the zip directory and each array's header declare are checked first, and only plain numbers and texts are
read.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from megatron_smartmoe.errors import ConfigError, printable
from megatron_smartmoe.spec.readers import files
from megatron_smartmoe.spec.readers.files import Named

Array = NDArray[Any]

NPY_MAGIC = b"\x93NUMPY"
ZIP_MAGIC = b"PK\x03\x04"
ALWAYS_CELLS = 2**23  # entries of an array that may be read from a file of any size
CELLS_PER_BYTE = 16  # ... and this many per byte of the file: counts are rarely packed more tightly
_MOST_MEMBERS = 10_000
_MOST_HEADER_BYTES = 4096
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_npz(named: Named, wanted: Sequence[str] | None = None) -> dict[str, Array]:
    """The arrays of an `.npz` file, by name.

    Args:
        named: the file.
        wanted: names of the arrays to read; None for all.

    Raises:
        ConfigError: it cannot be read, lacks an array, or declares more than a file of its size may hold.
    """
    size = files.size_of(named)
    try:
        with zipfile.ZipFile(named.path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()[: _MOST_MEMBERS + 1]}
            if len(members) > _MOST_MEMBERS:
                raise named.refused(f"holds more than {_MOST_MEMBERS:,} arrays")
            names = list(members) if wanted is None else list(wanted)
            missing = [name for name in names if name not in members]
            if missing:
                raise named.refused(f"has no array {', '.join(missing)}")
            return {name: _member(archive, members[name], name, size, named) for name in names}
    except ConfigError:
        raise
    except Exception as error:  # a damaged archive fails in any way: BadZipFile, zlib.error, NotImplementedError, ...
        raise named.refused(f"is not an .npz file: {_words(error)}") from None


def read_npy(named: Named) -> Array:
    """The array of an `.npy` file.

    Raises:
        ConfigError: it cannot be read, or declares more than the file holds.
    """
    size = files.size_of(named)
    try:
        with named.path.open("rb") as file:
            return _array(file, size, "array", size, named)
    except ConfigError:
        raise
    except Exception as error:  # see read_npz
        raise named.refused(f"is not an .npy file: {_words(error)}") from None


def check_cells(cells: int, size_bytes: int, what: str, named: Named) -> None:
    """Raise ConfigError where `what` has more entries than may be read from a file of `size_bytes`."""
    most = max(ALWAYS_CELLS, CELLS_PER_BYTE * size_bytes)
    if cells > most:
        rule = f"declares {cells:,} numbers in {what}: at most {most:,} are read from {size_bytes:,} bytes"
        raise named.refused(rule)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, size: int, named: Named) -> Array:
    if info.flag_bits & 1:
        raise named.refused(f"is encrypted: {name}")
    if info.compress_type not in _METHODS:
        raise named.refused(f"has {name} in compression method {info.compress_type}: only numpy's own are read")
    with archive.open(info) as file:
        return _array(file, info.file_size, name, size, named)


def _array(file: Any, length: int, name: str, size: int, named: Named) -> Array:
    """The array in `file`, whose `length` bytes are those of an .npy file.

    Args:
        file: at its beginning.
        length: bytes that it is said to have.
        name: of the array.
        size: bytes of the whole file on disk.
        named: the file on disk.
    """
    head = file.read(12)
    if not head.startswith(NPY_MAGIC) or len(head) < 12 or head[6] not in (1, 2, 3):
        raise named.refused(f"holds something else than an array under {name}")
    header_bytes = int.from_bytes(head[8:10] if head[6] == 1 else head[8:12], "little")
    if header_bytes > _MOST_HEADER_BYTES:
        raise named.refused(f"has a header of {header_bytes:,} bytes in {name}")
    begin = 10 if head[6] == 1 else 12
    header = io.BytesIO(head[8:] + file.read(begin + header_bytes - 12))
    # Versions 2 and 3 differ in the encoding of field names, which are refused below.
    read_header = npy.read_array_header_1_0 if head[6] == 1 else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(header, max_header_size=_MOST_HEADER_BYTES)
    if dtype.kind not in "biufcU" or dtype.hasobject:
        raise named.refused(f"holds {dtype} in {name}: only numbers and texts are read, never objects")
    cells = math.prod(shape)
    check_cells(cells * max(1, dtype.itemsize // 8), size, name, named)
    declared = cells * dtype.itemsize
    if min(shape, default=0) < 0 or declared != length - begin - header_bytes:
        rule = f"declares {declared:,} bytes in {name}, and holds {length - begin - header_bytes:,}"
        raise named.refused(f"is damaged: it {rule}")
    data = file.read(declared)
    if len(data) != declared:
        raise named.refused(f"is truncated: {name} ends after {len(data):,} of {declared:,} bytes")
    file.read(1)  # a zip member's checksum is compared at its end
    array = np.frombuffer(data, dtype=dtype).copy()  # that of a buffer cannot be written
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _words(error: Exception) -> str:
    text = printable(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def whole_numbers(array: Array, what: str, named: Named) -> NDArray[np.int64]:
    """An array of whole numbers as int64.

    Raises:
        ConfigError: it has another type, or numbers that int64 does not have.
    """
    if array.dtype.kind not in "iu":
        raise named.refused(f"has {what} of type {array.dtype}: must be whole numbers (int64)")
    if array.size and int(array.max()) >= 2**62:
        raise named.refused(f"has {what} of {int(array.max())}: must be below 2^62")
    return array.astype(np.int64)
