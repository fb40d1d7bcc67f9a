"""A worker: the models that it holds, and the jobs whose requests share their calls."""

import io
import logging
import re
from collections import deque
from collections.abc import Callable

import msgspec
from PIL import Image

from ldm_runtime.closing import Closing
from ldm_runtime.errors import BackendError, BundleError, LdmError
from ldm_runtime.pipeline.continuous import BatchEvent
from ldm_runtime.pipeline.results import Result
from ldm_runtime.pipeline.sampling import Step
from ldm_runtime.requests.request import parse_request
from ldm_serve.errors import from_runtime
from ldm_serve.executors.messages import (
    Cancel,
    Event,
    Failed,
    Finished,
    Progress,
    Quit,
    Ready,
    Report,
    Stopped,
    Work,
)
from ldm_serve.executors.open_models import OpenBatch, OpenModels

_LOGGER = logging.getLogger(__name__)
#: An absolute path in a sentence.
_PATH = re.compile(r"(?<![\w/])/\w")


class Worker(Closing):
    """Generates the requests of jobs; used by one thread, which alternates orders and `advance`.

    Args:
        models: The models.
        send: Called with every report.
    """

    def __init__(self, models: OpenModels, send: Callable[[Report], None]) -> None:
        self._models, self._send = models, send
        self._waiting: deque[Work] = deque()
        self._jobs: dict[str, tuple[OpenBatch, int]] = {}
        self._works: dict[tuple[OpenBatch, int], Work] = {}
        self._turn = 0

    @property
    def is_busy(self) -> bool:
        """Whether there is something to advance."""
        return bool(self._waiting or self._jobs)

    def open(self, model: str) -> None:
        """Open the first model and report that the worker takes work.

        Raises:
            LdmError: It cannot be opened.
        """
        opened = self._models.open(model)
        assert opened is not None, "no other model is open"
        generator = opened.generator
        self._send(
            Ready(
                backend=generator.backend,
                precision=generator.precision,
                max_begun=opened.batch.max_begun,
            )
        )

    def follow(self, order: Work | Cancel | Quit) -> bool:
        """Take an order; nothing is computed yet.

        Returns:
            Whether the worker is to go on.
        """
        match order:
            case Work():
                self._waiting.append(order)
            case Cancel(job=job):
                self._cancel(job)
                self._send(Stopped(job))
            case Quit():
                return False
        return True

    def advance(self) -> None:
        """Begin what waits, call the UNet of one model once, and report what happened.

        Models that have requests take turns.
        """
        self._begin()
        busy = self._models.busy()
        if not busy:
            return
        self._turn += 1
        opened = busy[self._turn % len(busy)]
        for number, event in opened.batch.advance():
            self._report((opened, number), event)

    def close(self) -> None:
        """Stop all jobs and close the models. Closing twice is harmless."""
        self._waiting.clear()
        self._models.close()

    def _begin(self) -> None:
        """Add requests to the batches of their models, up to the first that cannot be open yet.

        Others wait behind that one, so that busy models become idle and can be closed for it.
        """
        while self._waiting:
            work = self._waiting[0]
            try:
                opened = self._models.open(work.model, work.adapters, work.bundle_sha256)
                if opened is None:
                    return
                number = opened.batch.add(
                    parse_request(work.fields),
                    previews=work.previews,
                    deadline_seconds=work.deadline_seconds,
                    adapters=opened.scales(work.adapters),
                )
            except Exception as error:  # noqa: BLE001  (the job's client gets it)
                self._send(_failed(work, error))
            else:
                self._jobs[work.job] = opened, number
                self._works[opened, number] = work
            self._waiting.popleft()

    def _cancel(self, job: str) -> None:
        self._waiting = deque(each for each in self._waiting if each.job != job)
        if found := self._jobs.pop(job, None):
            opened, number = found
            opened.batch.cancel(number)
            del self._works[found]

    def _report(self, key: tuple[OpenBatch, int], event: BatchEvent) -> None:
        work = self._works[key]
        if not isinstance(event, Step):
            del self._works[key], self._jobs[work.job]
        told = _event_of(work, event)
        if isinstance(told, Finished):
            calls, called_images = key[0].batch.take_calls()
            told = msgspec.structs.replace(told, calls=calls, called_images=called_images)
        self._send(told)


def _event_of(work: Work, event: BatchEvent) -> Event:
    """Return what a job's client is to know of an event."""
    try:
        match event:
            case Step():
                return _progress(work, event)
            case Result():
                return _finished(work, event)
    except LdmError as error:
        return _failed(work, error)
    return _failed(work, event)


def _progress(work: Work, step: Step) -> Progress:
    preview = _png(step.previews[0]) if step.previews else None
    return Progress(
        job=work.job,
        image=step.images[0],
        step=step.index,
        total=step.total,
        preview=preview,
    )


def _finished(work: Work, result: Result) -> Finished:
    indices = range(len(result))
    adapter_names = {each.sha256: each.name for each in work.adapters}
    return Finished(
        job=work.job,
        images=[result.encoded(each, work.format, quality=work.quality) for each in indices],
        seeds=result.seeds,
        metadata=[result.metadata(each) for each in indices],
        infotexts=[result.infotext(each, adapter_names) for each in indices],
        timings=dict(result.timings),
    )


def _failed(work: Work, error: Exception) -> Failed:
    if isinstance(error, LdmError):
        answer = from_runtime(_without_paths(error, work.model))
        return Failed(
            job=work.job,
            status=answer.status,
            code=answer.code,
            message=str(answer),
            param=answer.param,
        )
    if isinstance(error, MemoryError):
        return Failed(
            job=work.job,
            status=500,
            code="insufficient_memory",
            message="not enough memory; ask for smaller images",
        )
    _LOGGER.error("job %s", work.job, exc_info=error)
    return Failed(
        job=work.job, status=500, code="internal_error", message="the request failed in the server"
    )


def _without_paths(error: LdmError, model: str) -> LdmError:
    """Return an error that clients may see: where files lie is the operator's own business."""
    if isinstance(error, BundleError):
        told = f"the bundle of model {model!r} cannot be opened; see the server's messages"
    elif isinstance(error, BackendError) and _PATH.search(str(error)):
        told = f"the networks of model {model!r} cannot be run; see the server's messages"
    else:
        return error
    _LOGGER.error("model %s: %s", model, error)
    return type(error)(told)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
