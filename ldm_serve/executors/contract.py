"""The contract of an executor, which the queue of the server feeds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ldm_serve.executors.messages import Event, Work


@dataclass(frozen=True, kw_only=True)
class ExecutorStats:
    """The state of an executor.

    Attributes:
        is_ready: Whether a worker takes work.
        room: Images that could be begun at once.
        workers: Workers that live.
        restarts: Workers that were replaced since the start.
        is_over: Whether no worker lives and none will be started.
        backend: Backend that runs the networks, once it is known.
        precision: Precision that they compute in.
        reason: Why it is not ready, in a sentence for the operator, not for clients.
    """

    is_ready: bool
    room: int
    workers: int
    restarts: int
    is_over: bool = False
    backend: str = ""
    precision: str = ""
    reason: str = ""


class Executor(Protocol):
    """Generates requests; used from one event loop, in which it also reports.

    Every submitted job ends with exactly one `Finished` or `Failed`, unless it is cancelled. Its
    `Progress` may go back: a job whose worker died is begun again.
    """

    async def start(self, report: Callable[[Event], None], changed: Callable[[], None]) -> None:
        """Start the workers, without waiting for their models.

        Args:
            report: Called with every event of a job.
            changed: Called when there may be room again.
        """

    def submit(self, work: Work) -> None:
        """Begin a job as soon as there is room; the caller looks at `stats` first."""

    def cancel(self, job: str) -> None:
        """Stop a job within a step; it has no more events."""

    def stats(self) -> ExecutorStats:
        """Return the state."""

    async def close(self) -> None:
        """End the workers at once, and wait for that."""
