"""The HTTP server: uvicorn, which answers until all jobs have ended once it is told to end."""

import logging
import socket
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from ldm_serve.board import GRACE_SECONDS
from ldm_serve.settings import ServeSettings
from ldm_serve.site import Site

_LOGGER = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """A server of one application; SIGTERM and SIGINT drain it, and a second one ends it at once.

    While it drains it takes no requests, and still answers for those that have come, and sends
    their images. Then it stops listening, and answers that are being sent have a little time.

    Args:
        app: From `create_app`.
        settings: Of the application.
        host: Address to listen on.
        port: Port to listen on; 0 is any free one.
        uds: Path of a Unix domain socket to listen on instead.
    """

    def __init__(
        self, app: Starlette, settings: ServeSettings, *, host: str, port: int, uds: Path | None
    ) -> None:
        site: Site = app.state.site
        self._is_told = False
        self._board, self._drain_seconds = site.board, settings.drain_seconds
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                uds=None if uds is None else str(uds),
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=64 * 2**10,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; or, at the second signal, end all jobs and stop listening."""
        super().handle_exit(sig, frame)
        self._board.drain(0 if self._is_told else self._drain_seconds)
        self.should_exit = self.force_exit = self._is_told
        self._is_told = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop listening; called ten times a second."""
        return await super().on_tick(counter) or self._board.is_drained

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if self.started:
            _LOGGER.warning("listening on %s", self._address())

    def _address(self) -> str:
        if self.config.uds is not None:
            return self.config.uds
        (first, *_) = (each for server in self.servers for each in server.sockets)
        host, port, *_ = first.getsockname()
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
