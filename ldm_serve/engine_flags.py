"""Flags of the workers of `ldm serve` and `ldm batch`, and the settings that they make."""

import argparse
import logging
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType

from ldm_runtime.backends import BACKEND_ALIASES, get_backend
from ldm_runtime.cli.backend_flags import add_backend_arguments
from ldm_runtime.cli.parsing import positive
from ldm_runtime.errors import BackendError, RequestError
from ldm_serve.adapters import adapter_paths
from ldm_serve.settings import EngineSettings, ExecutorName, LogSettings, WorkerSettings

_PLACES: Mapping[ExecutorName, str] = MappingProxyType(
    {"process": "worker processes", "inline": "this one", "ray": "the nodes of a Ray cluster"}
)


def add_worker_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that say where and by how many workers images are generated.

    Args:
        parser: The parser of a command.

    Returns:
        The group of those that have nothing to do with Ray.
    """
    work = parser.add_argument_group("Work")
    *places, last = _PLACES.values()
    work.add_argument(
        "--executor",
        choices=tuple(_PLACES),
        default=WorkerSettings.executor,
        help=f"where images are generated: {', '.join(places)}, or {last} "
        f"(default: {WorkerSettings.executor})",
    )
    work.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="worker processes, each with the models in memory (default: 1)",
    )
    work.add_argument(
        "--max-batch",
        type=positive,
        default=4,
        metavar="N",
        help="most images in one call of the UNet (default: 4)",
    )
    work.add_argument(
        "--stall-seconds",
        type=amount,
        default=WorkerSettings.stall_seconds,
        metavar="S",
        help="how long a worker may be silent before it is replaced "
        f"(default: {WorkerSettings.stall_seconds:g})",
    )
    _add_cluster_arguments(parser.add_argument_group("Ray"))
    return work


def amount(text: str) -> float:
    """Read a number above 0, as the type of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how workers open a bundle."""
    engine = parser.add_argument_group("Engine")
    add_backend_arguments(
        engine,
        default_threads="in each worker, one per physical core that it may use; on Ray, 1",
    )
    engine.add_argument(
        "--low-memory", action="store_true", help="hold one network at a time in memory"
    )
    engine.add_argument(
        "--trust-engines",
        action="store_true",
        help="run TensorRT engines that were not built on this machine, which are code",
    )
    _add_adapter_arguments(parser.add_argument_group("Adapters"))


def worker_settings(args: argparse.Namespace) -> WorkerSettings:
    """Return the settings of a command line that has the flags of `add_worker_arguments`.

    Raises:
        RequestError: Flags of Ray lack each other, or this process is to be several workers.
    """
    if args.executor == "inline" and args.workers > 1:
        raise RequestError(
            "workers", f"is {args.workers}, but --executor inline has one; leave one of them out"
        )
    if args.executor == "ray" and args.address is None:
        raise RequestError(
            "address", "--executor ray needs --address HOST:PORT, the head of a running cluster"
        )
    for name in ("address", "worker_gpus"):
        if getattr(args, name) and args.executor != "ray":
            raise RequestError(name, f"is of --executor ray, not of {args.executor}")
    level = logging.ERROR if args.quiet else logging.WARNING
    return WorkerSettings(
        executor=args.executor,
        count=args.workers,
        stall_seconds=args.stall_seconds,
        address=args.address,
        gpus=args.worker_gpus,
        logs=LogSettings(level=level, own_level=level),
    )


def engine_settings(
    args: argparse.Namespace, memory_budget_bytes: int | None = None
) -> EngineSettings:
    """Return the settings of a command line that has the flags of this module.

    Raises:
        RequestError: An adapter has no name of its own, or the backend or the precision takes none.
    """
    if args.adapter and args.precision == "int8":
        raise RequestError(
            "adapter",
            "changes weights, whose 8 bits were measured without it; leave out --precision int8",
        )
    if args.adapter:
        _check_takes_adapters(args.backend, live=args.live_adapters)
    return EngineSettings(
        backend=args.backend,
        precision=args.precision,
        threads=args.threads,
        low_memory=args.low_memory,
        trust_engines=args.trust_engines,
        max_batch=args.max_batch,
        memory_budget_bytes=memory_budget_bytes,
        adapters=adapter_paths(args.adapter),
        max_adapted=args.max_adapted,
        live_adapters=args.live_adapters,
    )


def _check_takes_adapters(backend: str, *, live: bool) -> None:
    """Check that a backend can run with adapters; one that is not on this machine is passed over.

    Raises:
        RequestError: It cannot.
    """
    name = BACKEND_ALIASES.get(backend, backend)
    with suppress(BackendError):
        abilities = None if name == "auto" else get_backend(name).ABILITIES
        if abilities is not None and not abilities.takes_weights:
            raise RequestError(
                "adapter", f"{name} has its weights built in and takes none; use another backend"
            )
        if abilities is not None and live and not abilities.takes_branches:
            raise RequestError(
                "live_adapters", f"{name} runs graphs as they are; leave out --live-adapters"
            )


def _add_adapter_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--adapter",
        "--lora",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a LoRA or a relative of it that requests may name; without a name it is called like "
        "its file; may be repeated",
    )
    group.add_argument(
        "--max-adapted",
        type=positive,
        default=2,
        metavar="N",
        help="most models with adapters, each with its scales, that a worker has in memory "
        "(default: 2)",
    )
    group.add_argument(
        "--live-adapters",
        action="store_true",
        help="do not merge adapters, but compute them next to the weights, so that requests with "
        "other adapters share calls; LoRAs of linear layers and 1x1 convolutions only, at most two "
        "at once, on CPUs",
    )


def _add_cluster_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--address", metavar="HOST:PORT", help="running cluster, of which this machine is a node"
    )
    group.add_argument(
        "--worker-gpus",
        type=_gpus,
        default=0.0,
        metavar="N",
        help="GPUs that a worker takes of its node, which may be a part of one (default: 0)",
    )


def _gpus(text: str) -> float:
    """Return a number of GPUs as Ray takes it."""
    with suppress(ValueError):
        gpus = float(text)
        if 0 <= gpus <= 1 or (gpus > 0 and gpus.is_integer()):
            return gpus
    raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor a part of 1")
