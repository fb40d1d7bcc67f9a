"""`ldm batch`: the images of a file of requests, of which no run is made twice."""

import argparse
import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from ldm_runtime.cli.messages import reporting, say
from ldm_runtime.cli.parsing import Parser, add_json_flag
from ldm_runtime.errors import RequestError
from ldm_serve.engine_flags import add_engine_arguments, add_worker_arguments, engine_settings
from ldm_serve.executors.contract import Executor
from ldm_serve.settings import EngineSettings

#: Name that workers have for the model.
_MODEL = "model"


def add_batch_command(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `ldm batch` to the commands of `ldm`; an entry point of `ldm_runtime.commands`."""
    parser = commands.add_parser(
        "batch", help="generate the images of many requests; run it again to go on"
    )
    parser.add_argument(
        "requests",
        type=Path,
        metavar="FILE",
        help="a request per line, as `ldm generate --requests` reads them",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="FOLDER",
        help="folder of the images and of results.jsonl (default: out)",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        default=Path("engines"),
        metavar="FOLDER",
        help="folder made by ldm-export (default: engines)",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="try images again that failed in an earlier run",
    )
    work = parser.add_argument_group("Work")
    work.add_argument(
        "--executor",
        choices=tuple(_EXECUTORS),
        default="process",
        help="where images are generated: worker processes, this one, or the nodes of a Ray "
        "cluster (default: process)",
    )
    add_worker_arguments(work)
    cluster = parser.add_argument_group("Ray")
    cluster.add_argument(
        "--address", metavar="HOST:PORT", help="running cluster, of which this machine is a node"
    )
    cluster.add_argument(
        "--worker-gpus",
        type=_gpus,
        default=0.0,
        metavar="N",
        help="GPUs that a worker takes of its node, which may be a part of one (default: 0)",
    )
    add_engine_arguments(parser)
    add_json_flag(parser, "print the counts as JSON")
    parser.set_defaults(run=batch)


def batch(args: argparse.Namespace) -> int:
    """Run `ldm batch`.

    Raises:
        RequestError: A request or a flag is wrong, or a cluster has no token; nothing is generated
            then.
        BundleError: The bundle is not one, or incomplete.
        BatchError: The folder cannot be written to, or no worker stays alive.
    """
    # Only here, so that other commands start without them.
    from ldm_serve.batch.folder import RESULTS_NAME, BatchFolder
    from ldm_serve.batch.run import BatchRun
    from ldm_serve.batch.units import BatchModel, RequestFile

    if args.address is not None and args.executor != "ray":
        raise RequestError("address", f"is of --executor ray, not of {args.executor}")
    model = BatchModel.of_bundle(args.bundle)
    with BatchFolder(args.out) as folder:
        units = RequestFile(args.requests, model, folder.seed)
        run = BatchRun(units, folder, model=_MODEL, retry_failed=args.retry_failed)
        missing = run.survey()
        if missing:
            with reporting(args) as progress:
                executor = _EXECUTORS[args.executor](args, engine_settings(args))
                asyncio.run(run.generate(executor, missing, progress))
    counts, results = run.counts, args.out / RESULTS_NAME
    print(json.dumps({**asdict(counts), "results": str(results)}) if args.json else results)
    if counts.failed:
        say(
            f"error: {counts.failed} of {counts.generated + counts.found + counts.failed} images "
            f"failed, as {results} says; --retry-failed tries them again"
        )
    return 1 if counts.failed else 0


def _gpus(text: str) -> float:
    """Return a number of GPUs as Ray takes it."""
    with suppress(ValueError):
        gpus = float(text)
        if 0 <= gpus <= 1 or (gpus > 0 and gpus.is_integer()):
            return gpus
    raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor a part of 1")


def _inline(args: argparse.Namespace, settings: EngineSettings) -> Executor:
    from ldm_serve.executors.inline import InlineExecutor

    return InlineExecutor({_MODEL: args.bundle}, settings)


def _process(args: argparse.Namespace, settings: EngineSettings) -> Executor:
    from ldm_serve.executors.process import ProcessExecutor

    return ProcessExecutor({_MODEL: args.bundle}, settings, workers=args.workers)


def _ray(args: argparse.Namespace, settings: EngineSettings) -> Executor:
    if args.address is None:
        raise RequestError(
            "address", "--executor ray needs --address HOST:PORT, the head of a running cluster"
        )
    from ldm_serve.executors.ray import RayExecutor

    return RayExecutor(
        {_MODEL: args.bundle},
        settings,
        address=args.address,
        workers=args.workers,
        gpus=args.worker_gpus,
    )


_EXECUTORS: Mapping[str, Callable[[argparse.Namespace, EngineSettings], Executor]] = (
    MappingProxyType({"process": _process, "inline": _inline, "ray": _ray})
)
