"""The values of a tensor that lies in the bytes of a file."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_runtime.tensor_files.errors import FormatError
from ldm_runtime.tensor_files.tensor_extent import TensorExtent

_UNREADABLE = frozenset({"float8_e4m3fn", "float8_e5m2"})  # NumPy has no such types


def tensor_values(extent: TensorExtent, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """Return the values of a tensor.

    The array is a view of `data` and may be unaligned there. Only bfloat16, which NumPy lacks, is
    widened into a fresh float32 array.

    Args:
        extent: The tensor, which was proved to lie inside the file.
        data: The whole file.

    Raises:
        FormatError: NumPy has no counterpart of its type.
    """
    if extent.dtype in _UNREADABLE:
        raise FormatError(f"has type {extent.dtype}, which cannot be read; convert it to float16")
    if extent.dtype == "bfloat16":
        return _widened(_view(extent, data, np.dtype("<u2")))
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
