"""How an export tells how far it is: a bar on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self, TextIO

_BAR_WIDTH = 24
_TICK_SECONDS = 0.5


class Progress(Protocol):
    """Told when stages begin and end."""

    def plan(self, seconds: Mapping[str, float]) -> None:
        """Take note of the stages to come and the seconds each is expected to need."""
        ...

    def begin(self, stage: str) -> None:
        """A stage starts."""
        ...

    def advance(self, fraction: float) -> None:
        """The running stage is as far as `fraction` of the whole; called from any thread."""
        ...

    def end(self, stage: str, outcome: str) -> None:
        """A stage is done; `outcome` is "built" or "reused"."""
        ...


class Silent:
    """Tells nobody."""

    def plan(self, seconds: Mapping[str, float]) -> None:
        """Ignore it."""

    def begin(self, stage: str) -> None:
        """Ignore it."""

    def advance(self, fraction: float) -> None:
        """Ignore it."""

    def end(self, stage: str, outcome: str) -> None:
        """Ignore it."""


class Lines:
    """One line a finished stage."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = time.monotonic()

    def plan(self, seconds: Mapping[str, float]) -> None:
        """Say how long it should take."""
        print(f"about {_clock(sum(seconds.values()))} to go", file=self._stream, flush=True)

    def begin(self, stage: str) -> None:
        """Start the stage's clock."""
        self._started = time.monotonic()

    def advance(self, fraction: float) -> None:
        """Wait for the end."""

    def end(self, stage: str, outcome: str) -> None:
        """Print the stage and its time."""
        seconds = time.monotonic() - self._started
        print(f"{stage:<14} {outcome} in {seconds:.1f} s", file=self._stream, flush=True)


class Bar:
    """A bar with the running stage and the time left, redrawn twice a second."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._seconds: dict[str, float] = {}
        self._left: dict[str, float] = {}
        self._stage, self._stage_started = "", time.monotonic()
        self._fraction: float | None = None
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def plan(self, seconds: Mapping[str, float]) -> None:
        """Take note of the estimates."""
        with self._lock:
            self._seconds, self._left = dict(seconds), dict(seconds)

    def begin(self, stage: str) -> None:
        """Show the stage."""
        with self._lock:
            self._stage, self._stage_started = stage, time.monotonic()
            self._fraction = None

    def advance(self, fraction: float) -> None:
        """Show what the stage says of itself, beside the time left."""
        with self._lock:
            self._fraction = fraction

    def end(self, stage: str, outcome: str) -> None:
        """Count the stage as done."""
        with self._lock:
            self._left[stage] = 0.0
            self._stage = ""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        print("\r\x1b[K", end="", file=self._stream, flush=True)

    def _tick(self) -> None:
        while not self._stop.wait(_TICK_SECONDS):
            with self._lock:
                print(f"\r\x1b[K{self._line()}", end="", file=self._stream, flush=True)

    def _line(self) -> str:
        if not self._seconds:
            return "reading the checkpoint"
        total = sum(self._seconds.values()) or 1.0  # 0 if everything is reused
        elapsed = time.monotonic() - self._stage_started if self._stage else 0.0
        left = sum(self._left.values())
        left -= min(elapsed, 0.95 * self._left.get(self._stage, 0.0))
        done = round(_BAR_WIDTH * (1 - left / total))
        bar = "#" * done + "." * (_BAR_WIDTH - done)
        own = "" if self._fraction is None else f", at {self._fraction:.0%}"
        return f"[{bar}] {self._stage}{own} (about {_clock(left)} left)"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
