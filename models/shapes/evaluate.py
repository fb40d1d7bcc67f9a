"""Measure a bundle of the shapes model: generate held-out captions, read the images back, count.

    python models/shapes/evaluate.py --bundle engines/        # 200 captions
    python models/shapes/evaluate.py --detector               # the ruler itself, on clean renders
    python models/shapes/evaluate.py --sweep --help           # samplers and steps, docs/quality.md

Prints a table and one JSON line (`--json`: the line alone).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ldm_runtime import Generator
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME
from ldm_runtime.errors import LdmError
from models.shapes.catalog.variants import VARIANTS
from models.shapes.data import scenes
from models.shapes.evaluation.detector_check import (
    DETECTOR_GOAL,
    DETECTOR_RENDERS,
    evaluate_detector,
)
from models.shapes.evaluation.held_out import (
    SEED,
    evaluate_bundle,
    held_out_scenes,
    tally_of_holes,
)
from models.shapes.evaluation.scoring import table


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("engines"))
    parser.add_argument(
        "--model", choices=("shapes", *VARIANTS), default="shapes", help="(default: %(default)s)"
    )
    parser.add_argument("--captions", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--sampler", help="default: the bundle's")
    parser.add_argument("--steps", type=int, help="default: the bundle's")
    parser.add_argument("--guidance-scale", type=float, help="default: the bundle's")
    parser.add_argument(
        "--short-captions", action="store_true", help='generate from captions like "a red circle"'
    )
    parser.add_argument("--threads", type=int, help="threads that compute (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--results", type=Path, help="file to append the JSON line to")
    parser.add_argument("--detector", action="store_true", help="test the detector, no bundle")
    parser.add_argument(
        "--sweep", action="store_true", help="compare samplers and steps; see --sweep --help"
    )
    parser.add_argument(
        "--report", action="store_true", help="write docs/quality.md from the sweep's results"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation: 0 on success, 1 for an error or a detector below its goal."""
    arguments = sys.argv[1:] if argv is None else argv
    if {"--sweep", "--report"} & set(arguments):
        from models.shapes import sweep

        return sweep.main(arguments)
    args = build_parser().parse_args(arguments)
    if args.captions < 1:
        print(f"error: --captions must be at least 1, got {args.captions}", file=sys.stderr)
        return 2
    if args.detector:
        return _run_detector()
    try:
        return _run_bundle(args)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run_bundle(args: argparse.Namespace) -> int:
    settings = {
        "sampler": args.sampler,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
    }
    wording = scenes.SHORT if args.short_captions else scenes.FULL
    with Generator(args.bundle, threads=args.threads) as generator:
        wanted = held_out_scenes(args.captions, SEED)
        tally, seconds = evaluate_bundle(generator, wanted, settings, wording)
        spec = generator.spec
    if not args.json:
        print(table(tally))
        print(f"{seconds:.2f} s per image")
    from measuring.rows import commit, machine

    report = {
        "model": args.model,
        "bundle": str(args.bundle),
        "bundle_sha256": sha256_of(args.bundle / MANIFEST_NAME),
        "commit": commit(),
        "device": machine(),
        "prediction_type": spec.prediction_type,
        "last_alpha_cumprod": spec.alphas_cumprod[-1],
        "settings": settings | ({"captions": "short"} if args.short_captions else {}),
        "shares": {
            name: share if share is None else round(share, 4)
            for name, share in tally.shares().items()
        },
        "counts": asdict(tally),
        "counts_of_holes": (
            asdict(tally_of_holes(wanted, wording)) if spec.task == "text-inpainting" else None
        ),
        "seconds_per_image": round(seconds, 4),
    }
    print(json.dumps(report))
    if args.results is not None:
        with args.results.open("a") as file:
            file.write(json.dumps(report) + "\n")
    return 0


def _run_detector() -> int:
    report = {
        "clean": evaluate_detector(DETECTOR_RENDERS, SEED),
        "noisy": evaluate_detector(DETECTOR_RENDERS, SEED, noise=12.0),
        "blurred_and_noisy": evaluate_detector(DETECTOR_RENDERS, SEED, noise=12.0, blurs=1),
    }
    print(json.dumps({"detector": report}))
    return 0 if report["clean"]["right"] >= DETECTOR_GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
