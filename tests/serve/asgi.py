"""Calls of an ASGI application in this process, without a socket."""

import asyncio
import json

import httpx2

from ldm_serve.app import create_app
from ldm_serve.settings import ServeSettings


def calling(settings: ServeSettings, executor, scenario, tracing=None):
    """Run `scenario(client, site)` with an HTTP client of an application, which is ended then."""

    async def main():
        app = create_app(settings, executor, tracing)
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            return await scenario(client, app.state.site)

    return asyncio.run(main())


def is_error(answer) -> bool:
    """Return whether an answer has the form of OpenAI's errors."""
    error = json.loads(answer.content)["error"]
    return set(error) == {"message", "type", "param", "code"} and bool(error["message"])
