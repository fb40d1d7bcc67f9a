"""Latents that a request brings, to start from in place of the noise of its seed."""

import math
import os
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ldm_runtime.inputs.frozen_array import FrozenArray, as_float32
from ldm_runtime.inputs.npy_files import MAX_HEADER, decode_npy
from ldm_runtime.inputs.reading import FORMS, read_bytes, shown

#: Most numbers, of all images together.
MAX_NUMBERS = 2**26

Float32Array = npt.NDArray[np.float32]

_AXES = 4


class InitialLatents(FrozenArray):
    """Latents in memory: immutable, hashable, and equal to any others with the same numbers.

    Args:
        values: (N, C, h, w) of any floating-point type, kept as float32; N is the number of images.
            They are noise of standard deviation 1, as diffusers' argument `latents`, and are scaled
            to the first noise level.
        source: Where they were read from.

    Raises:
        ValueError: The array does not have four axes, is empty or too large, or holds a number that
            is not finite in float32.
    """

    def __init__(self, values: npt.NDArray[Any], source: str | None = None) -> None:
        _check(values.dtype, values.shape, "the array")
        narrow = as_float32(values)
        if not np.isfinite(narrow).all():
            raise ValueError("the latents hold NaN, infinity or a number too large for float32")
        super().__init__(narrow, "{} {} {} {}\n".format(*narrow.shape), source)

    @classmethod
    def read(cls, value: object) -> Self:
        """Return the latents in `value`, or in the file that it names.

        Args:
            value: A path, a `data:` URL in base64 or the bytes of a `.npy` file, an array
                (N, C, h, w), anything that NumPy can take for one, such as a tensor of torch on the
                CPU, or `InitialLatents`. No pickles are read. A path lets the author of the text
                read any such file that this process can; a server should only pass on text that
                starts with "data:".

        Raises:
            ValueError: In one sentence, why `value` holds no latents.
        """
        match value:
            case cls():
                return value
            case bytes() | bytearray() | memoryview() | str() | os.PathLike():
                named = read_bytes(value, MAX_NUMBERS * 8 + MAX_HEADER)
                return cls(decode_npy(named, _check), named.source)
        if not hasattr(value, "__array__"):
            raise ValueError(
                f"{shown(value)} holds no latents; give {FORMS} (.npy) or an array "
                "(images, channels, height, width)"
            )
        return cls(np.asarray(value))

    @property
    def values(self) -> Float32Array:
        """The numbers, (N, C, h, w), read-only."""
        return self._array

    def of_image(self, index: int) -> "InitialLatents":
        """Return the latents of one image, (1, C, h, w)."""
        return InitialLatents(self._array[index : index + 1], self._source)

    @property
    def _extent(self) -> tuple[int, ...]:
        return self._array.shape


def _check(dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> None:
    if dtype.kind != "f" or len(shape) != _AXES:
        raise ValueError(
            f"{name} is of {dtype} and shape {shape}; give floating-point numbers "
            "(images, channels, height, width)"
        )
    if not 1 <= math.prod(shape) <= MAX_NUMBERS:
        raise ValueError(f"{name} has shape {shape}; give 1 to {MAX_NUMBERS} numbers")
