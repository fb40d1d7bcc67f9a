"""The executor of the server: spawned worker processes, which are replaced when they die."""

import asyncio
import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from ldm_serve.executors.contract import ExecutorStats
from ldm_serve.executors.messages import (
    Cancel,
    Event,
    Order,
    Quit,
    Work,
    decode_report,
    encode,
)
from ldm_serve.executors.pool import FIRST_PAUSE, LONGEST_PAUSE, PoolWorker, WorkerPool
from ldm_serve.executors.worker_process import work
from ldm_serve.settings import TEXT_LOGS, EngineSettings, LogSettings

_LOGGER = logging.getLogger(__name__)

#: Seconds that a worker may take to end when it is told to.
_QUIT_SECONDS = 5.0
#: Seconds between two looks for silent workers.
_WATCH_SECONDS = 0.25


@dataclass(eq=False, kw_only=True)
class _Process(PoolWorker):
    """A worker process, as its parent sees it."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    orders: queue.SimpleQueue[Order | None] = field(default_factory=queue.SimpleQueue)


class ProcessExecutor:
    """Generates in worker processes. The jobs of one that dies are run again by another.

    See `WorkerPool`. A worker that is silent over a job for too long is killed and replaced
    likewise.

    Args:
        bundles: Folder of every model; each worker opens the first at its start.
        settings: How they are opened.
        workers: How many workers.
        stall_seconds: How long a worker may be silent over a job.
        logs: What workers say on stderr.
    """

    def __init__(
        self,
        bundles: Mapping[str, Path],
        settings: EngineSettings,
        *,
        workers: int = 1,
        stall_seconds: float = 300.0,
        logs: LogSettings = TEXT_LOGS,
    ) -> None:
        self._bundles, self._settings, self._logs = dict(bundles), settings, logs
        self._count, self._stall_seconds = workers, stall_seconds
        self._pool: WorkerPool[_Process] = WorkerPool()
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
        self._pool.add(work)
        self._hand_out()

    def cancel(self, job: str) -> None:
        """See `Executor`."""
        worker = self._pool.cancel(job)
        if worker is not None:
            worker.orders.put(Cancel(job))
            self._hand_out()

    def stats(self) -> ExecutorStats:
        """See `Executor`."""
        return self._pool.stats(self._reason)

    async def close(self) -> None:
        """See `Executor`."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        workers, self._pool.workers = self._pool.workers, []
        for worker in workers:
            worker.orders.put(Quit())
            worker.orders.put(None)
        ends = (asyncio.to_thread(_end, each.process, _QUIT_SECONDS) for each in workers)
        await asyncio.gather(*ends)

    def _spawn(self) -> None:
        """Start a worker.

        Raises:
            OSError: There is no room for a process or its pipe.
            RuntimeError: There is none for a thread.
        """
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        arguments = (theirs, self._bundles, self._settings, self._logs)
        process = context.Process(target=work, args=arguments, name="ldm-worker")
        try:
            process.start()
        finally:
            theirs.close()
        worker = _Process(process=process, connection=ours)
        received = partial(self._call, self._received, worker)
        try:
            for talk, with_whom in ((_listen, received), (_speak, worker.orders.get)):
                thread = threading.Thread(
                    target=talk, args=(ours, with_whom), name="ldm-worker-pipe", daemon=True
                )
                thread.start()
        except RuntimeError:
            _end(process, 0.0)
            raise
        self._pool.workers.append(worker)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Call in the event loop, unless that has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _received(self, worker: _Process, data: bytes | None) -> None:
        """Take a report of a worker; None is its death."""
        if worker not in self._pool.workers:
            return
        if data is None:
            self._died(worker)
        else:
            worker.heard = time.monotonic()
            event = self._pool.take(worker, decode_report(data))
            if event is not None:
                self._report(event)
        self._hand_out()
        self._changed()

    def _died(self, worker: _Process) -> None:
        """Replace a worker, and run its jobs again before all others."""
        worker.orders.put(None)
        _end(worker.process, 1.0)
        code = worker.process.exitcode
        self._reason = f"a worker has ended with status {code}; see the server's messages"
        _LOGGER.error("worker %d ended with status %s", worker.process.pid or 0, code)
        ends, pause = self._pool.bury(worker)
        for end in ends:
            self._report(end)
        self._keep(self._replace_after(pause))

    async def _replace_after(self, pause: float) -> None:
        """Start a worker in the place of a dead one, as soon as this machine has room for it."""
        await asyncio.sleep(pause)
        while not self._is_closing:
            try:
                self._spawn()
            except (OSError, RuntimeError) as error:
                self._reason = f"a worker cannot be started: {error}"
                _LOGGER.error("%s", self._reason)
                pause = min(max(2 * pause, FIRST_PAUSE), LONGEST_PAUSE)
                await asyncio.sleep(pause)
            else:
                return

    async def _watch(self) -> None:
        """Kill workers that are silent over a job; their readers notice."""
        while True:
            await asyncio.sleep(min(_WATCH_SECONDS, self._stall_seconds / 4))
            now = time.monotonic()
            for worker in self._pool.workers:
                if worker.owes_an_answer and now - worker.heard > self._stall_seconds:
                    _LOGGER.error("worker %s is silent; it is replaced", worker.process.pid)
                    worker.process.kill()

    def _hand_out(self) -> None:
        for worker, job in self._pool.hand_out():
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
