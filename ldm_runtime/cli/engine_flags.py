"""Flags for the engines to build, for `ldm build-engines` and `ldm-export`."""

import argparse

from ldm_runtime.cli.parsing import image_size
from ldm_runtime.engines.build_specs import TARGETS, BuilderChoice, EngineOptions
from ldm_runtime.engines.profiles import Size, SizeRange


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags but the one for the builder."""
    group = parser.add_argument_group("TensorRT engines")
    for name, text in (
        (
            "min",
            "smallest image, N or WIDTHxHEIGHT pixels (default: 256 below the native size, at "
            "least half of it)",
        ),
        ("opt", "image size they are optimized for (default: the native size)"),
        ("max", "largest image (default: 1.5 times the native size)"),
    ):
        group.add_argument(f"--{name}-size", type=_height_and_width, metavar="SIZE", help=text)
    group.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        help="largest batch of images per call; with guidance the UNet's is twice as large "
        "(default: 4, static: 1)",
    )
    group.add_argument(
        "--static",
        action="store_true",
        help="serve --opt-size in batches of --max-batch with guidance, nothing else",
    )
    group.add_argument(
        "--target",
        type=_targets,
        default=(),
        metavar="SM,...",
        help=f"compute capabilities for TensorRT-RTX, of {','.join(TARGETS)} "
        "(default: sm80 and later; sm75 if this GPU has it)",
    )
    group.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="TensorRT: for every GPU of this compute capability, not only this model",
    )
    group.add_argument(
        "--refittable", action="store_true", help="weights can be replaced without a new build"
    )


def engine_options(args: argparse.Namespace, builder: str) -> EngineOptions:
    """Return the options of the flags; `builder` as typed, such as "tensorrt-rtx"."""
    choices: dict[str, BuilderChoice] = {
        "auto": "auto",
        "none": "none",
        "tensorrt": "tensorrt",
        "tensorrt-rtx": "tensorrt_rtx",
    }
    return EngineOptions(
        builder=choices[builder],
        sizes=SizeRange(
            min_size=args.min_size,
            opt_size=args.opt_size,
            max_size=args.max_size,
            max_batch=args.max_batch,
            static=args.static,
        ),
        targets=args.target,
        hardware_compatible=args.hardware_compatible,
        refittable=args.refittable,
    )


def _height_and_width(text: str) -> Size:
    width, height = image_size(text)
    return height, width


def _targets(text: str) -> tuple[str, ...]:
    return tuple(target.strip() for target in text.split(",") if target.strip())
