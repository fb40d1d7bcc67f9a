"""`ldm build-engines`: TensorRT engines built into a bundle."""

import argparse
import json
from pathlib import Path

from ldm_runtime.cli.engine_flags import add_engine_arguments, engine_options
from ldm_runtime.cli.messages import reporting


def add_builder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ldm build-engines`."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--builder",
        choices=("auto", "tensorrt", "tensorrt-rtx"),
        default="auto",
        help="default: TensorRT if it and a GPU are available, else TensorRT-RTX",
    )
    add_engine_arguments(parser)


def build_engines(args: argparse.Namespace) -> int:
    """Run `ldm build-engines`."""
    from ldm_runtime.engines.records import load_engine_records
    from ldm_runtime.engines.store import add_engines

    options = engine_options(args, args.builder)
    with reporting(args) as progress:
        manifest = add_engines(args.bundle, options, progress=progress)
    if args.json:
        records = load_engine_records(args.bundle, manifest)
        names = ("component", "builder", "builder_version", "targets", "size_bytes", "seconds")
        engines = [{name: getattr(record, name) for name in names} for record in records]
        print(json.dumps({"bundle": str(args.bundle), "engines": engines}))
    else:
        print(args.bundle)
    return 0
