"""What all routes share: the models, the board of jobs, and the settings."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeAlias, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ldm_serve.adapters import AdapterChoices
from ldm_serve.board import JobBoard, Wish
from ldm_serve.errors import ServeError
from ldm_serve.executors.messages import Finished
from ldm_serve.intake import Checked, check_request
from ldm_serve.jobs import Job
from ldm_serve.served_models import ServedModel, ServedModels
from ldm_serve.settings import Limits, ServeSettings
from ldm_serve.tracing import Tracing

#: Header in which OpenAI's client says how many seconds it waits for an answer.
_TIMEOUT_HEADER = "x-stainless-read-timeout"
#: Requests that are checked at once: the largest images take some 400 MB each while they are.
CHECKS_AT_ONCE = 2

#: What answers the calls of a route.
Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A request for images, as a call brings it.

    Attributes:
        fields: Its fields, as `check_request` takes them.
        wish: How its images are wanted.
        model: Name of the model, see `ServedModels.find`; None is the default.
        adapters: Adapters of the model, unless its name has them.
        decode: Returns the fields that are known when images have been decoded; it may raise a
            ServeError.
    """

    fields: Mapping[str, Any]
    wish: Wish
    model: str | None = None
    adapters: AdapterChoices | None = None
    decode: Callable[[], Mapping[str, Any]] = dict


@dataclass(frozen=True, kw_only=True)
class Site:
    """A server, as its routes see it.

    Attributes:
        models: The models.
        board: All jobs.
        settings: The settings.
        tracing: Makes spans of OpenTelemetry, if it is on.
        checks: Free places for requests that are checked.
    """

    models: ServedModels
    board: JobBoard
    settings: ServeSettings
    tracing: Tracing | None = None
    checks: asyncio.Semaphore = field(default_factory=partial(asyncio.Semaphore, CHECKS_AT_ONCE))

    def counted(self, answer: Endpoint) -> Endpoint:
        """Return the endpoint of a route that generates, with what it refuses counted.

        Args:
            answer: Answers its calls, and calls `submit`.
        """

        async def endpoint(request: Request) -> Response:
            state = request.state
            state.model, state.is_taken = "unknown", False
            try:
                return await answer(request)
            except ServeError as error:
                if not state.is_taken:  # else its job is counted when it ends
                    rejected = error.status in (429, 503)
                    self.board.metrics.refused(state.model, "rejected" if rejected else "invalid")
                raise

        return endpoint

    async def submit(self, request: Request, submission: Submission) -> Job:
        """Check and queue a request; nothing of it is decoded before its key may bring it.

        Args:
            request: The call that brings it, to a route that is `counted`.
            submission: The request.

        Raises:
            ServeError: It is wrong or beyond the limits, or the server takes none now.
        """
        key = request.state.key
        self.board.take_token(key)
        served = self.models.find(submission.model, submission.adapters)
        request.state.model = served.name
        with self.board.checking(key):
            checked = await self.check(_checked, submission, served, self.settings.limits)
        job = self.board.submit(key, checked, submission.wish)
        request.state.is_taken = True
        if self.tracing is not None:
            self.tracing.follow(job)
        return job

    async def check(
        self,
        function: Callable[_Arguments, _Result],
        *arguments: _Arguments.args,
        **options: _Arguments.kwargs,
    ) -> _Result:
        """Call a function that decodes what a client has sent, in a thread and with few others."""
        async with self.checks:
            return await run_in_threadpool(function, *arguments, **options)

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


def _checked(submission: Submission, model: ServedModel, limits: Limits) -> Checked:
    return check_request({**submission.fields, **submission.decode()}, model, limits)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
