"""The executor of the server: spawned worker processes, which are replaced when they die."""

import asyncio
import logging
import multiprocessing
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from ldm_serve.executors.contract import ExecutorStats
from ldm_serve.executors.messages import (
    Cancel,
    Event,
    Failed,
    Finished,
    Order,
    Quit,
    Ready,
    Report,
    Work,
    decode_report,
    encode,
)
from ldm_serve.executors.worker_process import work
from ldm_serve.settings import EngineSettings

_LOGGER = logging.getLogger(__name__)

#: How often a job is begun: in company, then twice alone, where its worker dies of nothing else.
_MAX_ATTEMPTS = 3
#: Seconds before a dead worker is replaced, doubled with every death in a row.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 30.0
#: Seconds that a worker may take to end when it is told to.
_QUIT_SECONDS = 5.0
#: Seconds between two looks for silent workers.
_WATCH_SECONDS = 0.25


@dataclass(eq=False)
class _Process:
    """A worker process, as its parent sees it."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    orders: queue.SimpleQueue[Order | None] = field(default_factory=queue.SimpleQueue)
    jobs: dict[str, Work] = field(default_factory=dict)
    ready: Ready | None = None
    heard: float = field(default_factory=time.monotonic)

    def images(self) -> int:
        """Return how many images it works on."""
        return sum(work.num_images for work in self.jobs.values())


class ProcessExecutor:
    """Generates in worker processes. The jobs of one that dies are run again by another.

    It runs them one by one, so that a job which ends its worker takes no others with it. One that
    has ended three workers fails. A worker that is silent over a job for too long is killed and
    replaced likewise.

    Args:
        bundles: Folder of every model; each worker opens the first at its start.
        settings: How they are opened.
        workers: How many workers.
        stall_seconds: How long a worker may be silent over a job.
    """

    def __init__(
        self,
        bundles: Mapping[str, Path],
        settings: EngineSettings,
        *,
        workers: int = 1,
        stall_seconds: float = 300.0,
    ) -> None:
        self._bundles, self._settings = dict(bundles), settings
        self._count, self._stall_seconds = workers, stall_seconds
        self._workers: list[_Process] = []
        self._again: deque[Work] = deque()  # jobs that have no worker
        self._attempts: dict[str, int] = {}
        self._restarts, self._deaths_in_a_row = 0, 0
        self._is_closing = False
        self._reason = "the model is being opened"
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, report: Callable[[Event], None], changed: Callable[[], None]) -> None:
        """See `Executor`."""
        self._report, self._changed = report, changed
        self._loop = asyncio.get_running_loop()
        for _ in range(self._count):
            self._spawn()
        self._keep(self._watch())

    def submit(self, work: Work) -> None:
        """See `Executor`."""
        self._attempts[work.job] = 0
        self._again.append(work)
        self._hand_out()

    def cancel(self, job: str) -> None:
        """See `Executor`."""
        self._attempts.pop(job, None)
        self._again = deque(work for work in self._again if work.job != job)
        for worker in self._workers:
            if worker.jobs.pop(job, None) is not None:
                worker.orders.put(Cancel(job))

    def stats(self) -> ExecutorStats:
        """See `Executor`."""
        ready = [each for each in self._workers if each.ready is not None]
        room = sum(self._room(each) for each in ready)
        first = ready[0].ready if ready else None
        return ExecutorStats(
            is_ready=bool(ready),
            room=room - sum(work.num_images for work in self._again),
            workers=len(self._workers),
            restarts=self._restarts,
            backend="" if first is None else first.backend,
            precision="" if first is None else first.precision,
            reason="" if ready else self._reason,
        )

    async def close(self) -> None:
        """See `Executor`."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.orders.put(Quit())
            worker.orders.put(None)
        ends = (asyncio.to_thread(_end, each.process, _QUIT_SECONDS) for each in workers)
        await asyncio.gather(*ends)

    def _spawn(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        process = context.Process(
            target=work, args=(theirs, self._bundles, self._settings), name="ldm-worker"
        )
        process.start()
        theirs.close()
        worker = _Process(process=process, connection=ours)
        self._workers.append(worker)
        received = partial(self._call, self._received, worker)
        for talk, with_whom in ((_listen, received), (_speak, worker.orders.get)):
            thread = threading.Thread(
                target=talk, args=(ours, with_whom), name="ldm-worker-pipe", daemon=True
            )
            thread.start()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Call in the event loop, unless that has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _received(self, worker: _Process, data: bytes | None) -> None:
        """Take a report of a worker; None is its death."""
        if worker not in self._workers:
            return
        if data is None:
            self._died(worker)
        else:
            worker.heard = time.monotonic()
            self._take(worker, decode_report(data))
        self._hand_out()
        self._changed()

    def _take(self, worker: _Process, message: Report) -> None:
        if isinstance(message, Ready):
            worker.ready = message
            return
        if message.job not in worker.jobs:  # it was cancelled
            return
        if isinstance(message, Finished | Failed):
            del worker.jobs[message.job]
            self._attempts.pop(message.job, None)
            self._deaths_in_a_row = 0
        self._report(message)

    def _died(self, worker: _Process) -> None:
        """Replace a worker, and run its jobs again before all others."""
        self._workers.remove(worker)
        worker.orders.put(None)
        _end(worker.process, 1.0)
        code = worker.process.exitcode
        self._reason = f"a worker has ended with status {code}; see the server's messages"
        _LOGGER.error("worker %d ended with status %s", worker.process.pid or 0, code)
        for job in reversed(worker.jobs.values()):
            self._attempts[job.job] += 1
            if self._attempts[job.job] < _MAX_ATTEMPTS:
                self._again.appendleft(job)
            else:
                del self._attempts[job.job]
                self._report(_poisonous(job))
        pause = min(_FIRST_PAUSE * 2**self._deaths_in_a_row, _LONGEST_PAUSE)
        self._deaths_in_a_row = min(self._deaths_in_a_row + 1, 16)
        self._restarts += 1
        self._keep(self._replace_after(pause))

    async def _replace_after(self, pause: float) -> None:
        await asyncio.sleep(pause)
        if not self._is_closing:
            self._spawn()

    async def _watch(self) -> None:
        """Kill workers that are silent over a job; their readers notice."""
        while True:
            await asyncio.sleep(min(_WATCH_SECONDS, self._stall_seconds / 4))
            now = time.monotonic()
            for worker in self._workers:
                if worker.jobs and now - worker.heard > self._stall_seconds:
                    _LOGGER.error("worker %s is silent; it is replaced", worker.process.pid)
                    worker.process.kill()

    def _room(self, worker: _Process) -> int:
        """Return how many more images a worker takes; none with a job that may have ended one."""
        if any(self._attempts[job] for job in worker.jobs):
            return 0
        return self._settings.max_batch - worker.images()

    def _hand_out(self) -> None:
        """Give jobs to the ready workers that have most room."""
        while self._again:
            job, *_ = self._again
            is_suspect = self._attempts[job.job] > 0
            free = [
                each
                for each in self._workers
                if each.ready is not None
                and (not each.jobs if is_suspect else self._room(each) > 0)
            ]
            if not free:
                return
            worker = max(free, key=self._room)
            self._again.popleft()
            if not worker.jobs:
                worker.heard = time.monotonic()
            worker.jobs[job.job] = job
            worker.orders.put(job)

    def _keep(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _listen(connection: Connection, received: Callable[[bytes | None], None]) -> None:
    """Pass on what a worker says; runs in a thread, and ends with the worker."""
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            received(None)
            return
        received(data)


def _speak(connection: Connection, next_order: Callable[[], Order | None]) -> None:
    """Send orders until one is None; runs in a thread, since a worker listens between two calls."""
    while (order := next_order()) is not None:
        try:
            connection.send_bytes(encode(order))
        except OSError:  # it has died, which its other thread notices
            return


def _end(process: multiprocessing.process.BaseProcess, seconds: float) -> None:
    """Wait for the end of a process, and kill it if that takes too long."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()


def _poisonous(work: Work) -> Failed:
    return Failed(
        job=work.job,
        status=500,
        code="worker_crash",
        message="the request ended three workers and is not tried again",
    )
