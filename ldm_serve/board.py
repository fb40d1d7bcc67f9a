"""The board of all jobs: it takes requests, queues them, hands them out and keeps their results."""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ldm_runtime.inputs.reading import shown
from ldm_serve.buckets import TokenBuckets
from ldm_serve.errors import ServeError, cancelled, deadline_passed, invalid, unavailable
from ldm_serve.executors.contract import Executor, ExecutorStats
from ldm_serve.executors.messages import Event, Failed, Finished, ImageFormat, Progress, Work
from ldm_serve.intake import Checked, without_inputs
from ldm_serve.jobs import Job, new_job_id
from ldm_serve.logs import values
from ldm_serve.metrics import Metrics
from ldm_serve.queue import FairQueue
from ldm_serve.settings import Limits

_LOGGER = logging.getLogger(__name__)

#: Seconds that clients of a server which is ending have to fetch images that are done.
GRACE_SECONDS = 5
#: Weight of the latest request in the running mean of how long one takes.
_LATEST = 0.2
_ENDED = "the server has ended"
# The reason of an executor may name files and addresses, and probes answer without a key.
_SEE = "the server's messages say why"
_OPENING = f"the model is being opened, or cannot be; {_SEE}"


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How a client wants the images of a request.

    Attributes:
        format: Their format.
        quality: Quality of JPEG and of lossy WebP, 0 to 100.
        previews: Whether steps have a preview, where the model has any.
        needs_previews: Whether it is an error if the model has none.
        deadline_seconds: How long the client waits; None is as long as it takes.
    """

    format: ImageFormat = "png"
    quality: int | None = None
    previews: bool = False
    needs_previews: bool = False
    deadline_seconds: float | None = None


class JobBoard:
    """All jobs of a server; used in one event loop.

    Args:
        executor: Generates them.
        limits: Bounds of the queue.
    """

    def __init__(self, executor: Executor, limits: Limits) -> None:
        self._executor, self._limits = executor, limits
        self._queue: FairQueue[Job] = FairQueue()
        self._running: dict[str, Job] = {}
        self._over: OrderedDict[str, Job] = OrderedDict()
        self._per_key: Counter[str] = Counter()
        self._checking: Counter[str] = Counter()
        self._buckets = TokenBuckets(limits.requests_per_minute)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._was_ready = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drained_at: float | None = None  # of the monotonic clock; None is not yet told to end
        self._kept_bytes = 0
        self._mean_seconds = 1.0
        self.metrics = Metrics(lambda: len(self._queue), executor.stats)

    async def start(self) -> None:
        """Start the executor."""
        self._loop = asyncio.get_running_loop()
        await self._executor.start(self._take, self._look)

    def drain(self, seconds: float) -> None:
        """Take no more requests; those that have come go on for a while, and are then ended.

        It may be called from the handler of a signal. A later call can only bring the end nearer.

        Args:
            seconds: How long they may take.
        """
        end = time.monotonic() + seconds
        if self._drained_at is not None and self._drained_at <= end:
            return
        self._drained_at = end
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self._end_all, _ENDED)

    @property
    def is_drained(self) -> bool:
        """Whether it is told to end, and neither jobs nor clients that fetch images hold it up."""
        if self._drained_at is None or self._running or self._queue:
            return False
        latest = time.monotonic() - GRACE_SECONDS
        return all(not job.unfetched or (job.finished or 0) < latest for job in self._over.values())

    async def close(self, seconds: float) -> None:
        """Wait for the jobs that have come, then end what is left, and the workers.

        Args:
            seconds: How long to wait, unless `drain` was called with less.
        """
        self.drain(seconds)
        assert self._drained_at is not None, "drain has set it"
        while (self._running or self._queue) and time.monotonic() < self._drained_at:
            await asyncio.sleep(0.02)
        self._end_all(_ENDED)
        await self._executor.close()

    def check_ready(self) -> None:
        """Return if requests are taken.

        Raises:
            ServeError: They are not, and why.
        """
        stats = self._executor.stats()
        self._was_ready = self._was_ready or stats.is_ready
        if self._drained_at is not None:
            raise unavailable("the server is ending; ask another one")
        if stats.is_over or not self._was_ready:
            raise unavailable(f"the server is not ready: {_OPENING}")

    def check_readiness(self) -> None:
        """Return if a request that came now would begin before long.

        Raises:
            ServeError: It would not, and why.
        """
        self.check_ready()
        stats = self._executor.stats()
        if not stats.is_ready:
            raise unavailable(f"no worker is ready; {_SEE}")
        if len(self._queue) >= self._limits.max_queue:
            raise unavailable("the queue is full")

    def take_token(self, key: str) -> None:
        """Count a call of a key.

        Raises:
            ServeError: The key calls too often.
        """
        wait = self._buckets.take(key)
        if wait:
            raise _too_many(
                "rate_limit_exceeded",
                f"this key has used up its {self._limits.requests_per_minute:g} requests per "
                "minute",
                wait,
            )

    @contextmanager
    def checking(self, key: str) -> Iterator[None]:
        """Count a request among those of its key while it is checked, in the block.

        Raises:
            ServeError: It would not be taken, see `submit`.
        """
        self._check_room(key)
        self._checking[key] += 1
        try:
            yield
        finally:
            self._checking[key] -= 1
            if not self._checking[key]:
                del self._checking[key]

    def submit(self, key: str, checked: Checked, wish: Wish) -> Job:
        """Queue a request, of which the job keeps no decoded image.

        Args:
            key: Name of the key that brings it.
            checked: The request.
            wish: How its images are wanted.

        Raises:
            ServeError: The server takes no requests now, or the queue, or the key's share of it,
                is full; or the model has not the previews that are needed.
        """
        self._check_room(key)
        work = _work(checked, wish)
        job = Job(key=key, checked=without_inputs(checked), work=work)
        self._queue.put(key, job)
        self._per_key[key] += 1
        if wish.deadline_seconds is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(wish.deadline_seconds, self._expire, job, wish.deadline_seconds)
            self._timers[job.id] = timer
        self._hand_out()
        return job

    def _check_room(self, key: str) -> None:
        self.check_ready()
        share = self._limits.max_queue_per_key
        if self._per_key[key] + self._checking[key] >= share:
            raise self._full(f"this key has {share} requests that wait or run, its share")
        if len(self._queue) >= self._limits.max_queue:
            raise self._full(f"{len(self._queue)} requests wait")

    def find(self, key: str | None, job_id: str) -> Job:
        """Return a job.

        Args:
            key: Name of the key that asks; None finds the job of any.
            job_id: The identifier of the job.

        Raises:
            ServeError: There is no such job, no longer, or it is another key's.
        """
        self._forget_old()
        waiting = (each for each in self._queue if each.id == job_id)
        job = self._running.get(job_id) or self._over.get(job_id) or next(waiting, None)
        if job is None or (key is not None and job.key != key):
            name = shown(job_id)
            raise ServeError(404, "job_not_found", f"there is no job {name!r}, or no longer")
        return job

    def jobs_of(self, key: str) -> list[Job]:
        """Return the jobs of a key that are not over, the running ones first."""
        return [job for job in [*self._running.values(), *self._queue] if job.key == key]

    def cancel(self, job: Job) -> None:
        """Stop a job; one that is over is left alone."""
        if not job.is_over:
            self._end(job, "cancelled", error=cancelled())

    def position(self, job: Job) -> int | None:
        """Return how many jobs are begun before a job; None if it does not wait."""
        if job.state != "queued":
            return None
        return next(place for place, each in enumerate(self._queue) if each is job)

    def stats(self) -> ExecutorStats:
        """Return the state of the executor."""
        return self._executor.stats()

    def expected_wait(self) -> float:
        """Return the seconds that a new request would wait, as far as the past can tell."""
        workers = max(1, self._executor.stats().workers)
        return self._mean_seconds * (len(self._queue) + 1) / workers

    def _look(self) -> None:
        """Look at what has become of the executor."""
        stats = self._executor.stats()
        if stats.is_over:
            self._end_all(f"no worker is left; {_SEE}")
        self._hand_out()

    def _end_all(self, reason: str) -> None:
        """End all jobs with an error."""
        for job in [*self._queue, *self._running.values()]:
            if not job.is_over:
                self._end(job, "failed", error=unavailable(reason))

    def _hand_out(self) -> None:
        """Give jobs to the executor as far as it has room."""
        while self._queue and self._executor.stats().room > 0:
            job = self._queue.pop()
            job.state, job.started = "generating", time.monotonic()
            self._running[job.id] = job
            self.metrics.began(job.started - job.created)
            self._executor.submit(job.work)
            job.notify()
        for job in self._queue:
            job.notify()  # its position may have changed

    def _take(self, event: Event) -> None:
        """Note what a worker says of a job."""
        job = self._running.get(event.job)
        if job is None:
            return
        match event:
            case Progress():
                seconds = job.advance(event)
                if seconds is not None:
                    self.metrics.stepped(job.checked.model.name, seconds)
            case Finished():
                model = job.checked.model.name
                self.metrics.called(model, event.calls, event.called_images)
                self._end(job, "completed", result=event)
            case Failed():
                error = ServeError(
                    event.status,
                    event.code,
                    event.message,
                    kind="invalid_request_error" if event.status == 400 else "server_error",
                    param=event.param,
                    should_retry=False,
                )
                self._end(job, "failed", error=error)

    def _expire(self, job: Job, seconds: float) -> None:
        message = f"{seconds:g} s are over; allow more, or ask for fewer steps or images"
        self._end(job, "failed", error=deadline_passed(message))

    def _end(
        self,
        job: Job,
        state: Literal["completed", "failed", "cancelled"],
        result: Finished | None = None,
        error: ServeError | None = None,
    ) -> None:
        if timer := self._timers.pop(job.id, None):
            timer.cancel()
        began = self._running.pop(job.id, None) is not None
        if not began:
            self._queue.remove(job.key, job)
        elif result is None:
            self._executor.cancel(job.id)  # harmless if it has ended by itself
        self._per_key[job.key] -= 1
        if not self._per_key[job.key]:
            del self._per_key[job.key]
        job.end(state, result, error)
        self._over[job.id] = job
        self._kept_bytes += job.result_bytes
        self._forget_old()
        self._count(job, began=began)
        if began:
            self._hand_out()

    def _count(self, job: Job, *, began: bool) -> None:
        model = job.checked.model.name
        outcome = _outcome(job)
        self.metrics.ended(model, outcome, began=began)
        _log_end(job, outcome)
        if job.result is not None and job.finished is not None and job.started is not None:
            seconds = job.finished - job.created
            self.metrics.generated(model, len(job.result.images), seconds, job.result.timings)
            served = job.finished - job.started
            self._mean_seconds += _LATEST * (served - self._mean_seconds)

    def _forget_old(self) -> None:
        """Forget the oldest finished jobs beyond the limits; the latest is always kept."""
        limits = self._limits
        while self._over:
            job = next(iter(self._over.values()))
            age = time.monotonic() - (job.finished or 0.0)
            is_much = len(self._over) > 1 and self._kept_bytes > limits.kept_bytes
            if (
                len(self._over) <= limits.kept_results
                and age <= limits.kept_seconds
                and not is_much
            ):
                return
            self._over.popitem(last=False)
            self._kept_bytes -= job.result_bytes

    def _full(self, message: str) -> ServeError:
        return _too_many("queue_full", f"{message}; ask again later", self.expected_wait())


def _work(checked: Checked, wish: Wish) -> Work:
    """Return what the executor is given.

    Raises:
        ServeError: The model has not the previews that are needed.
    """
    has_previews = checked.model.has_previews
    if wish.needs_previews and not has_previews:
        raise invalid("previews", "previews: the bundle was exported without; leave them out")
    return Work(
        job=new_job_id(),
        model=checked.model.name,
        bundle_sha256=checked.model.bundle_sha256,
        fields=checked.fields,
        adapters=checked.model.uses,
        num_images=checked.request.num_images,
        previews=wish.previews and has_previews,
        format=wish.format,
        quality=wish.quality,
    )


def _too_many(code: str, message: str, retry_after: float) -> ServeError:
    return ServeError(429, code, message, kind="rate_limit_error", retry_after=retry_after)


def _log_end(job: Job, outcome: str) -> None:
    """Say how a job ended, without its identifier, which gives access to its images."""
    assert job.finished is not None, "it has ended"
    began = job.finished if job.started is None else job.started
    seconds, waited = (round(end - job.created, 4) for end in (job.finished, began))
    images = 0 if job.result is None else len(job.result.images)
    parts = (job.checked.model.name, outcome, images, job.key, waited, seconds)
    names = ("model", "outcome", "images", "key", "queue_seconds", "seconds")
    extra = values(**dict(zip(names, parts, strict=True)))
    _LOGGER.info("job of %s: %s, images=%d key=%s waited %.3fs of %.3fs", *parts, extra=extra)


def _outcome(job: Job) -> str:
    if job.state == "completed":
        return "ok"
    if job.state == "cancelled":
        return "cancelled"
    assert job.error is not None, "a failed job has an error"
    return "timeout" if job.error.code == "deadline_exceeded" else "failed"
