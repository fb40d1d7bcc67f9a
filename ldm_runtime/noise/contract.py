"""The interface of noise generators: a seed means the same numbers, call after call."""

import math
from abc import ABC, abstractmethod
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint32]
Precision = TypeVar("Precision", np.float32, np.float64)


class NoiseGenerator(ABC):
    """A stream of standard normal numbers that depends on nothing but its seed.

    Raises:
        ValueError: The seed does not fit 64 unsigned bits.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must lie between 0 and 2**64 - 1, got {seed}")

    @overload
    def randn(self, shape: tuple[int, ...]) -> Float32Array: ...

    @overload
    def randn(self, shape: tuple[int, ...], dtype: type[Precision]) -> npt.NDArray[Precision]: ...

    def randn(
        self, shape: tuple[int, ...], dtype: type[np.floating] = np.float32
    ) -> npt.NDArray[np.floating]:
        """Sample the next numbers of the stream.

        Raises:
            ValueError: `dtype` is neither float32 nor float64.
        """
        precision = np.dtype(dtype)
        if precision not in (np.float32, np.float64):
            raise ValueError(f"noise is sampled in float32 or float64, not in {precision}")
        return self._sample(math.prod(shape), precision).reshape(shape)

    @abstractmethod
    def _sample(self, count: int, dtype: np.dtype[np.floating]) -> npt.NDArray[np.floating]:
        """Sample `count` numbers of type `dtype`, shape (count,)."""
