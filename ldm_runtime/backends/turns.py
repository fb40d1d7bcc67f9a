"""Engines that take turns in memory: one is open at a time, and closed when another is needed."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

from ldm_runtime.backends.contract import Engine, Tensors


def never_drop(inherited: object) -> None:
    """Keep what a forked process has of its parent: no destructor of it runs, not even on exit."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


class Turns:
    """The one engine that is open, of one bundle or of several that share their memory.

    Threads wait for each other: the engine that one of them runs cannot be closed by another.
    """

    def __init__(self) -> None:
        self._start()

    @contextmanager
    def hold(self, key: object, open_engine: Callable[[], Engine]) -> Iterator[Engine]:
        """Return an engine that stays open until the end of the block.

        Args:
            key: What names it.
            open_engine: Opens it; called unless it is the one that is open.
        """
        with self._lock:
            if key not in self._open:
                self._close()
                self._open[key] = open_engine()
            yield self._open[key]

    def close(self) -> None:
        """Close the engine that is open, once no thread runs it."""
        with self._lock:
            self._close()

    def abandon(self) -> None:
        """Start without an engine in a forked process, and let that of its parent be."""
        never_drop(self._open)
        self._start()

    def _start(self) -> None:
        self._lock = Lock()
        self._open: dict[object, Engine] = {}

    def _close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


@dataclass(frozen=True, kw_only=True)
class TakingTurns:
    """A network that is open while it runs, and until another one runs.

    Two of the same turns and key are equal: they run the same engine, in shared calls too.

    Attributes:
        turns: What it shares with the others.
        key: What names its engine.
        open_engine: Opens its engine.
    """

    turns: Turns
    key: object
    open_engine: Callable[[], Engine] = field(compare=False)

    def run(self, inputs: Tensors) -> Tensors:
        """Run once; see `ldm_runtime.backends.contract.Runner`.

        Raises:
            BundleError: A file of the network is missing or altered.
        """
        with self.turns.hold(self.key, self.open_engine) as engine:
            return engine.run(inputs)
