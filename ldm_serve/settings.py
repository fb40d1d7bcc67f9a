"""Settings of a server: what it serves, to whom, and how much of it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldm_runtime.backends import BackendName
from ldm_runtime.backends.contract import Precision

#: Names of the executors: worker processes, a thread of this process, actors of a Ray cluster.
ExecutorName = Literal["process", "inline", "ray"]
#: Formats of messages on stderr.
LogFormat = Literal["text", "json"]
#: Bytes of a body that may hold images, and of one that may not.
MAX_IMAGE_BODY_BYTES = 32 * 2**20
MAX_TEXT_BODY_BYTES = 256 * 2**10


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a request and of a queue; a request beyond them is refused before it waits.

    Attributes:
        max_images: Most images of a request.
        max_pixels: Most pixels of an image.
        max_steps: Most steps of an image, and of the schedule of which it makes the last ones.
        max_cost: Most megapixel steps of a request: pixels times steps times images, twice that
            with guidance, by a million.
        max_prompt_characters: Longest prompt.
        max_changing_characters: Most characters of the texts of prompts that change between steps,
            all texts together: a prompt of 5,000 that changes in each of 200 steps.
        max_text_chunks: Most chunks that a text encoder reads for a request, all texts together:
            sixteen times those of the longest prompts that do not change. They are encoded in one
            go, while the other requests of the worker wait.
        max_queue: Most requests that wait.
        max_queue_per_key: Most requests of one key that wait or run.
        requests_per_minute: Requests of one key per minute, in the long run; a key may bring as
            many at once.
        kept_results: Finished jobs that are kept until they are asked for.
        kept_bytes: Most bytes of their images in all.
        kept_seconds: How long they are kept at most.
    """

    max_images: int = 10
    max_pixels: int = 2048 * 2048
    max_steps: int = 200
    max_cost: float = 2000.0
    max_prompt_characters: int = 32_000
    max_changing_characters: int = 1_000_000
    max_text_chunks: int = 512
    max_queue: int = 64
    max_queue_per_key: int = 32
    requests_per_minute: float = 600.0
    kept_results: int = 256
    kept_bytes: int = 256 * 2**20
    kept_seconds: float = 600.0


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How workers open a bundle; the arguments of `Generator` of the same names.

    Attributes:
        backend: Backend.
        precision: Precision; None is the backend's own choice.
        threads: Threads of a worker that compute; None is one per core.
        low_memory: Whether one network at a time is in memory.
        trust_engines: Whether to run TensorRT engines that were built elsewhere.
        max_batch: Most images in one call of the UNet.
        memory_budget_bytes: Most bytes of the weights that a worker holds open, at least one
            model; None has no limit. Least recently used models are closed first.
        adapters: Files of the adapters that requests can name.
        max_adapted: Most models with adapters that a worker holds open.
        live_adapters: Whether adapters are inputs of the networks, and not merged into one more
            model for every choice of them.
    """

    backend: BackendName = "auto"
    precision: Precision | None = None
    threads: int | None = None
    low_memory: bool = False
    trust_engines: bool = False
    max_batch: int = 4
    memory_budget_bytes: int | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    max_adapted: int = 2
    live_adapters: bool = False


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What a server and its workers say on stderr.

    Attributes:
        format: Lines of text, or of JSON.
        level: Lowest level of the messages that are shown, as `logging` counts them.
        own_level: That of this package's own.
        leaves_out_requests: Whether messages about one request, which may quote its prompt, are
            left out.
    """

    format: LogFormat = "text"
    level: int = logging.WARNING
    own_level: int = logging.WARNING
    leaves_out_requests: bool = False


#: Warnings and errors as text, those about requests too.
TEXT_LOGS = LogSettings()


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Where requests are generated, and by how many workers.

    Attributes:
        executor: Name of the executor.
        count: How many workers; the inline executor has one.
        stall_seconds: How long a worker may be silent over a request before it is replaced.
        address: Host and port of the Ray cluster, as in "10.0.0.5:6379".
        gpus: GPUs of its node that a worker of the cluster takes.
        logs: What those in processes of their own say.
    """

    executor: ExecutorName = "process"
    count: int = 1
    stall_seconds: float = 300.0
    address: str | None = None
    gpus: float = 0.0
    logs: LogSettings = TEXT_LOGS


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may call.

    Attributes:
        keys: Secret keys by the names they have in logs and metrics; without any, everyone may.
        hosts: Names in the `Host` header that are answered; empty answers all, which is safe only
            with keys: a page on the web could otherwise rebind its name to this machine.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    hosts: frozenset[str] = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Everything that decides what a server does.

    Attributes:
        bundles: Folder of every model, by the model's name; the first is the default.
        engine: How workers open them.
        limits: Bounds of requests.
        access: Who may call.
        workers: Where requests are generated, and by how many workers.
        drain_seconds: How long requests that have come may go on after the server is told to end.
    """

    bundles: Mapping[str, Path]
    engine: EngineSettings = EngineSettings()
    limits: Limits = Limits()
    access: Access = Access()
    workers: WorkerSettings = WorkerSettings()
    drain_seconds: float = 30.0
