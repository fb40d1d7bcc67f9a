"""Jobs: requests from their arrival until their images are fetched."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from ldm_serve.errors import ServeError
from ldm_serve.executors.messages import Finished, Progress, Work
from ldm_serve.intake import Checked

#: States of a job; the last three are final.
JobState = Literal["queued", "generating", "completed", "failed", "cancelled"]


def new_job_id() -> str:
    """Return an identifier that no one can guess: it alone gives access to the images of a job."""
    return secrets.token_urlsafe(16)


@dataclass(eq=False)
class Job:
    """A request and what has become of it; used in one event loop.

    Attributes:
        key: Name of the key that brought it.
        checked: The request, without the images and arrays that it has brought.
        work: What the executor is given; these are in its fields, encoded, until the end.
        state: Where it is.
        steps: Finished steps of each image, by index.
        total: Steps of an image, once they are known.
        preview: Small PNG of the image so far.
        result: The images.
        unfetched: Indices of images that no client has been sent.
        error: The error that ended it.
        created: When it came, in seconds of the monotonic clock.
        started: When a worker took it.
        finished: When it ended.
    """

    key: str
    checked: Checked
    work: Work
    state: JobState = "queued"
    steps: dict[int, int] = field(default_factory=dict)
    total: int = 0
    preview: bytes | None = None
    result: Finished | None = None
    unfetched: set[int] = field(default_factory=set)
    error: ServeError | None = None
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    finished: float | None = None
    _stepped: dict[int, float] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        """Its identifier."""
        return self.work.job

    @property
    def result_bytes(self) -> int:
        """Bytes of its images, which wait to be fetched."""
        return 0 if self.result is None else sum(map(len, self.result.images))

    @property
    def is_over(self) -> bool:
        """Whether it has ended, in whichever way."""
        return self.state in ("completed", "failed", "cancelled")

    @property
    def progress(self) -> float:
        """The share of its steps that are done, from 0 to 1."""
        if self.state == "completed":
            return 1.0
        steps = self.total * self.checked.request.num_images
        return sum(self.steps.values()) / steps if steps else 0.0

    def advance(self, step: Progress) -> float | None:
        """Note a step.

        Returns:
            Seconds that it took, on average since the one before that is known; None for the first
            of an image, before which prompts are encoded.
        """
        now, steps = time.monotonic(), step.step - self.steps.get(step.image, 0)
        before = self._stepped.get(step.image)
        self.steps[step.image], self.total = step.step, step.total
        self._stepped[step.image] = now
        self.preview = step.preview or self.preview
        self.notify()
        return None if before is None or steps < 1 else (now - before) / steps

    def end(
        self, state: JobState, result: Finished | None = None, error: ServeError | None = None
    ) -> None:
        """Note the end, and forget the images that the request has brought."""
        self.state, self.result, self.error = state, result, error
        # A copy: a thread may be about to send the fields to a worker.
        self.work = msgspec.structs.replace(self.work, fields={})
        self.unfetched = set() if result is None else set(range(len(result.images)))
        self.finished = time.monotonic()
        self.notify()

    def notify(self) -> None:
        """Wake all that follow the job."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changes(self) -> AsyncIterator[None]:
        """Yield now and after every change up to the end, which is the last.

        A consumer that is slower than the job misses changes, and sees the latest state.
        """
        while True:
            changed, is_over = self._changed, self.is_over
            yield
            if is_over:
                return
            await changed.wait()

    async def outcome(self) -> Finished:
        """Wait for the end and return the images.

        Raises:
            ServeError: It failed or was cancelled.
        """
        async for _ in self.changes():
            pass
        if self.result is None:
            assert self.error is not None, "a job without a result has an error"
            raise self.error
        return self.result
