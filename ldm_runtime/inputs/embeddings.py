"""Embeddings that requests carry: vectors of an encoder outside the bundle, such as CLIP's."""

import os
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ldm_runtime.inputs.frozen_array import FrozenArray, as_float32
from ldm_runtime.inputs.npy_files import MAX_HEADER, decode_npy
from ldm_runtime.inputs.reading import FORMS, read_bytes, shown

#: Most vectors, and most numbers of one.
MAX_VECTORS = 1024
MAX_WIDTH = 16384

Float32Array = npt.NDArray[np.float32]

_MAX_BYTES = MAX_VECTORS * MAX_WIDTH * 8 + MAX_HEADER


class Embeddings(FrozenArray):
    """Vectors in memory: immutable, hashable, and equal to any others with the same numbers.

    Args:
        values: One vector per row, (k, D), of any floating-point type; kept as float32.
        source: Where they were read from.

    Raises:
        ValueError: The array is not such a matrix, is empty or too large, or holds a number that is
            not finite in float32.
    """

    def __init__(self, values: npt.NDArray[Any], source: str | None = None) -> None:
        _check(values.dtype, values.shape, "the array")
        narrow = as_float32(values)
        if not np.isfinite(narrow).all():
            row = int(np.flatnonzero(~np.isfinite(narrow).all(axis=1))[0])
            raise ValueError(
                f"vector {row} holds a number that is NaN, infinite or too large for float32; "
                "encode it again"
            )
        super().__init__(narrow, "{} {}\n".format(*narrow.shape), source)

    @classmethod
    def read(cls, value: object) -> Self:
        """Return the embeddings in `value`, or in the file that it names.

        Args:
            value: A path, a `data:` URL in base64 or the bytes of a `.npy` file, an array (k, D),
                or `Embeddings`. No pickles are read. A path lets the author of the text read
                any such file that this process can; a server should only pass on text that
                starts with "data:".

        Raises:
            ValueError: In one sentence, why `value` holds no embeddings, or too many.
        """
        match value:
            case cls():
                return value
            case np.ndarray():
                return cls(value)
            case bytes() | bytearray() | memoryview() | str() | os.PathLike():
                named = read_bytes(value, _MAX_BYTES)
                return cls(decode_npy(named, _check), named.source)
        raise ValueError(
            f"{shown(value)} holds no embeddings; give {FORMS} (.npy) or an array of vectors"
        )

    @property
    def values(self) -> Float32Array:
        """One vector per row, (k, D), read-only."""
        return self._array


def _check(dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> None:
    if dtype.kind != "f" or len(shape) != 2:
        raise ValueError(
            f"{name} is of {dtype} and shape {shape}; give floating-point numbers, one vector per "
            "row"
        )
    if not (1 <= shape[0] <= MAX_VECTORS and 1 <= shape[1] <= MAX_WIDTH):
        raise ValueError(
            f"{name} has {shape[0]} vectors of {shape[1]} numbers; give 1 to {MAX_VECTORS} of 1 "
            f"to {MAX_WIDTH}"
        )
