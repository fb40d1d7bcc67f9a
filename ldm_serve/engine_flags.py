"""Flags of the workers of `ldm serve` and `ldm batch`, and the settings that they make."""

import argparse

from ldm_runtime.cli.backend_flags import add_backend_arguments
from ldm_runtime.cli.parsing import positive
from ldm_serve.settings import EngineSettings


def add_worker_arguments(group: argparse._ArgumentGroup) -> None:
    """Add `--workers` and `--max-batch`."""
    group.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="worker processes, each with the models in memory (default: 1)",
    )
    group.add_argument(
        "--max-batch",
        type=positive,
        default=4,
        metavar="N",
        help="most images in one call of the UNet (default: 4)",
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how workers open a bundle."""
    engine = parser.add_argument_group("Engine")
    add_backend_arguments(engine)
    engine.add_argument(
        "--low-memory", action="store_true", help="hold one network at a time in memory"
    )
    engine.add_argument(
        "--trust-engines",
        action="store_true",
        help="run TensorRT engines that were not built on this machine, which are code",
    )


def engine_settings(
    args: argparse.Namespace, memory_budget_bytes: int | None = None
) -> EngineSettings:
    """Return the settings of a command line that has the flags of this module."""
    return EngineSettings(
        backend=args.backend,
        precision=args.precision,
        threads=args.threads,
        low_memory=args.low_memory,
        trust_engines=args.trust_engines,
        max_batch=args.max_batch,
        memory_budget_bytes=memory_budget_bytes,
    )
