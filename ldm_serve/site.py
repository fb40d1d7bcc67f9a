"""What all routes share: the models, the board of jobs, and the settings."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from ldm_serve.adapters import AdapterChoices
from ldm_serve.board import JobBoard, Wish
from ldm_serve.errors import ServeError
from ldm_serve.executors.messages import Finished
from ldm_serve.intake import check_request
from ldm_serve.jobs import Job
from ldm_serve.served_models import ServedModels
from ldm_serve.settings import ServeSettings
from ldm_serve.tracing import Tracing

#: Header in which OpenAI's client says how many seconds it waits for an answer.
_TIMEOUT_HEADER = "x-stainless-read-timeout"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A server, as its routes see it.

    Attributes:
        models: The models.
        board: All jobs.
        settings: The settings.
        tracing: Makes spans of OpenTelemetry, if it is on.
    """

    models: ServedModels
    board: JobBoard
    settings: ServeSettings
    tracing: Tracing | None = None

    async def submit(
        self,
        request: Request,
        fields: Mapping[str, Any],
        model: str | None,
        wish: Wish,
        adapters: AdapterChoices | None = None,
    ) -> Job:
        """Check and queue a request.

        Args:
            request: The call that brings it.
            fields: Its fields, as `check_request` takes them.
            model: Name of the model, see `ServedModels.find`; None is the default.
            wish: How its images are wanted.
            adapters: Adapters of the model, unless its name has them.

        Raises:
            ServeError: It is wrong or beyond the limits, or the server takes none now.
        """
        key = request.state.key
        name = "unknown"
        try:
            self.board.take_token(key)
            served = self.models.find(model, adapters)
            name = served.name
            self.board.check_ready()
            limits = self.settings.limits
            checked = await run_in_threadpool(check_request, fields, served, limits)
            job = self.board.submit(key, checked, wish)
        except ServeError as error:
            rejected = error.status in (429, 503)
            self.board.metrics.refused(name, "rejected" if rejected else "invalid")
            raise
        if self.tracing is not None:
            self.tracing.follow(job)
        return job

    async def images_of(self, request: Request, job: Job) -> Finished:
        """Wait for the images of a job, which is cancelled when the client goes away.

        Raises:
            ServeError: It failed or was cancelled.
        """
        outcome = asyncio.ensure_future(job.outcome())
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({outcome, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not outcome.done():
                self.board.cancel(job)
            return await outcome
        finally:
            gone.cancel()
            with suppress(asyncio.CancelledError):
                await gone
            if not job.is_over:
                self.board.cancel(job)


def deadline_of(request: Request) -> float | None:
    """Return the seconds that the client of a call waits for the answer, if it says so."""
    text = request.headers.get(_TIMEOUT_HEADER, "")
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 < seconds < 1e6 else None


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
