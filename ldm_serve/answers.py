"""Answers in JSON, server-sent events, and the bodies that calls bring."""

import re
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ldm_serve.errors import ServeError, invalid

_T = TypeVar("_T")

#: Where msgspec says that a value stands, as in "Expected `int`, got `str` - at `$.n`".
_PLACE = re.compile(r"`\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")
_SHOWN = 200
_DETAILED = "/sdapi/"


def json_answer(value: object, status: int = 200) -> Response:
    """Return an answer in JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_answer(error: ServeError, path: str) -> Response:
    """Return the answer that an error is.

    Args:
        error: The error.
        path: Path of the call. Clients of AUTOMATIC1111's API look for a `detail`.
    """
    detail = {"detail": str(error)} if path.startswith(_DETAILED) else {}
    answer = json_answer(error.body | detail, error.status)
    answer.headers.update(error.headers)
    return answer


async def read_json(request: Request, kind: type[_T]) -> _T:
    """Return the body of a call, which is JSON of a type.

    Raises:
        ServeError: It is not; the message names the field, and quotes no more than its name.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ServeError(415, "unsupported_media_type", "send JSON, as application/json")
    return decode_json(await request.body(), kind)


def decode_json(body: bytes, kind: type[_T]) -> _T:
    """Return JSON as a type.

    Raises:
        ServeError: It is of another form.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(None, f"the body is not JSON: {error}"[:_SHOWN], "invalid_json") from error


def convert(value: object, kind: type[_T], *, strict: bool = False) -> _T:
    """Return the fields of a form as a type.

    Args:
        value: The fields.
        kind: The type.
        strict: Whether text is only text; in a form of texts it may be a number.

    Raises:
        ServeError: They are of another form.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from error


def _explained(message: str) -> ServeError:
    """Return the error of a body that has another form, which names the field."""
    place = _PLACE.search(message)
    inside = "" if place is None else place[1]
    if found := _UNKNOWN.search(message):
        name = ".".join(part for part in (inside, found[1]) if part)[:_SHOWN]
        return invalid(name, f"unknown field {name!r}", "unknown_parameter")
    if found := _MISSING.search(message):
        name = ".".join(part for part in (inside, found[1]) if part)
        return invalid(name, f"{name} is missing", "missing_required_parameter")
    return invalid(inside or None, message[:_SHOWN])


def events_answer(events: AsyncIterator[tuple[str, Any]]) -> Response:
    """Return an answer of server-sent events.

    Args:
        events: Name and JSON value of each.
    """

    async def lines() -> AsyncIterator[bytes]:
        async for name, value in events:
            yield b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )
