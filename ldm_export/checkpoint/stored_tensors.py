"""Tensors of a checkpoint that are read when their values are asked for, and views of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class StoredTensor(Protocol):
    """A tensor that stays in its file until `numpy` is called."""

    @property
    def dtype(self) -> str:
        """Type of an element as torch names it, such as "float32" or "bfloat16"."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take, as stored."""
        ...

    def numpy(self) -> npt.NDArray[Any]:
        """Return its values."""
        ...


@dataclass(frozen=True, kw_only=True)
class TransposedTensor:
    """A matrix with its axes exchanged."""

    tensor: StoredTensor

    @property
    def dtype(self) -> str:
        """Type of an element."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return self.tensor.shape[::-1]

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take, as stored."""
        return self.tensor.nbytes

    def numpy(self) -> npt.NDArray[Any]:
        """Return its values, a view of the stored ones."""
        return self.tensor.numpy().T


@dataclass(frozen=True, kw_only=True)
class JoinedTensor:
    """Tensors one after another along their first axis, joined when they are read; see `joined`.

    Attributes:
        parts: At least one; equal in type and in every axis but the first.
    """

    parts: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> str:
        """Type of an element."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        first = sum(part.shape[0] for part in self.parts)
        return (first, *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take, as stored."""
        return sum(part.nbytes for part in self.parts)

    def numpy(self) -> npt.NDArray[Any]:
        """Return its values in a fresh array."""
        return np.concatenate([part.numpy() for part in self.parts])


def joined(parts: Sequence[StoredTensor]) -> JoinedTensor | None:
    """Return tensors as one, or None if they differ in type or in an axis but the first."""
    kinds = {(part.dtype, len(part.shape), part.shape[1:]) for part in parts}
    if len(kinds) != 1 or parts[0].shape == ():
        return None
    return JoinedTensor(parts=tuple(parts))
