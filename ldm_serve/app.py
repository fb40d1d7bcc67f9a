"""The application: every route behind the gate, and the start and end of the workers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from ldm_serve.access import Gate
from ldm_serve.answers import error_answer
from ldm_serve.board import JobBoard
from ldm_serve.errors import ServeError
from ldm_serve.executors.contract import Executor
from ldm_serve.executors.making import make_executor
from ldm_serve.routes.a1111.routes import A1111Routes
from ldm_serve.routes.health import health_routes
from ldm_serve.routes.jobs import JobRoutes
from ldm_serve.routes.openai_images import OpenAIRoutes
from ldm_serve.routes.page import page_routes
from ldm_serve.served_models import ServedModels
from ldm_serve.settings import ServeSettings
from ldm_serve.site import Site
from ldm_serve.tracing import Tracing, TracingMiddleware


def create_app(
    settings: ServeSettings, executor: Executor | None = None, tracing: Tracing | None = None
) -> Starlette:
    """Return the ASGI application, whose `state.site` is the server.

    Args:
        settings: What it serves, to whom, and how much of it.
        executor: Where requests are generated; None is the one that the settings ask for.
        tracing: Makes spans of OpenTelemetry, and is closed at the end; None makes none.

    Raises:
        BundleError: A folder is not a bundle.
        RequestError: An adapter cannot be read, or fits no model.
        LdmError: The executor cannot be had; see `make_executor`.
    """
    engine = settings.engine
    models = ServedModels(settings.bundles, engine.adapters, live_adapters=engine.live_adapters)
    if executor is None:
        executor = make_executor(
            settings.bundles, settings.engine, settings.workers, reports_steps=True
        )
    board = JobBoard(executor, settings.limits)
    for name in models:
        board.metrics.serves(name, models[name].bundle_sha256)
    site = Site(models=models, board=board, settings=settings, tracing=tracing)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await site.board.start()
        try:
            yield
        finally:
            await site.board.close(settings.drain_seconds)
            if tracing is not None:
                await tracing.close()

    traced = [] if tracing is None else [Middleware(TracingMiddleware, tracing=tracing)]
    app = Starlette(
        routes=_routes(site),
        middleware=[*traced, Middleware(Gate, access=settings.access)],
        exception_handlers={HTTPException: _http_error, ServeError: _serve_error},
        lifespan=lifespan,
    )
    app.state.site = site
    return app


def _routes(site: Site) -> list[BaseRoute]:
    interfaces = (JobRoutes(site), OpenAIRoutes(site), A1111Routes(site))
    described = (each for routes in interfaces for each in routes.routes())
    return [*page_routes(), *health_routes(site), *described]


async def _serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError), "it is registered for that"
    return error_answer(error, request.scope["path"])


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer in our form what Starlette refuses by itself: unknown paths and methods."""
    assert isinstance(error, HTTPException), "it is registered for that"
    status = error.status_code
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = f"{request.method} is not answered here" if status == 405 else "there is no such path"
    named = ServeError(status, codes.get(status, "http_error"), message)
    answer = error_answer(named, request.scope["path"])
    answer.headers.update(error.headers or {})
    return answer
