"""`ldm triton`: a bundle in a model repository of NVIDIA Triton."""

import argparse
import json
from pathlib import Path

from ldm_runtime.cli.backend_flags import add_backend_arguments
from ldm_runtime.cli.parsing import positive


def add_triton_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ldm triton`."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("model_repository"),
        metavar="FOLDER",
        help="the model repository, which may have other models (default: model_repository)",
    )
    parser.add_argument("--name", help="name of the model (default: that of the bundle's folder)")
    parser.add_argument(
        "--kind", choices=("gpu", "cpu"), default="gpu", help="device of instances (default: gpu)"
    )
    parser.add_argument(
        "--instances",
        type=positive,
        default=1,
        metavar="N",
        help="instances on every GPU, or in all on CPUs (default: 1)",
    )
    parser.add_argument(
        "--max-batch",
        type=positive,
        default=4,
        metavar="N",
        help="most images in one call of the UNet (default: 4)",
    )
    parser.add_argument(
        "--networks",
        action="store_true",
        help="add every network as a model of the ONNX Runtime backend",
    )
    parser.add_argument(
        "--replace", action="store_true", help="replace models of the same names, if there are any"
    )
    engine = parser.add_argument_group("Engine")
    add_backend_arguments(engine)
    engine.add_argument(
        "--trust-engines",
        action="store_true",
        help="let the model run TensorRT engines that were not built where it runs, which are code",
    )


def triton(args: argparse.Namespace) -> int:
    """Run `ldm triton`."""
    from ldm_runtime.triton.model_config import Instances
    from ldm_runtime.triton.repository import TritonOptions, add_to_repository

    given = {
        "backend": args.backend,
        "precision": args.precision,
        "threads": args.threads,
        "trust_engines": "true" if args.trust_engines else None,
    }
    options = TritonOptions(
        name=args.name,
        instances=Instances(kind=args.kind, count=args.instances),
        max_batch=args.max_batch,
        networks=args.networks,
        generator={name: str(value) for name, value in given.items() if value is not None},
        replace=args.replace,
    )
    models = [str(each) for each in add_to_repository(args.bundle, args.out, options)]
    print(json.dumps({"models": models}) if args.json else "\n".join(models))
    return 0
