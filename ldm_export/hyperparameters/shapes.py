"""Checked look-ups in the names and shapes of one component's parameters."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from ldm_export.errors import WeightsError

#: Network parameter name to shape.
Shapes = Mapping[str, tuple[int, ...]]

T = TypeVar("T")


def shape_of(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    """Return the shape of parameter `name`.

    Raises:
        WeightsError: There is no such parameter, or it does not have `rank` axes.
    """
    if name not in shapes:
        raise WeightsError(
            f"the tensor {name} is missing, and the model cannot be read without it; "
            "is the checkpoint complete?"
        )
    shape = shapes[name]
    if len(shape) != rank or 0 in shape:
        raise WeightsError(
            f"the tensor {name} has shape {shape}; {rank} axes were expected, none of them empty"
        )
    return shape


def same(values: Mapping[str, T]) -> T:
    """Return the one value that all of `values`, keyed by what they were read from, have.

    Raises:
        WeightsError: Two of them differ.
    """
    (first, expected), *rest = values.items()
    for name, value in rest:
        if value != expected:
            raise WeightsError(
                f"the weights contradict each other: {name} is {value}, but {first} is {expected}"
            )
    return expected


def multipliers(channels: Sequence[int], base: int, what: str) -> tuple[int, ...]:
    """Return `channels` as multiples of `base`.

    Raises:
        WeightsError: One of them is not a multiple.
    """
    for level, count in enumerate(channels):
        if count % base:
            raise WeightsError(
                f"{what}: level {level} has {count} channels, which is not a multiple of the "
                f"first level's {base}"
            )
    return tuple(count // base for count in channels)


def indices(names: Iterable[str], prefix: str) -> list[int]:
    """Return the numbers that follow `prefix` and a dot in `names`, in increasing order.

    Raises:
        WeightsError: They are not 0, 1, 2, … without a gap.
    """
    pattern = re.compile(rf"{re.escape(prefix)}\.([0-9]{{1,4}})\.")
    found = sorted({int(match[1]) for name in names if (match := pattern.match(name))})
    gap = next((index for index, number in enumerate(found) if index != number), None)
    if gap is not None:
        raise WeightsError(
            f"{prefix} has the members {', '.join(map(str, found))}, but {prefix}.{gap} is missing"
        )
    return found


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Return the first `limit` of `names`, sorted, and how many more there are, for a message."""
    ordered = sorted(names)
    more = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {more} more" if more > 0 else "")
