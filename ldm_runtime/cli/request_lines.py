"""Resolved requests, from the flags of `ldm generate` or a file with one request per line."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.layouts import label_number, read_label_names, read_layout
from ldm_runtime.inputs.reading import without_byte_order_mark
from ldm_runtime.requests.request import FIELDS, parse_request
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.requests.task_checks import check_needs
from ldm_runtime.specs.model import ModelSpec

#: Examples of flags for the fields that a task can need.
_EXAMPLES: Mapping[str, str] = MappingProxyType(
    {name: record.example or name for name, record in FIELDS.items()}
)


def read_requests(args: argparse.Namespace, spec: ModelSpec) -> list[ResolvedRequest]:
    """Return the resolved requests of a command line, or of the file that it names.

    Raises:
        RequestError: A field is wrong, missing for the model's task, or given twice.
    """
    names = None if args.label_names is None else _label_names(args.label_names)
    values = {name: getattr(args, name) for name in FIELDS}
    if args.requests is None:
        if names is not None and values["class_label"] is None and values["layout"] is None:
            raise RequestError("label_names", "needs --class-label or --layout")
        request = parse_request(_with_labels(values, names))
        check_needs(request, spec, _EXAMPLES)
        return [resolve(request, spec)]
    for name, record in FIELDS.items():
        if values[name] != record.default:
            raise RequestError(name, "cannot be combined with --requests, whose lines set it")
    lines = enumerate(_text(args.requests).splitlines(), start=1)
    requests = [
        _parse_line(line, f"{args.requests}, line {number}", names, spec)
        for number, line in lines
        if line.strip()
    ]
    if not requests:
        raise RequestError("requests", f"{args.requests} is empty; write one JSON object per line")
    return requests


def _text(path: Path) -> bytes:
    """Return the bytes of a file of text, whose lines are decoded one by one."""
    try:
        return without_byte_order_mark(path.read_bytes(), str(path))
    except ValueError as error:
        raise RequestError("requests", str(error)) from error


def _parse_line(
    line: bytes, place: str, names: Sequence[str] | None, spec: ModelSpec
) -> ResolvedRequest:
    try:
        values = msgspec.json.decode(line, type=dict[str, object])
        return resolve(parse_request(_with_labels(values, names)), spec)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("requests", f"{place} is not a JSON object: {error}") from error
    except RequestError as error:
        raise RequestError("requests", f"{place}: {error}") from error


def _label_names(path: Path) -> Sequence[str]:
    try:
        return read_label_names(path)
    except ValueError as error:
        raise RequestError("label_names", str(error)) from error


def _with_labels(values: Mapping[str, object], names: Sequence[str] | None) -> dict[str, object]:
    """Return the fields of a request with class names replaced by their numbers."""
    changed = dict(values)
    for name, numbered in (("class_label", _class_number), ("layout", read_layout)):
        if values.get(name) is not None:
            try:
                changed[name] = numbered(values[name], names)
            except ValueError as error:
                raise RequestError(name, str(error)) from error
    return changed


def _class_number(label: object, names: Sequence[str] | None) -> object:
    if not isinstance(label, str):
        return label
    if names is None:
        raise ValueError(f"{label!r} is a name; give --label-names FILE, or a number")
    return label_number(label, names)
