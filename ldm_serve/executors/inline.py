"""The executor without processes: one worker in a thread, for libraries and tests."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Mapping
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
    Stopped,
    Work,
)
from ldm_serve.executors.open_models import OpenModels
from ldm_serve.executors.worker import Worker
from ldm_serve.settings import EngineSettings

_LOGGER = logging.getLogger(__name__)


class InlineExecutor:
    """Generates in a thread of this process. What crashes the worker crashes the server.

    Args:
        bundles: Folder of every model; the first is opened at the start.
        settings: How they are opened.
        stopped: Called with a job that was cancelled, once it is computed no more.
    """

    def __init__(
        self,
        bundles: Mapping[str, Path],
        settings: EngineSettings,
        stopped: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._bundles, self._settings, self._stopped = bundles, settings, stopped
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._jobs: dict[str, int] = {}
        self._stopping: set[str] = set()  # cancelled jobs that the thread has not answered for
        self._ready: Ready | None = None
        self._reason, self._is_over = "the model is being opened", False
        self._thread: threading.Thread | None = None

    async def start(self, report: Callable[[Event], None], changed: Callable[[], None]) -> None:
        """See `Executor`."""
        self._report, self._changed = report, changed
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="ldm-worker")
        self._thread.start()

    def submit(self, work: Work) -> None:
        """See `Executor`."""
        self._jobs[work.job] = work.num_images
        self._orders.put(work)

    def cancel(self, job: str) -> None:
        """See `Executor`."""
        if self._jobs.pop(job, None) is not None:
            self._stopping.add(job)
            self._orders.put(Cancel(job))

    def stats(self) -> ExecutorStats:
        """See `Executor`."""
        ready = self._ready
        return ExecutorStats(
            is_ready=ready is not None,
            room=0 if ready is None else ready.max_begun - sum(self._jobs.values()),
            workers=0 if self._is_over else 1,
            restarts=0,
            is_over=self._is_over,
            backend="" if ready is None else ready.backend,
            precision="" if ready is None else ready.precision,
            reason="" if ready is not None else self._reason,
        )

    async def close(self) -> None:
        """See `Executor`."""
        if self._thread is not None:
            self._orders.put(Quit())
            await asyncio.to_thread(self._thread.join)

    def _received(self, message: Report) -> None:
        if isinstance(message, Ready):
            self._ready = message
        elif isinstance(message, Stopped):
            self._stopping.discard(message.job)
            self._stopped(message.job)
            return
        elif message.job in self._jobs:  # else it was cancelled
            if isinstance(message, Finished | Failed):
                del self._jobs[message.job]
            self._report(message)
        self._changed()

    def _crashed(self, reason: str) -> None:
        self._ready, self._reason, self._is_over = None, reason, True
        jobs, self._jobs = list(self._jobs), {}
        for job in jobs:
            self._report(
                Failed(job=job, status=500, code="worker_crash", message="the worker has ended")
            )
        for job in self._stopping:
            self._stopped(job)
        self._changed()

    def _work(self) -> None:
        """Work until told to quit; runs in the worker's thread."""

        def send(message: Report) -> None:
            self._loop.call_soon_threadsafe(self._received, message)

        with Worker(OpenModels(self._bundles, self._settings), send) as worker:
            try:
                worker.open(next(iter(self._bundles)))
                run(worker, self._orders.get, self._orders.empty)
            except Exception as error:
                _LOGGER.error("the worker has ended", exc_info=error)
                self._loop.call_soon_threadsafe(self._crashed, str(error))


def run(worker: Worker, next_order: Callable[[], Order], is_empty: Callable[[], bool]) -> None:
    """Let a worker follow orders until it is told to quit.

    Args:
        worker: The worker, whose first model is open.
        next_order: Waits for an order and returns it.
        is_empty: Whether there is no order to take at once.
    """
    while True:
        while not is_empty() or not worker.is_busy:
            if not worker.follow(next_order()):
                return
        worker.advance()
