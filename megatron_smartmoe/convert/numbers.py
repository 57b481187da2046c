"""Element types: numbers as they are stored, turned into those of another type.

Numpy has neither bfloat16 nor 8-bit floats; such numbers are unsigned integers here, as `StoredTensor` reads them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.spec.readers.torch_save import ITEM_BYTES

FLOATS = ("float32", "bfloat16", "float16", "float64")  # types that weights may have, 8-bit floats aside
FLOAT8 = ("float8_e4m3fn",)
_NUMPY = {"float32": np.float32, "float16": np.float16, "float64": np.float64, "bfloat16": np.uint16}


def empty(num_elements: int, dtype: str) -> NDArray[Any]:
    """Memory for so many numbers."""
    return np.empty(num_elements, _NUMPY[dtype])


def converted(numbers: NDArray[Any], dtype: str, wanted: str) -> NDArray[Any]:
    """Numbers of one type as those of another, rounded to the nearest, ties to even."""
    if dtype == wanted:
        return numbers
    single = as_float32(numbers, dtype)
    if wanted == "bfloat16":
        return _to_bfloat16(single)
    return single.astype(_NUMPY[wanted], copy=False)


def as_float32(numbers: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Numbers of any of the types as float32."""
    if dtype == "bfloat16":
        return np.left_shift(numbers.astype(np.uint32), np.uint32(16)).view(np.float32)
    if dtype in FLOAT8:
        values: NDArray[np.float32] = _float8_values()[numbers]
        return values
    return numbers.astype(np.float32, copy=False)


def size_bytes(num_elements: int, dtype: str) -> int:
    """Bytes of so many numbers."""
    return num_elements * ITEM_BYTES[dtype]


def _to_bfloat16(single: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32, after rounding. A NaN stays one, whatever its lower half is."""
    bits = np.ascontiguousarray(single).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
        np.uint16
    )
    is_nan = np.isnan(single)
    return np.where(is_nan, np.uint16(0x7FC0), rounded) if is_nan.any() else rounded


@functools.cache
def _float8_values() -> NDArray[np.float32]:
    """The value of each of the 256 numbers of type e4m3fn (OCP 8-bit floating point, revision 1.0, section 5.1)."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values[(bits & 127) == 127] = np.nan
    return np.where(bits & 128, -values, values).astype(np.float32)
