"""Runs several sampling loops together, so that one network call serves them all.

A loop needs the network in the midst of its arithmetic and cannot go on without the answer. So each
has a thread of its own, but threads take turns and never compute at once: the one that consumes the
items resumes a loop and waits until it needs the network, has made an item or ends. It alone calls
the network. What happens when thus depends on no clock, and between two items nothing happens.

Threads, because they leave samplers as they are. The same without them would take samplers that are
coroutines, with every denoiser call a `yield`, or loops begun anew for every call, with all answers
so far at hand: quadratic in the number of calls.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import accumulate
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

import numpy as np

from ldm_runtime.backends.contract import Runner, Tensors, bind_constants
from ldm_runtime.errors import ShapeError

Item = TypeVar("Item")
#: Makes items with the network it is given, which it uses in no thread but the one it runs in.
Loop = Callable[[Runner], Iterator[Item]]


def run_together(
    loops: Iterable[Loop[Item]], engine: Runner, *, max_rows: int, min_rows: int = 1
) -> Generator[tuple[int, Item], None, None]:
    """Yield what loops make, with the number of the loop, while they share calls of a network.

    The earliest loop always has its turn. The others join its call in order, as far as there is
    room and every axis but the first agrees; the rest wait. There are never more loops under way
    than rows in a call: a further one is taken from `loops` and begun as others end. A loop gets
    what it would get alone, as far as the network computes rows independently of each other.

    Closing the generator stops every loop where it waits. An error, in a loop or in the network,
    stops the others too.

    Args:
        loops: What makes the items. Each may call `run` of the network it is given, and of what
            its `bind` returns; the first axis of every array counts the rows.
        engine: The network.
        max_rows: Rows in a shared call. A loop that asks for more has calls of its own.
        min_rows: Rows to ask for to have a shared call; a loop that asks for fewer has calls of its
            own. On the CPU two rows or more give the same bits in any company, but a single one
            may take other paths: matrix products become matrix-vector products, reductions
            lose an axis, convolutions are divided among threads by another rule.

    Raises:
        ValueError: `max_rows` is less than 1.
        ShapeError: The inputs of a call differ in the number of rows.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    return _Together(loops, engine, min_rows, max_rows).items()


def in_order(results: Generator[tuple[int, Item], None, None]) -> Generator[Item, None, None]:
    """Yield the one result of each loop, in the order of the loops, as soon as it is its turn.

    Args:
        results: From `run_together`; closed at the end.
    """
    early: dict[int, Item] = {}
    expected = 0
    with closing(results):
        for index, result in results:
            early[index] = result
            while expected in early:
                yield early.pop(expected)
                expected += 1


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """A network call that a loop waits for; the first axis of every array counts its rows."""

    constants: Tensors
    inputs: Tensors

    @property
    def rows(self) -> int:
        return len(next(iter({**self.inputs, **self.constants}.values())))

    @property
    def kind(self) -> object:
        """What calls have in common that can be one."""
        return [
            {name: (array.dtype, array.shape[1:]) for name, array in tensors.items()}
            for tensors in (self.constants, self.inputs)
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Made(Generic[Item]):
    item: Item


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ended:
    error: BaseException | None = None


class _Stopped(BaseException):
    """Unwinds a loop that nobody will resume."""


class _LoopThread(Generic[Item]):
    """A loop in a thread that computes only while `resume` waits for it."""

    def __init__(self, loop: Loop[Item]) -> None:
        self._answers: SimpleQueue[Tensors] = SimpleQueue()
        self._events: SimpleQueue[_Call | _Made[Item] | _Ended] = SimpleQueue()
        self._stopping = False
        # In a copy of the caller's context, which holds NumPy's errstate; a daemon, so that the
        # process can end while a half-consumed generator is still referred to.
        work = copy_context().run
        self._thread = Thread(target=work, args=(self._work, loop), name="ldm-loop", daemon=True)
        self._thread.start()

    def resume(self, answer: Tensors) -> _Call | _Made[Item] | None:
        """Let the loop go on until it needs the network, has made an item or ends (None).

        Args:
            answer: What the network returned, if the loop waits for it.
        """
        self._answers.put(answer)
        event = self._events.get()
        if not isinstance(event, _Ended):
            return event
        if event.error is None:
            return None
        try:
            raise event.error
        finally:
            del event  # else its traceback and this frame would keep each other alive

    def stop(self) -> None:
        """Have the loop unwind from where it waits, or else from its next call or item."""
        self._stopping = True
        self._answers.put({})

    def join(self) -> None:
        """Wait for the end of a stopped loop."""
        self._thread.join()

    def wait_for(self, event: _Call | _Made[Item]) -> Tensors:
        """Hand over to `resume` and return the answer it is given next; for the loop's thread."""
        if not self._stopping:
            self._events.put(event)
            answer = self._answers.get()
        if self._stopping:
            raise _Stopped
        return answer

    def _work(self, loop: Loop[Item]) -> None:
        self._answers.get()
        try:
            for item in () if self._stopping else loop(_SharedRunner(ask=self.wait_for)):
                self.wait_for(_Made(item=item))
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001  (`resume` raises it)
            self._events.put(_Ended(error=error))
        else:
            self._events.put(_Ended())


@dataclass(frozen=True, kw_only=True, eq=False)
class _SharedRunner:
    """What a loop takes for the network."""

    ask: Callable[[_Call], Tensors]
    constants: Tensors = field(default_factory=dict)

    def run(self, inputs: Tensors) -> Tensors:
        """Run once, maybe with rows of other loops; see `ldm_runtime.backends.contract.Runner`."""
        call = _Call(constants=self.constants, inputs=inputs)
        for name, array in {**self.constants, **inputs}.items():
            if len(array) != call.rows:
                raise ShapeError(name, array.shape, (call.rows, *array.shape[1:]))
        return self.ask(call)

    def bind(self, constants: Tensors) -> Runner:
        """Fix some inputs; see `ldm_runtime.backends.Engine`."""
        return _SharedRunner(ask=self.ask, constants=constants)


class _JoiningNetwork:
    """A network that answers several calls at once and keeps their constants bound."""

    def __init__(self, engine: Runner) -> None:
        self._engine = engine
        self._bound = engine
        self._constants: Sequence[Tensors] = ()

    def run(self, calls: Sequence[_Call]) -> list[Tensors]:
        """Return the answer to each call; a single one reaches the engine as it is."""
        network = self._bind([call.constants for call in calls])
        outputs = network.run(_join([call.inputs for call in calls]))
        if len(calls) == 1:
            return [outputs]
        ends = accumulate(call.rows for call in calls)
        return [
            {name: array[end - call.rows : end].copy() for name, array in outputs.items()}
            for call, end in zip(calls, ends, strict=True)
        ]

    def _bind(self, constants: Sequence[Tensors]) -> Runner:
        """Bind, unless the very same arrays are: a device would upload them again."""
        if _identities(constants) != _identities(self._constants):
            joined = _join(constants)
            self._bound = bind_constants(self._engine, joined) if joined else self._engine
            self._constants = constants
        return self._bound


class _Together(Generic[Item]):
    """Loops, begun in order, and the calls that they wait for."""

    def __init__(
        self, loops: Iterable[Loop[Item]], engine: Runner, min_rows: int, max_rows: int
    ) -> None:
        self._loops = enumerate(loops)
        self._network = _JoiningNetwork(engine)
        self._min_rows, self._max_rows = min_rows, max_rows
        self._threads: dict[int, _LoopThread[Item]] = {}
        self._waiting: dict[int, _Call] = {}

    def items(self) -> Generator[tuple[int, Item], None, None]:
        """Run all loops to their ends."""
        try:
            yield from self._begin()
            while self._waiting:
                chosen = self._choose()
                answers = self._network.run([self._waiting.pop(index) for index in chosen])
                for index, answer in zip(chosen, answers, strict=True):
                    yield from self._resume(index, answer)
                yield from self._begin()
        finally:
            for thread in self._threads.values():
                thread.stop()
            for thread in self._threads.values():
                thread.join()

    def _begin(self) -> Iterator[tuple[int, Item]]:
        """Begin loops as long as those that wait leave rows to fill."""
        while self._has_room() and (begun := next(self._loops, None)):
            index, loop = begun
            self._threads[index] = _LoopThread(loop)
            yield from self._resume(index, {})

    def _has_room(self) -> bool:
        return sum(call.rows for call in self._waiting.values()) < self._max_rows

    def _resume(self, index: int, answer: Tensors) -> Iterator[tuple[int, Item]]:
        """Let a loop go on to its next call or its end, and pass on what it makes."""
        event = self._threads[index].resume(answer)
        while isinstance(event, _Made):
            yield index, event.item
            event = self._threads[index].resume({})
        if event is None:
            self._threads.pop(index).join()
        else:
            self._waiting[index] = event

    def _choose(self) -> list[int]:
        """Return which loops make up the next call: the earliest, and what fits to it."""
        earliest, *others = sorted(self._waiting)
        chosen, room = [earliest], self._max_rows - self._waiting[earliest].rows
        for index in others:
            rows = self._waiting[index].rows
            if rows <= room and self._can_join(index, earliest):
                chosen.append(index)
                room -= rows
        return chosen

    def _can_join(self, index: int, other: int) -> bool:
        calls = [self._waiting[index], self._waiting[other]]
        return calls[0].kind == calls[1].kind and min(call.rows for call in calls) >= self._min_rows


def _join(calls: Sequence[Tensors]) -> Tensors:
    """Put arrays of the same names below each other."""
    first, *others = calls
    if not others:
        return first
    return {name: np.concatenate([call[name] for call in calls]) for name in first}


def _identities(calls: Sequence[Tensors]) -> list[dict[str, int]]:
    return [{name: id(array) for name, array in call.items()} for call in calls]
