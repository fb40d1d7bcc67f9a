"""Probes and metrics."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ldm_serve.answers import json_answer
from ldm_serve.metrics import CONTENT_TYPE
from ldm_serve.site import Site


def health_routes(site: Site) -> list[Route]:
    """Return `/livez`, `/readyz` and `/health`, which is the same, and `/metrics`."""

    async def livez(_: Request) -> Response:
        """Answer as long as this process does."""
        return json_answer({"status": "ok"})

    async def readyz(_: Request) -> Response:
        """Answer 200 if a request that came now would begin before long."""
        site.board.check_readiness()
        return json_answer({"status": "ok"})

    async def metrics(_: Request) -> Response:
        return Response(site.board.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return [
        Route("/livez", livez),
        Route("/readyz", readyz),
        Route("/health", readyz),
        Route("/metrics", metrics),
    ]
