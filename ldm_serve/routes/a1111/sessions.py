"""What the server remembers of each key that uses AUTOMATIC1111's API, until it ends."""

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from ldm_serve.jobs import Job
from ldm_serve.routes.a1111.options import Options


@dataclass
class Session:
    """The settings and the jobs of a key.

    Attributes:
        options: Its settings.
        jobs: Its jobs in this interface that are not over, in the order in which they came.
        is_interrupted: Whether it has interrupted the last of them.
    """

    options: Options = field(default_factory=Options)
    jobs: list[Job] = field(default_factory=list)
    is_interrupted: bool = False

    @property
    def first(self) -> Job | None:
        """The job that came first among those that are being generated."""
        return next((job for job in self.jobs if job.state == "generating"), None)

    @contextmanager
    def following(self, job: Job) -> Iterator[None]:
        """Count a job among those of the session until the end of the block."""
        self.jobs.append(job)
        self.is_interrupted = False
        try:
            yield
        finally:
            self.jobs.remove(job)

    def interrupted(self) -> list[Job]:
        """Return the jobs that an interrupt ends: what is being generated, or waits first."""
        running = [job for job in self.jobs if job.state == "generating"]
        found = running or self.jobs[:1]
        self.is_interrupted = bool(found)
        return found

    def progress(self, *, has_image: bool) -> dict[str, Any]:
        """Return the answer of `progress`, about the job that came first.

        Args:
            has_image: Whether its latest preview is a part.
        """
        first = self.first
        preview = None if first is None or not has_image else first.preview
        return {
            "progress": 0.0 if first is None else round(first.progress, 4),
            "eta_relative": 0.0 if first is None else seconds_left(first),
            "state": self._state(first),
            "current_image": None if preview is None else base64.b64encode(preview).decode(),
            "textinfo": None,
        }

    def _state(self, first: Job | None) -> dict[str, Any]:
        return {
            "skipped": False,
            "interrupted": self.is_interrupted,
            "stopping_generation": False,  # a job that is interrupted is over at once
            "job": "" if first is None else first.id,
            "job_count": len(self.jobs),
            "job_timestamp": "0" if first is None else timestamp(first),
            "job_no": 0,
            "sampling_step": 0 if first is None else min(first.steps.values(), default=0),
            "sampling_steps": 0 if first is None else first.total,
        }


def timestamp(job: Job) -> str:
    """Return when a job came, as the web UI writes it: year to second in local time."""
    came = datetime.now(UTC) - timedelta(seconds=time.monotonic() - job.created)
    return came.astimezone().strftime("%Y%m%d%H%M%S")


def seconds_left(job: Job) -> float:
    """Return how long a job takes yet, if it goes on as it has begun; 0 before its first step."""
    if job.started is None or not job.progress:
        return 0.0
    spent = time.monotonic() - job.started
    return round(spent / job.progress - spent, 3)
