"""Traces of OpenTelemetry: a span per HTTP request, and one per generation; never a prompt.

Nothing of OpenTelemetry is imported unless the environment asks for traces. Names are those of its
semantic conventions for HTTP servers and, as far as they know images, for generative AI.
"""

import asyncio
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm_runtime.errors import RequestError
from ldm_runtime.version import extra, version
from ldm_serve.jobs import Job

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

#: Variables of which one asks for traces.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
#: Paths that probes and Prometheus ask for every few seconds.
UNTRACED_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics"})
_PROVIDER = "ldm-deploy"
_MAX_INT = 2**63 - 1  # of an attribute
_METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}
)


def open_tracing(environment: Mapping[str, str]) -> "Tracing | None":
    """Return the tracing that the environment asks for, or None if it asks for none.

    Args:
        environment: With the variables of OpenTelemetry's SDK and OTLP exporter, which they read
            themselves, too.

    Raises:
        RequestError: It asks for traces and the extra `otel` is not installed, or for a protocol
            other than OTLP over HTTP.
    """
    variable = next((name for name in ENDPOINTS if environment.get(name)), None)
    if variable is None or _is_off(environment):
        return None
    for name in _PROTOCOLS:
        if environment.get(name, _PROTOCOL) != _PROTOCOL:
            raise RequestError(name, f"is {environment[name]!r}; this server sends {_PROTOCOL}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        fix = f"install {extra('otel')}, or unset the variable"
        raise RequestError(variable, f"traces need the package {error.name!r}; {fix}") from error
    named = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    own = {"service.version": version()} | ({} if named else {"service.name": "ldm-serve"})
    provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Tracing:
    """Makes spans; used in one event loop.

    Args:
        provider: Samples, processes and exports them; it is shut down by `close`.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("ldm_serve", version())
        self._open: set[asyncio.Task[None]] = set()

    def follow(self, job: Job) -> None:
        """Make the span of a job, from its arrival to its end, below the call that brought it."""
        request = job.checked.request
        attributes: dict[str, str | int] = {
            "gen_ai.operation.name": "generate_content",
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": job.checked.model.name,
            "gen_ai.output.type": "image",
            "gen_ai.request.choice.count": request.num_images,
        }
        if request.seed <= _MAX_INT:
            attributes["gen_ai.request.seed"] = request.seed
        name = f"generate_content {job.checked.model.name}"
        epoch = time.time_ns() - round(time.monotonic() * 1e9)
        start = epoch + round(job.created * 1e9)
        span = self._tracer.start_span(name, attributes=attributes, start_time=start)
        task = asyncio.get_running_loop().create_task(_end_with(span, job, epoch))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def call(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Call an application in the span of an HTTP request, whose parent the client may name."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode

        status: int | None = None
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._tracer.start_as_current_span(
            "HTTP" if method == "_OTHER" else method,
            context=extract(Headers(scope=scope)),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "url.scheme": scope["scheme"]},
        ) as span:
            try:
                await app(scope, receive, noted)
            finally:
                route = getattr(scope.get("route"), "path", None)
                if route is not None:  # the path itself may give access to an image
                    span.update_name(f"{method} {route}")
                    span.set_attributes({"http.route": route, "url.path": route})
                if status is not None:
                    span.set_attribute("http.response.status_code", status)
                    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                        span.set_attribute("error.type", str(status))
                        span.set_status(StatusCode.ERROR)

    async def close(self) -> None:
        """Export what is left, once all jobs are over."""
        await asyncio.gather(*self._open)
        await run_in_threadpool(self._provider.shutdown)


class TracingMiddleware:
    """ASGI middleware: a span per HTTP request.

    Args:
        app: The application.
        tracing: Makes the spans.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app, self._tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http" or scope["path"] in UNTRACED_PATHS:
            await self._app(scope, receive, send)
        else:
            await self._tracing.call(self._app, scope, receive, send)


def _is_off(environment: Mapping[str, str]) -> bool:
    is_disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return is_disabled or environment.get("OTEL_TRACES_EXPORTER", "") == "none"


async def _end_with(span: "Span", job: Job, epoch: int) -> None:
    """End the span of a job when the job ends, with the time at which a worker took it.

    Args:
        span: The span.
        job: The job.
        epoch: Nanoseconds from 1970 to the zero of the job's clock.
    """
    from opentelemetry.trace import StatusCode

    async for _ in job.changes():
        pass
    assert job.finished is not None, "a job that is over has ended at some time"
    if job.started is not None:
        span.add_event("generation started", timestamp=epoch + round(job.started * 1e9))
    if job.error is not None:
        span.set_attribute("error.type", job.error.code)
    if job.state == "failed":
        span.set_status(StatusCode.ERROR)
    span.end(epoch + round(job.finished * 1e9))
