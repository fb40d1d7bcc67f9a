"""Checked look-ups in the names and shapes of one component's parameters."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from ldm_export.errors import WeightsError

#: Network parameter name to shape.
Shapes = Mapping[str, tuple[int, ...]]

T = TypeVar("T")

#: Twice what any model has: 32 transformer layers, each of which counts as two members.
_MAX_MEMBERS = 128


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


def members(names: Iterable[str], prefix: str) -> dict[int, list[str]]:
    """Return the `names` that go on with a dot and a number after `prefix`, by increasing number.

    Look for members of members among the names of one, not among all: a file may have very many.

    Raises:
        WeightsError: The numbers are not 0, 1, 2, … without a gap, or are more than any model has.
    """
    pattern = re.compile(rf"{re.escape(prefix)}\.([0-9]{{1,4}})\.")
    grouped: dict[int, list[str]] = {}
    for name in names:
        if match := pattern.match(name):
            grouped.setdefault(int(match[1]), []).append(name)
    found = sorted(grouped)
    if len(found) > _MAX_MEMBERS:
        raise WeightsError(
            f"{prefix} has {len(found)} members; no model has more than {_MAX_MEMBERS}, so that "
            "this is not a checkpoint of a known family"
        )
    gap = next((index for index, number in enumerate(found) if index != number), None)
    if gap is not None:
        raise WeightsError(
            f"{prefix} has the members {', '.join(map(str, found))}, but {prefix}.{gap} is missing"
        )
    return {number: grouped[number] for number in found}


def indices(names: Iterable[str], prefix: str) -> list[int]:
    """Return the numbers of the `members` of a prefix, in increasing order.

    Raises:
        WeightsError: They are not 0, 1, 2, … without a gap, or are more than any model has.
    """
    return list(members(names, prefix))


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Return the first `limit` of `names`, sorted, and how many more there are, for a message."""
    ordered = sorted(names)
    more = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {more} more" if more > 0 else "")
