"""One run of a batch: what is missing is generated, and a bounded number of images at a time."""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ldm_runtime.progress import Progress
from ldm_runtime.requests.request_json import request_to_fields
from ldm_serve.batch.folder import BatchFolder
from ldm_serve.batch.results import Outcome, Place
from ldm_serve.batch.units import Unit
from ldm_serve.errors import BatchError
from ldm_serve.executors.contract import Executor, ExecutorStats
from ldm_serve.executors.messages import Event, Failed, Finished, Work

#: Most parts of a run that progress tells of.
_PARTS = 20
#: Deaths per worker, with no image in between, after which there is no use in more.
_MAX_DEATHS = 5


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """How many images of a batch are where.

    Attributes:
        generated: Images that this run has generated.
        found: Images that were there.
        failed: Images that could not be generated, in this run or before.
    """

    generated: int
    found: int
    failed: int


class BatchRun:
    """A run of a batch.

    Memory does not grow with the images or the lines, but for the outcome of each: some 300 bytes.

    Args:
        units: The images, the same in every iteration.
        folder: Where they go.
        model: Name that the executor has for the model.
        retry_failed: Whether images that failed in earlier runs are tried again.
    """

    def __init__(
        self, units: Iterable[Unit], folder: BatchFolder, *, model: str, retry_failed: bool = False
    ) -> None:
        self._units, self._folder, self._model = units, folder, model
        self._retry_failed = retry_failed
        self._running: dict[str, Unit] = {}
        self._events: deque[Event] = deque()
        self._generated = self._found = self._failed = self._restarts = 0
        self._workers = 1

    @property
    def counts(self) -> BatchCounts:
        """How many images are where, so far."""
        return BatchCounts(generated=self._generated, found=self._found, failed=self._failed)

    def survey(self) -> int:
        """Check all requests, bring the log up to date, and return how many images are missing.

        Raises:
            RequestError: A request is wrong, or the folder has the results of another file; nothing
                is generated then.
            BatchError: The folder cannot be written to.
        """
        missing = 0
        kept: dict[Place, Outcome] = {}
        for unit in self._units:
            outcome = self._outcome(unit)
            if outcome is None:
                missing += 1
            else:
                kept[unit.line, unit.image] = outcome
                self._found += not outcome.is_failure
                self._failed += outcome.is_failure
        self._folder.keep(kept)
        return missing

    async def generate(self, executor: Executor, missing: int, progress: Progress) -> None:
        """Generate what is missing.

        Args:
            executor: Generates it; it is started and closed here.
            missing: From `survey`.
            progress: Told how many images are done.

        Raises:
            BatchError: No worker stays alive, or the folder cannot be written to.
        """
        wake, parts = asyncio.Event(), _Parts(progress, missing)

        def report(event: Event) -> None:
            if isinstance(event, Finished | Failed):
                self._events.append(event)
                wake.set()

        await executor.start(report, wake.set)
        try:
            units = self._missing()
            waiting = next(units, None)
            while waiting is not None or self._running:
                if self._events:
                    event = self._events.popleft()
                    if isinstance(event, Failed):  # of the image, unless no worker is left
                        self._check_workers(executor.stats())
                    self._take(event)
                    self._restarts = executor.stats().restarts
                    parts.add()
                elif waiting is not None and self._can_take(waiting, executor):
                    self._begin(waiting, executor, parts)
                    waiting = next(units, None)
                else:
                    self._check_workers(executor.stats())
                    await wake.wait()
                    wake.clear()
        finally:
            await executor.close()

    def _outcome(self, unit: Unit) -> Outcome | None:
        """Return what became of an image, by the folder, then the log; None if it is missing."""
        found = self._folder.log.outcome(unit)
        is_failure = found is not None and found.is_failure
        if not self._folder.has(unit):
            return found if is_failure and not self._retry_failed else None
        if found is None or is_failure:
            self._folder.add_found(unit)
        return self._folder.log.outcome(unit)

    def _missing(self) -> Iterator[Unit]:
        """Yield the images that the log says nothing of."""
        return (unit for unit in self._units if self._folder.log.outcome(unit) is None)

    def _can_take(self, unit: Unit, executor: Executor) -> bool:
        """Return whether an image can be begun: another line may ask for the same one just now."""
        return unit.name not in self._running and executor.stats().room > 0

    def _begin(self, unit: Unit, executor: Executor, parts: "_Parts") -> None:
        if self._folder.has(unit):  # for another line
            self._folder.add_found(unit)
            self._found += 1
            parts.add()
            return
        fields = request_to_fields(unit.request.as_request())
        self._running[unit.name] = unit
        executor.submit(
            Work(
                job=unit.name,
                model=self._model,
                bundle_sha256=unit.bundle_sha256,
                fields=fields,
                adapters=unit.adapters,
            )
        )

    def _take(self, event: Event) -> None:
        unit = self._running.pop(event.job)
        match event:
            case Finished():
                self._folder.add(unit, event)
                self._generated += 1
            case Failed():
                self._folder.add_failure(unit, event)
                self._failed += 1

    def _check_workers(self, stats: ExecutorStats) -> None:
        """Give up on workers that end before they have done anything."""
        self._workers = max(self._workers, stats.workers)
        is_hopeless = stats.restarts - self._restarts >= _MAX_DEATHS * self._workers
        if not stats.is_ready and (stats.is_over or is_hopeless):
            raise BatchError(f"no worker stays alive: {stats.reason}")


class _Parts:
    """Reports images that end in any order as parts of the whole that end one after the other."""

    def __init__(self, progress: Progress, total: int) -> None:
        count = min(total, _PARTS)
        self._progress, self._done = progress, 0
        self._ends = deque(total * part // count for part in range(1, count + 1))
        self._begun = 0
        self._name = "{}/" + f"{total} images"
        progress.plan(dict.fromkeys(map(self._name.format, self._ends)))
        self._begin()

    def add(self) -> None:
        """An image is done; beyond the total there is nothing to report."""
        if not self._ends:
            return
        self._done += 1
        end = self._ends[0]
        if self._done < end:
            self._progress.advance((self._done - self._begun) / (end - self._begun))
            return
        self._progress.end(self._name.format(self._ends.popleft()), "done")
        self._begun = end
        self._begin()

    def _begin(self) -> None:
        if self._ends:
            self._progress.begin(self._name.format(self._ends[0]))
