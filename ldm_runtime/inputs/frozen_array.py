"""An array that cannot be changed, equal to any other with the same values."""

import hashlib
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt


def as_float32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return numbers in float32, without negative zeros; those beyond its range are infinite."""
    with np.errstate(over="ignore"):
        narrow = np.asarray(values, dtype=np.dtype("<f4"))
    return narrow + np.float32(0)  # which makes zeros of negative zeros


class FrozenArray:
    """Base of the arrays that requests carry: immutable, hashable, compared by value.

    Args:
        array: The values, without negative zeros or NaN, which compare unlike their bytes; copied.
        header: A line of text that stands before the values in the file whose hash identifies them.
        source: Where it was read from; does not count for equality.
    """

    def __init__(self, array: npt.NDArray[Any], header: str, source: str | None) -> None:
        # Over bytes, because the owner of an array could make it writable again.
        data = np.frombuffer(array.tobytes(), dtype=array.dtype)
        self._array: npt.NDArray[Any] = data.reshape(array.shape)
        self._header = header
        self._source = source

    @property
    def source(self) -> str | None:
        """The path it was read from, if any; does not count for equality."""
        return self._source

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal sha256 of the header and the values, which other programs can compute."""
        digest = hashlib.sha256(self._header.encode())
        digest.update(self._array.data)
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrozenArray) or type(other) is not type(self):
            return NotImplemented
        return self is other or np.array_equal(self._array, other._array)

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing in it can change; `dataclasses.asdict` asks for a copy

    @property
    def _extent(self) -> tuple[int, ...]:
        """The lengths by which `repr` tells it from others."""
        return self._array.shape

    def __repr__(self) -> str:
        source = f", {self._source!r}" if self._source else ""
        extent = "x".join(map(str, self._extent))
        return f"{type(self).__name__}({extent}, sha256 {self.sha256[:12]}{source})"

    def __reduce__(self) -> tuple[type[Self], tuple[npt.NDArray[Any], str | None]]:
        return type(self), (self._array, self._source)  # the arguments of every subclass


class FrozenRaster(FrozenArray):
    """A frozen array of pixels, (H, W) or (H, W, channels)."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, in this order, as PIL has it."""
        return self._array.shape[1], self._array.shape[0]

    @property
    def _extent(self) -> tuple[int, int]:
        return self.size
