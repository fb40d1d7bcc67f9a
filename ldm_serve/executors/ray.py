"""The executor on a Ray cluster: actors on its nodes, replaced on others when they die."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm_serve.executors.contract import ExecutorStats
from ldm_serve.executors.messages import Event, Work, decode_report, encode
from ldm_serve.executors.pool import PoolWorker, WorkerPool
from ldm_serve.executors.ray_cluster import connected, live_nodes, ray, sentence
from ldm_serve.executors.ray_worker import NodeBundles, NodeError, RayWorker
from ldm_serve.settings import TEXT_LOGS, EngineSettings, LogSettings

_LOGGER = logging.getLogger(__name__)

#: Seconds after which the log says that a worker is not ready.
_PATIENCE = 60.0
#: Longest time between two looks for silent workers, in seconds.
_WATCH_SECONDS = 5.0
#: Ray restarts and repeats nothing, since it would do so in the same place.
_ONCE = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}


@dataclass(eq=False, kw_only=True)
class _Actor(PoolWorker):
    """An actor, as the process that started it sees it."""

    handle: Any
    events: int = 0


class RayExecutor:
    """Generates in actors of a Ray cluster, whose nodes have the bundles in the same folders.

    Jobs of an actor that dies, alone or with its node, are run again by another: see `WorkerPool`.
    A node with another bundle is refused and gets no more actors. The constructor waits until the
    cluster answers, and `close` leaves it.

    Args:
        bundles: Folder of every model; each worker opens the first at its start.
        settings: How they are opened. A worker takes as many CPUs of its node as it has threads,
            one if that is open.
        address: Host and port of the cluster.
        workers: How many workers. Those for which no node has room wait.
        gpus: GPUs of its node that a worker takes.
        stall_seconds: How long a worker may be silent over a job.
        logs: What workers say, which Ray keeps on their nodes.
        reports_steps: Whether steps are reported, all that an actor has done at once: those of a
            large cluster are many messages to one process.

    Raises:
        RequestError: The address is none, or there is no token.
        ClusterError: No cluster answers.
        OSError: A bundle cannot be read.
    """

    def __init__(  # noqa: PLR0913  (what a cluster has to know)
        self,
        bundles: Mapping[str, Path],
        settings: EngineSettings,
        *,
        address: str,
        workers: int = 1,
        gpus: float = 0.0,
        stall_seconds: float = 300.0,
        reports_steps: bool = False,
        logs: LogSettings = TEXT_LOGS,
    ) -> None:
        self._required = NodeBundles.of_this_machine(bundles, settings.adapters.values())
        self._reports_steps, self._logs = reports_steps, logs
        self._settings = replace(settings, threads=settings.threads or 1)
        self._cpus, self._gpus = settings.threads or 1, gpus
        self._count, self._stall_seconds = workers, stall_seconds
        self._pool: WorkerPool[_Actor] = WorkerPool()
        self._refused: set[str] = set()  # identifiers of nodes
        self._given_up = 0
        self._reason = "no node has room for a worker yet, or the model is being opened"
        self._tasks: set[asyncio.Task[None]] = set()
        self._connection = ExitStack()
        self._connection.enter_context(connected(address))

    async def start(self, report: Callable[[Event], None], changed: Callable[[], None]) -> None:
        """See `Executor`."""
        self._report, self._changed = report, changed
        for _ in range(self._count):
            self._spawn()

    def submit(self, work: Work) -> None:
        """See `Executor`."""
        self._pool.add(work)
        self._hand_out()

    def cancel(self, job: str) -> None:
        """See `Executor`."""
        actor = self._pool.cancel(job)
        if actor is not None:
            actor.handle.cancel.remote(job)
            self._hand_out()

    def stats(self) -> ExecutorStats:
        """See `Executor`."""
        return self._pool.stats(self._reason, is_over=self._given_up == self._count)

    async def close(self) -> None:
        """See `Executor`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for actor in self._pool.workers:
            ray.kill(actor.handle)
        self._pool.workers.clear()
        self._connection.close()

    def _spawn(self) -> None:
        options = {**_ONCE, "num_cpus": self._cpus, "num_gpus": self._gpus}
        if self._refused:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self._refused)})"}
        actor_class = ray.remote(RayWorker).options(**options)
        handle = actor_class.remote(self._required, self._settings, self._logs)
        actor = _Actor(handle=handle)
        self._pool.workers.append(actor)
        self._keep(self._open(actor))

    async def _open(self, actor: _Actor) -> None:
        """Wait for an actor's place and its model, then watch it."""
        opening = asyncio.ensure_future(_result(actor.handle.open.remote()))
        try:
            done, _ = await asyncio.wait({opening}, timeout=_PATIENCE)
            if not done:
                _LOGGER.warning("a worker still waits: %s", self._reason)
            ready = await opening
        except NodeError as error:  # as an error of Ray that is one, too
            self._refuse(actor, getattr(error, "cause", error))
        except ray.exceptions.RayError as error:
            self._died(actor, error)
        else:
            self._pool.take(actor, decode_report(ready))
            self._hand_out()
            self._changed()
            if self._reports_steps:
                self._keep(self._follow(actor))
            await self._watch(actor)
        finally:
            opening.cancel()

    async def _generate(self, actor: _Actor, work: Work) -> None:
        try:
            data = await actor.handle.generate.remote(encode(work))
        except ray.exceptions.RayError as error:
            self._died(actor, error)
            return
        actor.heard = time.monotonic()
        actor.stopping.discard(work.job)
        event = self._pool.take(actor, decode_report(data)) if data else None
        if event is not None:
            self._report(event)
        self._hand_out()
        self._changed()

    async def _follow(self, actor: _Actor) -> None:
        """Report the steps of an actor; of steps that are faster than its answers, the latest."""
        while actor in self._pool.workers:
            try:
                steps = await actor.handle.next_steps.remote()
            except ray.exceptions.RayError as error:
                self._died(actor, error)
                return
            for step in steps:
                event = self._pool.take(actor, decode_report(step))
                if event is not None:
                    self._report(event)

    async def _watch(self, actor: _Actor) -> None:
        """Ask an actor how far it is, and replace it if it is silent over a job."""
        while actor in self._pool.workers:
            await asyncio.sleep(min(_WATCH_SECONDS, self._stall_seconds / 4))
            counting = _result(actor.handle.count_events.remote())
            try:
                events = await asyncio.wait_for(counting, self._stall_seconds)
            except TimeoutError:
                events = actor.events
            except ray.exceptions.RayError as error:
                self._died(actor, error)
                return
            now = time.monotonic()
            if events != actor.events or not actor.owes_an_answer:
                actor.events, actor.heard = events, now
            elif now - actor.heard > self._stall_seconds:
                self._died(actor, TimeoutError("it was silent over a job"))

    def _died(self, actor: _Actor, error: Exception) -> None:
        """Replace an actor, and run its jobs again before all others."""
        if actor not in self._pool.workers:  # another of its calls has said so
            return
        self._reason = f"a worker has ended: {sentence(error)}"
        _LOGGER.error("%s", self._reason)
        ray.kill(actor.handle)  # one that cannot be reached may yet live
        ends, pause = self._pool.bury(actor)
        for end in ends:
            self._report(end)
        self._keep(self._replace_after(pause))
        self._hand_out()
        self._changed()

    async def _replace_after(self, pause: float) -> None:
        await asyncio.sleep(pause)
        self._spawn()

    def _refuse(self, actor: _Actor, error: NodeError) -> None:
        """Place the worker of a node elsewhere, if another node is large enough."""
        nodes = live_nodes(self._cpus, self._gpus)
        self._reason = f"node {nodes.get(error.node, error.node)} {error}"
        _LOGGER.error("%s", self._reason)
        ray.kill(actor.handle)
        self._pool.workers.remove(actor)
        self._refused.add(error.node)
        if nodes.keys() - self._refused:
            self._spawn()
        else:
            self._given_up += 1
        self._changed()

    def _hand_out(self) -> None:
        for actor, job in self._pool.hand_out():
            self._keep(self._generate(actor, job))

    def _keep(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _result(reference: Any) -> Any:  # noqa: ANN401  (whatever the method returns)
    """Return what a call of an actor returns."""
    return await reference
