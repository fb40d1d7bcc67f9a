"""The page: a form for every field that a model takes, over the native interface."""

from collections.abc import Awaitable, Callable
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

#: File and media type by path.
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


def page_routes() -> list[Route]:
    """Return the routes of the page's three files, which are read here and kept in memory.

    A browser asks again each time, and is told by the hash of a file that it has it already.

    Raises:
        OSError: The package is installed without its page.
    """
    folder = files("ldm_serve") / "page"
    return [
        Route(path, _answer_with((folder / name).read_bytes(), media_type))
        for path, (name, media_type) in _FILES.items()
    ]


def _answer_with(data: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """Return the answer to GET and HEAD of a file."""
    headers = {"ETag": f'"{sha256(data).hexdigest()}"', "Cache-Control": "no-cache"}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=media_type)

    return answer
