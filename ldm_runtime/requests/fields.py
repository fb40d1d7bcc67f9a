"""The fields of a generation request: description, bounds, and the check of each value.

A field is one annotation in `request.GenerationRequest`. Its bounds, the flags of the command line,
their help and the JSON schema are all read from there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from types import MappingProxyType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.initial_latents import InitialLatents
from ldm_runtime.inputs.layouts import LayoutObject
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.requests import checks
from ldm_runtime.requests.aliases import unknown_field

MAX_SEED = 2**64 - 1

#: The groups of `ldm generate --help`.
Group = Literal["Conditioning", "Input image", "Sampling", "Guidance", "Output"]

Check = Callable[[str, object], object]


def about(
    text: str,
    group: Group,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    pattern: str = "",
    **extra: object,
) -> msgspec.Meta:
    """Describe a field of a request, for `typing.Annotated`.

    Args:
        text: Its description, in one phrase with units.
        group: Where the help has it.
        low: Lowest value.
        high: Highest value.
        choices: All values there are.
        pattern: Regular expression of the whole text, of a field of text that has a form.
        extra: `metavar`, `flags` in addition to its name, an `example` of its use, a `hint` for
            values out of range, `none_is_empty` for text that None leaves empty, and `or_name` for
            numbers that have names.
    """
    null = {"type": ["string", "null"]} if extra.get("none_is_empty") else {}
    form = {"pattern": f"^({pattern})$"} if pattern else {}
    schema = _bounds_schema(low, high) | null | form
    bounds = {"low": low, "high": high, "choices": tuple(choices), "pattern": pattern}
    return msgspec.Meta(
        description=text,
        extra_json_schema=schema or None,
        extra={"group": group, **bounds, **extra},
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
        schema: Its bounds, as JSON schema has them, and its type where that is not `kind`.
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
    is_optional = get_origin(optional) in (UnionType, Union)
    kind = get_args(optional)[0] if is_optional else optional
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
        return partial(checks.choice, choices=extra["choices"])
    if extra.get("pattern"):
        return partial(checks.text_like, pattern=extra["pattern"], hint=extra["hint"])
    if extra.get("none_is_empty"):
        return checks.optional_text
    bounds = {name: extra[name] for name in ("low", "high", "hint") if extra.get(name) is not None}
    return partial(checks.label if extra.get("or_name") else _CHECKS[kind], **bounds)


def check_names(names: Iterable[object], records: Mapping[str, FieldRecord]) -> None:
    """Check that every name is that of a field.

    Raises:
        RequestError: One is not; the sentence has the name that was probably meant.
    """
    for name in names:
        if name not in records:
            raise unknown_field(str(name), records)


def checked_fields(
    given: Mapping[str, object], records: Mapping[str, FieldRecord]
) -> dict[str, object]:
    """Return the value of every field, checked; those that are not given are at their defaults.

    Raises:
        RequestError: A field is unknown, of the wrong type or out of range.
    """
    check_names(given, records)
    values = {name: given.get(name, record.default) for name, record in records.items()}
    for name, record in records.items():
        if values[name] is not None or record.default is not None:
            values[name] = record.check(name, values[name])
    return values


#: The check of every type that a field has.
_CHECKS: Mapping[Any, Callable[..., object]] = MappingProxyType(
    {
        str: checks.text,
        int: checks.whole_number,
        float: checks.number,
        bool: checks.switch,
        tuple[float, ...]: checks.numbers_list,
        tuple[float, float]: checks.interval,
        tuple[int, int]: checks.whole_pair,
        tuple[int, int, int, int]: checks.margins,
        tuple[LayoutObject, ...]: checks.layout,
        InputImage: checks.image,
        SegmentationMap: checks.segmentation,
        Embeddings: checks.embeddings,
        DepthMap: checks.depth_map,
        InitialLatents: checks.latents,
    }
)
