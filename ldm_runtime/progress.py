"""Progress of long operations: a bar on a terminal, one line per step elsewhere.

Exports, engine builds and generation all report to one `Progress`, step by step.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TextIO

_BAR_WIDTH = 24
_TICK_SECONDS = 0.5
_LEAST_DONE = 0.05  # before that, the pace says nothing


class Progress(Protocol):
    """A listener that is told when steps begin and end."""

    def plan(self, seconds: Mapping[str, float | None]) -> None:
        """Take note of the steps to come and the seconds that each may need; None is unknown."""
        ...

    def begin(self, step: str) -> None:
        """A step starts."""
        ...

    def advance(self, fraction: float) -> None:
        """The running step is as far as `fraction` of the whole; called from any thread."""
        ...

    def end(self, step: str, outcome: str) -> None:
        """A step is done; `outcome` is one word, such as "built" or "reused"."""
        ...


class Silent:
    """Progress that is not reported."""

    def plan(self, seconds: Mapping[str, float | None]) -> None:
        """Ignore it."""

    def begin(self, step: str) -> None:
        """Ignore it."""

    def advance(self, fraction: float) -> None:
        """Ignore it."""

    def end(self, step: str, outcome: str) -> None:
        """Ignore it."""


class Lines:
    """One line per finished step.

    Args:
        stream: Where they go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = time.monotonic()

    def plan(self, seconds: Mapping[str, float | None]) -> None:
        """Say how long it should take."""
        known = [each for each in seconds.values() if each is not None]
        if known:
            print(f"about {_clock(sum(known))} to go", file=self._stream, flush=True)

    def begin(self, step: str) -> None:
        """Start the step's clock."""
        self._started = time.monotonic()

    def advance(self, fraction: float) -> None:
        """Wait for the end."""

    def end(self, step: str, outcome: str) -> None:
        """Print the step and its time."""
        seconds = time.monotonic() - self._started
        print(f"{step:<14} {outcome} in {seconds:.1f} s", file=self._stream, flush=True)


class Bar:
    """A bar with the running step and the time left, refreshed twice a second.

    The time left is first the estimate, and then follows the pace so far. Between two steps nothing
    is shown, so that others may write to the terminal.

    Args:
        stream: A terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._weights: dict[str, float] = {}
        self._knows_seconds = False
        self._done: set[str] = set()
        self._step, self._fraction = "", 0.0
        self._started = self._step_started = time.monotonic()
        self._reports_itself = False
        self._lock = threading.Lock()

    def plan(self, seconds: Mapping[str, float | None]) -> None:
        """Take note of the estimates."""
        with self._lock:
            self._knows_seconds = None not in seconds.values()
            self._weights = {step: 1.0 if each is None else each for step, each in seconds.items()}
            self._started = time.monotonic()

    def begin(self, step: str) -> None:
        """Show the step."""
        with self._lock:
            self._step, self._step_started = step, time.monotonic()
            self._fraction, self._reports_itself = 0.0, False
        self.redraw()

    def advance(self, fraction: float) -> None:
        """Show how far the step says that it is."""
        with self._lock:
            self._fraction, self._reports_itself = fraction, True

    def end(self, step: str, outcome: str) -> None:
        """Count the step as done, and make room for other lines."""
        with self._lock:
            self._done.add(step)
            self._step = ""
            self._write("")

    def redraw(self) -> None:
        """Show the bar as it is now."""
        with self._lock:
            if self._step:
                self._write(self._line())

    def clear(self) -> None:
        """Take the bar away."""
        with self._lock:
            self._write("")

    def _write(self, line: str) -> None:
        self._stream.write(f"\r\x1b[K{line}")
        self._stream.flush()

    def _line(self) -> str:
        elapsed = time.monotonic() - self._step_started
        own = f", at {self._fraction:.0%}" if self._reports_itself else ""
        if self._step not in self._weights:
            return f"{self._step}{own} ({_clock(elapsed)})"
        share = self._share(elapsed)
        done = round(_BAR_WIDTH * share)
        bar = "#" * done + "." * (_BAR_WIDTH - done)
        left = self._left(share)
        rest = "" if left is None else f" (about {_clock(left)} left)"
        return f"[{bar}] {self._step}{own}{rest}"

    def _share(self, elapsed: float) -> float:
        """Return how much of the whole is done."""
        total = sum(self._weights.values())
        if total == 0:  # everything is reused
            return 1.0
        planned = self._weights[self._step]
        running = self._fraction * planned
        if self._knows_seconds and not self._reports_itself:
            running = min(elapsed, 0.95 * planned)
        finished = sum(seconds for step, seconds in self._weights.items() if step in self._done)
        return min((finished + running) / total, 1.0)

    def _left(self, share: float) -> float | None:
        """Return the seconds that are left, or None where nothing is known of them yet."""
        if share < _LEAST_DONE:
            return sum(self._weights.values()) * (1 - share) if self._knows_seconds else None
        return (time.monotonic() - self._started) * (1 - share) / share


@contextmanager
def reporting_to(stream: TextIO) -> Iterator[Progress]:
    """Report to a stream: a bar on a terminal, which goes away at the end, lines elsewhere."""
    if not stream.isatty():
        yield Lines(stream)
        return
    bar, stop = Bar(stream), threading.Event()

    def tick() -> None:
        while not stop.wait(_TICK_SECONDS):
            bar.redraw()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield bar
    finally:
        stop.set()
        thread.join()
        bar.clear()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
