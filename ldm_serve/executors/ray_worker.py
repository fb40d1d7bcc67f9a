"""The worker of a Ray cluster: an actor that generates on the node where Ray has placed it."""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm_runtime.adapters.files import adapter_sha256
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME
from ldm_runtime.version import version
from ldm_serve.executors.inline import InlineExecutor
from ldm_serve.executors.messages import (
    Event,
    Failed,
    Finished,
    Ready,
    Work,
    decode_order,
    encode,
)
from ldm_serve.executors.ray_cluster import this_node
from ldm_serve.logs import show_logs
from ldm_serve.settings import EngineSettings, LogSettings

#: How many jobs that were cancelled are known, for those that come after it.
_KNOWN_CANCELLED = 256


class NodeError(Exception):
    """A node cannot have workers: it lacks the bundle, or has another.

    Attributes:
        node: Identifier of the node.
    """

    def __init__(self, message: str, node: str) -> None:
        super().__init__(message, node)
        self.node = node

    def __str__(self) -> str:
        return str(self.args[0])


class WorkerError(Exception):
    """A worker has ended, or its model cannot be opened."""


@dataclass(frozen=True, kw_only=True)
class NodeBundles:
    """The bundles and adapters that every node must have.

    Attributes:
        folders: Absolute folder of every model.
        manifest_sha256: Hash of each manifest, and so of all files that it lists.
        adapter_sha256: Hash of every adapter, by its absolute path.
        version: Version of this package.
    """

    folders: Mapping[str, Path]
    manifest_sha256: Mapping[str, str]
    version: str
    adapter_sha256: Mapping[Path, str]

    @classmethod
    def of_this_machine(
        cls, bundles: Mapping[str, Path], adapters: Iterable[Path] = ()
    ) -> "NodeBundles":
        """Return what this machine has, by the folder of every model and the files of adapters.

        Raises:
            OSError: A manifest or an adapter cannot be read.
        """
        folders = {name: folder.absolute() for name, folder in bundles.items()}
        hashes = {name: sha256_of(folder / MANIFEST_NAME) for name, folder in folders.items()}
        return cls(
            folders=folders,
            manifest_sha256=hashes,
            version=version(),
            adapter_sha256={path: adapter_sha256(path) for path in adapters},
        )

    def why_not_here(self) -> str | None:
        """Return what this machine lacks to generate the same images, or None."""
        if version() != self.version:
            return f"has ldm-deploy {version()} and not {self.version}; install that"
        for name, folder in self.folders.items():
            try:
                found = sha256_of(folder / MANIFEST_NAME)
            except OSError:
                return f"has no bundle in {folder}; copy it there"
            if found != (expected := self.manifest_sha256[name]):
                return (
                    f"has another bundle in {folder}: the sha256 of its manifest is {found[:12]}… "
                    f"and not {expected[:12]}…; copy the right one there"
                )
        for path, expected in self.adapter_sha256.items():
            if _sha256_or_none(path) != expected:
                return f"has not the adapter {path}, or another one there; copy the right one"
        return None


def _sha256_or_none(path: Path) -> str | None:
    try:
        return adapter_sha256(path)
    except (OSError, ValueError):
        return None


class RayWorker:
    """Generates in a thread of an actor's process; all methods run in its event loop.

    Args:
        bundles: The models; the first is opened by `open`.
        settings: How they are opened.
        logs: What is said on stderr, which Ray keeps on the node.
    """

    def __init__(self, bundles: NodeBundles, settings: EngineSettings, logs: LogSettings) -> None:
        show_logs(logs, "worker")
        self._bundles = bundles
        self._executor = InlineExecutor(bundles.folders, settings, self._stopped)
        self._ends: dict[str, asyncio.Future[Finished | Failed | None]] = {}
        self._cancelled: deque[str] = deque(maxlen=_KNOWN_CANCELLED)
        self._steps: dict[str, bytes] = {}  # of each job the latest that has not been asked for
        self._changed, self._stepped = asyncio.Event(), asyncio.Event()
        self._events = 0

    async def open(self) -> bytes:
        """Open the first model and return `Ready`.

        Raises:
            NodeError: This node has another bundle, or another version of this package.
            WorkerError: The model cannot be opened.
        """
        why_not = await asyncio.to_thread(self._bundles.why_not_here)
        if why_not is not None:
            raise NodeError(why_not, this_node())
        await self._executor.start(self._report, self._changed.set)
        while not (stats := self._executor.stats()).is_ready:
            self._check()
            self._changed.clear()
            await self._changed.wait()
        return encode(Ready(backend=stats.backend, precision=stats.precision, max_begun=stats.room))

    async def generate(self, data: bytes) -> bytes:
        """Generate a job and return its `Finished` or `Failed`; nothing if it was cancelled.

        Args:
            data: A `Work`.

        Raises:
            WorkerError: The worker has ended; the job can be run again elsewhere.
        """
        self._check()
        work = decode_order(data)
        assert isinstance(work, Work), "other orders have methods of their own"
        if work.job in self._cancelled:
            return b""
        end = self._ends[work.job] = asyncio.get_running_loop().create_future()
        self._executor.submit(work)
        event = await end
        self._check()
        return b"" if event is None else encode(event)

    async def cancel(self, job: str) -> None:
        """Stop a job within a step, also one that this call has overtaken.

        Its `generate` returns when it is computed no more, so that a thread that hangs is noticed.
        """
        self._executor.cancel(job)
        self._steps.pop(job, None)
        if job not in self._ends:
            self._cancelled.append(job)

    async def next_steps(self) -> list[bytes]:
        """Wait for steps, and return the latest `Progress` of every job that has done some."""
        await self._stepped.wait()
        self._stepped.clear()
        steps, self._steps = self._steps, {}
        return list(steps.values())

    async def count_events(self) -> int:
        """Return how many steps and ends of jobs there were, which grows while it works."""
        return self._events

    def _stopped(self, job: str) -> None:
        if end := self._ends.pop(job, None):
            end.set_result(None)

    def _report(self, event: Event) -> None:
        self._events += 1
        if isinstance(event, Finished | Failed):
            self._steps.pop(event.job, None)
            self._ends.pop(event.job).set_result(event)
        else:
            self._steps[event.job] = encode(event)
            self._stepped.set()

    def _check(self) -> None:
        stats = self._executor.stats()
        if stats.is_over:
            raise WorkerError(stats.reason)
