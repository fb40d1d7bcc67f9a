"""Resolved requests, from the flags of `ldm generate` or a file with one request per line."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from ldm_runtime.cli.flags import given_fields, given_inversions
from ldm_runtime.cli.recorded import recorded_fields
from ldm_runtime.cli.standard_input import decoded, place_of, read_data
from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.layouts import label_number, read_label_names, read_layout
from ldm_runtime.requests.request import FIELDS, GenerationRequest, parse_request
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.requests.task_checks import check_needs
from ldm_runtime.specs.model import ModelSpec

#: Fills in what a request leaves to the models of a command.
_Resolve = Callable[[GenerationRequest], ResolvedRequest]

#: Examples of flags for the fields that a task can need.
_EXAMPLES: Mapping[str, str] = MappingProxyType(
    {name: record.example or name for name, record in FIELDS.items()}
)
#: Functions that put numbers in place of names, by the field that may have names.
_NUMBERED: Mapping[str, Callable[[Any, Sequence[str]], object]] = MappingProxyType(
    {"class_label": label_number, "layout": read_layout}
)
#: Suffixes of files with a JSON object on each line, and of those with a prompt on each.
_JSON_SUFFIXES, _PROMPT_SUFFIXES = (".jsonl", ".ndjson", ".json"), (".txt",)


def read_requests(
    args: argparse.Namespace, spec: ModelSpec, refiner: ModelSpec | None = None
) -> list[ResolvedRequest]:
    """Return the resolved requests of a command line, or of the file that it names.

    Args:
        args: The command's arguments.
        spec: The model.
        refiner: The model that makes the last steps, if there is one.

    Raises:
        RequestError: A field is wrong, missing for the model's task, or given twice.
        LdmError: The image to repeat does not say how it was made.
    """
    names = None if args.label_names is None else _label_names(args.label_names)
    given = given_fields(args)
    if args.requests is not None:
        return _requests_of_lines(args, given, names, partial(resolve, spec=spec, refiner=refiner))
    if args.like is not None:
        given = recorded_fields(args.like, given, args.bundle, given_inversions(args), args.refiner)
    if names is not None and not given.keys() & {"class_label", "layout"}:
        raise RequestError("label_names", "needs --class-label or --layout")
    request = parse_request(_with_labels(given, names))
    check_needs(request, spec, _EXAMPLES)
    return [resolve(request, spec, refiner)]


def _requests_of_lines(
    args: argparse.Namespace,
    given: Mapping[str, object],
    names: Sequence[str] | None,
    resolved: _Resolve,
) -> list[ResolvedRequest]:
    """Return a request for each line that is not blank."""
    if args.like is not None:
        raise RequestError("like", "cannot be combined with --requests; give one of them")
    data, place = read_data(args.requests, "requests"), place_of(args.requests)
    is_json = _is_json(args.requests, data)
    for name in given:
        if is_json or name == "prompt":
            raise RequestError(name, "cannot be combined with --requests, whose lines set it")
    requests = []
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            here = f"{place}, line {number}"
            fields = _json_fields(line, here) if is_json else _prompt_fields(line, here, given)
            requests.append(_request_of_line(fields, here, names, resolved))
    if not requests:
        what = "JSON object" if is_json else "prompt"
        raise RequestError("requests", f"{place} is empty; write one {what} per line")
    return requests


def _is_json(name: str, data: bytes) -> bool:
    """Return whether lines are JSON: by the suffix of the file, or else by the first character."""
    suffix = Path(name).suffix.lower()
    if suffix in _JSON_SUFFIXES + _PROMPT_SUFFIXES:
        return suffix in _JSON_SUFFIXES
    return data.lstrip().startswith(b"{")


def _json_fields(line: bytes, place: str) -> dict[str, object]:
    try:
        return msgspec.json.decode(line, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("requests", f"{place} is not a JSON object: {error}") from error


def _prompt_fields(line: bytes, place: str, given: Mapping[str, object]) -> dict[str, object]:
    return {**given, "prompt": decoded(line, "requests", place).strip()}


def _request_of_line(
    fields: Mapping[str, object], place: str, names: Sequence[str] | None, resolved: _Resolve
) -> ResolvedRequest:
    try:
        return resolved(parse_request(_with_labels(fields, names)))
    except RequestError as error:
        raise RequestError("requests", f"{place}: {error}") from error


def _label_names(path: Path) -> Sequence[str]:
    try:
        return read_label_names(path)
    except ValueError as error:
        raise RequestError("label_names", str(error)) from error


def _with_labels(values: Mapping[str, object], names: Sequence[str] | None) -> dict[str, object]:
    """Return the fields of a request with names of labels replaced by their numbers.

    Without names they are left for the bundle's own.
    """
    changed = dict(values)
    if names is None:
        return changed
    for name, numbered in _NUMBERED.items():
        if values.get(name) is not None:
            try:
                changed[name] = numbered(values[name], names)
            except ValueError as error:
                raise RequestError(name, str(error)) from error
    return changed
