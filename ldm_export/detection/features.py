"""A feature of a checkpoint with the tensor that shows it, and features read from shapes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from ldm_export.hyperparameters.shapes import Shapes

NONE = "none"


class CheckpointTensor(Protocol):
    """A tensor of a checkpoint; its values are read only when `numpy` is called."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of every axis."""
        ...

    @property
    def dtype(self) -> str:
        """Element type as stored, such as "float16"."""
        ...

    def numpy(self) -> npt.NDArray[Any]:
        """Return the values."""
        ...


Tensors = Mapping[str, CheckpointTensor]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One feature of a checkpoint.

    Attributes:
        value: Its value; "none" where the feature is absent.
        tensor: Name of the tensor that shows it, or "" if it shows by absence.
    """

    value: int | str
    tensor: str


#: A feature that is absent.
ABSENT = Feature(value=NONE, tensor="")


def present(tensors: Iterable[str], kinds: Iterable[tuple[str, str]]) -> Feature:
    """Return the first kind whose tensor is there, of (kind, tensor) pairs."""
    names = frozenset(tensors)
    for kind, tensor in kinds:
        if tensor in names:
            return Feature(value=kind, tensor=tensor)
    return ABSENT


def size_of(shapes: Shapes, tensor: str, axis: int) -> Feature:
    """Return the length of an axis of `tensor`."""
    shape = shapes.get(tensor, ())
    if axis >= len(shape):
        return ABSENT
    return Feature(value=shape[axis], tensor=tensor)


def difference(whole: Feature, part: Feature) -> Feature:
    """Return the length of an axis without that of another."""
    if isinstance(whole.value, int) and isinstance(part.value, int):
        return Feature(value=whole.value - part.value, tensor=whole.tensor)
    return ABSENT


def ending(names: Iterable[str], suffix: str) -> str:
    """Return the first of `names` that ends in `suffix`, or ""."""
    return next((name for name in names if name.endswith(suffix)), "")
