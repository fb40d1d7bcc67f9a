"""Checks of the values of a request's fields: each returns the value to keep, or raises."""

import math
import numbers
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.initial_latents import InitialLatents
from ldm_runtime.inputs.layouts import LayoutObject, read_layout
from ldm_runtime.inputs.reading import shown as shown_text
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.suggestions import did_you_mean

_PAIR = 2

_T = TypeVar("_T")


def optional_text(name: str, value: object) -> str:
    """Accept text, and None for empty text."""
    return "" if value is None else text(name, value)


def text(name: str, value: object) -> str:
    """Accept text that can be written in UTF-8."""
    if not isinstance(value, str):
        raise RequestError(name, f"must be text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            name, f"is not valid Unicode at character {error.start}; was it typed in UTF-8?"
        ) from error
    return _plain(value)


def text_like(name: str, value: object, *, pattern: str, hint: str) -> str:
    """Accept text of a form."""
    found = text(name, value)
    if re.fullmatch(pattern, found) is None:
        raise RequestError(name, f"is {shown(found)}; {hint}")
    return found


# NumPy's numbers are welcome and become Python's, so that records compare and encode.
def whole_number(name: str, value: object, *, low: int, high: int, hint: str = "") -> int:
    """Accept a whole number within bounds, but no bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RequestError(name, f"must be a whole number, got {shown(value)}")
    integer = int(value)
    if not low <= integer <= high:
        raise _outside(name, f"{low} and {high}", integer, hint)
    return integer


def label(name: str, value: object, *, low: int, high: int) -> int | str:
    """Accept the number of a class within bounds, or its name."""
    if isinstance(value, str):
        if not value.strip():
            raise RequestError(name, "is empty text; give the number or the name of a class")
        return text(name, value)
    return whole_number(name, value, low=low, high=high)


def number(name: str, value: object, *, low: float, high: float, hint: str = "") -> float:
    """Accept a finite number within bounds, but no bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(name, f"must be a number, got {shown(value)}")
    try:
        real = float(value)
    except OverflowError:
        real = math.inf
    if not low <= real <= high:  # which NaN never does
        raise _outside(name, f"{low:g} and {high:g}", value, hint)
    return real


def switch(name: str, value: object) -> bool:
    """Accept True or False."""
    if not isinstance(value, bool):
        raise RequestError(name, f"must be true or false, got {shown(value)}")
    return value


def choice(name: str, value: object, *, choices: Sequence[str]) -> str:
    """Accept one of some names."""
    if not isinstance(value, str) or value not in choices:
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise RequestError(
            name, f"unknown {name} {shown(value)}{hint}; choose {', '.join(choices)}"
        )
    return _plain(value)


def numbers_list(name: str, value: object, *, low: float, high: float) -> tuple[float, ...]:
    """Accept a list of numbers within bounds."""
    return tuple(number(name, each, low=low, high=high) for each in _items(name, value))


def interval(name: str, value: object, *, low: float, high: float) -> tuple[float, float]:
    """Accept a pair of numbers, the lower first."""
    ends = numbers_list(name, value, low=low, high=high)
    if len(ends) != _PAIR or ends[0] > ends[1]:
        raise RequestError(name, f"must be two numbers, the lower first, got {shown(value)}")
    return ends[0], ends[1]


def whole_pair(name: str, value: object, *, low: int, high: int, hint: str) -> tuple[int, int]:
    """Accept a pair of whole numbers within bounds."""
    pair = tuple(whole_number(name, each, low=low, high=high) for each in _items(name, value))
    if len(pair) != _PAIR:
        raise RequestError(name, f"must be two whole numbers, got {shown(value)}; {hint}")
    return pair[0], pair[1]


def margins(name: str, value: object, *, low: int, high: int) -> tuple[int, int, int, int]:
    """Accept pixels to the left, top, right and bottom, not all zero."""
    sides = tuple(whole_number(name, each, low=low, high=high) for each in _items(name, value))
    if len(sides) != 2 * _PAIR or not any(sides):
        raise RequestError(
            name, f"must be pixels to add left, top, right and bottom, got {shown(value)}"
        )
    return sides[0], sides[1], sides[2], sides[3]


def image(name: str, value: object) -> InputImage:
    """Accept anything that `InputImage.read` can read."""
    return _read(name, value, InputImage.read, "image")


def segmentation(name: str, value: object) -> SegmentationMap:
    """Accept anything that `SegmentationMap.read` can read."""
    return _read(name, value, SegmentationMap.read, "map")


def depth_map(name: str, value: object) -> DepthMap:
    """Accept anything that `DepthMap.read` can read."""
    return _read(name, value, DepthMap.read, "map")


def embeddings(name: str, value: object) -> Embeddings:
    """Accept anything that `Embeddings.read` can read."""
    return _read(name, value, Embeddings.read, "array")


def latents(name: str, value: object) -> InitialLatents:
    """Accept anything that `InitialLatents.read` can read."""
    return _read(name, value, InitialLatents.read, "array")


def layout(name: str, value: object) -> tuple[LayoutObject, ...]:
    """Accept anything that `read_layout` can read."""
    return _read(name, value, read_layout, "layout")


def check_positive(name: str, value: object) -> None:
    """Check an argument that counts something; None is not given.

    Raises:
        ValueError: It is not a whole number from 1.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
        raise ValueError(f"{name} must be at least 1 and whole, got {shown(value)}")


def shown(value: object) -> str:
    """Return a value as it may stand in a message."""
    return shown_text(repr(value))


def _plain(value: str) -> str:
    """Return text of Python's own type, since metadata holds none of NumPy's."""
    return str.__str__(value)


def _outside(name: str, bounds: str, value: object, hint: str) -> RequestError:
    fix = f"; {hint}" if hint else ""
    return RequestError(name, f"must lie between {bounds}, got {shown(value)}{fix}")


def _items(name: str, value: object) -> Sequence[object]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RequestError(name, f"must be a list of numbers, got {shown(value)}")
    return value


def _read(name: str, value: object, read: Callable[[object], _T], noun: str) -> _T:
    if isinstance(value, dict) and "sha256" in value:
        raise RequestError(
            name, f"is known by its hash alone, {value['sha256']}; give the {noun} itself"
        )
    try:
        return read(value)
    except ValueError as error:
        raise RequestError(name, str(error)) from error
