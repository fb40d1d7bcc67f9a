"""The values of a tensor that lies in the bytes of a file."""

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_runtime.tensor_files.tensor_extent import TensorExtent


def tensor_values(extent: TensorExtent, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """Return the values of a tensor.

    The array is a view of `data` and may be unaligned there. Only bfloat16 and the two types of 8
    bits, which NumPy lacks, are widened into a fresh float32 array.

    Args:
        extent: The tensor, which was proved to lie inside the file.
        data: The whole file.
    """
    if extent.dtype == "bfloat16":
        return _widened(_view(extent, data, np.dtype("<u2")))
    if extent.dtype in _FLOAT8:
        table = _FLOAT8[extent.dtype]()
        return np.take(table, _view(extent, data, np.dtype(np.uint8)))
    return _view(extent, data, np.dtype(extent.dtype).newbyteorder("<"))


def _view(
    extent: TensorExtent, data: npt.NDArray[np.uint8], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    if 0 in extent.shape:
        return np.empty(extent.shape, dtype)
    # The stride of an axis of length 1 is never used, and may be too large for NumPy.
    strides = tuple(
        dtype.itemsize * (step if length > 1 else 1)
        for length, step in zip(extent.shape, extent.stride, strict=True)
    )
    return np.ndarray(extent.shape, dtype, buffer=data, offset=extent.start, strides=strides)


def _widened(bfloat16: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widen the bits of bfloat16 values to float32, of which they are the upper half."""
    bits = bfloat16.astype(np.uint32)
    np.left_shift(bits, 16, out=bits)
    return bits.view(np.float32)


@cache
def _e4m3fn() -> npt.NDArray[np.float32]:
    """Return the values of all bytes: a sign, 4 bits of exponent and 3 of mantissa.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1: no infinities, and
    one pattern of bits that is not a number.
    """
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent.astype(float) - 10)
    )
    size[byte & 127 == 127] = np.nan
    return np.where(byte < 128, size, -size).astype(np.float32)


@cache
def _e5m2() -> npt.NDArray[np.float32]:
    """Return the values of all bytes, which are the upper halves of float16."""
    return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)


#: The values of all bytes by type.
_FLOAT8: Mapping[str, Callable[[], npt.NDArray[np.float32]]] = MappingProxyType(
    {"float8_e4m3fn": _e4m3fn, "float8_e5m2": _e5m2}
)
