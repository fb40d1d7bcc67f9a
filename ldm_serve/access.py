"""The gate before every route: who calls, from which page, and how much they send."""

import base64
import hmac
import logging
import secrets
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm_serve.answers import error_answer
from ldm_serve.errors import ServeError
from ldm_serve.logs import values
from ldm_serve.settings import MAX_IMAGE_BODY_BYTES, MAX_TEXT_BODY_BYTES, Access

_LOGGER = logging.getLogger(__name__)

#: Name of the caller of a server without keys.
ANYONE = "anyone"
#: Probes, which say nothing. Kubernetes calls a pod by its address, whatever its names are.
PROBE_PATHS = frozenset({"/livez", "/readyz", "/health"})
#: Paths that need no key: the page, which asks for one itself, and probes.
PUBLIC_PATHS = PROBE_PATHS | {"/", "/page.js", "/page.css"}
#: Images whose address alone gives access to them, as OpenAI's do.
PUBLIC_PREFIX = "/files/"
#: Paths whose bodies hold no image.
_TEXT_PATHS = frozenset({"/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/options"})
#: Digits of a length that is compared; Python reads no number of more than 4,300.
_MAX_LENGTH_DIGITS = 18
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; "
    "base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Gate:
    """ASGI middleware: host, origin, key, size of the body, headers and identifier of every answer.

    The name of the key is left in `scope["state"]["key"]` for the routes.

    Args:
        app: The routes.
        access: Who may call.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = _Call(scope, send)
        headers = Headers(scope=scope)
        try:
            if scope["path"] not in PROBE_PATHS:
                self._check_host(headers)
            _check_origin(scope["method"], headers)
            scope.setdefault("state", {})["key"] = self._key(scope["path"], headers)
            scope["state"]["request_id"] = call.request_id
            limit = MAX_TEXT_BODY_BYTES if scope["path"] in _TEXT_PATHS else MAX_IMAGE_BODY_BYTES
            _check_length(headers, limit)
            await self._app(scope, _bounded(receive, limit), call.send)
        except ServeError as error:
            await call.answer(error_answer(error, scope["path"]), receive)
        except Exception:
            _LOGGER.exception("request %s", call.request_id)
            failure = ServeError(
                500,
                "internal_error",
                f"the server failed; its messages tell more of {call.request_id}",
                kind="server_error",
                should_retry=False,
            )
            await call.answer(error_answer(failure, scope["path"]), receive)
        finally:
            call.log(scope)

    def _check_host(self, headers: Headers) -> None:
        """Refuse names that this server does not have: a page may have rebound its own."""
        host = headers.get("host", "")
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self._access.hosts and name.lower() not in self._access.hosts:
            names = ", ".join(sorted(self._access.hosts))
            message = f"this server is not called {name[:80]!r} but {names}; see --allow-host"
            raise ServeError(421, "wrong_host", message)

    def _key(self, path: str, headers: Headers) -> str:
        """Return the name of the key that a call brings."""
        keys = self._access.keys
        if not keys:
            return ANYONE
        given = _given_key(headers.get("authorization", ""))
        # All are compared, so that the time tells nothing of which came close.
        found = [name for name, key in keys.items() if _is_same(given, key)]
        if given and found:
            return found[0]
        if path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIX):
            return ANYONE
        message = "send a valid key, as in `Authorization: Bearer …`"
        raise ServeError(401, "invalid_api_key", message, kind="authentication_error")


def _given_key(authorization: str) -> str:
    """Return the key of a header, empty without one.

    Clients of AUTOMATIC1111's API know user names and passwords alone; the key is the password.
    """
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(given.strip(), validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _is_same(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), key.encode())


def _check_origin(method: str, headers: Headers) -> None:
    """Refuse calls from pages of other sites that would change something."""
    origin = headers.get("origin")
    if method in _SAFE_METHODS or origin is None:
        return
    try:
        site = urlsplit(origin).netloc
    except ValueError:
        site = ""
    if site.lower() != headers.get("host", "").lower():
        raise ServeError(403, "wrong_origin", "pages of other sites may not call this server")


def _check_length(headers: Headers, limit: int) -> None:
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal()):
        raise ServeError(400, "invalid_length", "Content-Length is not a number")
    if len(length) > _MAX_LENGTH_DIGITS or int(length) > limit:
        raise _too_large(limit)


def _bounded(receive: Receive, limit: int) -> Receive:
    """Return `receive` that refuses a body which is longer than its header says it is."""
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _too_large(limit)
        return message

    return bounded


def _too_large(limit: int) -> ServeError:
    return ServeError(413, "body_too_large", f"the body has more than {limit} bytes")


class _Call:
    """One call: its identifier, its answer, and how long that took."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.request_id = f"req_{secrets.token_hex(12)}"
        self._send, self._scope = send, scope
        self._started = time.monotonic()
        self._status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)

    async def answer(self, response: Response, receive: Receive) -> None:
        """Answer with an error, unless an answer has begun, which can only be broken off."""
        if not self._status:
            await response(self._scope, receive, self.send)

    def log(self, scope: Scope) -> None:
        """Write a line about the call, without anything that a user wrote.

        The path is that of the route: the identifier of a job, which stands in the path itself,
        gives access to its images.
        """
        spent = round(time.monotonic() - self._started, 4)
        key = scope.get("state", {}).get("key", "-")
        path = getattr(scope.get("route"), "path", "-")
        parts = (scope["method"], path, self._status, key, spent, self.request_id)
        names = ("method", "route", "status", "key", "seconds", "request_id")
        extra = values(**dict(zip(names, parts, strict=True)))
        _LOGGER.info("%s %s %d key=%s %.3fs %s", *parts, extra=extra)
