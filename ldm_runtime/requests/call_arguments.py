"""Requests from the arguments of a call: a prompt, a request, or a dictionary, and keywords."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.fields import check_names
from ldm_runtime.requests.presets import PRESET_FIELDS
from ldm_runtime.requests.request import FIELDS, GenerationRequest, parse_request
from ldm_runtime.requests.resolved import ResolvedRequest


def request_from(
    given: object, fields: Mapping[str, object]
) -> GenerationRequest | ResolvedRequest:
    """Return the request of a call.

    Args:
        given: A prompt, a request or a dictionary of fields; None is a request without a prompt.
        fields: Further fields; they replace those of a request.

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
            return parse_request({**given, **fields})
        case GenerationRequest() | ResolvedRequest():
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


def _changed(
    request: GenerationRequest | ResolvedRequest, fields: Mapping[str, object]
) -> GenerationRequest | ResolvedRequest:
    if not fields:
        return request
    check_names(fields, FIELDS)
    if not isinstance(request, ResolvedRequest):
        return replace(request, **fields)  # type: ignore[arg-type]
    # In a resolved request nothing is open that a preset could set.
    opened = dict.fromkeys((*PRESET_FIELDS, "sigmas")) if fields.get("preset") else {}
    return replace(request.as_request(), **{**opened, **fields})  # type: ignore[arg-type]
