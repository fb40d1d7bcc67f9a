"""Resolved requests, from the flags of `ldm generate` or a file with one request per line."""

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from ldm_runtime.cli.flags import given_adapters, given_fields, given_inversions
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


class RequestLine(NamedTuple):
    """A request that a line of a file holds.

    Attributes:
        number: Number of the line, from 1.
        place: Name of the file and number of the line, for messages.
        request: The request.
        others: Fields of the line that are not the request's.
    """

    number: int
    place: str
    request: GenerationRequest
    others: Mapping[str, object]


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
        return list(
            _resolved_lines(args, given, names, partial(resolve, spec=spec, refiner=refiner))
        )
    if args.like is not None:
        given = recorded_fields(
            args.like,
            given,
            args.bundle,
            given_inversions(args),
            given_adapters(args),
            args.refiner,
        )
    if names is not None and not given.keys() & {"class_label", "layout"}:
        raise RequestError("label_names", "needs --class-label or --layout")
    request = parse_request(_with_labels(given, names))
    check_needs(request, spec, _EXAMPLES)
    return [resolve(request, spec, refiner)]


def requests_of_lines(
    lines: Iterable[bytes],
    place: str,
    *,
    is_json: bool,
    given: Mapping[str, object] = MappingProxyType({}),
    names: Sequence[str] | None = None,
    others: Collection[str] = (),
) -> Iterator[RequestLine]:
    """Yield the request of each line that is not blank, one at a time.

    Args:
        lines: The lines of a file, in UTF-8.
        place: Name of the file, for messages.
        is_json: Whether lines are JSON objects, see `is_json`; else they are prompts.
        given: Further fields of a prompt's request.
        names: Names of labels; None leaves them for the bundle's own.
        others: Names of fields that a line may have in addition to those of a request.

    Raises:
        RequestError: A line is not a request, or there is none.
    """
    is_empty = True
    for number, line in enumerate(lines, start=1):
        if line.strip():
            is_empty, here = False, f"{place}, line {number}"
            fields = _json_fields(line, here) if is_json else _prompt_fields(line, here, given)
            beyond = {name: fields.pop(name) for name in others if name in fields}
            with at_line(here):
                request = parse_request(_with_labels(fields, names))
            yield RequestLine(number, here, request, beyond)
    if is_empty:
        what = "JSON object" if is_json else "prompt"
        raise RequestError("requests", f"{place} is empty; write one {what} per line")


def is_json(name: str, data: bytes) -> bool:
    """Return whether lines are JSON: by the suffix of the file, or else by the first character.

    Args:
        name: Name of the file.
        data: Its first line that is not blank, or more.
    """
    suffix = Path(name).suffix.lower()
    if suffix in _JSON_SUFFIXES + _PROMPT_SUFFIXES:
        return suffix in _JSON_SUFFIXES
    return data.lstrip().startswith(b"{")


@contextmanager
def at_line(place: str) -> Iterator[None]:
    """Name the place of a line in what the block finds wrong with its request.

    Raises:
        RequestError: The block raises one.
    """
    try:
        yield
    except RequestError as error:
        raise RequestError("requests", f"{place}: {error}") from error


def _resolved_lines(
    args: argparse.Namespace,
    given: Mapping[str, object],
    names: Sequence[str] | None,
    resolved: _Resolve,
) -> Iterator[ResolvedRequest]:
    """Yield the requests of the file that a command line names."""
    if args.like is not None:
        raise RequestError("like", "cannot be combined with --requests; give one of them")
    data = read_data(args.requests, "requests")
    has_json = is_json(args.requests, data)
    for name in given:
        if has_json or name == "prompt":
            raise RequestError(name, "cannot be combined with --requests, whose lines set it")
    place = place_of(args.requests)
    for line in requests_of_lines(
        data.splitlines(), place, is_json=has_json, given=given, names=names
    ):
        with at_line(line.place):
            request = resolved(line.request)
        yield request


def _json_fields(line: bytes, place: str) -> dict[str, object]:
    try:
        return msgspec.json.decode(line, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("requests", f"{place} is not a JSON object: {error}") from error


def _prompt_fields(line: bytes, place: str, given: Mapping[str, object]) -> dict[str, object]:
    return {**given, "prompt": decoded(line, "requests", place).strip()}


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
