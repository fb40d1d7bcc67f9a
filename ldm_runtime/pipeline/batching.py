"""Batching of several sampling loops, so that they share network calls.

A loop needs the network in the middle of its arithmetic and cannot continue without the answer. So
each has its own thread, but threads take turns and never compute at once: the consumer of the items
resumes a loop and waits until it needs the network, has made an item or ends. The consumer alone
calls the network. The order of events thus does not depend on timing, and nothing runs between two
items.

Threads leave the samplers as they are. The alternatives are samplers as coroutines, with every
denoiser call a `yield`, or loops that start again for every call with all answers so far: quadratic
in the number of calls.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

import numpy as np

from ldm_runtime.backends.contract import Runner, Tensors, bind_constants
from ldm_runtime.errors import ShapeError

Item = TypeVar("Item")
#: Makes items with the network it is given, which it uses only in the thread that it runs in.
Loop = Callable[["SharedRunner"], Iterator[Item]]
#: Returns a network as a loop is to see it, whose calls are shared.
Share = Callable[[Runner], "SharedRunner"]
#: Makes items with networks that it opens itself and shares.
SharingLoop = Callable[[Share], Iterator[Item]]


def run_together(
    loops: Iterable[Loop[Item]], engine: Runner, *, max_samples: int, min_samples: int = 1
) -> Generator[tuple[int, Item], None, None]:
    """Yield the items of several loops, with the loops' numbers, while they share network calls.

    The earliest loop is always served first. The others join its call in order, as far as there is
    room, the network is the same and every axis but the first agrees; the rest wait. There are
    never more active loops than samples in a call: the next one is taken from `loops` and started
    as others end. A loop gets the results that it would get alone, as far as the network is
    batch-invariant.

    Closing the generator stops every loop where it waits. An error, in a loop or in the network,
    stops the others too.

    Args:
        loops: The loops. Each may call `run` of the network it is given, and of the runners that
            its `bind` and `over` return; the first axis of every array is the batch.
        engine: The network that they are given.
        max_samples: Batch size of a shared call. A loop that asks for more has separate calls.
        min_samples: Smallest batch size that a loop must ask for to share a call; with fewer it has
            separate calls. The CPU is batch-invariant from two samples on, but a single one may
            take other paths: matrix products become matrix-vector products, reductions lose an
            axis, convolutions are divided among threads by another rule.

    Raises:
        ValueError: `max_samples` is less than 1.
        ShapeError: The inputs of a call differ in batch size.
    """
    if max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    scheduler: LoopScheduler[Item] = LoopScheduler(max_samples=max_samples, min_samples=min_samples)
    return _run_all((_given(engine, loop) for loop in loops), scheduler)


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
    """A network call that a loop waits for; the first axis of every array is the batch."""

    engine: Runner
    constants: Tensors
    inputs: Tensors

    @property
    def samples(self) -> int:
        return len(next(iter({**self.inputs, **self.constants}.values())))

    @property
    def signature(self) -> object:
        """Types and shapes without the batch axis; calls with equal ones can be joined."""
        return [
            {name: (array.dtype, array.shape[1:]) for name, array in tensors.items()}
            for tensors in (self.constants, self.inputs)
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoopItem(Generic[Item]):
    """An item that a loop made."""

    item: Item


@dataclass(frozen=True, kw_only=True, eq=False)
class LoopEnd:
    """The end of a loop, and the error that ended it, if one did."""

    error: BaseException | None = None


class _Stopped(BaseException):
    """Unwinds a loop that is not going to be resumed."""


class _LoopThread(Generic[Item]):
    """A thread for one loop, which computes only while `resume` waits for it."""

    def __init__(self, loop: SharingLoop[Item]) -> None:
        self._answers: SimpleQueue[Tensors] = SimpleQueue()
        self._events: SimpleQueue[_Call | LoopItem[Item] | LoopEnd] = SimpleQueue()
        self._stopping = False
        # In a copy of the caller's context, which holds NumPy's errstate; a daemon, so that the
        # process can end while a half-consumed generator is still referred to.
        work = copy_context().run
        self._thread = Thread(target=work, args=(self._work, loop), name="ldm-loop", daemon=True)
        self._thread.start()

    def resume(self, answer: Tensors) -> _Call | LoopItem[Item] | LoopEnd:
        """Run the loop until it needs the network, has made an item or ends.

        Args:
            answer: The outputs of the network, if the loop waits for them.
        """
        self._answers.put(answer)
        return self._events.get()

    def stop(self) -> None:
        """Unwind the loop from where it waits, or else from its next call or item."""
        self._stopping = True
        self._answers.put({})

    def join(self) -> None:
        """Wait for the end of a stopped loop."""
        self._thread.join()

    def wait_for(self, event: _Call | LoopItem[Item]) -> Tensors:
        """Pass an event to `resume` and return its next answer; called in the loop's thread."""
        if not self._stopping:
            self._events.put(event)
            answer = self._answers.get()
        if self._stopping:
            raise _Stopped
        return answer

    def _work(self, loop: SharingLoop[Item]) -> None:
        self._answers.get()
        try:
            share = partial(SharedRunner, ask=self.wait_for)
            for item in () if self._stopping else loop(lambda engine: share(engine=engine)):
                self.wait_for(LoopItem(item=item))
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001  (the scheduler's caller gets it)
            self._events.put(LoopEnd(error=error))
        else:
            self._events.put(LoopEnd())


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedRunner:
    """A network as a loop sees it.

    Attributes:
        ask: Returns the answer to a call.
        engine: The network.
        constants: The inputs that are fixed.
    """

    ask: Callable[[_Call], Tensors]
    engine: Runner
    constants: Tensors = field(default_factory=dict)

    def run(self, inputs: Tensors) -> Tensors:
        """Run once, possibly batched with other loops; see `Runner`."""
        call = _Call(engine=self.engine, constants=self.constants, inputs=inputs)
        for name, array in {**self.constants, **inputs}.items():
            if len(array) != call.samples:
                raise ShapeError(name, array.shape, (call.samples, *array.shape[1:]))
        return self.ask(call)

    def bind(self, constants: Tensors) -> Runner:
        """Fix some inputs; see `ldm_runtime.backends.Engine`."""
        return replace(self, constants=constants)

    def over(self, engine: Runner) -> Runner:
        """Return another network as the loop sees it, whose calls are shared likewise."""
        return SharedRunner(ask=self.ask, engine=engine)


class _JoiningNetwork:
    """A network that answers several calls at once and keeps their constants bound.

    Attributes:
        engine: The network.
        users: The loops that have called it and have not ended.
    """

    def __init__(self, engine: Runner) -> None:
        self.engine = engine
        self.users: set[int] = set()
        self._bound = engine
        self._constants: Sequence[Tensors] = ()

    def run(self, calls: Sequence[_Call]) -> list[Tensors]:
        """Return the answer to each call; a single one reaches the engine as it is."""
        network = self._bind([call.constants for call in calls])
        outputs = network.run(_join([call.inputs for call in calls]))
        if len(calls) == 1:
            return [outputs]
        ends = accumulate(call.samples for call in calls)
        return [
            {name: array[end - call.samples : end].copy() for name, array in outputs.items()}
            for call, end in zip(calls, ends, strict=True)
        ]

    def _bind(self, constants: Sequence[Tensors]) -> Runner:
        """Bind, unless the same arrays are bound already: a device would upload them again."""
        if _identities(constants) != _identities(self._constants):
            joined = _join(constants)
            self._bound = bind_constants(self.engine, joined) if joined else self.engine
            self._constants = constants
        return self._bound


class LoopScheduler(Generic[Item]):
    """Loops that come and go, and the network calls that they share; used by one thread.

    Loops have numbers, in which the lowest is the earliest.

    Args:
        max_samples: Batch size of a shared call. A loop that asks for more has separate calls.
        min_samples: Smallest batch size that a loop must ask for to share a call.
        max_begun: Samples of all loops that wait, from which on there is no room for others;
            `max_samples` if not given. With more than that, loops whose calls have no room for each
            other take turns too.
        takes_turns: Whether the next call is of the loop that has waited longest, so that none
            waits for the end of another whose calls it cannot share; else it is of the earliest.

    Raises:
        ValueError: `max_samples` is less than 1.
    """

    def __init__(
        self,
        *,
        max_samples: int,
        min_samples: int = 1,
        max_begun: int | None = None,
        takes_turns: bool = False,
    ) -> None:
        if max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        self._networks: list[_JoiningNetwork] = []
        self._min_samples, self._max_samples = min_samples, max_samples
        self._max_begun = max_samples if max_begun is None else max_begun
        self._takes_turns = takes_turns
        self._threads: dict[int, _LoopThread[Item]] = {}
        self._waiting: dict[int, _Call] = {}

    @property
    def has_room(self) -> bool:
        """Whether another loop may begin: the waiting ones have few enough samples."""
        return sum(call.samples for call in self._waiting.values()) < self._max_begun

    @property
    def is_waiting(self) -> bool:
        """Whether a loop waits for a network."""
        return bool(self._waiting)

    def begin(self, index: int, loop: SharingLoop[Item]) -> Iterator[LoopItem[Item] | LoopEnd]:
        """Start a loop and yield its events up to its first call, or to its end.

        Args:
            index: Its number, which no other loop has.
            loop: The loop.
        """
        self._threads[index] = _LoopThread(loop)
        yield from self._resume(index, {})

    def next_call(self) -> list[int]:
        """Return the loops of the next call: the one whose turn it is, and those that fit."""
        # A loop that has been answered is put in again, so the order is that of waiting.
        first, *others = self._waiting if self._takes_turns else sorted(self._waiting)
        chosen, room = [first], self._max_samples - self._waiting[first].samples
        for index in others:
            samples = self._waiting[index].samples
            if samples <= room and self._can_join(index, first):
                chosen.append(index)
                room -= samples
        return chosen

    def call(self, chosen: Sequence[int]) -> Iterator[tuple[int, LoopItem[Item] | LoopEnd]]:
        """Call the network once for some loops, and yield the events of each up to its next call.

        An error of the network is raised at once; the loops then wait as before.

        Args:
            chosen: From `next_call`, or some of those.
        """
        calls = [self._waiting[index] for index in chosen]
        network = self._network(calls[0].engine)
        network.users.update(chosen)
        answers = network.run(calls)
        for index in chosen:
            del self._waiting[index]
        for index, answer in zip(chosen, answers, strict=True):
            for event in self._resume(index, answer):
                yield index, event

    def stop(self, index: int) -> None:
        """Stop a loop where it waits, without events; a loop that has ended is left alone."""
        self._waiting.pop(index, None)
        if thread := self._threads.pop(index, None):
            thread.stop()
            thread.join()
        self._forget(index)

    def close(self) -> None:
        """Stop all loops."""
        for thread in self._threads.values():
            thread.stop()
        for index in list(self._threads):
            self.stop(index)

    def _resume(self, index: int, answer: Tensors) -> Iterator[LoopItem[Item] | LoopEnd]:
        """Run a loop to its next call or its end, and yield its events."""
        while thread := self._threads.get(index):  # may be stopped after any event
            event = thread.resume(answer)
            if isinstance(event, _Call):
                self._waiting[index] = event
                return
            if isinstance(event, LoopEnd):
                self._threads.pop(index).join()
                self._forget(index)
                yield event
                return
            yield event
            answer = {}

    def _network(self, engine: Runner) -> _JoiningNetwork:
        """Return the network that answers the calls of an engine."""
        for network in self._networks:
            if network.engine == engine:
                return network
        self._networks.append(_JoiningNetwork(engine))
        return self._networks[-1]

    def _forget(self, index: int) -> None:
        """Forget a loop that has ended, and with their constants the networks it used alone."""
        for network in self._networks:
            network.users.discard(index)
        self._networks = [each for each in self._networks if each.users]

    def _can_join(self, index: int, other: int) -> bool:
        calls = [self._waiting[index], self._waiting[other]]
        same = calls[0].engine == calls[1].engine and calls[0].signature == calls[1].signature
        return same and min(call.samples for call in calls) >= self._min_samples


def _run_all(
    loops: Iterable[SharingLoop[Item]], scheduler: LoopScheduler[Item]
) -> Generator[tuple[int, Item], None, None]:
    """Yield the items of all loops, and raise the first error."""
    with closing(scheduler):
        for index, event in _events(loops, scheduler):
            if isinstance(event, LoopItem):
                yield index, event.item
            elif event.error is not None:
                try:
                    raise event.error
                finally:
                    del event  # else its traceback and this frame would keep each other alive


def _events(
    loops: Iterable[SharingLoop[Item]], scheduler: LoopScheduler[Item]
) -> Iterator[tuple[int, LoopItem[Item] | LoopEnd]]:
    """Run all loops to their ends; start each as soon as the waiting ones leave room."""
    numbered = enumerate(loops)
    while True:
        while scheduler.has_room and (begun := next(numbered, None)):
            index, loop = begun
            for event in scheduler.begin(index, loop):
                yield index, event
        if not scheduler.is_waiting:
            return
        yield from scheduler.call(scheduler.next_call())


def _given(engine: Runner, loop: Loop[Item]) -> SharingLoop[Item]:
    """Return a loop that is given one network."""
    return lambda share: loop(share(engine))


def _join(calls: Sequence[Tensors]) -> Tensors:
    """Concatenate arrays of the same names along the batch axis."""
    first, *others = calls
    if not others:
        return first
    return {name: np.concatenate([call[name] for call in calls]) for name in first}


def _identities(calls: Sequence[Tensors]) -> list[dict[str, int]]:
    return [{name: id(array) for name, array in call.items()} for call in calls]
