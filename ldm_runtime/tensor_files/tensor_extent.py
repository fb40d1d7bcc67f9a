"""The place of a tensor in its file, and the sizes that no tensor may have.

The parsers of the two checkpoint formats end here: whatever they read becomes `TensorExtent`
records, each of which has been proved to lie inside its file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeGuard

from ldm_runtime.tensor_files.errors import FormatError

MAX_DIMS = 8  # torch allows 64; no layer has weights of more than 5
_MAX_NAME_LENGTH = 512
# A broadcast tensor has more elements than its file has bytes; below this size that is harmless.
_MIN_EXPANDED_BYTES = 1 << 20

#: Bytes of one element of each type that a tensor may have, by torch's name for the type.
DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "bool": 1,
        "uint8": 1,
        "int8": 1,
        "float8_e4m3fn": 1,
        "float8_e5m2": 1,
        "uint16": 2,
        "int16": 2,
        "float16": 2,
        "bfloat16": 2,
        "uint32": 4,
        "int32": 4,
        "float32": 4,
        "uint64": 8,
        "int64": 8,
        "float64": 8,
        "complex64": 8,
        "complex128": 16,
    }
)
#: Those of them that are real floating-point numbers.
FLOATS = frozenset(name for name in DTYPE_BYTES if "float" in name)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorExtent:
    """A tensor that lies inside its file.

    Attributes:
        dtype: Type of an element, a key of `DTYPE_BYTES`.
        shape: Length of each axis.
        stride: Elements from one index to the next along each axis.
        start: Byte of the file at which the first element begins.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take when they are laid out one after another."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


def is_size(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer (not a bool) that could be a length in torch."""
    return type(value) is int and 0 <= value < 2**63


def check_name(name: object) -> str:
    """Return the name of a tensor if it can be shown to people.

    Raises:
        FormatError: It is not a string, is empty or very long, or holds control characters, which
            could play tricks on a terminal.
    """
    if not isinstance(name, str):
        raise FormatError(f"a tensor is named by a {type(name).__name__} and not by a string")
    if not 0 < len(name) <= _MAX_NAME_LENGTH:
        raise FormatError(f"a tensor has a name of {len(name)} characters")
    if not name.isprintable():
        raise FormatError(f"the name of a tensor holds control characters: {name!a}")
    return name


def check_inside(extent: TensorExtent, available: int, file_size: int) -> None:
    """Prove that a tensor lies inside the bytes that are its to use.

    Args:
        extent: The tensor.
        available: Bytes from `extent.start` to the end of what the tensor may use.
        file_size: Bytes of the file; a tensor that is expanded may not grow beyond this.

    Raises:
        FormatError: It reaches beyond them.
    """
    item = DTYPE_BYTES[extent.dtype]
    expanded = item * math.prod(max(length, 1) for length in extent.shape)
    if expanded > max(file_size, _MIN_EXPANDED_BYTES):
        raise FormatError(f"its {expanded} bytes are more than the whole file has ({file_size})")
    if 0 in extent.shape:
        return
    last = sum(
        (length - 1) * stride for length, stride in zip(extent.shape, extent.stride, strict=True)
    )
    if (last + 1) * item > available:
        raise FormatError(f"it reaches {(last + 1) * item - available} bytes beyond its storage")


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor whose elements follow one another, last axis fastest."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
