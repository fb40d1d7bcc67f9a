"""`ldm batch`: the images of a file of requests, of which no run is made twice."""

import argparse
import asyncio
import json
from dataclasses import asdict
from pathlib import Path

from ldm_runtime.cli.messages import reporting, say
from ldm_runtime.cli.parsing import Parser, add_json_flag
from ldm_serve.engine_flags import (
    add_engine_arguments,
    add_worker_arguments,
    engine_settings,
    worker_settings,
)

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
    add_worker_arguments(parser)
    add_engine_arguments(parser)
    add_json_flag(parser, "print the counts as JSON")
    parser.set_defaults(run=batch, repeats_messages=True)


def batch(args: argparse.Namespace) -> int:
    """Run `ldm batch`.

    Raises:
        RequestError: A request or a flag is wrong, or a cluster has no token; nothing is generated
            then.
        BundleError: The bundle is not one, or incomplete.
        BatchError: The folder cannot be written to, or no worker stays alive.
        ClusterError: No Ray cluster answers at the address.
    """
    # Only here, so that other commands start without them.
    from ldm_serve.batch.folder import RESULTS_NAME, BatchFolder
    from ldm_serve.batch.run import BatchRun
    from ldm_serve.batch.units import BatchModel, RequestFile
    from ldm_serve.executors.making import make_executor

    workers, settings = worker_settings(args), engine_settings(args)
    model = BatchModel.of_bundle(
        args.bundle, settings.adapters, live_adapters=settings.live_adapters
    )
    with BatchFolder(args.out, args.requests.name) as folder:
        units = RequestFile(args.requests, model, folder.seed)
        run = BatchRun(units, folder, model=_MODEL, retry_failed=args.retry_failed)
        missing = run.survey()
        if missing:
            with reporting(args) as progress:
                executor = make_executor(
                    {_MODEL: args.bundle}, settings, workers, reports_steps=False
                )
                asyncio.run(run.generate(executor, missing, progress))
    counts, results = run.counts, args.out / RESULTS_NAME
    print(json.dumps({**asdict(counts), "results": str(results)}) if args.json else results)
    if counts.failed:
        say(
            f"error: {counts.failed} of {counts.generated + counts.found + counts.failed} images "
            f"failed, as {results} says; --retry-failed tries them again"
        )
    return 1 if counts.failed else 0
