"""Requests from the arguments of a call: a prompt, a request, or a dictionary, and keywords."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.fields import check_names
from ldm_runtime.requests.replaced_fields import kept_fields
from ldm_runtime.requests.request import FIELDS, GenerationRequest, parse_request
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.requests.sampler_names import with_known_names


def request_from(
    given: object, fields: Mapping[str, object]
) -> GenerationRequest | ResolvedRequest:
    """Return the request of a call.

    Args:
        given: A prompt, a request or a dictionary of fields; None is a request without a prompt.
        fields: Further fields; they replace those of a request, and of a resolved one all that
            depends on them, see `replaced_fields`. A sampler's name that carries a schedule, such
            as "DPM++ 2M Karras", replaces both.

    Raises:
        RequestError: A field is unknown, of the wrong type or out of range, or `given` is none of
            these.
    """
    match given:
        case None:
            return parse_request(fields)
        case str():
            return parse_request({"prompt": given, **fields})
        case Mapping():
            return parse_request({**given, **_opened_schedule(fields), **fields})
        case GenerationRequest() | ResolvedRequest() if not fields:
            return given
        case GenerationRequest():
            check_names(fields, FIELDS)
            return replace(given, **_opened_schedule(fields), **fields)  # type: ignore[arg-type]
        case ResolvedRequest():
            return _changed(given, fields)
    fix = "give text, a GenerationRequest, or the fields as keywords"
    if isinstance(given, Sequence):
        fix = "give one prompt, or all of them to run_many"
    raise RequestError("prompt", f"is {type(given).__name__}; {fix}")


def requests_from(
    given: Iterable[object], fields: Mapping[str, object]
) -> list[GenerationRequest | ResolvedRequest]:
    """Return the requests of a call with several, as `request_from` reads each.

    Raises:
        RequestError: One of them is not a request, or `given` is one alone.
    """
    if isinstance(given, str | Mapping | GenerationRequest | ResolvedRequest):
        raise RequestError("requests", f"is one {type(given).__name__}; give a list of them")
    return [request_from(each, fields) for each in given]


def _opened_schedule(fields: Mapping[str, object]) -> dict[str, None]:
    """Return the schedule to leave open, if the name of a sampler carries its own."""
    carries_schedule = "schedule" in with_known_names(fields) and "schedule" not in fields
    return {"schedule": None} if carries_schedule else {}


def _changed(request: ResolvedRequest, fields: Mapping[str, object]) -> GenerationRequest:
    read, known = parse_request(fields), request.as_request()
    changes = {name: getattr(read, name) for name in with_known_names(fields)}
    recorded = {name: getattr(known, name) for name in FIELDS}
    return GenerationRequest(**{**kept_fields(recorded, changes), **changes})
