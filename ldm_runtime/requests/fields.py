"""The fields of a generation request: description, bounds, and the check of each value.

A field is one annotation in `request.GenerationRequest`. Its bounds, the flags of the command line,
their help and the JSON schema are all read from there.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from types import MappingProxyType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import msgspec

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.layouts import LayoutObject, read_layout
from ldm_runtime.inputs.reading import shown as shown_text
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.suggestions import did_you_mean

MAX_SEED = 2**64 - 1
_PAIR = 2

#: The groups of `ldm generate --help`.
Group = Literal["Conditioning", "Input image", "Sampling", "Guidance", "Output"]

Check = Callable[[str, object], object]

_T = TypeVar("_T")


def about(
    text: str,
    group: Group,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    **extra: object,
) -> msgspec.Meta:
    """Describe a field of a request, for `typing.Annotated`.

    Args:
        text: Its description, in one phrase with units.
        group: Where the help has it.
        low: Lowest value.
        high: Highest value.
        choices: All values there are.
        extra: `metavar`, `flags` in addition to its name, and `example` of its use.
    """
    schema = _bounds_schema(low, high) | ({"enum": [*choices, None]} if choices else {})
    return msgspec.Meta(
        description=text,
        extra_json_schema=schema or None,
        extra={"group": group, "low": low, "high": high, "choices": tuple(choices), **extra},
    )


def about_items(
    text: str, group: Group, *, low: float, high: float, **extra: object
) -> msgspec.Meta:
    """Describe a field that is a list of numbers, with the bounds of each."""
    return msgspec.Meta(
        description=text,
        extra_json_schema={"items": {"type": "number", **_bounds_schema(low, high)}},
        extra={"group": group, "low": low, "high": high, "choices": (), **extra},
    )


def _bounds_schema(low: float | None, high: float | None) -> dict[str, Any]:
    bounds = {"minimum": low, "maximum": high}
    return {name: bound for name, bound in bounds.items() if bound is not None}


@dataclass(frozen=True, kw_only=True)
class FieldRecord:
    """Name, type, help and check of one field of a request.

    Attributes:
        name: Its name.
        kind: Its type, None left out.
        default: Its default.
        text: Its description.
        group: Where the help has it.
        choices: All values there are, if they are names.
        metavar: Name of its value in the help.
        flags: Flags in addition to its name.
        example: Example of its use.
        schema: Its bounds and choices, as JSON schema has them.
        check: Returns the value to keep, or raises a `RequestError`.
    """

    name: str
    kind: Any
    default: object
    text: str
    group: Group
    choices: tuple[str, ...]
    metavar: str | None
    flags: tuple[str, ...]
    example: str | None
    schema: Mapping[str, Any]
    check: Check


def field_records(request: type) -> Mapping[str, FieldRecord]:
    """Return the record of every field of a dataclass whose fields are described by `about`."""
    hints = get_type_hints(request, include_extras=True)
    return MappingProxyType(
        {
            field.name: _record(
                field.name, hints[field.name], None if field.default is MISSING else field.default
            )
            for field in fields(request)
        }
    )


def _record(name: str, hint: Any, default: object) -> FieldRecord:  # noqa: ANN401  (a type)
    optional, meta = get_args(hint)
    kind = get_args(optional)[0] if isinstance(optional, UnionType) else optional
    extra = meta.extra
    return FieldRecord(
        name=name,
        kind=kind,
        default=default,
        text=meta.description,
        group=extra["group"],
        choices=extra["choices"],
        metavar=extra.get("metavar"),
        flags=tuple(extra.get("flags", ())),
        example=extra.get("example"),
        schema=meta.extra_json_schema or {},
        check=_check_of(kind, extra),
    )


def _check_of(kind: Any, extra: Mapping[str, Any]) -> Check:  # noqa: ANN401  (a type)
    """Return the check of a field from its type and its bounds."""
    if extra["choices"]:
        return partial(choice, choices=extra["choices"])
    bounds = {name: extra[name] for name in ("low", "high") if extra[name] is not None}
    return partial(_CHECKS[kind], **bounds)


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
    return value


# NumPy's numbers are welcome and become Python's, so that records compare and encode.
def whole_number(name: str, value: object, *, low: int, high: int) -> int:
    """Accept a whole number within bounds, but no bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RequestError(name, f"must be a whole number, got {shown(value)}")
    integer = int(value)
    if not low <= integer <= high:
        raise RequestError(name, f"must lie between {low} and {high}, got {shown(integer)}")
    return integer


def number(name: str, value: object, *, low: float, high: float) -> float:
    """Accept a finite number within bounds, but no bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(name, f"must be a number, got {shown(value)}")
    try:
        real = float(value)
    except OverflowError:
        real = math.inf
    if not low <= real <= high:  # which NaN never does
        raise RequestError(name, f"must lie between {low:g} and {high:g}, got {shown(value)}")
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
    return value


def numbers_list(name: str, value: object, *, low: float, high: float) -> tuple[float, ...]:
    """Accept a list of numbers within bounds."""
    return tuple(number(name, each, low=low, high=high) for each in _items(name, value))


def interval(name: str, value: object, *, low: float, high: float) -> tuple[float, float]:
    """Accept a pair of numbers, the lower first."""
    ends = numbers_list(name, value, low=low, high=high)
    if len(ends) != _PAIR or ends[0] > ends[1]:
        raise RequestError(name, f"must be two numbers, the lower first, got {shown(value)}")
    return ends[0], ends[1]


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


def embeddings(name: str, value: object) -> Embeddings:
    """Accept anything that `Embeddings.read` can read."""
    return _read(name, value, Embeddings.read, "array")


def layout(name: str, value: object) -> tuple[LayoutObject, ...]:
    """Accept anything that `read_layout` can read."""
    return _read(name, value, read_layout, "layout")


def shown(value: object) -> str:
    """Return a value as it may stand in a message."""
    return shown_text(repr(value))


def _items(name: str, value: object) -> Sequence[object]:
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


#: The check of every type that a field has.
_CHECKS: Mapping[Any, Callable[..., object]] = MappingProxyType(
    {
        str: text,
        int: whole_number,
        float: number,
        bool: switch,
        tuple[float, ...]: numbers_list,
        tuple[float, float]: interval,
        tuple[int, int, int, int]: margins,
        tuple[LayoutObject, ...]: layout,
        InputImage: image,
        SegmentationMap: segmentation,
        Embeddings: embeddings,
    }
)
