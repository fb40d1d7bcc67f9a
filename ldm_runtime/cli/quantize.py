"""`ldm quantize`: graphs in 8 bits added to a bundle, with what they cost its images."""

import argparse
import json
from dataclasses import asdict
from math import inf
from pathlib import Path

from ldm_runtime.cli.backend_flags import add_threads_argument, backend_name
from ldm_runtime.cli.messages import reporting
from ldm_runtime.cli.parsing import positive
from ldm_runtime.cli.standard_input import decoded, place_of, read_data
from ldm_runtime.errors import RequestError


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ldm quantize`."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts like those that the model is to get, one per line, or - for standard input "
        "(default: those of the golden requests)",
    )
    parser.add_argument(
        "--images",
        type=positive,
        default=4,
        metavar="N",
        help="images in which activations are measured (default: %(default)s)",
    )
    parser.add_argument(
        "--compared",
        type=positive,
        default=2,
        metavar="N",
        help="images that are compared, in addition to the golden ones (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="steps of each image but the golden ones (default: those of the model)",
    )
    parser.add_argument(
        "--min-psnr",
        type=_decibels,
        default=25.0,
        metavar="DB",
        help="least PSNR of any compared image to the one in fp32, for which layers are left in "
        "higher precision (default: %(default)g)",
    )
    parser.add_argument(
        *("-b", "--backend"),
        type=backend_name,
        default="auto",
        metavar="NAME",
        help="openvino or onnxruntime, whose images are compared with those of onnxruntime in fp32 "
        "(default: auto, the faster that can run here)",
    )
    add_threads_argument(parser)


def quantize(args: argparse.Namespace) -> int:
    """Run `ldm quantize`."""
    from ldm_runtime.quantization.quantize import QuantizationOptions, quantize_bundle
    from ldm_runtime.quantization.requests import SampleOptions

    options = QuantizationOptions(
        backend=args.backend,
        threads=args.threads,
        samples=SampleOptions(
            measured=args.images,
            compared=args.compared,
            prompts=() if args.prompts is None else _prompts(args.prompts),
            steps=args.steps,
        ),
        least_psnr=args.min_psnr,
    )
    with reporting(args) as progress:
        manifest = quantize_bundle(args.bundle, options, progress=progress)
    record = manifest.quantization
    assert record is not None, "it was written just now"
    if args.json:
        print(json.dumps({"bundle": str(args.bundle), **asdict(record)}, indent=1))
    else:
        kept = f", {len(record.kept)} left out" if record.kept else ""
        lowest, mean = min(record.psnr), sum(record.psnr) / len(record.psnr)
        print(
            f"{args.bundle}: {record.layers} layers in 8 bits{kept}; {len(record.psnr)} images "
            f"have a PSNR of {lowest:.1f} dB or more to fp32, {mean:.1f} dB on average"
        )
    return 0


def _decibels(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < inf:
        raise argparse.ArgumentTypeError(f"must be a number of decibels from 0 on, got {text!r}")
    return value


def _prompts(name: str) -> tuple[str, ...]:
    """Read prompts, one per line; empty lines are none."""
    place = place_of(name)
    lines = decoded(read_data(name, "prompts"), "prompts", place).splitlines()
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise RequestError("prompts", f"{place} has no prompt; write one per line")
    return found
