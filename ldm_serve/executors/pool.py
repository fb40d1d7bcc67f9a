"""The accounts of an executor whose workers may die: who works on what, and what is run again."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ldm_serve.executors.contract import ExecutorStats
from ldm_serve.executors.messages import Event, Failed, Finished, Ready, Report, Stopped, Work

#: How often a job is begun: in company, then twice alone, where its worker dies of nothing else.
_MAX_ATTEMPTS = 3
#: Seconds before a dead worker is replaced, doubled with every death in a row.
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 30.0


@dataclass(eq=False, kw_only=True)
class PoolWorker:
    """A worker as its executor sees it.

    Attributes:
        jobs: What it works on.
        stopping: Cancelled jobs that it has not said to have stopped.
        ready: What it said when it had opened its first model.
        heard: When it last showed that it goes on, in seconds of the monotonic clock.
    """

    jobs: dict[str, Work] = field(default_factory=dict)
    stopping: set[str] = field(default_factory=set)
    ready: Ready | None = None
    heard: float = field(default_factory=time.monotonic)

    @property
    def owes_an_answer(self) -> bool:
        """Whether it has something to do, so that its silence means that it hangs."""
        return bool(self.jobs or self.stopping)

    def images(self) -> int:
        """Return how many images it works on."""
        return sum(work.num_images for work in self.jobs.values())


_Worker = TypeVar("_Worker", bound=PoolWorker)


class WorkerPool(Generic[_Worker]):
    """Workers and their jobs, of which those of a worker that dies are run again by another.

    They are run one by one then, so that a job which ends its worker takes no others with it. One
    that has ended three workers fails.

    Attributes:
        workers: Those that live; the executor adds its own.
        restarts: Workers that have died.
    """

    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        self.restarts = 0
        self._waiting: deque[Work] = deque()  # jobs that have no worker
        self._attempts: dict[str, int] = {}
        self._deaths_in_a_row = 0

    def add(self, work: Work) -> None:
        """Take a job, for `hand_out`."""
        self._attempts[work.job] = 0
        self._waiting.append(work)

    def cancel(self, job: str) -> _Worker | None:
        """Forget a job and return the worker that has it, if one does."""
        self._attempts.pop(job, None)
        self._waiting = deque(work for work in self._waiting if work.job != job)
        for worker in self.workers:
            if worker.jobs.pop(job, None) is not None:
                worker.stopping.add(job)
                return worker
        return None

    def take(self, worker: _Worker, message: Report) -> Event | None:
        """Take a report of a worker, and return it if it is the event of a job that goes on."""
        if isinstance(message, Ready):
            worker.ready = message
            return None
        if isinstance(message, Stopped):
            worker.stopping.discard(message.job)
            return None
        if message.job not in worker.jobs:  # it was cancelled
            return None
        if isinstance(message, Finished | Failed):
            del worker.jobs[message.job]
            self._attempts.pop(message.job, None)
            self._deaths_in_a_row = 0
        return message

    def bury(self, worker: _Worker) -> tuple[list[Failed], float]:
        """Remove a worker that has died, and let its jobs run before all others.

        Returns:
            The ends of jobs that are not run again, and after how many seconds to replace it.
        """
        self.workers.remove(worker)
        ends = []
        for job in reversed(worker.jobs.values()):
            self._attempts[job.job] += 1
            if self._attempts[job.job] < _MAX_ATTEMPTS:
                self._waiting.appendleft(job)
            else:
                del self._attempts[job.job]
                ends.append(_poisonous(job))
        worker.jobs.clear()  # whatever of it is yet to come is too late
        pause = min(FIRST_PAUSE * 2**self._deaths_in_a_row, LONGEST_PAUSE)
        self._deaths_in_a_row = min(self._deaths_in_a_row + 1, 16)
        self.restarts += 1
        return ends, pause

    def hand_out(self) -> Iterator[tuple[_Worker, Work]]:
        """Give jobs to the ready workers that have most room, and yield both."""
        while self._waiting:
            job = self._waiting[0]
            is_suspect = self._attempts[job.job] > 0
            free = [
                each
                for each in self.workers
                if (each.ready and not each.jobs if is_suspect else self._room(each) > 0)
            ]
            if not free:
                return
            worker = max(free, key=self._room)
            self._waiting.popleft()
            if not worker.owes_an_answer:
                worker.heard = time.monotonic()
            worker.jobs[job.job] = job
            yield worker, job

    def stats(self, reason: str, *, is_over: bool = False) -> ExecutorStats:
        """Return the state.

        Args:
            reason: Why no worker is ready, if none is.
            is_over: See `ExecutorStats`.
        """
        ready = [each for each in self.workers if each.ready is not None]
        room = sum(self._room(each) for each in ready)
        first = ready[0].ready if ready else None
        return ExecutorStats(
            is_ready=bool(ready),
            room=room - sum(work.num_images for work in self._waiting),
            workers=len(self.workers),
            restarts=self.restarts,
            is_over=is_over,
            backend="" if first is None else first.backend,
            precision="" if first is None else first.precision,
            reason="" if ready else reason,
        )

    def _room(self, worker: _Worker) -> int:
        """Return how many more images a worker takes.

        That is none before it is ready, and with a job that may have ended another one.
        """
        if worker.ready is None or any(self._attempts[job] for job in worker.jobs):
            return 0
        return worker.ready.max_begun - worker.images()


def _poisonous(work: Work) -> Failed:
    return Failed(
        job=work.job,
        status=500,
        code="worker_crash",
        message="the request ended three workers and is not tried again",
    )
